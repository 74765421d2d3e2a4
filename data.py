"""Pictures with captions, from three kinds of place, as batches that are a function of (seed, step) alone.

A source is the embedded `scenes`, a folder of images with KEY.txt (or KEY.json) beside them, or WebDataset tars as
img2dataset writes them. Which samples a step reads, how each is cropped, and which stands in for a broken one follow
from the seed and the position in the run: not from threads, devices, hosts, or what ran before. A broken sample is
never used and never stops a run: the next one takes its place, and it is counted and listed with the reason.

Letters: B images, R pixels a side, T text positions.

    python data.py [WHERE [CAPTION]]        writes contact.png: what training sees, crops and captions
"""
import glob
import io
import itertools
import json
import os
import queue
import re
import tarfile
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageEnhance, ImageOps

import scenes
from decoder import EOS
from tokenizer import Tokenizer

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
UPRIGHT = dict(enumerate(map(Image.Transpose, (0, 3, 1, 5, 4, 6, 2)), 2))  # what undoes a camera's orientation, 2 to 8
warnings.simplefilter("error", Image.DecompressionBombWarning)  # above 89 million pixels a picture is a broken sample


class DataError(Exception):
    """The data cannot be used at all; the message says what to do about it."""


class BadSample(Exception):
    """One sample cannot be used; the message says why."""


# -------------------------------------------------------------------------------------------------------------- sources
class Scenes:
    """The embedded pictures (scenes.py). A training split has no end, so no picture comes twice."""

    def __init__(self, seed: int, split: str, count: int | None = None):
        self.seed, self.split, self.count, self.skipped = seed, split, count, {}

    def __len__(self) -> int:
        return self.count or 1 << 40

    def fingerprint(self) -> str:
        return "scenes"

    def name(self, i: int) -> str:
        return f"scene {self.split} {i}"

    def record(self, i: int) -> dict:
        return scenes.record(self.seed, self.split, i)

    def caption(self, i: int) -> str:
        return scenes.caption(self.record(i))

    def picture(self, i: int) -> Image.Image:
        return scenes.paint(self.record(i))


class Files:
    """Samples that lie in files: each has an image and the text that holds its caption, both a (file, offset, size).
    `field` is "txt" for the KEY.txt, or the name of a field in the KEY.json."""

    def __init__(self, where: str, field: str):
        self.where, self.field, self.skipped = where, field, {}
        self.paths: list[str] = []
        self.rows: Any = []                                    # (image file, offset, size, text file, offset, size)

    def close(self) -> "Files":
        """After indexing: settle the table, and refuse a source that holds nothing to train on."""
        self.rows = np.array(self.rows, np.int64).reshape(-1, 6)
        if not len(self.rows):
            found = "; ".join(f"{n} {why}" for why, n in self.skipped.items()) or "no images at all"
            raise DataError(f"no captioned image in {self.where}: {found}. Each KEY.jpg (or .png, .webp …) needs "
                            + ("a KEY.txt beside it, or a KEY.json and --caption FIELD" if self.field == "txt" else
                               f"a KEY.json with the field {self.field!r} beside it"))
        problems = []
        for i in range(min(len(self), 200)):                   # a wrong --caption shows in the first samples or never
            try:
                self.caption(i)
                return self
            except BadSample as problem:
                problems.append(str(problem))
        raise DataError(f"no caption can be read from the first {len(problems)} samples of {self.where}: {problems[0]}")

    def skip(self, why: str, count: int = 1) -> None:
        if count > 0:
            self.skipped[why] = self.skipped.get(why, 0) + count

    def note(self, found: dict[str, dict[str, tuple]], key: str, suffix: str, place: tuple) -> None:
        """found: {key: {suffix: (file, offset, size)}} of one shard or folder. Of equal names the last counts, as when
        a tar is unpacked."""
        parts = found.setdefault(key, {})
        self.skip("replaced by a later file of the same name", suffix in parts)
        parts[suffix] = place

    def pair(self, found: dict[str, dict[str, tuple]]) -> None:
        """Adds the complete samples of one shard or folder."""
        text = "txt" if self.field == "txt" else "json"
        for parts in found.values():
            images = [parts[s] for s in IMAGES if s in parts]
            self.skip("beside another image of the same name", len(images) - 1)
            if images and text in parts:
                self.rows.append((*images[0], *parts[text]))
            elif images:
                self.skip(f"without a .{text}")
            elif text in parts:
                self.skip("without an image")

    def __len__(self) -> int:
        return len(self.rows)

    def fingerprint(self) -> str:
        """Changes when the data set does: to continue a run on other data would be another run."""
        crc = zlib.crc32(np.ascontiguousarray(self.rows[:, [1, 2, 4, 5]]))
        for file, _, size in self.rows[:, :3]:
            if size < 0:  # in a folder the names tell, where in tars the sizes do
                crc = zlib.crc32(os.fsencode(os.path.relpath(self.paths[file], self.where)), crc)
        return f"{len(self)} samples ({crc:08x})"

    def name(self, i: int) -> str:
        file, offset, _ = self.rows[i][:3]
        return printable(self.paths[file]) + (f" at byte {offset}" if offset else "")

    def read(self, file: int, offset: int, size: int) -> bytes:
        """size -1 means the whole file."""
        try:
            with open(self.paths[file], "rb") as f:
                f.seek(offset)
                data = f.read(size)
        except OSError as problem:
            raise BadSample(f"cannot be read ({problem.strerror})") from None
        if len(data) < size:
            raise BadSample("is cut off")
        return data

    def caption(self, i: int) -> str:
        data = self.read(*self.rows[i][3:])
        try:
            text = data.decode("utf-8-sig")
            if self.field != "txt":
                fields = json.loads(text)
                if not isinstance(fields, dict) or self.field not in fields:
                    has = ", ".join(fields) if isinstance(fields, dict) else "no fields"
                    raise BadSample(f"json has no field {self.field!r} (it has {has[:200]}); name one with --caption")
                text = fields[self.field]
        except UnicodeDecodeError:
            raise BadSample("caption is not UTF-8 text") from None
        except (ValueError, RecursionError):  # ValueError is also what a number of thousands of digits gives
            raise BadSample("json cannot be parsed") from None
        if not isinstance(text, str) or not text.strip():
            raise BadSample("caption is empty")
        return text

    def picture(self, i: int) -> Image.Image:
        """Opened, not yet decoded."""
        data = self.read(*self.rows[i][:3])
        try:
            return Image.open(io.BytesIO(data))
        except Exception as problem:  # Pillow's plugins raise what they like on broken bytes
            raise BadSample(f"image cannot be opened ({type(problem).__name__})") from None


def printable(path: str) -> str:
    """A path as text: on disk it may be bytes that no terminal takes."""
    return os.fsencode(path).decode("utf-8", "replace")


def folder(where: str, field: str) -> Files:
    """All images below a folder, in the order of their names."""
    source = Files(where, field)
    for base, folders, names in os.walk(where, onerror=lambda _: source.skip("folders that cannot be read")):
        folders.sort()
        found: dict[str, dict] = {}
        for name in sorted(names):
            key, dot, suffix = name.rpartition(".")
            if dot and key and suffix.lower() in (*IMAGES, "txt", "json"):
                source.paths.append(os.path.join(base, name))
                source.note(found, key, suffix.lower(), (len(source.paths) - 1, 0, -1))
        source.pair(found)
    return source.close()


def shards(where: str, field: str) -> Files:
    """WebDataset tars: a glob, or a brace list such as data/{00000..00011}.tar."""
    named = [where] if os.path.exists(where) else expand(where)  # a name may itself hold brackets
    paths = sorted({p for one in named for p in ([one] if os.path.exists(one) or not glob.has_magic(one) else glob.glob(one))})
    if not paths:
        raise DataError(f"no file matches {where}")
    source = Files(where, field)
    for path in paths:
        try:
            size = os.path.getsize(path)
            tar = tarfile.open(path, "r:")
        except (OSError, tarfile.TarError) as problem:
            raise DataError(f"{path} cannot be read as an uncompressed tar: {getattr(problem, 'strerror', None) or problem}") from None
        source.paths.append(path)
        found: dict[str, dict] = {}
        end = 0
        with tar:
            try:
                for member in tar:
                    key, _, suffix = member.name.rpartition(".")
                    end = member.offset_data + (member.size + 511) // 512 * 512
                    if member.offset_data + member.size > size:
                        source.skip("cut off by the end of a shard")
                    elif member.isfile():
                        source.note(found, key, suffix.lower(), (len(source.paths) - 1, member.offset_data, member.size))
            except (tarfile.TarError, OSError, ValueError):
                pass  # what came before is good; the mark below is then missing
        if not ends_well(path, end):
            source.skip(f"shard {printable(path)} has no end mark: it was cut off or damaged, and what could be read is used")
        source.pair(found)
    return source.close()


def ends_well(path: str, end: int) -> bool:
    """Whether a tar's end mark (a block of zeros) stands after its last member: tarfile stops silently without it."""
    with open(path, "rb") as f:
        f.seek(end)
        return f.read(512) == bytes(512)


def expand(pattern: str) -> list[str]:
    """Braces as shells have them: a{1,2}b and a{00..11}b, left to right."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if not found:
        return [pattern]
    inside = found[1]
    if span := re.fullmatch(r"(\d+)\.\.(\d+)", inside):
        if len(span[2]) > 7:
            raise DataError(f"{pattern} lists too many files: give a range below ten million")
        options = [f"{n:0{len(span[1])}d}" for n in range(int(span[1]), int(span[2]) + 1)]
    else:
        options = inside.split(",")
    return [whole for o in options for whole in expand(pattern[:found.start()] + o + pattern[found.end():])]


class Part:
    """Some samples of a source: what is held out, or what remains."""

    def __init__(self, source: Files, indices: np.ndarray):
        self.source, self.indices, self.skipped = source, indices, source.skipped

    def __len__(self) -> int:
        return len(self.indices)

    def fingerprint(self) -> str:
        return f"{len(self)} of {self.source.fingerprint()}"

    def __getattr__(self, name: str) -> Callable:  # name, caption, picture: of the i-th of these samples
        return lambda i: getattr(self.source, name)(int(self.indices[i]))


def open_source(where: str, field: str = "txt", seed: int = 0, split: str = "train", count: int | None = None) -> Any:
    """`scenes`, a folder, or tars. DataError if there is nothing there to train on."""
    if where == "scenes":
        return Scenes(seed, split, count)
    if os.path.isdir(where):
        return folder(where, field)
    if where.endswith(".tar") or glob.has_magic(where) or "{" in where:
        return shards(where, field)
    raise DataError(f"{where} is no data: give scenes, a folder of images with captions, or tars (a glob or a {{00000..00011}} list)"
                    + ("" if os.path.exists(where) else "; nothing of that name exists"))


def hold_out(source: Files, count: int) -> tuple[Part, Part]:
    """(train, held-out): a fixed draw of `count` samples, a tenth at most, for a data set without one of its own."""
    if len(source) < 2:
        raise DataError(f"{source.where} holds one sample: give at least two, or held-out pictures with --val")
    drawn = np.random.default_rng(0).permutation(len(source))
    cut = max(1, min(count, len(source) // 10))
    return Part(source, np.sort(drawn[cut:])), Part(source, np.sort(drawn[:cut]))


# -------------------------------------------------------------------------------------------------------------- picture
class Augment(NamedTuple):
    """What training does to a picture; the held-out ones are only resized."""
    crop: float = 0.4    # least area of the random-resized crop; 1 for none
    flip: bool = False   # off: a mirrored picture makes "left of" a lie, and letters unreadable
    jitter: float = 0.0  # brightness, contrast and saturation by a factor of 1 +- this
    gray: float = 0.0    # chance of a picture without colour


def crop_box(width: int, height: int, least: float, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """A random-resized crop: area in least..1 of the picture, aspect 3/4..4/3; the whole picture when none fits."""
    for _ in range(10):
        area, aspect = width * height * rng.uniform(least, 1), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = float(np.sqrt(area * aspect)), float(np.sqrt(area / aspect))
        if w <= width and h <= height:
            x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
            return x, y, x + w, y + h
    return 0.0, 0.0, float(width), float(height)


def to_pixels(image: Image.Image, resolution: int, augment: Augment | None = None, rng: Any = None) -> np.ndarray:
    """A picture of any mode and size to (R,R,3) uint8: (crop,) bilinear antialiased resize of the whole to a square.
    Transparency lies on white, an animation gives its first frame, a camera's rotation is applied. BadSample if it
    cannot be decoded."""
    if image.mode in ("I", "F"):
        raise BadSample("image has 32-bit pixels, and which of them is white is not known")
    try:
        width, height = image.size
        box = crop_box(width, height, augment.crop, rng) if augment and augment.crop < 1 else (0, 0, width, height)
        need = (resolution * width / max(box[2] - box[0], 1), resolution * height / max(box[3] - box[1], 1))
        if drafted := image.draft("RGB", (int(need[0]) + 1, int(need[1]) + 1)):  # a JPEG decodes at 1/2, 1/4 or 1/8 when that suffices
            inside = drafted[1][2:]  # 1003 / 8 pixels show the picture, where 126 are decoded: the last is in part beyond it
            box = [b * new / old for b, new, old in zip(box, inside * 2, (width, height) * 2)]
        image.load()
        turned = image.getexif().get(ExifTags.Base.Orientation)  # now, for not every conversion below keeps it
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB").resize((resolution, resolution), Image.Resampling.BILINEAR, box)
        if turned in UPRIGHT:
            image = image.transpose(UPRIGHT[turned])
        if augment:
            if augment.flip and rng.random() < 0.5:
                image = ImageOps.mirror(image)
            if augment.jitter:
                for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
                    image = enhance(image).enhance(rng.uniform(max(0, 1 - augment.jitter), 1 + augment.jitter))
            if augment.gray and rng.random() < augment.gray:
                image = ImageOps.grayscale(image).convert("RGB")
        return np.asarray(image)
    except Exception as problem:  # Pillow's plugins raise what they like on broken bytes
        raise BadSample(f"image cannot be decoded ({type(problem).__name__})") from None


# ---------------------------------------------------------------------------------------------------------------- batch
class Reader:
    """Samples of a source by position in the run: position p is sample p mod n of epoch p // n, each epoch in an order
    of its own."""

    def __init__(self, source: Any, tokenizer: Tokenizer, length: int, seed: int, augment: Augment | None, workers: int):
        self.source, self.tokenizer, self.length, self.seed, self.augment = source, tokenizer, length, seed, augment
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
        self.bad: dict[int, str] = {}       # sample: why it cannot be used
        self.orders: dict[int, Any] = {}    # of the latest epochs
        self.lock = threading.Lock()

    def index(self, position: int) -> int:
        n = len(self.source)
        if isinstance(self.source, Scenes) or self.augment is None:
            return position % n
        epoch, place = divmod(position, n)
        with self.lock:
            if epoch not in self.orders:
                order = np.random.default_rng((self.seed, 1, epoch)).permutation(n)
                self.orders = {e: o for e, o in self.orders.items() if e == epoch - 1} | {epoch: order}
            return int(self.orders[epoch][place])

    def sample_index(self, position: int) -> int:
        """The sample that ends up at a position that has been read: past the broken ones."""
        i = self.index(position)
        while i in self.bad:
            i = (i + 1) % len(self.source)
        return i

    def sample(self, position: int, resolution: int) -> tuple[np.ndarray, np.ndarray, int]:
        """((R,R,3) uint8, (T,) int32, index). A broken sample's place is taken by the next in the source."""
        first = self.index(position)
        for step in range(len(self.source)):
            i = (first + step) % len(self.source)
            if i in self.bad:
                continue
            try:
                text = self.tokenizer.encode(self.source.caption(i), self.length)
                if text[1] == EOS:
                    raise BadSample("caption holds no word")  # nothing but control characters
                rng = np.random.default_rng((self.seed, 2, position)) if self.augment else None
                return to_pixels(self.source.picture(i), resolution, self.augment, rng), text, i
            except BadSample as problem:
                self.bad[i] = str(problem)
        raise DataError(f"not one usable sample in the data; the last: {self.source.name(i)} {self.bad[i]}")

    def batch(self, positions: range, resolution: int) -> dict[str, np.ndarray]:
        """{"images": (B,R,R,3) uint8, "text": (B,T) int32, "row": (B,) int32 position in the run, "index": (B,)}."""
        images, text, index = zip(*self.pool.map(lambda p: self.sample(p, resolution), positions))
        return {"images": np.stack(images), "text": np.stack(text), "index": np.array(index),
                "row": np.array([p & 0x7FFFFFFF for p in positions], np.int32)}

    def ahead(self, wanted: Iterator[tuple[range, int]], put: Callable[[dict], Any], depth: int = 2) -> Iterator[Any]:
        """put(batch) for each wanted (positions, resolution), made in a thread `depth` ahead of its use: so the next
        batch is decoded, and on its way to the device, while the current step runs."""
        ready: queue.Queue = queue.Queue(depth)
        stop = threading.Event()

        def offer(item: Any) -> None:
            while not stop.is_set():
                try:
                    return ready.put(item, timeout=0.1)
                except queue.Full:
                    pass

        def work() -> None:
            try:
                for positions, resolution in itertools.takewhile(lambda _: not stop.is_set(), wanted):
                    offer((put(self.batch(positions, resolution)), None))
                offer((None, StopIteration()))
            except BaseException as problem:
                offer((None, problem))
        threading.Thread(target=work, daemon=True, name="batches").start()
        try:
            while True:
                batch, problem = ready.get()
                if isinstance(problem, StopIteration):
                    return
                if problem:
                    raise problem
                yield batch
        finally:
            stop.set()


if __name__ == "__main__":
    import sys

    from PIL import ImageDraw

    from tokenizer import build
    where, field = [*sys.argv[1:], *("scenes", "txt")[len(sys.argv) - 1:]][:2]
    try:
        source = open_source(where, field)
        names = [source.caption(i) for i in range(min(len(source), 200))]
        reader = Reader(source, build(names, 4000), 48, 0, Augment(crop=1.0 if where == "scenes" else 0.4), 2)
        batch = reader.batch(range(16), 160)
    except (DataError, BadSample) as problem:
        sys.exit(f"error: {problem}")
    sheet = Image.new("RGB", (8 * 168, 2 * 220), "white")
    for n, (pixels, i) in enumerate(zip(batch["images"], batch["index"])):
        sheet.paste(Image.fromarray(pixels), (n % 8 * 168, n // 8 * 220))
        caption = source.caption(i)
        lines = "\n".join(caption[k:k + 27] for k in range(0, min(len(caption), 108), 27))
        ImageDraw.Draw(sheet).multiline_text((n % 8 * 168, n // 8 * 220 + 164), lines, fill="black")
    sheet.save("contact.png")
    print(f"contact.png: 16 training pictures of {where}; skipped: {source.skipped or 'none'}")

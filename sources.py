"""Where pictures with captions lie: the embedded `scenes`, a folder of images with KEY.txt (or KEY.json) beside them, or
WebDataset tars as img2dataset writes them (KEY.jpg KEY.json KEY.txt side by side).

A source knows how many samples it has, and gives the caption and the (undecoded) picture of each; its memory does not
grow with the samples of tars, and in a folder by about the length of a path. What cannot be a sample is skipped, and
counted in `skipped` with the reason; a sample that turns out broken when it is read raises BadSample; only a source with
nothing to train on raises DataError.

    python sources.py WHERE [CAPTION]        counts samples, shows some captions, and says what is skipped and why
"""
import contextlib
import functools
import glob
import io
import json
import os
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

import scenes
import shards

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # told by the bytes, not by the name; others might start a program (EPS)
MOST_IMAGE, MOST_TEXT = 256 << 20, 1 << 20               # bytes: a larger file is a broken sample
MEMORY = 256 << 20                                       # bytes of tars that a process keeps in memory for training
LANES = 64                                               # places of a large set that training reads side by side
RECENT = 80                                              # tars whose rows are in memory: one per lane, and some for validation
Place = tuple[str, int, int]                             # path, offset, bytes
Choose = Callable[[int], int]                            # which of n captions is taken
MOST_PIXELS = 89_478_485  # of an image: 256 MiB as RGB; above that Pillow itself only warns


class DataError(Exception):
    """The data cannot be used at all; the message says what to do about it."""


class BadSample(Exception):
    """One sample cannot be used; the message says why."""


def first_of(count: int) -> int:
    """Which of a sample's captions validation and the vocabulary take."""
    return 0


def open_image(file: BinaryIO) -> Image.Image:
    """The image in an open file, not yet decoded. All files enter through here, so no bytes reach a
    plugin that is not in FORMATS, and none are decoded to more than MOST_PIXELS. BadSample says
    what is wrong."""
    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        names = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        raise BadSample(f"image cannot be opened: it is not a whole {names} file") from None
    except Exception as problem:  # Pillow's plugins raise what they like on broken bytes
        raise BadSample(f"image cannot be opened ({type(problem).__name__})") from None
    pixels = image.width * image.height
    if pixels > MOST_PIXELS:
        raise BadSample(f"image has {pixels:,} pixels, and more than {MOST_PIXELS:,} are not read")
    return image


def silence_pillow() -> None:
    """Do not print what Pillow warns of, such as damaged EXIF: an image that cannot be used raises.
    The warning filters belong to the whole process, so only a program calls this, as it starts."""
    warnings.filterwarnings("ignore", module=r"PIL\.")


recent_record = functools.lru_cache(64)(scenes.record)  # which the caption asks for, and then the picture


class Scenes:
    """The embedded pictures (scenes.py). A training split has no end, so no picture comes twice."""
    run = 0

    def __init__(self, seed: int, split: str, count: int | None = None, field: str = "txt"):
        self.seed, self.split, self.count, self.field, self.skipped = seed, split, count, field, {}
        self.caption(0)

    def __len__(self) -> int:
        return self.count or 1 << 40

    def fingerprint(self) -> str:
        return "scenes"

    def name(self, i: int) -> str:
        return f"scene {self.split} {i}"

    def record(self, i: int) -> dict:
        return recent_record(self.seed, self.split, i)

    def caption(self, i: int, field: str = "") -> str:
        if (field or self.field) not in scenes.FIELDS:
            raise DataError(f"scenes have no captions {field or self.field!r}: take one of {', '.join(scenes.FIELDS)}")
        return scenes.caption(self.record(i), field or self.field)

    def surprise(self, i: int) -> float:
        """Nats in the caption for one who does not see the picture."""
        return scenes.surprise(self.record(i), self.field)

    def grade(self, text: str, i: int) -> dict[str, tuple[int, int]]:
        """What of sample i a generated caption states rightly, by attribute; nothing for alt text, which states too little."""
        return scenes.grade(text, self.record(i)) if self.field != "web" else {}

    def picture(self, i: int) -> Image.Image:
        return scenes.paint(self.record(i))

    def sample(self, i: int, fields: Iterable[str], choose: Choose, with_run: bool = False) -> tuple[list[str], Image.Image]:
        """(the text of each field, the image)."""
        return [self.caption(i, field) for field in fields], self.picture(i)


class Files:
    """Samples that lie in files. `starts` (shards + 1,) int64 says at which sample each shard begins, and how many there
    are in all; a folder is one shard. `field` is "txt" for the KEY.txt, or the name of a field in the KEY.json. `run` is
    how many samples in a row training reads at once and then mixes with others (data.py); 0: all are shuffled together."""
    run = 0

    def __init__(self, where: str, field: str):
        self.where, self.field, self.text = where, field, "txt" if field == "txt" else "json"
        self.skipped: Counter = Counter()
        self.starts, self.crc = np.zeros(1, np.int64), 0

    def place(self, i: int) -> tuple[Place, Place]:
        """Where the image and the text of sample i lie."""
        raise NotImplementedError

    def settle(self, pairs: list[int]) -> None:
        """After indexing: pairs counts [image and text, image alone, text alone]. Refuses a source that holds nothing to
        train on."""
        self.skipped += Counter({f"without a .{self.text}": pairs[1], "without an image": pairs[2]})  # += drops what is 0
        if not len(self):
            found = "; ".join(f"{n} {why}" for why, n in self.skipped.items()) or "no images at all"
            if glob.glob(os.path.join(glob.escape(self.where), "*.tar")):
                raise DataError(f"no captioned image in {self.where}, but tars: name those, as '{os.path.join(self.where, '*.tar')}'")
            raise DataError(f"no captioned image in {self.where}: {found}. Each KEY.jpg (or .png, .webp …) needs "
                            + ("a KEY.txt beside it, or a KEY.json and --caption FIELD" if self.field == "txt" else
                               f"a KEY.json with the field {self.field!r} beside it"))
        problems = []
        for i in range(min(len(self), 200)):                   # a wrong --caption shows in the first samples or never
            try:
                self.caption(i)
                return
            except BadSample as problem:
                problems.append(str(problem))
        raise DataError(f"no caption can be read from the first {len(problems)} samples of {self.where}: {problems[0]}")

    def __len__(self) -> int:
        return int(self.starts[-1])

    def fingerprint(self) -> str:
        """Changes when the data set does: to continue a run on other data would be another run."""
        return f"{len(self)} samples ({self.crc:08x})"

    def name(self, i: int) -> str:
        path, offset, _ = self.place(i)[0]
        return printable(path) + (f" at byte {offset}" if offset else "")

    def read(self, place: Place, most: int) -> bytes:
        """The bytes at a place; size -1 means the whole file."""
        path, offset, size = place
        if size > most:
            raise BadSample(f"is larger than {most >> 20} MiB")
        try:
            if size < 0:
                with open(path, "rb", opener=lambda p, flags: os.open(p, flags | os.O_NONBLOCK)) as f:  # a pipe of that name must not block
                    data = f.read(most + 1) or b""
            else:
                data = shards.read_span(path, offset, offset + size)
        except OSError as problem:
            raise BadSample(f"cannot be read ({problem.strerror or problem})") from None
        if len(data) > most:
            raise BadSample(f"is larger than {most >> 20} MiB")
        if len(data) < size:
            raise BadSample("is cut off")
        return data

    def caption(self, i: int, field: str = "") -> str:
        """The text of sample i, or another field of the KEY.json that it is from; the first of a list."""
        return self.parse_caption(self.read(self.place(i)[1], MOST_TEXT), field)

    def sample(self, i: int, fields: Iterable[str], choose: Choose, with_run: bool = False) -> tuple[list[str], Image.Image]:
        """(the text of each field, the image as `picture` gives it). choose(n) says which of the n
        captions of a list is taken; with_run: the samples around this one are wanted soon."""
        image, text = self.read_sample(i, with_run)
        return [self.parse_caption(text, field, choose) for field in fields], open_image(io.BytesIO(image))

    def read_sample(self, i: int, with_run: bool) -> tuple[bytes, bytes]:
        """The bytes of the image and of the text."""
        image, text = self.place(i)
        data = self.read(text, MOST_TEXT)
        return self.read(image, MOST_IMAGE), data

    def parse_caption(self, data: bytes, field: str = "", choose: Choose = first_of) -> str:
        """The text in the bytes of a KEY.txt or KEY.json."""
        flag, field = ("--alt" if field else "--caption"), field or self.field
        try:
            text = data.decode("utf-8-sig")
            if field != "txt":
                fields = json.loads(text)
                if not isinstance(fields, dict) or field not in fields:
                    has = ", ".join(fields) if isinstance(fields, dict) else "no fields"
                    raise BadSample(f"json has no field {field!r} (it has {has[:200]}); name one with {flag}")
                text = fields[field]
                if isinstance(text, list):
                    texts = [one for one in text if isinstance(one, str) and one.strip()]
                    if not texts:
                        raise BadSample("caption list holds no text" if text else "caption list is empty")
                    text = texts[choose(len(texts))]
                if isinstance(text, str):
                    text = text.encode("utf-8", "replace").decode()  # json can spell halves of characters, which nothing can print
        except UnicodeDecodeError:
            raise BadSample("caption is not UTF-8 text") from None
        except (ValueError, RecursionError):  # ValueError is also what a number of thousands of digits gives
            raise BadSample("json cannot be parsed") from None
        if not isinstance(text, str) or not text.strip():
            raise BadSample("caption is empty")
        return text

    def picture(self, i: int) -> Image.Image:
        """Opened, not yet decoded."""
        return open_image(io.BytesIO(self.read(self.place(i)[0], MOST_IMAGE)))


class Folder(Files):
    """All images below a folder, in the order of their names. Links to folders are followed, each folder once."""

    def __init__(self, where: str, field: str):
        super().__init__(where, field)
        names, pairs, seen = [], np.zeros(3, int), {os.path.realpath(where)}
        for base, folders, files in os.walk(where, onerror=lambda _: self.skipped.update(["folders that cannot be read"]), followlinks=True):
            inside = {os.path.realpath(os.path.join(base, f)): f for f in sorted(folders, reverse=True)}  # of equal ones the first name
            folders[:] = sorted(f for real, f in inside.items() if real not in seen)
            self.skipped += Counter({"folders that links lead to again": len(inside) - len(folders)})  # upwards would never end
            seen |= inside.keys()
            parts = ((name, *name.rpartition(".")) for name in sorted(files))
            found = [(key, suffix.lower(), name) for name, key, _, suffix in parts if key and suffix.lower() in shards.IMAGES + shards.TEXTS]
            own = [f for f in found if not f[0].startswith("._")]
            self.skipped += Counter({shards.FORKS: len(found) - len(own)})
            rows, counts = shards.group(own, self.skipped)
            pairs += counts[self.text]
            below = os.path.relpath(base, where)
            for image, *texts in rows:
                if text := texts[shards.TEXTS.index(self.text)]:
                    names.append(os.fsencode(os.path.join(below, image)) + b"\0" + os.fsencode(text.rpartition(".")[2]))
        self.names = b"".join(names)                            # one long text and where each begins: objects take five times as much
        self.begins = np.cumsum([0, *map(len, names)])
        self.starts, self.crc = np.array([0, len(names)]), zlib.crc32(self.names)
        self.settle(pairs.tolist())

    def place(self, i: int) -> tuple[Place, Place]:
        image, _, suffix = self.names[self.begins[i]:self.begins[i + 1]].partition(b"\0")
        path, suffix = os.path.normpath(os.path.join(self.where, os.fsdecode(image))), os.fsdecode(suffix)
        return (path, 0, -1), (f"{path.rpartition('.')[0]}.{suffix}", 0, -1)


class Tars(Files):
    """WebDataset tars: a glob, or a brace list such as data/{00000..00011}.tar. In memory are counts by tar, and the rows
    of the tars that were read last; those of all lie in the index beside each (shards.py)."""

    def __init__(self, where: str, field: str):
        super().__init__(where, field)
        try:
            paths = shards.matching(where)
        except ValueError as problem:
            raise DataError(str(problem)) from None
        if not paths:
            raise DataError(f"no file matches {where}")
        found = shards.index_all(paths)
        good = [(p, one) for p, one in zip(paths, found) if isinstance(one, shards.Index)]
        bad = [(printable(p), getattr(one, "strerror", None) or one) for p, one in zip(paths, found) if not isinstance(one, shards.Index)]
        if not good:
            raise DataError(f"{bad[0][0]} cannot be read as an uncompressed tar: {bad[0][1]}")
        if bad:
            self.skipped[f"files that cannot be read as uncompressed tars, first {bad[0][0]} ({bad[0][1]})"] += len(bad)
        self.paths, self.kept = [p for p, _ in good], {n: one.rows for n, (_, one) in enumerate(good) if one.rows is not None}
        pairs = np.array([one.meta["pairs"][self.text] for _, one in good], np.int64)
        self.starts = np.cumsum([0, *pairs[:, 0]])
        self.crcs = np.array([one.meta["crc"] for _, one in good], np.uint32)
        self.crc = zlib.crc32(self.crcs)
        first: dict[str, str] = {}                              # reason: the tar that gives it first
        for path, one in good:
            for why, count in one.meta["skipped"].items():
                self.skipped[why if why not in shards.PLACED else f"{why}, first {first.setdefault(why, printable(path))}"] += count
        self.plan_reads(sum(one.meta["size"] for _, one in good))
        self.settle(pairs.sum(0).tolist())

    def plan_reads(self, size: int) -> None:
        """Training reads runs of samples: of half of a lane's memory on average, so that few exceed all of it.
        A lane has 16 of them or more, because the one at its end is read by the next lane too. A set that fits
        in MEMORY (size: bytes of all tars) is read once, and shuffled whole."""
        whole = size <= MEMORY
        self.longest = MEMORY if whole else MEMORY // LANES
        count = MEMORY // LANES // 2 * len(self) // max(size, 1)
        self.read_run = max(1, count if whole else min(count, len(self) // (16 * LANES)))
        self.run = 0 if whole else self.read_run
        self.rows = functools.lru_cache(None if whole else RECENT)(self.load)
        self.run_span = functools.lru_cache(4 * LANES)(self.span)
        self.cache = shards.SpanCache(MEMORY)

    def load(self, shard: int) -> np.ndarray:
        """(samples, 4) int64 of one tar: offset and bytes of the image and of the text."""
        path, rows = self.paths[shard], self.kept.get(shard)
        if rows is None:
            found = shards.recall(path, rows=True)
            try:
                found = found or shards.scan(path)
            except (OSError, ValueError) as problem:
                raise BadSample(f"{printable(path)} can no longer be read ({getattr(problem, 'strerror', None) or problem})") from None
            if found.meta["crc"] != self.crcs[shard]:
                raise DataError(f"{printable(path)} has changed since it was opened: start again")
            rows = found.rows
        text = 2 + 2 * shards.TEXTS.index(self.text)
        return rows[rows[:, text] > 0][:, [0, 1, text, text + 1]]

    def locate(self, i: int) -> tuple[int, int]:
        """Which tar sample i is in, and which of its samples it is."""
        shard = int(np.searchsorted(self.starts, i, side="right")) - 1
        return shard, int(i - self.starts[shard])

    def place(self, i: int) -> tuple[Place, Place]:
        shard, row = self.locate(i)
        image, size, text, length = self.rows(shard)[row].tolist()
        return (self.paths[shard], image, size), (self.paths[shard], text, length)

    def run_of(self, samples: np.ndarray) -> np.ndarray:
        """Which run of its tar each sample is in."""
        return (samples - self.starts[np.searchsorted(self.starts, samples, side="right") - 1]) // self.read_run

    def span(self, shard: int, first: int, count: int) -> tuple[int, int] | None:
        """Where `count` samples of a tar begin and end, or None if much else lies between them."""
        rows = self.rows(shard)[first:first + count]
        begins, sizes = rows[:, [0, 2]], rows[:, [1, 3]]
        begin, end = int(begins.min()), int((begins + sizes).max())
        headers = 8192 * len(rows)  # of three files or so, and what fills up their last blocks
        return (begin, end) if end - begin <= 2 * int(sizes.sum()) + headers else None

    def read_sample(self, i: int, with_run: bool) -> tuple[bytes, bytes]:
        """Image and text come out of one read: that of their run, which is kept for its other samples, or
        their own where the run is too long or cannot be read."""
        shard, row = self.locate(i)
        image, text = self.place(i)
        for (_, _, size), most in ((text, MOST_TEXT), (image, MOST_IMAGE)):
            if size > most:
                raise BadSample(f"is larger than {most >> 20} MiB")
        data, begin = None, 0
        run = self.run_span(shard, row - row % self.read_run, self.read_run) if with_run else None
        if run and run[1] - run[0] <= self.longest:
            with contextlib.suppress(OSError):
                data, begin = self.cache.read(self.paths[shard], *run), run[0]
        if data is None:
            own = self.span(shard, row, 1)
            if own is None:
                return super().read_sample(i, with_run)
            begin, size = own[0], own[1] - own[0]
            data = self.read((self.paths[shard], begin, size), size)
        parts = [data[offset - begin:offset - begin + size] for _, offset, size in (image, text)]
        if any(len(part) < place[2] for part, place in zip(parts, (image, text))):
            raise BadSample("is cut off")
        return parts[0], parts[1]

    def name(self, i: int) -> str:
        try:
            return super().name(i)
        except BadSample:  # its tar is gone
            return f"sample {i} of {self.where}"


def printable(path: str) -> str:
    """A path as text: on disk it may be bytes that no terminal takes."""
    return os.fsencode(path).decode("utf-8", "replace")


class Part:
    """Some samples of a source, in a given order: what is held out."""
    run = 0

    def __init__(self, source: Files, indices: np.ndarray):
        self.source, self.indices, self.skipped = source, indices, source.skipped
        self.starts = np.array([0, len(indices)])

    def at(self, i: Any) -> Any:
        """Which sample of the source is the i-th of this part; or which ones, of an array."""
        return self.indices[i]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def fingerprint(self) -> str:
        return f"{len(self)} of {self.source.fingerprint()}"

    def __getattr__(self, name: str) -> Callable:  # name, caption, picture: of the i-th of these samples
        return lambda i, *more: getattr(self.source, name)(self.at(i), *more)


class Rest(Part):
    """All samples of a source but some: what remains for training. Only those left out are listed."""

    def __init__(self, source: Files, left_out: np.ndarray):
        super().__init__(source, np.sort(left_out))
        self.starts = source.starts - np.searchsorted(self.indices, source.starts)
        self.before = self.indices - np.arange(len(left_out))  # how many remain before each one that is left out
        self.run = source.run

    def at(self, i: Any) -> Any:
        return i + np.searchsorted(self.before, i, side="right")


def open_source(where: str, field: str = "txt", seed: int = 0, split: str = "train", count: int | None = None) -> Any:
    """`scenes`, a folder, or tars. DataError if there is nothing there to train on."""
    if where == "scenes":
        return Scenes(seed, split, count, field)
    if os.path.isdir(where):
        return Folder(where, field)
    if where.endswith(".tar") or glob.has_magic(where) or "{" in where:
        return Tars(where, field)
    raise DataError(f"{where} is no data: give scenes, a folder of images with captions, or tars (a glob or a {{00000..00011}} list)"
                    + ("" if os.path.exists(where) else "; nothing of that name exists"))


def some(size: int, count: int) -> np.ndarray:
    """`count` of `size` samples, the same at every call, in random order."""
    return np.random.default_rng(0).choice(size, min(count, size), replace=False)


def draw(source: Any, count: int) -> Any:
    """`count` samples of a held-out source at most: a fixed random draw, for files often lie in order of what they show."""
    if isinstance(source, Scenes):
        return source
    if len(source) < 2:
        raise DataError(f"{source.where} holds one sample: to measure anything on held-out pictures takes two or more")
    return Part(source, some(len(source), count))


def hold_out(source: Files, count: int) -> tuple[Rest, Part]:
    """(train, held-out): a fixed draw of `count` samples, a tenth at most (but two), for a data set without one of its own."""
    if len(source) < 3:
        raise DataError(f"{source.where} holds {len(source)} sample{'s' * (len(source) > 1)}: give at least three, or held-out pictures with --val")
    drawn = some(len(source), max(2, min(count, len(source) // 10)))
    return Rest(source, drawn), Part(source, drawn)


if __name__ == "__main__":
    import sys
    if not 2 <= len(sys.argv) <= 3:
        sys.exit("usage: python sources.py WHERE [CAPTION]")
    try:
        found = open_source(*sys.argv[1:], count=1000)
    except DataError as problem:
        sys.exit(f"error: {problem}")
    print(f"{len(found):,} samples; skipped: {dict(found.skipped) or 'none'}")
    for i in range(min(len(found), 5)):
        try:
            print(f"{found.name(i)}: {found.caption(i)}")
        except BadSample as problem:
            print(f"{found.name(i)}: {problem}")

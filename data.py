"""Samples as batches that are a function of (seed, step) alone.

Which samples a step reads, how each is cropped, and which stands in for a broken one follow from the seed and the
position in the run: not from threads, devices, hosts, or what ran before. A broken sample is never used and never
stops a run: the next one takes its place, and it is counted and listed with the reason.

Letters: B images, R pixels a side, T text positions.

    python data.py [WHERE [CAPTION]]        writes contact.png: what training sees, crops and captions
"""
import itertools
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps

import sources
from decoder import EOS
from sources import BadSample, DataError, Scenes, first_of
from tokenizer import Tokenizer

PIECE = 8    # samples that a thread is given at a time: a small picture is made sooner than a thread is woken
ATTEMPTS = 100           # at a crop, before the whole image is taken
ASPECTS = (0.75, 1.33)   # width / height of a crop: TensorFlow's defaults, which the release keeps
JITTERED = 0.8           # probability that an image's colours are jittered
TINY = np.float32(1e-12)  # in place of 0 as a divisor
BLOCK = 8192             # pixels whose colours change at a time: so intermediate results stay in the cache
OWN_HUES = np.arange(0, 6, 2, dtype=np.float32)[:, None]  # of red, green and blue, in sixths of the circle
UPRIGHT = dict(enumerate(map(Image.Transpose, (0, 3, 1, 5, 4, 6, 2)), 2))  # what undoes a camera's orientation, 2 to 8


# ------------------------------------------------------------------------------------------------------------ picture
class Augment(NamedTuple):
    """What training does to a picture; the held-out ones are only resized."""
    crop: float = 0.4    # least area of the random-resized crop; 1 for none
    flip: bool = False   # off: a mirrored picture makes "left of" a lie, and letters unreadable
    jitter: float = 0.0  # brightness, contrast and saturation by a factor of 1 +- this
    hue: float = 0.0     # hue by +- this share of the colour circle
    gray: float = 0.0    # chance of a picture without colour


def crop_box(width: int, height: int, least: float, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """A random-resized crop, drawn as TensorFlow does: an aspect, then a height among those that
    fit and give an area of `least`..1 of the image, then a place. An aspect that has no such height
    is drawn anew. The whole image if none is found, which is so where its sides are too unlike."""
    for _ in range(ATTEMPTS):
        aspect = rng.uniform(*ASPECTS)
        lowest = float(np.sqrt(least * width * height / aspect))
        highest = min(height, width / aspect)
        if lowest <= highest:
            h = rng.uniform(lowest, highest)
            w = min(h * aspect, width)
            x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
            return x, y, x + w, y + h
    return 0.0, 0.0, float(width), float(height)


def adjust_brightness(x: np.ndarray, factor: float) -> np.ndarray:
    """x (3,P) float32 in 0..1, the P pixels of an image, here and below. Black stays black."""
    return x * np.float32(factor)


def adjust_contrast(x: np.ndarray, factor: float, mean: np.ndarray) -> np.ndarray:
    """Each channel away from its mean over the image (3,1), or towards it."""
    return x * np.float32(factor) + mean * np.float32(1 - factor)


def adjust_saturation(x: np.ndarray, factor: float) -> np.ndarray:
    """HSV's saturation times a factor, 1 at most: hue and greatest channel stay."""
    high, low = x.max(0), x.min(0)
    most = high / np.maximum(high - low, TINY)
    return high + (x - high) * np.minimum(np.float32(factor), most)


def adjust_hue(x: np.ndarray, shift: float) -> np.ndarray:
    """HSV's hue turned by a share of the colour circle, half of it at most: greatest and least
    channel stay. A channel is greatest within a sixth of the circle from its own hue, and least
    from two sixths on."""
    red, green, blue = x
    high, low = x.max(0), x.min(0)
    chroma = high - low
    scale = 1 / np.maximum(chroma, TINY)
    hue = np.where(green == high, 2 + (blue - red) * scale, 4 + (red - green) * scale)
    hue = np.where(red == high, (green - blue) * scale, hue) + np.float32(6 * shift)  # in sixths
    apart = np.abs(hue - OWN_HUES)
    apart = np.abs(np.minimum(apart, 6 - apart))  # the shorter way round
    return low + chroma * np.clip(2 - apart, 0, 1)


ADJUST = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)


def color_jitter(image: np.ndarray, augment: Augment, rng: np.random.Generator) -> np.ndarray:
    """(R,R,3) uint8, with probability JITTERED changed in brightness, contrast, saturation and hue,
    in random order, each result cut to 0..1. Factors and shift are uniform, as in SimCLR's v2.

    The changes are TensorFlow's, which the release uses. torchvision differs in two: its contrast
    is about the mean gray level, one number for all channels, and its saturation blends each pixel
    with its gray level. On 8-bit images torchvision also rounds after each change; here, once."""
    if rng.random() >= JITTERED:
        return image
    order = rng.permutation(len(ADJUST))
    lowest = max(0, 1 - augment.jitter)
    drawn = rng.uniform([lowest] * 3 + [-augment.hue], [1 + augment.jitter] * 3 + [augment.hue])
    x = image.reshape(-1, 3).T.astype(np.float32, order="C")
    x /= 255
    for n in order.tolist():
        if augment.hue if n == 3 else augment.jitter:
            mean = [x.mean(1, keepdims=True)] if n == 1 else []
            for start in range(0, x.shape[1], BLOCK):
                part = x[:, start:start + BLOCK]
                np.clip(ADJUST[n](part, drawn[n], *mean), 0, 1, out=part)
    x *= 255
    changed = np.empty_like(image)
    np.copyto(changed.reshape(-1, 3).T, np.rint(x, out=x), casting="unsafe")
    return changed


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
        image = (image if image.mode == "RGB" else image.convert("RGB")).resize((resolution, resolution), Image.Resampling.BILINEAR, box)
        if turned in UPRIGHT:
            image = image.transpose(UPRIGHT[turned])
        if augment:
            if augment.flip and rng.random() < 0.5:
                image = ImageOps.mirror(image)
            if augment.jitter or augment.hue:
                image = Image.fromarray(color_jitter(np.asarray(image), augment, rng))
            if augment.gray and rng.random() < augment.gray:
                image = ImageOps.grayscale(image).convert("RGB")
        return np.asarray(image)
    except Exception as problem:  # Pillow's plugins raise what they like on broken bytes
        raise BadSample(f"image cannot be decoded ({type(problem).__name__})") from None


# ---------------------------------------------------------------------------------------------------------------- batch
class Order:
    """Each epoch's order of the samples, from (seed, epoch) alone. Without runs all are shuffled together.

    With runs (tars that do not fit in memory) the tars are shuffled, then the runs inside each tar, then the samples
    inside each run. That sequence is cut into LANES equal parts, the lanes, and the order takes one sample from each
    lane in turn. So a batch mixes runs from LANES places of the set, the samples of a run are LANES places apart, and
    each run is read once, while at most LANES of them are in use. Where the number of processes divides LANES, each
    process that takes every n-th position has lanes of its own."""

    def __init__(self, starts: np.ndarray, seed: int, run_of: Callable[[np.ndarray], np.ndarray] | None = None):
        """starts: (shards + 1,) at which sample each shard begins; run_of: the runs of samples, numbered in each shard."""
        self.starts, self.seed, self.run_of = starts, seed, run_of
        self.epoch, self.shuffled = lru_cache(2)(self._epoch), lru_cache(2)(self._shuffled)
        self.shard = lru_cache(2 * sources.LANES)(self._shard)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in this epoch's order, and at which place of their sequence each begins."""
        order = np.random.default_rng((self.seed, 1, epoch)).permutation(len(self.starts) - 1)
        return order, np.cumsum([0, *np.diff(self.starts)[order]])

    def _shuffled(self, epoch: int) -> np.ndarray:
        """All samples in their order."""
        samples = np.concatenate([np.arange(self.starts[s], self.starts[s + 1]) for s in self.epoch(epoch)[0]])
        return np.random.default_rng((self.seed, 3, epoch, 0)).permutation(samples)

    def _shard(self, epoch: int, shard: int) -> np.ndarray:
        """The samples of a shard, run by run, in the order of their lane."""
        samples = np.arange(self.starts[shard], self.starts[shard + 1])
        runs, rng = self.run_of(samples), np.random.default_rng((self.seed, 3, epoch, shard))
        turns = rng.permutation(runs.max() + 1)
        return samples[np.lexsort((rng.random(len(samples)), turns[runs]))]

    def __call__(self, position: int) -> int:
        n, lanes = int(self.starts[-1]), sources.LANES
        epoch, place = divmod(position, n)
        if self.run_of is None:
            return int(self.shuffled(epoch)[place])
        step, lane = divmod(place, lanes)
        at = lane * (n // lanes) + min(lane, n % lanes) + step  # the first n % lanes of them are longer by one
        order, begins = self.epoch(epoch)
        turn = int(np.searchsorted(begins, at, side="right")) - 1
        return int(self.shard(epoch, int(order[turn]))[at - begins[turn]])


def order_name(source: Any) -> str:
    """Which order a source's samples come in: a run that continues must find the same."""
    return f"in runs of {source.run} samples" if source.run else "shuffled whole"


def former_order_name(source: Any) -> str:
    """The order that was used when checkpoints did not yet name it."""
    few = isinstance(source, Scenes) or len(source.starts) <= 17
    return "shuffled whole" if few else "shuffled in windows of 16 tars"


class Reader:
    """Samples of a source by position in the run: position p is sample p mod n of epoch p // n, in that epoch's order
    if they are augmented (training), else in the source's."""

    def __init__(self, source: Any, tokenizer: Tokenizer, length: int, seed: int, augment: Augment | None, workers: int, alt: str = ""):
        """alt: the field of each sample's second text, if one is wanted."""
        self.source, self.tokenizer, self.length, self.seed, self.augment = source, tokenizer, length, seed, augment
        self.fields = {"text": ""} | ({"alt": alt} if alt else {})
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
        self.draws = augment not in (None, Augment(crop=1.0))  # whether anything of a picture is left to chance
        self.bad: dict[int, str] = {}       # sample: why it cannot be used
        self.order = None
        if augment is not None and not isinstance(source, Scenes):
            self.order = Order(source.starts, seed, source.run_of if source.run else None)

    def index(self, position: int) -> int:
        return self.order(position) if self.order else position % len(self.source)

    def choose(self, position: int, i: int) -> Callable[[int], int]:
        """Which of the n captions of sample i is taken: in training one is drawn in each epoch, else it is
        the first."""
        if self.augment is None:
            return first_of
        epoch = position // len(self.source)
        return lambda n: int(np.random.default_rng((self.seed, 4, epoch, i)).integers(n))

    def sample(self, position: int, first: int, resolution: int) -> tuple[np.ndarray, list[np.ndarray], int]:
        """((R,R,3) uint8, (T,) int32 of each text, index) for a position whose turn is sample `first`. A broken sample's place
        is taken by the next in the source."""
        for step in range(len(self.source)):
            i = (first + step) % len(self.source)
            if i in self.bad:
                continue
            try:
                choose = self.choose(position, i)
                captions, image = self.source.sample(i, self.fields.values(), choose, self.order is not None)
                texts = [self.tokenizer.encode(caption, self.length) for caption in captions]
                if any(text[1] == EOS for text in texts):
                    raise BadSample("caption holds no word")  # nothing but control characters
                rng = np.random.default_rng((self.seed, 2, position)) if self.draws else None
                return to_pixels(image, resolution, self.augment, rng), texts, i
            except BadSample as problem:
                self.bad[i] = str(problem)
        raise DataError(f"not one usable sample in the data; the last: {self.source.name(i)} {self.bad[i]}")

    def batch(self, positions: range, resolution: int) -> dict[str, Any]:
        """{"images": (B,R,R,3) uint8, "text" (and "alt"): (B,T) int32, "row": (B,) int32 position in the run, "index": (B,), "bad": {index: reason}}.
        "bad" has each bad sample where its own turn comes in the first epoch: so every host, and a continued run, counts the same."""
        firsts = [self.index(p) for p in positions]
        jobs = list(zip(positions, firsts))
        pieces = [jobs[n:n + PIECE] for n in range(0, len(jobs), PIECE)]
        done = self.pool.map(lambda piece: [self.sample(p, first, resolution) for p, first in piece], pieces)
        images, texts, index = zip(*itertools.chain.from_iterable(done))
        bad = {i: self.bad[i] for p, i in zip(positions, firsts) if p < len(self.source) and i in self.bad}
        return {"images": np.stack(images), **dict(zip(self.fields, map(np.stack, zip(*texts)))), "index": np.array(index),
                "row": np.array([p & 0x7FFFFFFF for p in positions], np.int32), "bad": bad}

    def ahead(self, wanted: Iterator[tuple[range, int]], put: Callable[[dict], Any], depth: int = 2) -> Iterator[Any]:
        """(put(batch), batch["bad"]) for each wanted (positions, resolution), made in a thread `depth` ahead of its use: so the next
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
                    batch = self.batch(positions, resolution)
                    offer(((put(batch), batch["bad"]), None))
                offer((None, StopIteration()))
            except BaseException as problem:
                offer((None, problem))
        maker = threading.Thread(target=work, daemon=True, name="batches")
        maker.start()
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
            maker.join()  # a thread that still runs when the program ends brings it down


if __name__ == "__main__":
    import contextlib
    import sys

    from PIL import ImageDraw

    from sources import open_source, silence_pillow
    from tokenizer import build
    silence_pillow()
    where, field = [*sys.argv[1:], *("scenes", "txt")[len(sys.argv) - 1:]][:2]
    try:
        source, captions = open_source(where, field), []
        for i in range(min(len(source), 200)):
            with contextlib.suppress(BadSample):
                captions.append(source.caption(i))
        reader = Reader(source, build(captions, 4000), 48, 0, Augment(crop=1.0 if where == "scenes" else 0.4), 2)
        batch = reader.batch(range(16), 160)
    except DataError as problem:
        sys.exit(f"error: {problem}")
    sheet = Image.new("RGB", (8 * 168, 2 * 220), "white")
    for n, (pixels, i) in enumerate(zip(batch["images"], batch["index"])):
        sheet.paste(Image.fromarray(pixels), (n % 8 * 168, n // 8 * 220))
        caption = source.caption(i)
        lines = "\n".join(caption[k:k + 27] for k in range(0, min(len(caption), 108), 27))
        ImageDraw.Draw(sheet).multiline_text((n % 8 * 168, n // 8 * 220 + 164), lines, fill="black")
    sheet.save("contact.png")
    print(f"contact.png: 16 training pictures of {where}; skipped: {dict(source.skipped) or 'none'}")

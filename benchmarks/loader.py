"""How fast one core turns shards of photographs into training samples: this project's Reader, and the webdataset library.

Both read the same WebDataset tars, made here: 640x480 JPEGs of about the bytes and the look of photographs (noise with a
spectrum that falls like a photograph's, and edges), with captions of the length that dense ones have. Both do the same work: a
random-resized crop, a bilinear antialiased resize, the caption to word numbers. `python bench.py data -h` is its command line.
"""
import contextlib
import importlib.util
import io
import itertools
import os
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from data import Loader
from inputs.images import Augment, random_crop_box
from inputs.sources import open_source
from inputs.tokenizer import WordPiece, train_vocab
from runtime.errors import ConfigError

WIDTH, HEIGHT, LENGTH = 640, 480, 128
WORDS = ("the a of with in on and is are large small red blue green white black wooden metal old new street table window tree water",
         "person standing beside behind above below light shadow background foreground image shows building sky")


def photograph(rng: np.random.Generator) -> Image.Image:
    """A picture that costs a JPEG decoder what a photograph does."""
    fy, fx = np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None, :]
    fall = np.maximum(np.hypot(fy, fx), 1 / WIDTH) ** -1.3
    noise = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((4, HEIGHT, WIDTH))) * fall, s=(HEIGHT, WIDTH))
    noise /= noise.std(axis=(1, 2), keepdims=True)
    pixels = 128 + 45 * noise[:1] + 15 * noise[1:]  # light varies more than color does
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
    pen = ImageDraw.Draw(image)
    for _ in range(12):
        x, y, w, h = (int(v) for v in rng.integers(0, (WIDTH, HEIGHT, 160, 160)))
        (pen.rectangle, pen.ellipse)[rng.integers(2)]((x, y, x + w + 4, y + h + 4), fill=tuple(map(int, rng.integers(0, 256, 3))))
    return image


def make_shard(path: str, count: int, quality: int = 85) -> float:
    """A tar of `count` pictures with captions; returns the mean bytes of a JPEG."""
    rng, total = np.random.default_rng(0), 0
    with tarfile.open(path, "w") as tar:
        for i in tqdm(range(count), desc="making pictures", leave=False, disable=not sys.stderr.isatty()):
            jpeg = io.BytesIO()
            photograph(rng).save(jpeg, "JPEG", quality=quality)
            total += len(jpeg.getvalue())
            for suffix, content in (("jpg", jpeg.getvalue()), ("txt", " ".join(rng.choice(" ".join(WORDS).split(), 90)).encode())):
                member = tarfile.TarInfo(f"{i:09d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return total / count


def webdataset_samples(path: str, resolution: int, tokenizer: WordPiece, augment: Augment) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Endless samples in the way of that library: its own Pillow decoder, then a map over (image, caption)."""
    import webdataset
    rng = np.random.default_rng(0)

    def prepare(sample: tuple[Image.Image, str]) -> tuple[np.ndarray, np.ndarray]:
        image, caption = sample
        box = random_crop_box(*image.size, augment.min_crop_area, rng)
        return np.asarray(image.resize((resolution, resolution), Image.Resampling.BILINEAR, box)), tokenizer.encode(caption, LENGTH)
    return iter(webdataset.WebDataset(path, shardshuffle=False, empty_check=False).repeat().decode("pil").to_tuple("jpg", "txt").map(prepare))


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """What runs inside, and the threads that it starts, share one core (on systems that let a program ask for that)."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def rows(resolutions: list[int], pictures: int, batch: int, repeats: int, alone: bool) -> list[dict]:
    """The table: samples/s of either, medians of rounds in turns."""
    if not alone and importlib.util.find_spec("webdataset") is None:
        raise ConfigError("data compares with the webdataset library: pip install -e '.[bench]', or leave it out with --alone")
    table, augment = [], Augment(min_crop_area=0.4)
    with tempfile.TemporaryDirectory() as folder, one_core():
        path = os.path.join(folder, "00000.tar")
        size = make_shard(path, pictures)
        source = open_source(path)
        tokenizer = train_vocab([source.caption(i) for i in range(min(pictures, 100))], 4000)
        for resolution in resolutions:
            reader, positions = Loader(source, tokenizer, LENGTH, 0, augment, workers=1), itertools.count()

            def ours(reader: Any = reader, positions: Any = positions, resolution: int = resolution) -> None:
                reader.batch(list(itertools.islice(positions, batch)), resolution)
            runs: dict[str, Callable] = {"ours": ours}
            if not alone:
                samples = webdataset_samples(path, resolution, tokenizer, augment)
                runs["webdataset"] = lambda samples=samples: [np.stack(part) for part in zip(*itertools.islice(samples, batch))]
            speeds: dict[str, list[float]] = {name: [] for name in runs}
            for turn in tqdm(range(repeats + 1), desc=f"{resolution} px", leave=False, disable=not sys.stderr.isatty()):
                for name, run in runs.items():
                    asked = time.perf_counter()
                    run()
                    if turn:  # the first warms up
                        speeds[name].append(batch / (time.perf_counter() - asked))
            middle = {name: statistics.median(s) for name, s in speeds.items()}
            reader.pool.shutdown()
            table.append({"px": resolution, "kB a JPEG": size / 1e3} | {f"{name}/s": s for name, s in middle.items()}
                         | ({} if alone else {"ratio": middle["ours"] / middle["webdataset"]}))
    return table

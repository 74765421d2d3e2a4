"""How fast one core turns tars of photographs into training samples: this project's Loader and the
webdataset library. `python bench.py data -h` is the command line.

Both read the same tar, made here: 640x480 JPEGs that cost a decoder what photographs do, with long
captions. Both do the same work: a random-resized crop, a bilinear antialiased resize, tokenization.
The second table compares threads with worker processes.
"""
import contextlib
import importlib.util
import io
import itertools
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

import config
from data import Loader
from inputs.images import Augment, random_crop_box
from inputs.sources import Source, open_source
from inputs.tokenizer import WordPiece, train_vocab
from runtime.errors import ConfigError
from runtime.worker_processes import ProcessLoader

WIDTH, HEIGHT, MAX_TEXT_LEN = 640, 480, 128
JPEG_QUALITY, CAPTION_WORDS = 85, 90
WORDS = ("the a of with in on and is are large small red blue green white black wooden metal old "
         "new street table window tree water person standing beside behind above below light "
         "shadow background foreground image shows building sky")


# -------------------------------------------------------------------------------------- data
def photograph(rng: np.random.Generator) -> Image.Image:
    """Noise with a photograph's spectrum, mostly in brightness, and shapes with edges."""
    fy, fx = np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None, :]
    spectrum = np.maximum(np.hypot(fy, fx), 1 / WIDTH) ** -1.3
    white = rng.standard_normal((4, HEIGHT, WIDTH))
    noise = np.fft.irfft2(np.fft.rfft2(white) * spectrum, s=(HEIGHT, WIDTH))
    noise /= noise.std(axis=(1, 2), keepdims=True)
    pixels = 128 + 45 * noise[:1] + 15 * noise[1:]
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
    pen = ImageDraw.Draw(image)
    for _ in range(12):
        x, y, w, h = rng.integers(0, (WIDTH, HEIGHT, 160, 160)).tolist()
        draw = (pen.rectangle, pen.ellipse)[rng.integers(2)]
        draw((x, y, x + w + 4, y + h + 4), fill=tuple(rng.integers(0, 256, 3).tolist()))
    return image


def make_shard(path: str, count: int) -> float:
    """Write a tar of `count` images with captions. Returns the mean bytes per JPEG."""
    rng = np.random.default_rng(0)
    total_bytes = 0
    with tarfile.open(path, "w") as tar:
        for i in tqdm(range(count), desc="making images", leave=False, disable=None):
            jpeg = io.BytesIO()
            photograph(rng).save(jpeg, "JPEG", quality=JPEG_QUALITY)
            total_bytes += len(jpeg.getvalue())
            caption = " ".join(rng.choice(WORDS.split(), CAPTION_WORDS)).encode()
            for suffix, content in (("jpg", jpeg.getvalue()), ("txt", caption)):
                member = tarfile.TarInfo(f"{i:09d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return total_bytes / count


# -------------------------------------------------------------------------------- contestants
def loader_batches(loader: Loader, batch: int, resolution: int) -> Iterator[dict]:
    for start in itertools.count(0, batch):
        yield loader.batch(range(start, start + batch), resolution)


def webdataset_batches(path: str, tokenizer: WordPiece, augment: Augment, batch: int,
                       resolution: int) -> Iterator[list[np.ndarray]]:
    """As that library does it: its Pillow decoder, then a map over (image, caption)."""
    import webdataset
    rng = np.random.default_rng(0)

    def prepare(sample: tuple[Image.Image, str]) -> tuple[np.ndarray, np.ndarray]:
        image, caption = sample
        box = random_crop_box(*image.size, augment.min_crop_area, rng)
        pixels = image.resize((resolution, resolution), Image.Resampling.BILINEAR, box)
        return np.asarray(pixels), tokenizer.encode(caption, MAX_TEXT_LEN)

    dataset = webdataset.WebDataset(path, shardshuffle=False, empty_check=False).repeat()
    samples = iter(dataset.decode("pil").to_tuple("jpg", "txt").map(prepare))
    while True:
        yield [np.stack(part) for part in zip(*itertools.islice(samples, batch))]


# ------------------------------------------------------------------------------------- timing
@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Inside, this thread and those that it starts share one core, if the system allows that."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def measure(contestants: dict[str, Iterator], batch: int, repeats: int,
            title: str) -> dict[str, tuple[float, float]]:
    """{name: (images per second, CPU milliseconds of this process per image)}: medians of `repeats`
    batches of each, in turns, after one batch to warm up."""
    figures: dict[str, list] = {name: [] for name in contestants}
    for turn in tqdm(range(repeats + 1), desc=title, leave=False, disable=None):  # no bar in a file
        for name, batches in contestants.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            next(batches)
            seconds, cpu = time.perf_counter() - start, time.process_time() - cpu_start
            if turn > 0:
                figures[name].append((batch / seconds, 1e3 * cpu / batch))
    return {name: tuple(map(statistics.median, zip(*rows))) for name, rows in figures.items()}


@contextlib.contextmanager
def make_data(num_images: int) -> Iterator[tuple[str, float, Source, WordPiece]]:
    """(path of a tar, its kB per JPEG, source, tokenizer). The tar is deleted at the end."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "00000.tar")
        jpeg_bytes = make_shard(path, num_images)
        source = open_source(path)
        captions = [source.caption(i) for i in range(min(num_images, 100))]
        yield path, jpeg_bytes / 1e3, source, train_vocab(captions, 4000)


def rows(resolutions: list[int], num_images: int, batch: int, repeats: int,
         alone: bool) -> list[dict]:
    """The table: images per second of each, by resolution. alone: without webdataset."""
    if not alone and importlib.util.find_spec("webdataset") is None:
        raise ConfigError("data compares with the webdataset library: pip install -e '.[bench]', "
                          "or leave it out with --alone")
    augment, table = Augment(min_crop_area=0.4), []
    with make_data(num_images) as (path, jpeg_kb, source, tokenizer), one_core():
        for resolution in resolutions:
            loader = Loader(source, tokenizer, MAX_TEXT_LEN, 0, augment, workers=1)
            contestants: dict[str, Iterator] = {"ours": loader_batches(loader, batch, resolution)}
            if not alone:
                other = webdataset_batches(path, tokenizer, augment, batch, resolution)
                contestants["webdataset"] = other
            figures = measure(contestants, batch, repeats, f"{resolution} px")
            loader.pool.shutdown()
            row = {"px": resolution, "kB per JPEG": jpeg_kb}
            row |= {f"{name}/s": speed for name, (speed, _) in figures.items()}
            if not alone:
                row["speedup"] = figures["ours"][0] / figures["webdataset"][0]
            table.append(row)
    return table


def worker_rows(resolutions: list[int], num_images: int, batch: int, repeats: int,
                counts: list[int]) -> list[dict]:
    """The table: images per second of n threads and of n worker processes, on all cores, with the
    augmentation of the paper's recipes. The CPU time that the process of the training spends per
    image gives the most that any number of worker processes can deliver."""
    cfg, table = config.RECIPES["l14"], []
    augment = Augment(*[getattr(cfg, name) for name in Augment._fields])
    with make_data(num_images) as (_, jpeg_kb, source, tokenizer):
        for resolution, count in itertools.product(resolutions, counts):
            contestants = {}
            for name, kind in (("threads", Loader), ("processes", ProcessLoader)):
                loader = kind(source, tokenizer, MAX_TEXT_LEN, 0, augment, count)
                contestants[name] = loader_batches(loader, batch, resolution)
            title = f"{resolution} px, {count} workers"
            figures = measure(contestants, batch, repeats, title)
            cpu = figures["processes"][1]
            row = {"px": resolution, "kB per JPEG": jpeg_kb, "workers": count}
            row |= {f"{name}/s": speed for name, (speed, _) in figures.items()}
            table.append(row | {"main process, CPU ms": cpu, "limit/s": 1e3 / cpu})
    return table

"""The images nearest to a text: search.png, with their scores.

By vectors, if the run has a text encoder, else by log p(text | image) of its decoder. The images
are those of a folder, with or without captions, or of any other data.
"""
import math
import os
import sys
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from config import Config
from inputs.images import decode_and_augment
from inputs.opening import read_options
from inputs.sources import open_source
from interop.encoder import load_pixels
from runtime.errors import BadSample, DataError

BLOCK = 64       # images that are decoded and scored at once
NUM_SHOWN = 12
SIDE, GAP, LINE, COLUMNS = 160, 10, 18, 4
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def readable_images(cfg: Config, seed: int, count: int,
                    resolution: int) -> Iterator[tuple[str, np.ndarray]]:
    """(name, pixels (R,R,3) uint8) of at most `count` images of cfg.val, or cfg.data. One that
    cannot be read is reported on stderr and left out."""
    where, names = cfg.val or cfg.data, []
    if os.path.isdir(where):
        for folder, _, files in sorted(os.walk(where)):
            names += [os.path.join(folder, file) for file in sorted(files)
                      if file.lower().endswith(ENDINGS)]

        def load(i: int) -> np.ndarray:
            return load_pixels(names[i], resolution)
    else:
        source = open_source(where, cfg.caption_field, seed, "val", count, read_options(cfg))
        names += [source.name(i) for i in range(min(count, len(source)))]

        def load(i: int) -> np.ndarray:
            return decode_and_augment(source.image(i), resolution)
    available = len(names) if os.path.isdir(where) else len(source)
    if available > count:
        print(f"searching the first {count:,} of {available:,} images: --num-samples takes more",
              file=sys.stderr)
    for i, name in enumerate(names[:count]):
        try:
            yield name, load(i)
        except BadSample as problem:
            print(f"skipped: {name}: {problem}", file=sys.stderr)


def nearest(images: Iterator[tuple[str, np.ndarray]],
            score: Callable[[np.ndarray], np.ndarray]) -> list[tuple[float, str, np.ndarray]]:
    """The NUM_SHOWN (score, name, pixels) with the highest score, block by block. score: a function
    of pixels (b,R,R,3) to (b,). DataError without images."""
    best: list[tuple[float, str, np.ndarray]] = []
    block: list[tuple[str, np.ndarray]] = []

    def add() -> None:
        scores = score(np.stack([pixels for _, pixels in block]))
        best.extend((float(s), name, pixels) for s, (name, pixels) in zip(scores, block))
        best.sort(key=lambda item: -item[0])
        del best[NUM_SHOWN:]
        block.clear()
    for item in images:
        block.append(item)
        if len(block) == BLOCK:
            add()
    if block:
        add()
    if not best:
        raise DataError("no image can be read in what --data or --val names: give a folder of "
                        "images, or tars")
    return best


def draw(path: str, text: str, best: list[tuple[float, str, np.ndarray]]) -> None:
    rows = math.ceil(len(best) / COLUMNS)
    height = SIDE + LINE + GAP
    size = COLUMNS * (SIDE + GAP) + GAP, rows * height + LINE + 2 * GAP
    sheet = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    pen.text((GAP, GAP), text, fill="black", font=font)
    for n, (score, name, pixels) in enumerate(best):
        x = GAP + n % COLUMNS * (SIDE + GAP)
        y = 2 * GAP + LINE + n // COLUMNS * height
        sheet.paste(Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BILINEAR), (x, y))
        pen.text((x, y + SIDE + 2), f"{score:.3f} {os.path.basename(name)}"[:24], fill="black",
                 font=font)
    sheet.save(path)

"""Images of any shape: the grids of patches that keep an image's aspect ratio.

For `max_tokens` patch tokens there is a short list of grids, so that few programs are compiled. The
widths and heights of neighbors in the list have ratios that differ by at least 10%, and each image
gets the grid with the ratio closest to its own. From 64 tokens on, that stretches an image by less
than 15%, most by less than 5%. Square images get the largest square grid.
"""
import functools
import math

import numpy as np
from PIL import ExifTags, Image

from inputs.images import TURNED
from runtime.errors import BadSample

RATIO_STEP = 1.1  # between the ratios of two grids

Grid = tuple[int, int]  # rows and columns of patches


@functools.lru_cache(8)
def patch_grids(max_tokens: int) -> list[Grid]:
    """The grids with at most max_tokens patches. Of those with nearly the same ratio, the one with
    the most patches is in the list."""
    side = math.isqrt(max_tokens)
    candidates = []
    for rows in range(1, max_tokens + 1):
        candidates += [(rows, columns) for columns in range(1, max_tokens // rows + 1)]

    def rank(grid: Grid) -> tuple:
        return grid != (side, side), -grid[0] * grid[1], abs(grid[0] - grid[1])
    candidates.sort(key=rank)
    grids: list[Grid] = []
    ratios: list[float] = []
    for rows, columns in candidates:
        ratio = math.log(columns / rows)
        if not grids or np.abs(np.array(ratios) - ratio).min() > math.log(RATIO_STEP) - 1e-9:
            grids.append((rows, columns))
            ratios.append(ratio)
    return grids


def closest_grid(width: int, height: int, max_tokens: int) -> Grid:
    """The grid for an image of this size. BadSample if it is longer than max_tokens patches are."""
    if max(width, height) > max_tokens * min(width, height):
        raise BadSample(f"image is {width} x {height} pixels: with max_tokens {max_tokens}, one "
                        f"side may be at most {max_tokens} times as long as the other")

    def error(grid: Grid) -> float:
        return abs(math.log(grid[1] / grid[0] * height / width))
    return min(patch_grids(max_tokens), key=error)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) of a loaded image, with a camera's orientation applied."""
    turned = image.getexif().get(ExifTags.Base.Orientation) in TURNED
    return image.size[::-1] if turned else image.size

"""Images in, features out: a trained or imported encoder, ready for use.

    encoder = load_encoder("runs/toy")                    # a run's folder, or an encoder's .npz
    tokens, pooled = encoder(["cat.jpg", "dog.png"])      # (2,N,D) for a multimodal model, (2,D)

Images are resized to squares. load_encoder(path, max_tokens=256) keeps their aspect ratio instead
(shapes.py), and `tokens` is then a list.

This file and what it imports need no root module of common name (config, data, train), so it works
beside a project that has its own.

Letters: B images, R pixels per side, N patches, D width.

    python -m interop.encoder ENCODER IMAGE...         writes features.npz
"""
import copy
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from typing import NamedTuple

import jax
import numpy as np
from PIL import Image

import vit
from inputs.images import decode_and_augment, open_image, silence_pillow
from interop.shapes import closest_grid, upright_size
from runtime.checkpoint import atomic_write, read_encoder
from runtime.cpu_tuning import enable_compilation_cache
from runtime.errors import BadSample, ConfigError, run_command

ImageLike = str | os.PathLike | Image.Image | np.ndarray


class Features(NamedTuple):
    tokens: np.ndarray | list[np.ndarray]  # (B,N,D) fp32, before the final norm: what the decoder
                                           # was trained on. With max_tokens, B arrays (N,D)
    pooled: np.ndarray                     # (B,D) fp32: the mean of the tokens, then the final norm


# ----------------------------------------------------------------------------------- pixels
def load_pixels(image: ImageLike, resolution: int) -> np.ndarray:
    """A file, a PIL image or a uint8 array (H,W), (H,W,3) or (H,W,4) to (R,R,3) uint8: decoded at
    full size and resized to a square (bilinear, antialiased). For an opaque image, these pixels
    equal those of the exported image processors; training may decode a JPEG at a reduced size.
    BadSample names an image that cannot be used."""
    return load(image, lambda opened: decode_and_augment(opened, resolution))


def load_rectangle(image: ImageLike, patch_size: int, max_tokens: int) -> np.ndarray:
    """The same, to at most max_tokens patches (rows * P, columns * P, 3) with the image's aspect
    ratio (shapes.closest_grid)."""
    def resize(opened: Image.Image) -> np.ndarray:
        rows, columns = closest_grid(*upright_size(opened), max_tokens)
        return decode_and_augment(opened, (rows * patch_size, columns * patch_size))
    return load(image, resize)


def load(image: ImageLike, decode: Callable[[Image.Image], np.ndarray]) -> np.ndarray:
    """`decode` of the loaded image. BadSample names an image that cannot be used."""
    is_path = isinstance(image, str | os.PathLike)
    name = image if is_path else "the image"
    try:
        with open(image, "rb") if is_path else nullcontext() as file:
            if is_path:
                image = open_image(file)
            elif not isinstance(image, Image.Image):
                image = from_array(image)
            image.load()  # at full size; later a JPEG's reduced size could be requested
            return decode(image)
    except BadSample as problem:
        raise BadSample(f"{name}: {problem}") from None
    except FileNotFoundError:
        raise BadSample(f"{name} does not exist") from None
    except Exception as problem:  # Pillow's plugins raise many types on broken bytes
        reason = getattr(problem, "strerror", None)  # the operating system's; Pillow gives none
        if reason:
            raise BadSample(f"{name}: image cannot be read ({reason})") from None
        raise BadSample(f"{name}: image cannot be decoded ({type(problem).__name__})") from None


def from_array(array: np.ndarray) -> Image.Image:
    array = np.asarray(array)
    has_channels = array.ndim == 3 and array.shape[2] in (3, 4)
    if array.dtype != np.uint8 or not (array.ndim == 2 or has_channels):
        raise BadSample(f"array is {array.dtype} {array.shape}: it must be uint8, (H,W), (H,W,3) "
                        "or (H,W,4)")
    return Image.fromarray(array)


def as_list(images: ImageLike | Sequence[ImageLike]) -> Sequence[ImageLike]:
    """One image as a list of one. An array (B,H,W,3) is several images."""
    if isinstance(images, np.ndarray | jax.Array):
        single = images.ndim < 4
    else:
        single = isinstance(images, str | os.PathLike | Image.Image)
    return [images] if single else images


# ---------------------------------------------------------------------------------- encoder
class Encoder:
    """Parameters, configuration and a compiled forward pass. For more than features, such as
    attention maps: vit.vit(encoder.params, encoder.pixels(images), encoder.cfg, attention=True)."""

    def __init__(self, params: dict, cfg: vit.ViTConfig, resolution: int, max_tokens: int = 0):
        """max_tokens: patch tokens of an image at most, with its aspect ratio kept; 0 for squares
        of `resolution`. ConfigError for a resolution below the patch size."""
        if resolution < cfg.patch_size:
            raise ConfigError(f"resolution {resolution} is below the patch size {cfg.patch_size}")
        self.params, self.cfg, self.resolution = jax.device_put(params), cfg, resolution
        self.max_tokens = max_tokens

        def run(params: dict, images: jax.Array) -> Features:
            out = vit.vit(params, images, cfg)
            return Features(out["tokens"], out["pooled"])
        self.run = jax.jit(run)
        self.pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="decode")

    def pixels(self, images: ImageLike | Sequence[ImageLike]) -> np.ndarray:
        """One image or several to (B,R,R,3) uint8. An array of that shape is returned as it is."""
        square = (self.resolution, self.resolution, 3)
        is_array = isinstance(images, np.ndarray) and images.dtype == np.uint8
        if is_array and images.shape[1:] == square:
            return images
        to_square = functools.partial(load_pixels, resolution=self.resolution)
        return np.stack(list(self.pool.map(to_square, as_list(images))))

    def __call__(self, images: ImageLike | Sequence[ImageLike], batch: int = 32) -> Features:
        """Features of one image or several, at most `batch` at a time. BadSample names an image
        that cannot be used."""
        images = as_list(images)
        if not len(images):
            raise BadSample("there is no image")
        if self.max_tokens:
            return self.encode_rectangles(images, batch)
        tokens, pooled = [], []
        for start, stop, size in batches(len(images), batch):
            features = self.encode_batch(self.pixels(images[start:stop]), size)
            tokens.append(features.tokens)
            pooled.append(features.pooled)
        return Features(np.concatenate(tokens), np.concatenate(pooled))

    def encode_rectangles(self, images: Sequence[ImageLike], batch: int) -> Features:
        """Images of the same grid share a batch. Compiled are, at most, the grids of
        shapes.patch_grids with the sizes of `batches`."""
        to_rectangle = functools.partial(load_rectangle, patch_size=self.cfg.patch_size,
                                         max_tokens=self.max_tokens)
        pixels = list(self.pool.map(to_rectangle, images))
        by_shape: dict[tuple, list[int]] = {}
        for i, array in enumerate(pixels):
            by_shape.setdefault(array.shape, []).append(i)
        tokens: list = [None] * len(images)
        pooled: list = [None] * len(images)
        for rows in by_shape.values():
            for start, stop, size in batches(len(rows), batch):
                chosen = rows[start:stop]
                features = self.encode_batch(np.stack([pixels[i] for i in chosen]), size)
                for i, token_array, vector in zip(chosen, *features):
                    tokens[i], pooled[i] = token_array, vector
        return Features(tokens, np.stack(pooled))

    def encode_batch(self, pixels: np.ndarray, size: int) -> Features:
        """Features of images of one shape, padded to `size` images."""
        count = len(pixels)
        padded = np.pad(pixels, ((0, size - count), (0, 0), (0, 0), (0, 0)))
        out = self.run(self.params, padded)
        return Features(*(np.asarray(x, np.float32)[:count] for x in out))


def batches(count: int, batch: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, size) of batches that cover `count` images. A size is `batch` or a lower power
    of two, so that few programs are compiled; at most a quarter of a batch is padding. ValueError
    for a batch below 1."""
    if batch < 1:
        raise ValueError(f"batch must be 1 or more, not {batch}")
    start = 0
    while start < count:
        left = count - start
        size = min(batch, 1 << (left - 1).bit_length())
        if left < 0.75 * size:
            size = 1 << (left.bit_length() - 1)
        stop = min(start + size, count)
        yield start, stop, size
        start = stop


def load_encoder(path: str, resolution: int = 0, dtype: str = "float32",
                 max_tokens: int = 0) -> Encoder:
    """The encoder of a run's folder, a checkpoint or an .npz. resolution (pixels): 0 for that of
    the last training stage. max_tokens: keeps the aspect ratio of images, with at most so many
    patch tokens each. CheckpointError if it cannot be read, ConfigError if the resolution is too
    low."""
    params, cfg, meta = read_encoder(path)
    cfg = replace(cfg, dtype=dtype, remat="none")
    if max_tokens < 0:
        raise ConfigError(f"max_tokens {max_tokens} must not be negative")
    if max_tokens and resolution:
        raise ConfigError("max_tokens excludes resolution: images are then as large as max_tokens "
                          "patches allow")
    return Encoder(params, cfg, resolution or meta["resolution"], max_tokens)


# -------------------------------------------------------------------------------- baselines
@functools.lru_cache(4)
def random_encoder(like: Encoder, seed: int) -> Encoder:
    """The same encoder with random parameters, as before training, and its compiled program."""
    encoder = copy.copy(like)
    encoder.params = jax.device_put(vit.init(jax.random.key(seed), like.cfg))
    return encoder


def raw_pixel_encoder(like: Encoder) -> Encoder:
    """An encoder of the same grid whose tokens are the normalized pixels of the patches."""
    encoder = Encoder({}, like.cfg, like.resolution)

    def run(_: dict, images: jax.Array) -> Features:
        patches = vit.patchify(vit.normalize(images), like.cfg.patch_size)
        return Features(patches, patches.mean(1))
    encoder.run = jax.jit(run)
    return encoder


def main(argv: list[str]) -> int:
    if len(argv) < 2 or argv[0].startswith("-"):
        sys.exit("usage: python -m interop.encoder ENCODER IMAGE..., where ENCODER is a run's "
                 "folder or an encoder's .npz")
    path, *images = argv
    tokens, pooled = load_encoder(path)(images)
    arrays = {"names": np.array(images), "tokens": tokens, "pooled": pooled}
    atomic_write("features.npz", lambda f: np.savez(f, **arrays))
    print(f"features.npz: tokens {tokens.shape}, pooled {pooled.shape}")
    return 0


if __name__ == "__main__":
    enable_compilation_cache()
    silence_pillow()
    sys.exit(run_command(main, sys.argv[1:]))

"""Pictures in, features out: a trained or imported encoder, ready for use.

    encoder = load_encoder("runs/toy")          # a run's folder, or an encoder's .npz
    found = encoder(["cat.jpg", "dog.png"])     # found.tokens (2,N,D) for a multimodal model, found.pooled (2,D) for the rest

Letters: B images, R pixels a side, N patches, D width.

    python -m interop.encoder ENCODER IMAGE...         writes features.npz
"""
import copy
import functools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

import vit
from inputs import images
from inputs.images import open_image, silence_pillow
from runtime import checkpoint
from runtime.checkpoint import read_encoder
from runtime.cpu_tuning import enable_compilation_cache
from runtime.errors import BadSample, CheckpointError

ImageLike = str | os.PathLike | Image.Image | np.ndarray


class Features(NamedTuple):
    tokens: np.ndarray  # (B,N,D) fp32, before the final norm: what the caption decoder was trained on
    pooled: np.ndarray  # (B,D) fp32, their mean, normed


def whole(image: Image.Image, resolution: int) -> np.ndarray:
    """All of an image, decoded at its full size, so that there is no draft to be had."""
    image.load()
    return images.decode_and_augment(image, resolution)


def load_pixels(picture: ImageLike, resolution: int) -> np.ndarray:
    """A file, PIL image, or uint8 array (H,W), (H,W,3) or (H,W,4) to (R,R,3) uint8: decoded whole, squashed to a square
    (bilinear, antialiased). For an opaque picture these are the very pixels of the exported image processors; training
    may take a JPEG's smaller draft. BadSample names a picture that cannot be used."""
    name = picture if isinstance(picture, str | os.PathLike) else "a picture"
    try:
        if isinstance(picture, str | os.PathLike):
            with open(picture, "rb") as file:
                return whole(open_image(file), resolution)
        if not isinstance(picture, Image.Image):
            picture = np.asarray(picture)
            if picture.dtype != np.uint8 or picture.ndim not in (2, 3) or (picture.ndim == 3 and picture.shape[2] not in (3, 4)):
                raise BadSample(f"array is {picture.dtype} {picture.shape}: it must be uint8, (H,W), (H,W,3) or (H,W,4)")
            picture = Image.fromarray(picture)
        return whole(picture, resolution)
    except BadSample as problem:
        raise BadSample(f"{name}: {problem}") from None
    except FileNotFoundError:
        raise BadSample(f"{name} does not exist") from None
    except Exception as problem:  # Pillow's plugins raise what they like on broken bytes
        if why := getattr(problem, "strerror", None):  # the operating system's; Pillow gives none
            raise BadSample(f"{name}: image cannot be read ({why})") from None
        raise BadSample(f"{name}: image cannot be decoded ({type(problem).__name__})") from None


def as_list(images: ImageLike | Sequence[ImageLike]) -> Sequence[ImageLike]:
    """One picture as a list of one; an array (B,H,W,3) is several."""
    one = images.ndim < 4 if isinstance(images, np.ndarray | jax.Array) else isinstance(images, str | os.PathLike | Image.Image)
    return [images] if one else images


class Encoder:
    """Parameters with all that is needed to use them. For more than features, such as attention maps:
    vit.vit(encoder.params, encoder.pixels(images), encoder.cfg, attention=True)."""

    def __init__(self, params: dict, cfg: vit.ViTConfig, resolution: int):
        if resolution < cfg.patch_size:
            raise ValueError(f"resolution {resolution} is below the patch size {cfg.patch_size}")
        self.params, self.cfg, self.resolution = jax.device_put(params), cfg, resolution
        self.run = jax.jit(lambda params, images: Features(*map(vit.vit(params, images, cfg).get, Features._fields)))
        self.pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="decode")

    def pixels(self, images: ImageLike | Sequence[ImageLike]) -> np.ndarray:
        """One picture or several to (B,R,R,3) uint8, which such pixels already are."""
        if isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.shape[1:] == (self.resolution, self.resolution, 3):
            return images
        return np.stack(list(self.pool.map(functools.partial(load_pixels, resolution=self.resolution), as_list(images))))

    def __call__(self, images: ImageLike | Sequence[ImageLike], batch: int = 32) -> Features:
        """Features of one picture or several, `batch` at a time; the last few are filled up to a power of two, so
        that few shapes are compiled. BadSample names a picture that cannot be used."""
        images = as_list(images)
        found = []
        for start in range(0, len(images), batch):
            some = self.pixels(images[start:start + batch])
            size = min(batch, 1 << (len(some) - 1).bit_length())
            out = self.run(self.params, np.pad(some, ((0, size - len(some)), (0, 0), (0, 0), (0, 0))))
            found.append(Features(*(np.asarray(x, np.float32)[:len(some)] for x in out)))
        if not found:
            raise BadSample("there is no picture")
        return Features(*map(np.concatenate, zip(*found)))


@functools.lru_cache(4)
def random_encoder(like: Encoder, seed: int) -> Encoder:
    """The same encoder as it is before training, and its compiled program: what trained features must beat."""
    made = copy.copy(like)
    made.params = jax.device_put(vit.init(jax.random.key(seed), like.cfg))
    return made


def raw_pixel_encoder(like: Encoder) -> Encoder:
    """Tokens that are the pixels of the patches, of the same grid: likewise."""
    made = Encoder({}, like.cfg, like.resolution)

    def run(_: dict, images: jax.Array) -> Features:
        patches = vit.patchify(vit.normalize(images), like.cfg.patch_size)
        return Features(patches, patches.mean(1))
    made.run = jax.jit(run)
    return made


def load_encoder(path: str, resolution: int = 0, dtype: str = "float32") -> Encoder:
    """The encoder of a run's folder or an .npz, at the resolution it was trained at last, or another one in pixels.
    CheckpointError or ValueError say what does not fit."""
    params, cfg, meta = read_encoder(path)
    return Encoder(params, replace(cfg, dtype=dtype, remat="none"), resolution or meta["resolution"])


if __name__ == "__main__":
    import sys
    if len(sys.argv) < 3 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m interop.encoder ENCODER IMAGE..., where ENCODER is a run's folder or an encoder's .npz")
    enable_compilation_cache()
    silence_pillow()
    try:
        found: Any = load_encoder(sys.argv[1])(sys.argv[2:])
    except (CheckpointError, BadSample, ValueError) as problem:
        sys.exit(f"error: {problem}")
    checkpoint.atomic_write("features.npz", lambda f: np.savez(f, names=np.array(sys.argv[2:]), **found._asdict()))
    print(f"features.npz: tokens {found.tokens.shape}, pooled {found.pooled.shape}")

"""TODO."""
import warnings
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from runtime.errors import BadSample

CROP_ATTEMPTS = 100           # at a crop, before the whole image is taken
CROP_ASPECTS = (0.75, 1.33)   # width / height of a crop: TensorFlow's defaults, which the release keeps
JITTER_PROB = 0.8           # probability that an image's colors are jittered
TINY = np.float32(1e-12)  # in place of 0 as a divisor
JITTER_BLOCK = 8192             # pixels whose colors change at a time: so intermediate results stay in the cache
CHANNEL_HUES = np.arange(0, 6, 2, dtype=np.float32)[:, None]  # of red, green and blue, in sixths of the circle
EXIF_TRANSPOSE = dict(enumerate(map(Image.Transpose, (0, 3, 1, 5, 4, 6, 2)), 2))  # what undoes a camera's orientation, 2 to 8


class Augment(NamedTuple):
    """What training does to a picture; the held-out ones are only resized."""
    min_crop_area: float = 0.4    # least area of the random-resized crop; 1 for none
    hflip: bool = False   # off: a mirrored picture makes "left of" a lie, and letters unreadable
    jitter: float = 0.0  # brightness, contrast and saturation by a factor of 1 +- this
    hue: float = 0.0     # hue by +- this share of the color circle
    grayscale_prob: float = 0.0    # chance of a picture without color


def random_crop_box(width: int, height: int, least: float, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """A random-resized crop, drawn as TensorFlow does: an aspect, then a height among those that
    fit and give an area of `least`..1 of the image, then a place. An aspect that has no such height
    is drawn anew. The whole image if none is found, which is so where its sides are too unlike."""
    for _ in range(CROP_ATTEMPTS):
        aspect = rng.uniform(*CROP_ASPECTS)
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
    """HSV's hue turned by a share of the color circle, half of it at most: greatest and least
    channel stay. A channel is greatest within a sixth of the circle from its own hue, and least
    from two sixths on."""
    red, green, blue = x
    high, low = x.max(0), x.min(0)
    chroma = high - low
    scale = 1 / np.maximum(chroma, TINY)
    hue = np.where(green == high, 2 + (blue - red) * scale, 4 + (red - green) * scale)
    hue = np.where(red == high, (green - blue) * scale, hue) + np.float32(6 * shift)  # in sixths
    apart = np.abs(hue - CHANNEL_HUES)
    apart = np.abs(np.minimum(apart, 6 - apart))  # the shorter way round
    return low + chroma * np.clip(2 - apart, 0, 1)


ADJUST = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)


def color_jitter(image: np.ndarray, augment: Augment, rng: np.random.Generator) -> np.ndarray:
    """(R,R,3) uint8, with probability JITTERED changed in brightness, contrast, saturation and hue,
    in random order, each result cut to 0..1. Factors and shift are uniform, as in SimCLR's v2.

    The changes are TensorFlow's, which the release uses. torchvision differs in two: its contrast
    is about the mean gray level, one number for all channels, and its saturation blends each pixel
    with its gray level. On 8-bit images torchvision also rounds after each change; here, once."""
    if rng.random() >= JITTER_PROB:
        return image
    order = rng.permutation(len(ADJUST))
    lowest = max(0, 1 - augment.jitter)
    drawn = rng.uniform([lowest] * 3 + [-augment.hue], [1 + augment.jitter] * 3 + [augment.hue])
    x = image.reshape(-1, 3).T.astype(np.float32, order="C")
    x /= 255
    for n in order.tolist():
        if augment.hue if n == 3 else augment.jitter:
            mean = [x.mean(1, keepdims=True)] if n == 1 else []
            for start in range(0, x.shape[1], JITTER_BLOCK):
                part = x[:, start:start + JITTER_BLOCK]
                np.clip(ADJUST[n](part, drawn[n], *mean), 0, 1, out=part)
    x *= 255
    changed = np.empty_like(image)
    np.copyto(changed.reshape(-1, 3).T, np.rint(x, out=x), casting="unsafe")
    return changed


def decode_and_augment(image: Image.Image, resolution: int, augment: Augment | None = None, rng: Any = None) -> np.ndarray:
    """A picture of any mode and size to (R,R,3) uint8: (crop,) bilinear antialiased resize of the whole to a square.
    Transparency lies on white, an animation gives its first frame, a camera's rotation is applied. BadSample if it
    cannot be decoded."""
    if image.mode in ("I", "F"):
        raise BadSample("image has 32-bit pixels, and which of them is white is not known")
    try:
        width, height = image.size
        box = random_crop_box(width, height, augment.min_crop_area, rng) if augment and augment.min_crop_area < 1 else (0, 0, width, height)
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
        if turned in EXIF_TRANSPOSE:
            image = image.transpose(EXIF_TRANSPOSE[turned])
        if augment:
            if augment.hflip and rng.random() < 0.5:
                image = ImageOps.mirror(image)
            if augment.jitter or augment.hue:
                image = Image.fromarray(color_jitter(np.asarray(image), augment, rng))
            if augment.grayscale_prob and rng.random() < augment.grayscale_prob:
                image = ImageOps.grayscale(image).convert("RGB")
        return np.asarray(image)
    except Exception as problem:  # Pillow's plugins raise what they like on broken bytes
        raise BadSample(f"image cannot be decoded ({type(problem).__name__})") from None


IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # told by the bytes, not by the name; others might start a program (EPS)
MAX_IMAGE_PIXELS = 89_478_485  # of an image: 256 MiB as RGB; above that Pillow itself only warns


def open_image(file: BinaryIO) -> Image.Image:
    """The image in an open file, not yet decoded. All files enter through here, so no bytes reach a
    plugin that is not in FORMATS, and none are decoded to more than MOST_PIXELS. BadSample says
    what is wrong."""
    try:
        image = Image.open(file, formats=IMAGE_FORMATS)
    except UnidentifiedImageError:
        names = f"{', '.join(IMAGE_FORMATS[:-1])} or {IMAGE_FORMATS[-1]}"
        raise BadSample(f"image cannot be opened: it is not a whole {names} file") from None
    except Exception as problem:  # Pillow's plugins raise what they like on broken bytes
        raise BadSample(f"image cannot be opened ({type(problem).__name__})") from None
    pixels = image.width * image.height
    if pixels > MAX_IMAGE_PIXELS:
        raise BadSample(f"image has {pixels:,} pixels, and more than {MAX_IMAGE_PIXELS:,} are not read")
    return image


def silence_pillow() -> None:
    """Do not print what Pillow warns of, such as damaged EXIF: an image that cannot be used raises.
    The warning filters belong to the whole process, so only a program calls this, as it starts."""
    warnings.filterwarnings("ignore", module=r"PIL\.")

"""From a file's bytes to the pixels that training reads: open, decode, crop, resize, augment.

All files enter through `open_image`, which accepts few formats and bounds the size. Color jitter
follows TensorFlow's formulas, as released (docs/fidelity.md).

Letters: R pixels per side, P pixels of an image.
"""
import io
import warnings
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from runtime.errors import BadSample, DataError

# by content, not by name; other formats might start a program (EPS)
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_IMAGE_PIXELS = 89_478_485  # 256 MiB as RGB; above that Pillow itself only warns
EXIF_TRANSPOSE = {  # what undoes a camera's orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}
TURNED = (5, 6, 7, 8)        # orientations that exchange width and height
CROP_ATTEMPTS = 100          # before the complete image is taken
CROP_ASPECTS = (0.75, 1.33)  # width / height: TensorFlow's defaults, which the release keeps
JITTER_PROB = 0.8            # of an image
JITTER_BLOCK = 8192          # pixels changed at a time, so that intermediate results stay in cache

OUT_OF_MEMORY = ("memory ran out while an image was decoded: give the process more of it, or lower "
                 "--workers or --worker-processes; a run continues from its last checkpoint")
Box = tuple[float, float, float, float]  # left, top, right, bottom


class Augment(NamedTuple):
    """What training does to an image. Validation images are only resized."""
    min_crop_area: float = 0.4   # of the random-resized crop, as a share of the image; 1 for none
    hflip: bool = False          # makes captions that say left or right untrue
    jitter: float = 0.0          # factor of 1 +- this on brightness, contrast and saturation
    hue: float = 0.0             # shift of +- this share of the color circle
    grayscale_prob: float = 0.0


# ---------------------------------------------------------------------------- open and decode
def open_image(file: BinaryIO) -> Image.Image:
    """The image in an open file, not yet decoded. BadSample says what is wrong."""
    try:
        image = Image.open(file, formats=IMAGE_FORMATS)
    except UnidentifiedImageError:
        names = f"{', '.join(IMAGE_FORMATS[:-1])} or {IMAGE_FORMATS[-1]}"
        raise BadSample(f"image cannot be opened: it is not a complete {names} file") from None
    except MemoryError:
        raise DataError(OUT_OF_MEMORY) from None
    except Exception as problem:  # Pillow's plugins raise anything on corrupt bytes
        raise BadSample(f"image cannot be opened ({type(problem).__name__})") from None
    pixels = image.width * image.height
    if pixels > MAX_IMAGE_PIXELS:
        raise BadSample(f"image has {pixels:,} pixels, and more than {MAX_IMAGE_PIXELS:,} are not "
                        "read")
    return image


def read_image(image: bytes | Image.Image) -> Image.Image:
    """Opens a sample's image if it is the bytes of a file; an Image is returned as it is."""
    return open_image(io.BytesIO(image)) if isinstance(image, bytes) else image


def decode_and_augment(image: Image.Image, resolution: int | tuple[int, int],
                       augment: Augment | None = None, rng: Any = None) -> np.ndarray:
    """An image of any mode and size to (R,R,3) uint8, or (height,width,3) for such a pair. It is
    resized, not padded.

    Alpha is composited on white, an animation's first frame is used, a camera's orientation is
    applied. `augment` needs rng, a numpy Generator. BadSample if it cannot be decoded, DataError if
    memory runs out."""
    if image.mode in ("I", "F"):
        raise BadSample("image has 32-bit pixels, whose white level is not known")
    try:
        width, height = image.size
        box: Box = (0, 0, width, height)
        if augment and augment.min_crop_area < 1:
            box = random_crop_box(width, height, augment.min_crop_area, rng)
        rows, columns = np.broadcast_to(resolution, 2).tolist()
        box = set_draft_mode(image, box, max(rows, columns))
        image.load()
        orientation = camera_orientation(image)  # some conversions lose it
        size = (rows, columns) if orientation in TURNED else (columns, rows)
        image = to_rgb(image).resize(size, Image.Resampling.BILINEAR, box)
        if orientation in EXIF_TRANSPOSE:
            image = image.transpose(EXIF_TRANSPOSE[orientation])
        return np.asarray(augment_image(image, augment, rng) if augment else image)
    except Exception as problem:  # Pillow's plugins raise anything on corrupt bytes
        # Pillow refuses very long rows by a MemoryError too.
        if isinstance(problem, MemoryError) and max(image.size) < 1 << 24:
            raise DataError(OUT_OF_MEMORY) from None
        raise BadSample(f"image cannot be decoded ({type(problem).__name__})") from None


def camera_orientation(image: Image.Image) -> int | None:
    """From its EXIF data, None if there is none or it is damaged."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Pillow raises anything on corrupt bytes
        return None


def set_draft_mode(image: Image.Image, box: Box, resolution: int) -> Box:
    """Lets a JPEG decode at 1/2, 1/4 or 1/8 of its size where that is enough for the crop. Returns
    the box in the pixels that will be decoded."""
    width, height = image.size
    left, top, right, bottom = box
    needed = (int(resolution * width / max(right - left, 1)) + 1,
              int(resolution * height / max(bottom - top, 1)) + 1)
    draft = image.draft("RGB", needed)
    if draft is None:
        return box
    # not rounded: 1003 pixels at 1/8 are 125.4, of 126 decoded (the last is partly outside)
    _, _, new_width, new_height = draft[1]
    return (left * new_width / width, top * new_height / height,
            right * new_width / width, bottom * new_height / height)


def to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def silence_pillow() -> None:
    """Do not print Pillow's warnings, such as those on damaged EXIF. An image that cannot be used
    raises. Only a command calls this, as it starts, because warning filters are global."""
    warnings.filterwarnings("ignore", module=r"PIL\.")


# ------------------------------------------------------------------------------- augmentation
def random_crop_box(width: int, height: int, min_area: float, rng: np.random.Generator) -> Box:
    """A random-resized crop, sampled as TensorFlow does: an aspect, then a height among those that
    fit and give an area of min_area..1 of the image, then a position. An aspect without such a
    height is drawn again. The complete image if no attempt fits (a very long image)."""
    for _ in range(CROP_ATTEMPTS):
        aspect = rng.uniform(*CROP_ASPECTS)
        lowest = float(np.sqrt(min_area * width * height / aspect))
        highest = min(height, width / aspect)
        if lowest <= highest:
            crop_height = rng.uniform(lowest, highest)
            crop_width = min(crop_height * aspect, width)
            left = rng.uniform(0, width - crop_width)
            top = rng.uniform(0, height - crop_height)
            return left, top, left + crop_width, top + crop_height
    return 0.0, 0.0, float(width), float(height)


def augment_image(image: Image.Image, augment: Augment, rng: np.random.Generator) -> Image.Image:
    """Flip, color jitter and grayscale of a cropped image."""
    if augment.hflip and rng.random() < 0.5:
        image = ImageOps.mirror(image)
    if augment.jitter or augment.hue:
        image = Image.fromarray(color_jitter(np.asarray(image), augment, rng))
    if augment.grayscale_prob and rng.random() < augment.grayscale_prob:
        image = ImageOps.grayscale(image).convert("RGB")
    return image


def color_jitter(image: np.ndarray, augment: Augment, rng: np.random.Generator) -> np.ndarray:
    """(R,R,3) uint8, with probability JITTER_PROB changed in brightness, contrast, saturation and
    hue, in random order, each result clipped to 0..1. Amounts are uniform, as in SimCLR v2.

    torchvision differs from TensorFlow: its contrast uses the mean gray level of all channels, its
    saturation blends with the gray level, and on 8-bit images it rounds after each change."""
    if rng.random() >= JITTER_PROB:
        return image
    order = rng.permutation(len(ADJUSTMENTS))
    least = max(0, 1 - augment.jitter)
    amounts = rng.uniform([least, least, least, -augment.hue],
                          [1 + augment.jitter] * 3 + [augment.hue])
    x = image.reshape(-1, 3).T.astype(np.float32, order="C")  # (3,P)
    x /= 255
    for n in order.tolist():
        adjust, amount = ADJUSTMENTS[n], amounts[n]
        strength = augment.hue if adjust is adjust_hue else augment.jitter
        if not strength:
            continue
        mean = x.mean(1, keepdims=True)
        for start in range(0, x.shape[1], JITTER_BLOCK):
            block = x[:, start:start + JITTER_BLOCK]
            np.clip(adjust(block, amount, mean), 0, 1, out=block)
    x *= 255
    return np.rint(x, out=x).astype(np.uint8).T.reshape(image.shape)


# Each adjustment gets x (3,P) float32 in 0..1, an amount and the means (3,1) of the channels.
TINY = np.float32(1e-12)  # in place of 0 as a divisor
CHANNEL_HUES = np.float32([[0], [2], [4]])  # of red, green and blue, in sixths of the circle


def adjust_brightness(x: np.ndarray, factor: float, mean: np.ndarray) -> np.ndarray:
    return x * np.float32(factor)


def adjust_contrast(x: np.ndarray, factor: float, mean: np.ndarray) -> np.ndarray:
    """Each channel away from its mean, or towards it."""
    return x * np.float32(factor) + mean * np.float32(1 - factor)


def adjust_saturation(x: np.ndarray, factor: float, mean: np.ndarray) -> np.ndarray:
    """HSV's saturation times the factor, at most 1. Hue and the largest value stay."""
    high, low = x.max(0), x.min(0)
    max_factor = high / np.maximum(high - low, TINY)
    return high + (x - high) * np.minimum(np.float32(factor), max_factor)


def adjust_hue(x: np.ndarray, shift: float, mean: np.ndarray) -> np.ndarray:
    """HSV's hue turned by a share of the color circle, at most half of it. The largest and the
    smallest value stay. A channel has the largest value up to a sixth of the circle from its own
    hue, the smallest from two sixths on, and a linear mix between."""
    red, green, blue = x
    high, low = x.max(0), x.min(0)
    chroma = high - low
    scale = 1 / np.maximum(chroma, TINY)
    hue = np.where(green == high, 2 + (blue - red) * scale, 4 + (red - green) * scale)
    hue = np.where(red == high, (green - blue) * scale, hue) + np.float32(6 * shift)  # in sixths
    distance = np.abs(hue - CHANNEL_HUES)
    distance = np.abs(np.minimum(distance, 6 - distance))  # the shorter way round
    return low + chroma * np.clip(2 - distance, 0, 1)


ADJUSTMENTS = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)

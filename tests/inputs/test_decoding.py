"""An image of any kind becomes (R,R,3) uint8 pixels, and training changes only what it should."""
import numpy as np
import pytest
from PIL import Image, ImageOps

from inputs.images import Augment, decode_and_augment, random_crop_box
from runtime.errors import BadSample
from tests.helpers.samples import opened, photo

RED, GREEN, BLUE, BLACK, WHITE = (255, 0, 0), (0, 128, 0), (0, 0, 255), (0, 0, 0), (255, 255, 255)


def is_near(a, b, limit=1.0):
    difference = np.asarray(a, np.float32) - np.asarray(b, np.float32)
    return np.abs(difference).mean() <= limit


def halves(mode, left, right):
    image = Image.new(mode, (40, 20), right)
    image.paste(left, (0, 0, 20, 20))
    return image


# ------------------------------------------------------------------------------------- modes
RED_BLUE = halves("RGB", RED, BLUE)
PALETTE = halves("P", 0, 1)
PALETTE.putpalette((*BLUE, *RED))
CLEAR_AND_HALF_RED = halves("RGBA", (0, 0, 0, 0), (255, 0, 0, 128))
CYAN_AND_BLACK = halves("CMYK", (255, 0, 0, 0), (0, 0, 0, 255))
SIXTEEN = Image.fromarray(np.repeat([[0x4000, 0xFFFF]], 20, 1).repeat(20, 0).astype(np.uint16))
FRAMES = {"save_all": True, "append_images": [Image.new("RGB", (40, 20), GREEN)] * 2}
LOSSLESS = FRAMES | {"lossless": True}
# kind: (image, format, how it is saved, color of the left half, of the right half)
KINDS = {
    "rgb": (RED_BLUE, "PNG", {}, RED, BLUE),
    "rgba on white": (CLEAR_AND_HALF_RED, "PNG", {}, WHITE, (255, 127, 127)),
    "palette with a clear color": (PALETTE, "PNG", {"transparency": 0}, WHITE, RED),
    "palette with alphas": (PALETTE, "PNG", {"transparency": bytes((255, 0))}, BLUE, WHITE),
    "rgb with a clear color": (RED_BLUE, "PNG", {"transparency": RED}, WHITE, BLUE),
    "gray and alpha": (halves("LA", (0, 255), (0, 0)), "PNG", {}, BLACK, WHITE),
    "cmyk": (CYAN_AND_BLACK, "JPEG", {"quality": 95}, (0, 255, 255), BLACK),
    "gray": (halves("L", 10, 200), "JPEG", {"quality": 95}, (10, 10, 10), (200, 200, 200)),
    "16-bit": (SIXTEEN, "PNG", {}, (64, 64, 64), WHITE),
    "16-bit tiff": (SIXTEEN, "TIFF", {}, (64, 64, 64), WHITE),
    "1-bit": (halves("1", 0, 1), "PNG", {}, BLACK, WHITE),
    "bmp": (RED_BLUE, "BMP", {}, RED, BLUE),
    "animated gif": (RED_BLUE, "GIF", FRAMES, RED, BLUE),
    "animated webp": (RED_BLUE, "WEBP", LOSSLESS, RED, BLUE),
    "animated png": (RED_BLUE, "PNG", FRAMES, RED, BLUE),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_of_any_mode_keeps_its_colors(kind):
    image, form, options, left, right = KINDS[kind]
    pixels = decode_and_augment(opened(image, form, **options), 16)
    assert pixels.shape == (16, 16, 3) and pixels.dtype == np.uint8
    assert is_near(pixels[:, 2], left, 3)
    assert is_near(pixels[:, -3], right, 3)
    augment = Augment(0.3, True, 0.4, 0.1, 0.5)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        pixels = decode_and_augment(opened(image, form, **options), 9, augment, rng)
        assert pixels.shape == (9, 9, 3)


def test_pixels_without_a_known_white_are_refused():
    for image in (Image.new("F", (9, 9), 0.5), Image.new("I", (9, 9), 70000)):
        with pytest.raises(BadSample, match="32-bit"):
            decode_and_augment(opened(image, "TIFF"), 4)


# -------------------------------------------------------------------------------- orientation
def transposed(image, method):
    return image.copy() if method is None else image.transpose(method)


def is_undone(upright, method, exif):
    """Whether the orientation in `exif` undoes this transposition."""
    image = transposed(upright, method)
    image.info["exif"] = exif.tobytes()
    return np.array_equal(upright, ImageOps.exif_transpose(image))


@pytest.mark.parametrize("form, mode", [("JPEG", "RGB"), ("PNG", "RGB"), ("PNG", "RGBA"),
                                        ("WEBP", "RGBA"), ("PNG", "I;16"), ("TIFF", "RGB")])
def test_the_orientation_of_a_camera_is_undone(form, mode):
    upright = photo(40, 60).convert("L").convert("RGB")
    expected = decode_and_augment(upright, 24)
    options = {} if form in ("PNG", "TIFF") else {"quality": 95}
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        methods = [m for m in (None, *Image.Transpose) if is_undone(upright, m, exif)]
        stored = transposed(upright, methods[0])
        if mode == "I;16":
            stored = Image.fromarray(np.asarray(stored.convert("L")).astype(np.uint16) * 257)
        elif mode == "RGBA":
            stored.putalpha(254)
        pixels = decode_and_augment(opened(stored, form, exif=exif, **options), 24)
        assert is_near(pixels, expected, 4), orientation


# ------------------------------------------------------------------------------ sizes and crops
@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (2, 2), (5000, 3)])
@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_extreme_shapes(size, form):
    color = (200, 100, 50)
    image = Image.new("RGB", size, color)
    assert is_near(decode_and_augment(opened(image, form), 16), color, 3)
    for seed in range(1, 20):
        rng = np.random.default_rng(seed)
        assert is_near(decode_and_augment(opened(image, form), 16, Augment(), rng), color, 3)


@pytest.mark.parametrize("size", [(411, 307), (1003, 771)])  # no multiples of the 8 x 8 blocks
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_jpeg_decoded_at_low_resolution_is_nearly_the_same(mode, size):
    image = photo(*size, detail=20).convert(mode)
    full = opened(image, "JPEG", quality=95)
    full.load()  # decoded: draft does nothing now
    for seed in range(8):
        augment = Augment() if seed else None
        small = decode_and_augment(opened(image, "JPEG", quality=95), 64, augment,
                                   np.random.default_rng(seed))
        expected = decode_and_augment(full.copy(), 64, augment, np.random.default_rng(seed))
        assert is_near(small, expected, 2)


def test_a_crop_is_inside_the_image_and_has_the_area_it_should():
    shares = []
    for seed in range(300):
        for w, h in ((100, 80), (33, 47), (400, 300)):
            box = random_crop_box(w, h, 0.4, np.random.default_rng(seed))
            x0, y0, x1, y1 = box
            assert 0 <= x0 < x1 <= w + 1e-9
            assert 0 <= y0 < y1 <= h + 1e-9
            assert box == random_crop_box(w, h, 0.4, np.random.default_rng(seed))
            shares.append((x1 - x0) * (y1 - y0) / (w * h))
    assert 0.4 <= min(shares) < 0.45
    assert 0.95 < max(shares) <= 1 + 1e-9
    assert len(set(shares)) > 600


# ------------------------------------------------------------------------------- augmentation
def augmented(image, **options):
    """Twenty draws."""
    augment = Augment(min_crop_area=1.0, **options)
    return [decode_and_augment(image, 24, augment, np.random.default_rng(s)) for s in range(20)]


def test_only_the_chosen_augmentations_change_an_image():
    image = photo()
    plain = decode_and_augment(image, 24)
    assert not Augment().hflip
    assert all(np.array_equal(pixels, plain) for pixels in augmented(image))
    flipped = {pixels.tobytes() for pixels in augmented(image, hflip=True)}
    assert flipped == {plain.tobytes(), plain[:, ::-1].tobytes()}
    spreads = [np.ptp(pixels, axis=-1).max() for pixels in augmented(image, grayscale_prob=0.5)]
    assert 0 < sum(spread == 0 for spread in spreads) < 20
    jittered = {pixels.tobytes() for pixels in augmented(image, jitter=0.4)}
    assert 10 < len(jittered) < 20
    assert plain.tobytes() in jittered

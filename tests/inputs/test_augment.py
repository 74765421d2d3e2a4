"""Random crops and color jitter, each against an independent formula."""
import colorsys
import itertools

import numpy as np
import pytest
from PIL import Image

import config
from inputs import images
from inputs.images import Augment, decode_and_augment
from tests.helpers.samples import photo

RELEASED = Augment(jitter=0.32, hue=0.08, grayscale_prob=0.2)
PAPER = ("ti16", "s16", "b16", "l14", "so400m14", "h14", "g14")


def flat(color, side=4):
    return Image.new("RGB", (side, side), color)


def hsv(pixels):
    return np.array([colorsys.rgb_to_hsv(*p) for p in np.asarray(pixels).reshape(-1, 3) / 255])


def augmented(image, count=400, side=4, **settings):
    """(count,R,R,3): the image augmented by `count` generators."""
    augment = Augment(min_crop_area=1.0, **settings)
    rngs = [np.random.default_rng(seed) for seed in range(count)]
    return np.stack([decode_and_augment(image.copy(), side, augment, rng) for rng in rngs])


def crop_boxes(width, height, min_area, count=2000):
    rngs = [np.random.default_rng(seed) for seed in range(count)]
    return np.array([images.random_crop_box(width, height, min_area, rng) for rng in rngs])


@pytest.mark.parametrize("size", [(300, 100), (100, 300), (640, 480), (310, 100)])
def test_a_long_image_is_cropped_and_never_squashed(size):
    x0, y0, x1, y1 = crop_boxes(*size, 0.4).T
    share, aspect = (x1 - x0) * (y1 - y0) / np.prod(size), (x1 - x0) / (y1 - y0)
    assert share.min() >= 0.4 - 1e-9 and share.max() <= 1
    assert aspect.min() >= 3 / 4 - 1e-9 and aspect.max() <= 4 / 3 + 1e-9
    assert min(x0.min(), y0.min()) >= 0
    assert x1.max() <= size[0] + 1e-9 and y1.max() <= size[1] + 1e-9


def test_an_image_that_no_crop_fits_is_not_cropped():
    assert (crop_boxes(1000, 200, 0.4, 20) == (0, 0, 1000, 200)).all()


def test_crops_are_distributed_as_released():
    """The aspect is uniform, then the height among those that give enough area and fit."""
    x0, y0, x1, y1 = crop_boxes(400, 400, 0.4, 6000).T
    aspect, height = (x1 - x0) / (y1 - y0), y1 - y0
    least, most = np.sqrt(0.4 * 400 * 400 / aspect), np.minimum(400, 400 / aspect)
    quantiles = np.array([0.05, 0.25, 0.5, 0.75, 0.95])
    for values, low, high in ((aspect, 0.75, 1.33), ((height - least) / (most - least), 0, 1)):
        expected = low + (high - low) * quantiles
        assert np.abs(np.quantile(values, quantiles) - expected).max() < 0.025
    free = np.maximum(400 - (x1 - x0), 1e-9)
    assert abs(np.mean((x0 / free)[free > 9]) - 0.5) < 0.02


def triangle(size, new):
    """(new,size) weights of the antialiased bilinear filter."""
    scale = max(size / new, 1)
    centers = (np.arange(new) + 0.5) * size / new
    weights = np.maximum(1 - np.abs((np.arange(size) + 0.5 - centers[:, None]) / scale), 0)
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("size", [(97, 61), (64, 64), (20, 30)])
def test_resize_is_antialiased_bilinear_and_rounds_to_nearest(size):
    image = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    wide = np.einsum("ah,hwc->awc", triangle(size[1], 24), image.astype(float))
    exact = np.einsum("bw,awc->abc", triangle(size[0], 24), wide)
    error = decode_and_augment(Image.fromarray(image), 24) - exact
    assert np.abs(error).max() < 1.1 and abs(error.mean()) < 0.1  # truncation would give -0.5


def some_colors():
    ramp = np.array(list(itertools.product((0.0, 0.2, 0.55, 1.0), repeat=3)), np.float32)
    drawn = np.random.default_rng(0).random((192, 3), np.float32)
    return np.concatenate([ramp, drawn]).reshape(16, 16, 3)


def reference(name, image, amount):
    """The adjustment of an (R,R,3) image in 0..1, pixel by pixel in float64."""
    x = image.astype(np.float64)
    if name == "brightness":
        return (x * amount).clip(0, 1)
    if name == "contrast":
        mean = x.reshape(-1, 3).mean(0)
        return ((x - mean) * amount + mean).clip(0, 1)
    pixels = np.array([colorsys.rgb_to_hsv(*p) for p in x.reshape(-1, 3)])
    if name == "saturation":
        pixels[:, 1] = (pixels[:, 1] * amount).clip(0, 1)
    else:
        pixels[:, 0] = (pixels[:, 0] + amount) % 1
    return np.array([colorsys.hsv_to_rgb(*p) for p in pixels]).reshape(x.shape)


NAMES = ("brightness", "contrast", "saturation", "hue")
AMOUNTS = (1.3, 0.7, 1.25, 0.07)


@pytest.mark.parametrize("name, amount", [
    *itertools.product(NAMES[:3], (0.0, 0.5, 0.68, 1.0, 1.32, 2.0)),
    *itertools.product(["hue"], (-0.5, -0.08, -0.01, 0.0, 0.08, 0.3, 0.5))])
def test_each_adjustment_equals_its_formula(name, amount):
    image = some_colors()
    planes = image.reshape(-1, 3).T.copy()
    adjust = getattr(images, f"adjust_{name}")
    adjusted = adjust(planes, amount, planes.mean(1, keepdims=True)).T.reshape(image.shape)
    assert np.abs(adjusted.clip(0, 1) - reference(name, image, amount)).max() < 2e-6


class FixedDraws:
    """A generator that draws a given order, and amounts in the order of NAMES."""
    def __init__(self, order, amounts):
        self.order, self.amounts = order, amounts

    def random(self):
        return 0.0

    def permutation(self, count):
        assert count == 4
        return np.array(self.order)

    def uniform(self, low, high):
        assert len(low) == len(high) == 4
        return np.array(self.amounts)


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_adjustments_follow_one_another_and_each_result_is_clipped(order):
    """Clipped between them, 0.9 x 1.3 is white, and no contrast brings it back."""
    pixels = np.round(some_colors() * 255)
    expected = pixels.astype(np.float64) / 255
    for n in order:
        expected = reference(NAMES[n], expected, AMOUNTS[n])
    rng = FixedDraws(order, AMOUNTS)
    jittered = images.color_jitter(pixels.astype(np.uint8), RELEASED, rng)
    assert jittered.dtype == np.uint8 and np.abs(jittered - expected * 255).max() <= 0.51


def test_the_order_is_random():
    """With the same amounts, all 24 orders occur."""
    image = np.round(some_colors() * 255).astype(np.uint8)
    expected = set()
    for order in itertools.permutations(range(4)):
        expected.add(images.color_jitter(image, RELEASED, FixedDraws(order, AMOUNTS)).tobytes())

    class RandomOrder(FixedDraws):
        def permutation(self, count):
            return np.random.default_rng(self.order).permutation(count)

    drawn = set()
    for seed in range(400):
        drawn.add(images.color_jitter(image, RELEASED, RandomOrder(seed, AMOUNTS)).tobytes())
    assert drawn == expected and len(expected) > 8


def test_four_images_of_five_are_jittered():
    plain = decode_and_augment(photo(), 24)
    same = (augmented(photo(), 1000, 24, jitter=0.32, hue=0.08) == plain).all((1, 2, 3))
    assert 0.16 < same.mean() < 0.24


def assert_uniform(values, low, high, tolerance):
    """The values are uniform in low..high, except for the rounding of pixels."""
    assert low - tolerance <= values.min() <= low + 0.05 * (high - low) + tolerance
    assert high + tolerance >= values.max() >= high - 0.05 * (high - low) - tolerance
    assert abs(values.mean() - (low + high) / 2) < 0.06 * (high - low)


def jittered_only(image):
    """The augmented versions of an image that were jittered."""
    out = augmented(image, jitter=0.32, hue=0.08)
    return out[(out != decode_and_augment(image, out.shape[1])).any((1, 2, 3))]


def test_the_ranges_are_as_released():
    brightness = jittered_only(flat((180, 180, 180)))[:, 0, 0, 0] / 180
    assert_uniform(brightness, 0.68, 1.32, 0.003)
    before, after = hsv([120, 80, 60])[0], hsv(jittered_only(flat((120, 80, 60)))[:, 0, 0])
    assert_uniform(after[:, 1] / before[1], 0.68, 1.32, 0.03)                       # saturation
    assert_uniform((after[:, 0] - before[0] + 0.5) % 1 - 0.5, -0.08, 0.08, 0.012)   # hue
    two_grays = np.repeat(np.array([[90, 90, 150, 150]], np.uint8), 4, 0)
    out = jittered_only(Image.fromarray(two_grays).convert("RGB"))[..., 0].reshape(-1, 16)
    assert_uniform(out.std(1) / out.mean(1) * 4, 0.68, 1.32, 0.03)                  # contrast


def test_hue_and_jitter_are_independent_settings():
    color = flat((200, 80, 60))
    turned = augmented(color, 100, hue=0.08)[:, 0, 0]
    assert np.ptp(turned.max(1)) == 0 == np.ptp(turned.min(1))
    assert len(np.unique(turned, axis=0)) > 20
    kept = augmented(color, 100, jitter=0.32)[:, 0, 0]
    assert np.abs(hsv(kept)[:, 0] - hsv([200, 80, 60])[0, 0]).max() < 0.012


def test_one_image_of_five_is_gray_with_its_luma():
    out = augmented(photo(), 1000, 24, grayscale_prob=0.2)
    gray = (np.ptp(out, axis=-1) == 0).all((1, 2))
    assert 0.16 < gray.mean() < 0.24
    luma = decode_and_augment(photo(), 24) @ [0.299, 0.587, 0.114]
    assert np.abs(out[gray][0][..., 0] - luma).max() < 0.51
    both = augmented(photo(), 20, 24, jitter=0.32, hue=0.08, grayscale_prob=1.0)  # gray comes last
    assert np.ptp(both, axis=-1).max() == 0 and len({x.tobytes() for x in both}) > 12


@pytest.mark.parametrize("recipe", PAPER)
def test_the_papers_recipes_augment_as_released(recipe):
    cfg = config.RECIPES[recipe]
    settings = cfg.min_crop_area, cfg.hflip, cfg.jitter, cfg.hue, cfg.grayscale_prob
    assert settings == (0.4, False, 0.32, 0.08, 0.2)


def test_the_small_recipes_leave_hue_alone():
    """Their captions name colors."""
    toy = config.RECIPES["toy"]
    assert (toy.min_crop_area, toy.jitter, toy.hue, toy.grayscale_prob) == (1.0, 0.0, 0.0, 0.0)
    for name in ("images", "emoji"):
        assert (config.RECIPES[name].jitter, config.RECIPES[name].hue) == (0.2, 0.0)


def test_the_same_generator_draws_the_same_image():
    for seed in range(8):
        rngs = np.random.default_rng(seed), np.random.default_rng(seed)
        first, second = (decode_and_augment(photo(60, 40), 24, RELEASED, rng) for rng in rngs)
        assert np.array_equal(first, second)


def test_one_image_of_two_is_mirrored():
    plain = decode_and_augment(photo(), 24)
    made = augmented(photo(), 1000, 24, hflip=True)
    assert abs((made == plain).all((1, 2, 3)).mean() - 0.5) < 0.05

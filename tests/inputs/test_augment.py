"""What training does to an image: crops and color jitter, each against a formula of its own."""
import colorsys
import itertools

import numpy as np
import pytest
from PIL import Image

import config
import data
from inputs import images
from inputs.images import Augment, decode_and_augment
from tests.helpers.samples import photo

RELEASED = Augment(jitter=0.32, hue=0.08, grayscale_prob=0.2)
PAPER = ("ti16", "s16", "b16", "l14", "so400m14", "h14", "g14")


def flat(color, side=4):
    return Image.new("RGB", (side, side), color)


def hsv(pixels):
    return np.array([colorsys.rgb_to_hsv(*p) for p in np.asarray(pixels).reshape(-1, 3) / 255])


def augmented(image, count=400, side=4, **how):
    """(count,R,R,3) of an image, each by a generator of its own."""
    augment = Augment(min_crop_area=1.0, **how)
    return np.stack([decode_and_augment(image.copy(), side, augment, np.random.default_rng(s)) for s in range(count)])


def boxes(width, height, least, count=2000):
    return np.array([images.random_crop_box(width, height, least, np.random.default_rng(s)) for s in range(count)])


@pytest.mark.parametrize("size", [(300, 100), (100, 300), (640, 480), (310, 100)])
def test_a_long_image_is_cropped_and_never_squashed_whole(size):
    x0, y0, x1, y1 = boxes(*size, 0.4).T
    share, aspect = (x1 - x0) * (y1 - y0) / np.prod(size), (x1 - x0) / (y1 - y0)
    assert share.min() >= 0.4 - 1e-9 and share.max() <= 1
    assert aspect.min() >= 3 / 4 - 1e-9 and aspect.max() <= 4 / 3 + 1e-9
    assert min(x0.min(), y0.min()) >= 0
    assert x1.max() <= size[0] + 1e-9 and y1.max() <= size[1] + 1e-9


def test_what_no_crop_fits_is_taken_whole():
    assert (boxes(1000, 200, 0.4, 20) == (0, 0, 1000, 200)).all()


def test_crops_are_distributed_as_released():
    """Aspect uniform; then the height uniform among those that give area enough and fit."""
    x0, y0, x1, y1 = boxes(400, 400, 0.4, 6000).T
    aspect, height = (x1 - x0) / (y1 - y0), y1 - y0
    least, most = np.sqrt(0.4 * 400 * 400 / aspect), np.minimum(400, 400 / aspect)
    for found, low, high in ((aspect, 0.75, 1.33), ((height - least) / (most - least), 0, 1)):
        wanted = low + (high - low) * np.array([0.05, 0.25, 0.5, 0.75, 0.95])
        assert np.abs(np.quantile(found, [0.05, 0.25, 0.5, 0.75, 0.95]) - wanted).max() < 0.025
    room = np.maximum(400 - (x1 - x0), 1e-9)
    assert abs(np.mean((x0 / room)[room > 9]) - 0.5) < 0.02


def triangle(size, new):
    """(new,size) weights of the antialiased bilinear filter."""
    scale = max(size / new, 1)
    centres = (np.arange(new) + 0.5) * size / new
    weights = np.maximum(1 - np.abs((np.arange(size) + 0.5 - centres[:, None]) / scale), 0)
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("size", [(97, 61), (64, 64), (20, 30)])
def test_resize_is_antialiased_bilinear_and_rounded_to_the_nearest(size):
    image = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    wide = np.einsum("ah,hwc->awc", triangle(size[1], 24), image.astype(float))
    exact = np.einsum("bw,awc->abc", triangle(size[0], 24), wide)
    error = decode_and_augment(Image.fromarray(image), 24) - exact
    assert np.abs(error).max() < 1.1 and abs(error.mean()) < 0.1  # cut off, it would be -0.5


def some_colors():
    ramp = np.array(list(itertools.product((0.0, 0.2, 0.55, 1.0), repeat=3)), np.float32)
    drawn = np.random.default_rng(0).random((192, 3), np.float32)
    return np.concatenate([ramp, drawn]).reshape(16, 16, 3)


def independent(name, image, by):
    """The same change of an (R,R,3) image in 0..1, pixel by pixel in float64."""
    x = image.astype(np.float64)
    if name == "brightness":
        return (x * by).clip(0, 1)
    if name == "contrast":
        mean = x.reshape(-1, 3).mean(0)
        return ((x - mean) * by + mean).clip(0, 1)
    found = np.array([colorsys.rgb_to_hsv(*p) for p in x.reshape(-1, 3)])
    if name == "saturation":
        found[:, 1] = (found[:, 1] * by).clip(0, 1)
    else:
        found[:, 0] = (found[:, 0] + by) % 1
    return np.array([colorsys.hsv_to_rgb(*p) for p in found]).reshape(x.shape)


CHANGES = ("brightness", "contrast", "saturation", "hue")


@pytest.mark.parametrize("name, by", [
    *itertools.product(CHANGES[:3], (0.0, 0.5, 0.68, 1.0, 1.32, 2.0)),
    *itertools.product(["hue"], (-0.5, -0.08, -0.01, 0.0, 0.08, 0.3, 0.5))])
def test_each_change_of_color_is_its_formula(name, by):
    image = some_colors()
    planes = image.reshape(-1, 3).T.copy()
    mean = [planes.mean(1, keepdims=True)] if name == "contrast" else []
    found = getattr(images, "adjust_" + name)(planes, by, *mean).T.reshape(image.shape).clip(0, 1)
    assert np.abs(found - independent(name, image, by)).max() < 2e-6


class Fixed:
    """A generator that draws what it is told, in the order of the changes."""
    def __init__(self, order, factors):
        self.order, self.factors = order, factors

    def random(self):
        return 0.0

    def permutation(self, count):
        assert count == 4
        return np.array(self.order)

    def uniform(self, low, high):
        assert len(low) == len(high) == 4
        return np.array(self.factors)


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_the_four_follow_one_another_each_cut_to_range(order):
    """Cut between them, 0.9 x 1.3 is white, and no contrast brings it back."""
    image = some_colors()
    by = (1.3, 0.7, 1.25, 0.07)
    wanted = (np.round(image * 255) / 255).astype(np.float64)
    for n in order:
        wanted = independent(CHANGES[n], wanted, by[n])
    found = images.color_jitter(np.round(image * 255).astype(np.uint8), RELEASED, Fixed(order, by))
    assert found.dtype == np.uint8 and np.abs(found - wanted * 255).max() <= 0.51


def test_the_order_is_random():
    """All 24 orders with the same factors: as many images as the formula gives."""
    image = np.round(some_colors() * 255).astype(np.uint8)
    by = (1.3, 0.7, 1.25, 0.07)
    orders = itertools.permutations(range(4))
    wanted = {images.color_jitter(image, RELEASED, Fixed(o, by)).tobytes() for o in orders}

    class Shuffled(Fixed):
        def permutation(self, count):
            return np.random.default_rng(self.order).permutation(count)
    found = {images.color_jitter(image, RELEASED, Shuffled(s, by)).tobytes() for s in range(400)}
    assert found == wanted and len(wanted) > 8


def test_four_images_of_five_are_jittered():
    plain = decode_and_augment(photo(), 24)
    same = (augmented(photo(), 1000, 24, jitter=0.32, hue=0.08) == plain).all((1, 2, 3))
    assert 0.16 < same.mean() < 0.24


def spread(found, low, high, slack):
    """That what was drawn is uniform between two bounds, but for the rounding of pixels."""
    assert low - slack <= found.min() <= low + 0.05 * (high - low) + slack
    assert high + slack >= found.max() >= high - 0.05 * (high - low) - slack
    assert abs(found.mean() - (low + high) / 2) < 0.06 * (high - low)


def changed(found, image):
    """Those of some augmented images that were jittered."""
    return found[(found != decode_and_augment(image, found.shape[1])).any((1, 2, 3))]


def test_the_ranges_are_as_released():
    gray = changed(augmented(flat((180, 180, 180)), jitter=0.32, hue=0.08), flat((180,) * 3))
    spread(gray[:, 0, 0, 0] / 180, 0.68, 1.32, 0.003)                       # brightness
    image = flat((120, 80, 60))
    drawn = changed(augmented(image, jitter=0.32, hue=0.08), image)[:, 0, 0]
    before, after = hsv([120, 80, 60])[0], hsv(drawn)
    spread(after[:, 1] / before[1], 0.68, 1.32, 0.03)                       # saturation
    spread((after[:, 0] - before[0] + 0.5) % 1 - 0.5, -0.08, 0.08, 0.012)   # hue
    tones = Image.fromarray(np.repeat(np.array([[90, 90, 150, 150]], np.uint8), 4, 0)).convert("RGB")
    drawn = changed(augmented(tones, jitter=0.32, hue=0.08), tones)[..., 0].reshape(-1, 16)
    spread(drawn.std(1) / drawn.mean(1) * 4, 0.68, 1.32, 0.03)              # contrast: 30 / 120


def test_hue_and_strength_are_apart():
    color = flat((200, 80, 60))
    turned = augmented(color, 100, hue=0.08)[:, 0, 0]
    assert np.ptp(turned.max(1)) == 0 == np.ptp(turned.min(1)) and len(np.unique(turned, axis=0)) > 20
    kept = augmented(color, 100, jitter=0.32)[:, 0, 0]
    assert np.abs(hsv(kept)[:, 0] - hsv([200, 80, 60])[0, 0]).max() < 0.012


def test_one_in_five_is_gray_as_its_luma():
    found = augmented(photo(), 1000, 24, gray=0.2)
    gray = (np.ptp(found, axis=-1) == 0).all((1, 2))
    assert 0.16 < gray.mean() < 0.24
    luma = decode_and_augment(photo(), 24) @ [0.299, 0.587, 0.114]
    assert np.abs(found[gray][0][..., 0] - luma).max() < 0.51
    both = augmented(photo(), 20, 24, jitter=0.32, hue=0.08, gray=1.0)  # the colors first, gray last
    assert np.ptp(both, axis=-1).max() == 0 and len({x.tobytes() for x in both}) > 12


@pytest.mark.parametrize("recipe", PAPER)
def test_the_papers_recipes_augment_as_released(recipe):
    cfg = config.RECIPES[recipe]
    found = cfg.min_crop_area, cfg.hflip, cfg.jitter, cfg.hue, cfg.grayscale_prob
    assert found == (0.4, False, 0.32, 0.08, 0.2)


def test_the_small_recipes_leave_hue_alone():
    """Their captions name colors."""
    toy, pictures = (config.RECIPES[name] for name in ("toy", "pictures"))
    assert (toy.min_crop_area, toy.jitter, toy.hue, toy.grayscale_prob) == (1.0, 0.0, 0.0, 0.0)
    assert (pictures.jitter, pictures.hue) == (0.2, 0.0)


def test_the_same_generator_draws_the_same_image():
    for seed in range(8):
        one, two = (decode_and_augment(photo(60, 40), 24, RELEASED, np.random.default_rng(seed)) for _ in "12")
        assert np.array_equal(one, two)

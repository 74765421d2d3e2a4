"""Images of any shape: grids that keep the aspect ratio, and features that depend on one image."""
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

import vit
from interop.encoder import load_encoder, load_pixels, load_rectangle
from interop.shapes import closest_grid, patch_grids
from runtime.errors import BadSample, ConfigError
from tests.helpers.encoders import random_image

SIDE = st.integers(1, 5000)


def stretch(width: int, height: int, grid: tuple[int, int]) -> float:
    """By which factor the aspect ratio changes, at least 1."""
    rows, columns = grid
    return math.exp(abs(math.log(columns / rows * height / width)))


@given(SIDE, SIDE, st.sampled_from([1, 2, 5, 16, 64, 100, 256]))
@settings(max_examples=300, deadline=None)
def test_a_grid_keeps_the_ratio_and_the_bound(width, height, max_tokens):
    assume(max(width, height) <= max_tokens * min(width, height))
    rows, columns = closest_grid(width, height, max_tokens)
    assert 1 <= rows * columns <= max_tokens
    turned = stretch(height, width, closest_grid(height, width, max_tokens))
    assert turned == pytest.approx(stretch(width, height, (rows, columns)))
    if max_tokens >= 64:
        assert stretch(width, height, (rows, columns)) < 1.12
        if max(width, height) <= 2 * min(width, height):
            assert rows * columns >= 0.75 * max_tokens


@pytest.mark.parametrize("max_tokens", [1, 3, 16, 63, 64, 256])
def test_few_grids_and_the_largest_square(max_tokens):
    grids = patch_grids(max_tokens)
    assert {(columns, rows) for rows, columns in grids} == set(grids)
    assert len(set(grids)) == len(grids) <= 2 * math.log(max_tokens) / math.log(1.1) + 1
    side = math.isqrt(max_tokens)
    assert closest_grid(7, 7, max_tokens) == (side, side)


def test_an_image_that_is_too_long_is_refused(tmp_path):
    Image.new("RGB", (5000, 1)).save(tmp_path / "long.png")
    with pytest.raises(BadSample, match=r"long.png: image is 5000 x 1 pixels.*64 times as long"):
        load_rectangle(tmp_path / "long.png", 8, 64)
    assert load_rectangle(Image.new("RGB", (64, 1)), 8, 64).shape == (8, 512, 3)


def test_a_camera_s_orientation_comes_before_the_grid():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 80, 3), np.uint8))
    upright = load_rectangle(image.transpose(Image.Transpose.ROTATE_270), 4, 64)
    exif = image.getexif()
    exif[ExifTags.Base.Orientation] = 6
    turned = load_rectangle(image, 4, 64)
    assert turned.shape == upright.shape == (40, 20, 3)
    assert np.abs(turned.astype(int) - upright).max() <= 1  # rows and columns resized in turn


def test_features_are_those_of_the_image_alone(run):
    """A list of shapes in any order and batch size gives what each image gives alone, and what the
    model computes for its pixels."""
    sizes = [(30, 30), (60, 30), (31, 62), (30, 90), (64, 64), (60, 30), (90, 30)]
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (h, w, 3), np.uint8) for w, h in sizes]
    encoder = load_encoder(run, max_tokens=9)
    tokens, pooled = encoder(images)
    assert [len(t) for t in tokens] == [9, 8, 8, 3, 9, 8, 3]
    for n, image in enumerate(images):
        pixels = load_rectangle(image, 8, 9)
        expected = vit.vit(encoder.params, pixels[None], encoder.cfg)
        np.testing.assert_allclose(tokens[n], expected["tokens"][0], atol=1e-4)
        np.testing.assert_allclose(pooled[n], expected["pooled"][0], atol=1e-4)
    other_tokens, other_pooled = encoder(images[::-1], batch=2)
    np.testing.assert_allclose(other_pooled[::-1], pooled, atol=1e-5)
    for a, b in zip(other_tokens[::-1], tokens):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert encoder.run._cache_size() <= 2 * len(patch_grids(9))


def test_squares_are_bit_for_bit_those_of_a_resolution(run):
    images = [random_image(i, (29, 29)) for i in range(3)] + [np.zeros((50, 50, 3), np.uint8)]
    square = load_encoder(run, resolution=24)(images)
    tokens, pooled = load_encoder(run, max_tokens=11)(images)
    assert np.array_equal(np.stack(tokens), square.tokens)
    assert np.array_equal(pooled, square.pooled)
    assert np.array_equal(load_rectangle(images[3], 8, 9), load_pixels(images[3], 24))


def test_the_position_embedding_of_a_rectangle():
    """Rows and columns of a rectangle have the entries of the square around it."""
    square = vit.sincos_position_embedding(5, 16).reshape(5, 5, 16)
    assert np.array_equal(vit.sincos_position_embedding((2, 5), 16), square[:2].reshape(10, 16))
    assert np.array_equal(vit.sincos_position_embedding((5, 3), 16),
                          square[:, :3].reshape(15, 16))


def test_one_way_to_say_the_size(run):
    for options in ({"max_tokens": -1}, {"max_tokens": 9, "resolution": 24}):
        with pytest.raises(ConfigError, match="max_tokens"):
            load_encoder(run, **options)

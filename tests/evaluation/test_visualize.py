"""Attention maps and colors, against the model's own attention weights."""
import dataclasses

import jax
import numpy as np

import vit
from evaluation import visualize
from interop.encoder import Encoder
from tests.evaluation.conftest import CFG


def random_images(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), np.uint8)


def test_patch_attention_is_that_of_the_encoder():
    """By image and layer, mean over heads, among patches only."""
    cfg, images = dataclasses.replace(CFG, cls_token=True), random_images(3)
    encoder = Encoder(vit.init(jax.random.key(0), cfg), cfg, 16)
    with_cls = np.asarray(vit.vit(encoder.params, images, cfg, attention=True)["attention"])
    weights = visualize.patch_attention(encoder, images)
    assert weights.shape == (3, 2, 4, 4)
    for b, layer in np.ndindex(3, 2):
        patches = with_cls[layer, b].mean(0)[1:, 1:]                    # (L,B,H,1+N,1+N)
        expected = patches / patches.sum(-1, keepdims=True)
        np.testing.assert_allclose(weights[b, layer], expected, rtol=1e-5)


def test_caption_attention_goes_to_the_image_and_earlier_tokens(encoder, captioner):
    """With queries and keys of zero all weights are equal: token t + 1 sees 4 patches and the t + 1
    tokens before it."""
    params, tokens = captioner.params["decoder"], encoder(random_images(2)).tokens
    zeros = jax.tree.map(np.zeros_like, params["blocks"]["qkv"])
    uniform = params | {"blocks": params["blocks"] | {"qkv": zeros}}
    uniform = captioner._replace(params=captioner.params | {"decoder": uniform})
    text, maps, image_share = visualize.caption_attention(uniform, tokens)
    assert text.shape == (2, 40) and maps.shape == (2, 39, 4)
    expected = np.broadcast_to(4 / (4 + np.arange(1, 40)), (2, 39))
    np.testing.assert_allclose(image_share, expected, rtol=1e-5)
    np.testing.assert_allclose(maps, 1 / 4, rtol=1e-5)
    _, maps, _ = visualize.caption_attention(captioner, tokens)
    assert np.ptp(maps, axis=-1).min() > 1e-4  # with the true ones, patches differ


def test_colors_follow_the_strongest_directions():
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    coordinates = rng.normal(size=(2, 50, 8)) * (9, 5, 3, *[0.01] * 5)
    colors = visualize.pca_colors(coordinates @ axes.T)
    assert colors.shape == (2, 50, 3) and colors.min() == 0 and colors.max() == 1
    for i in range(3):
        assert abs(np.corrcoef(colors[..., i].ravel(), coordinates[..., i].ravel())[0, 1]) > 0.9

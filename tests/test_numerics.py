"""Jitted layers and losses against NumPy in float64, at the sizes of a model and with more than
32,768 rows of 2 to 8 numbers.

jaxlib 0.10.2 computes wrong values on a CPU where some programs sum a product over so short an axis
in so many rows (jax-ml/jax#39103). Ours are not among them. These tests say so."""
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import decoder
import layers
import masking
import vit
from objectives import aimv2, contrastive
from tests.helpers import numpy_model
from tests.helpers.compiling import optimized
from tests.helpers.models import noisy_params
from tests.helpers.numpy_model import assert_close, normal, random_text, to_double, to_single

ROWS = 40_000
NARROW = range(2, 9)         # lengths of the last axis
TI16 = (4, 196, 192)         # images, tokens, width of Ti/16 at 224 px
SHAPES = [(200, 200, width) for width in NARROW] + [TI16]


def value_and_vjp(f, args: tuple, g):
    """f(*args) and the gradients of <f, g>, in one jitted program."""
    def both(args, g):
        out, vjp = jax.vjp(f, *args)
        return out, vjp(g)
    return optimized(both, to_single(args), to_single(g))


# ---------------------------------------------------------------------------------- layers
@pytest.mark.parametrize("shape", SHAPES)
def test_linear(shape):
    D = shape[-1]
    x, kernel, bias, g = normal(0, *shape), normal(1, D, D), normal(2, D), normal(3, *shape)
    expected = numpy_model.linear(x, kernel, bias), numpy_model.linear_grads(x, kernel, g)
    assert_close(value_and_vjp(layers.linear_with_bias, (x, kernel, bias), g), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm_alone_and_with_the_linear_layer_after_it(shape):
    D = shape[-1]
    x, g = numpy_model.normalize(normal(0, *shape))[0] * 2 + 1, normal(5, *shape)
    scale, shift, kernel, bias = normal(1, D), normal(2, D), normal(3, D, D), normal(4, D)
    normalized, rstd = numpy_model.normalize(x)
    out = normalized * scale + shift

    def norm(x, scale, shift):
        return layers.layer_norm(x, {"scale": scale, "bias": shift})

    def norm_linear(x, scale, shift, kernel, bias):
        return layers.linear(norm(x, scale, shift), {"kernel": kernel, "bias": bias})

    def norm_grads(g):
        d = g * scale
        along = normalized * (d * normalized).mean(-1, keepdims=True)
        d_x = rstd * (d - d.mean(-1, keepdims=True) - along)
        return d_x, (g * normalized).sum((0, 1)), g.sum((0, 1))
    assert_close(value_and_vjp(norm, (x, scale, shift), g), (out, norm_grads(g)))

    d_out, d_kernel, d_bias = numpy_model.linear_grads(out, kernel, g)
    expected = numpy_model.linear(out, kernel, bias), (*norm_grads(d_out), d_kernel, d_bias)
    assert_close(value_and_vjp(norm_linear, (x, scale, shift, kernel, bias), g), expected)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_gelu_linear(shape, exact):
    D = shape[-1]
    x, kernel, bias, g = normal(0, *shape), normal(1, D, D), normal(2, D), normal(3, *shape)
    hidden, slope = numpy_model.gelu(x, exact)
    d_hidden, d_kernel, d_bias = numpy_model.linear_grads(hidden, kernel, g)

    def gelu_linear(x, kernel, bias):
        return layers.gelu_linear(x, {"kernel": kernel, "bias": bias}, exact)
    assert_close(value_and_vjp(gelu_linear, (x, kernel, bias), g),
                 (numpy_model.linear(hidden, kernel, bias), (d_hidden * slope, d_kernel, d_bias)))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("B", "S", "H", "Dh"),
                         [(ROWS // (2 * n) + 1, n, 2, n) for n in NARROW] + [(2, 197, 3, 64)])
def test_attention(B, S, H, Dh, causal):
    """Gradients flow in through the outputs and through the attention weights."""
    q, k, v, g = (normal(seed, B, S, H, Dh) for seed in range(4))
    g_weights = normal(4, B, H, S, S)
    mask = np.tril(np.ones((S, S), bool)) if causal else None
    outputs, weights = numpy_model.attention(q, k, v, mask if causal else True)
    d_weights = np.einsum("bqhd,bshd->bhqs", g, v) + g_weights
    along = (d_weights * weights).sum(-1, keepdims=True)
    d_scores = weights * (d_weights - along) / math.sqrt(Dh)
    d_q = np.einsum("bhqs,bshd->bqhd", d_scores, k)
    d_k = np.einsum("bhqs,bqhd->bshd", d_scores, q)
    d_v = np.einsum("bhqs,bqhd->bshd", weights, g)

    def attention(q, k, v):
        return layers.dot_product_attention(q, k, v, mask)
    assert_close(value_and_vjp(attention, (q, k, v), (g, g_weights)),
                 ((outputs, weights), (d_q, d_k, d_v)))


# ---------------------------------------------------------------------------------- losses
@pytest.mark.parametrize("chunk", [0, 3])
@pytest.mark.parametrize(("B", "T", "D", "V"),
                         [(5000, 8, n, n) for n in NARROW] + [(16, 127, 192, 1000)])
def test_token_cross_entropy(B, T, D, V, chunk):
    cfg = decoder.DecoderConfig(1, D, 1, D, vocab_size=V, image_width=D, loss_chunk=chunk)
    features, head, g = normal(0, B, T, D), normal(1, D, V), normal(2, B)
    targets = np.random.default_rng(3).integers(0, V, (B, T)).astype(np.int32)
    d_scores = numpy_model.softmax(features @ head) - np.eye(V)[targets]
    d_scores = np.where(targets[..., None] != decoder.PAD, d_scores, 0) * g[:, None, None]
    grads = d_scores @ head.T, np.einsum("btd,btv->dv", features, d_scores)

    def loss(features, head):
        params = {"head": {"kernel": head}}
        return decoder.token_cross_entropy(params, features, jnp.asarray(targets), cfg)
    assert_close(value_and_vjp(loss, (features, head), g),
                 (numpy_model.token_cross_entropy(head, features, targets), grads))


NARROW_MODEL = (8400, 4, 6, vit.ViTConfig(2, 8, 2, 8, patch_size=2),
                decoder.DecoderConfig(2, 8, 4, 6, vocab_size=7, image_width=8))
SMALL_MODEL = (8, 32, 32, vit.ViTConfig(2, 96, 3, 192, patch_size=8),
               decoder.DecoderConfig(2, 96, 3, 192, vocab_size=500, image_width=96,
                                     loss_chunk=16))


@pytest.mark.parametrize(("B", "R", "T", "enc", "dec"), [NARROW_MODEL, SMALL_MODEL])
def test_caption_loss_and_its_gradient_for_every_parameter(B, R, T, enc, dec):
    """Gradients against central differences of the float64 loss. Each difference moves a third of
    the arrays, of which each contributes 1 to the slope, so that none can hide behind another."""
    params = to_double(noisy_params({"encoder": vit.param_specs(enc),
                                     "decoder": decoder.param_specs(dec)}))
    images = np.random.default_rng(0).integers(0, 256, (B, R, R, 3)).astype(np.uint8)
    text = random_text(1, B, T, dec.vocab_size)

    def loss(params):
        tokens = vit.vit(params["encoder"], jnp.asarray(images), enc)["tokens"]
        return decoder.caption_loss(params["decoder"], tokens, jnp.asarray(text), dec)

    def numpy_loss(params):
        tokens = numpy_model.encode(params["encoder"], images, enc)
        return numpy_model.caption_loss(params["decoder"], tokens, text, dec)
    losses, (grads,) = value_and_vjp(loss, (params,), np.ones(B))
    assert_close(losses, numpy_loss(params))
    grads = to_double(jax.device_get(grads))
    for tree in (grads, params):
        del tree["encoder"]["norm"]  # the caption loss does not read the encoder's final norm
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(grads)]
    directions = jax.tree.map(direction_of_slope_one, grads)
    for start in range(3):
        moved = paths[start::3]

        def loss_at(step, moved=moved):
            def move(path, x, direction):
                return x + step * direction if path in moved else x
            return numpy_loss(jax.tree_util.tree_map_with_path(move, params, directions)).sum()
        slope = (loss_at(1e-4) - loss_at(-1e-4)) / 2e-4
        assert abs(slope - len(moved)) <= 1e-3, moved


def direction_of_slope_one(grad):
    """The gradient's own direction plus a random one, scaled."""
    noise = normal(grad.size, *grad.shape)
    direction = grad / np.linalg.norm(grad) + noise / np.linalg.norm(noise)
    return direction / (grad * direction).sum()


@pytest.mark.parametrize(("B", "D"), [(33_000, 2), (33_000, 7), (33_000, 8), (256, 192)])
def test_l2_normalize(B, D):
    x = normal(0, B, D)
    expected = x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-12)
    assert_close(optimized(contrastive.l2_normalize, to_single(x)), expected)


@pytest.mark.parametrize(("B", "D"), [(500, 3), (256, 192)])
def test_contrastive_loss(B, D):
    features = normal(0, 2, B, D)
    image, text = features / np.linalg.norm(features, axis=-1, keepdims=True)
    scores = 10 * image @ text.T
    image_losses = np.log(np.exp(scores).sum(1)) - np.diag(scores)
    text_losses = np.log(np.exp(scores).sum(0)) - np.diag(scores)

    def loss(image, text):
        real = jnp.ones(B, bool)
        return contrastive.contrastive_loss(image, text, real, jnp.float32(10))
    on_one_device = jax.pmap(loss, "devices", devices=jax.devices()[:1])
    losses = optimized(on_one_device, to_single(image)[None], to_single(text)[None])[0]
    assert_close(losses, (image_losses + text_losses) / 2)


@pytest.mark.parametrize(("B", "R", "patch_size"), [(40, 32, 1), (8, 224, 16)])
def test_pixel_targets(B, R, patch_size):
    images = np.random.default_rng(0).integers(0, 256, (B, R, R, 3)).astype(np.uint8)
    x = numpy_model.patchify(images, patch_size)
    std = np.sqrt(x.var(-1, keepdims=True, ddof=1) + 1e-6)
    computed = optimized(lambda x: aimv2.pixel_targets(x, patch_size), images)
    # the tolerance is wide, because a gray pixel has almost no deviation to be divided by
    assert_close(computed, (x - x.mean(-1, keepdims=True)) / std, 1e-3)


# --------------------------------------------------------------------------------- masking
@pytest.mark.parametrize("n", NARROW)
def test_kept_tokens_are_the_drawn_ones_and_each_is_equally_likely(n):
    B, k = ROWS, max(1, n // 2)
    tokens = to_single(normal(0, B, n, 3))

    def keep(keys, tokens):
        return masking.keep_random_tokens(keys, tokens, k / n + 1e-6)
    keys = jax.random.split(jax.random.key(0), B)
    kept, keep_indices = jax.device_get(optimized(keep, keys, tokens))
    assert keep_indices.shape == (B, k) and (np.diff(keep_indices, axis=1) > 0).all()
    assert keep_indices.min() == 0 and keep_indices.max() == n - 1
    assert np.array_equal(kept, np.take_along_axis(tokens, keep_indices[:, :, None], 1))
    share = np.bincount(keep_indices[-8000:].ravel(), minlength=n) / 8000
    assert np.abs(share - k / n).max() < 0.03

"""The models in NumPy and float64, without a line of the code that they check."""
import math

import jax
import numpy as np
from scipy.special import erf

import decoder
import vit
from layers import LAYER_NORM_EPS


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def random_text(seed: int, B: int, T: int, vocab_size: int) -> np.ndarray:
    """(B,T) int32: bos, tokens, eos, then pad."""
    rng = np.random.default_rng(seed)
    text = rng.integers(min(3, vocab_size - 1), vocab_size, (B, T)).astype(np.int32)
    end = rng.integers(1, T, B)
    text[:, 0] = decoder.BOS
    text[np.arange(B), end] = min(decoder.EOS, vocab_size - 1)
    text[np.arange(T) > end[:, None]] = decoder.PAD
    return text


def to_single(tree):
    def cast(x):
        return x.astype(np.float32) if x.dtype == np.float64 else x
    return jax.tree.map(cast, tree)


def to_double(tree):
    def cast(x):
        x = np.asarray(x)
        return x.astype(np.float64) if x.dtype == np.float32 else x
    return jax.tree.map(cast, tree)


def assert_close(computed, expected, tolerance: float = 5e-5) -> None:
    """Each array within tolerance times its largest number (at least 1, because gradients may
    cancel to nothing)."""
    computed = jax.tree.leaves(to_double(jax.device_get(computed)))
    expected = jax.tree.leaves(expected)
    for a, b in zip(computed, expected, strict=True):
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= tolerance * max(1, np.abs(b).max())


# ---------------------------------------------------------------------------------- layers
def linear(x, kernel, bias):
    return x @ kernel + bias


def linear_grads(x, kernel, g):
    """Gradients for x, kernel and bias."""
    rows, g_rows = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    return g @ kernel.T, rows.T @ g_rows, g_rows.sum(0)


def normalize(x):
    """x with mean 0 and variance 1 over the last axis, and 1 / its standard deviation."""
    centered = x - x.mean(-1, keepdims=True)
    rstd = 1 / np.sqrt((centered**2).mean(-1, keepdims=True) + LAYER_NORM_EPS)
    return centered * rstd, rstd


def layer_norm(x, w):
    return normalize(x)[0] * w["scale"] + w["bias"]


def gelu(x, exact):
    """gelu and its derivative."""
    if exact:
        cdf = 0.5 * (1 + erf(x / math.sqrt(2)))
        return x * cdf, cdf + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    a, b = math.sqrt(2 / math.pi), 0.044715
    t = np.tanh(a * (x + b * x**3))
    cdf = (1 + t) / 2
    return x * cdf, cdf + x / 2 * (1 - t * t) * a * (1 + 3 * b * x * x)


def softmax(x, axis=-1):
    exp = np.exp(x - x.max(axis, keepdims=True))
    return exp / exp.sum(axis, keepdims=True)


def attention(q, k, v, mask):
    """The outputs and the attention weights."""
    scores = np.einsum("bqhd,bshd->bhqs", q, k) / math.sqrt(q.shape[-1])
    weights = softmax(np.where(mask, scores, -1e30))
    return np.einsum("bhqs,bshd->bqhd", weights, v), weights


def block(x, w, num_heads, mask, exact_gelu):
    B, S, D = x.shape
    qkv = linear(layer_norm(x, w["norm1"]), **w["qkv"])
    q, k, v = (a.reshape(B, S, num_heads, D // num_heads) for a in np.split(qkv, 3, -1))
    attended = attention(q, k, v, mask)[0].reshape(B, S, D)
    if "gate" in w:
        attended = attended / (1 + np.exp(-linear(layer_norm(x, w["norm1"]), **w["gate"])))
    x = x + linear(attended, **w["out"])
    hidden = linear(layer_norm(x, w["norm2"]), **w["fc1"])
    return x + linear(gelu(hidden, exact_gelu)[0], **w["fc2"])


def stack(x, blocks, cfg, mask, exact_gelu):
    for layer in range(cfg.depth):
        w = jax.tree.map(lambda a, layer=layer: a[layer], blocks)
        x = block(x, w, cfg.num_heads, mask, exact_gelu)
    return x


# ------------------------------------------------------------------------- encoder and loss
def patchify(images, patch_size):
    """(B,R,R,3) uint8 to normalized patches (B,N,P*P*3)."""
    pixels = (images / 255 - np.array(vit.IMAGENET_MEAN)) / np.array(vit.IMAGENET_STD)
    B, G, P = len(images), images.shape[1] // patch_size, patch_size
    return pixels.reshape(B, G, P, G, P, 3).swapaxes(2, 3).reshape(B, G * G, -1)


def encode(params, images, cfg):
    """The encoder's patch tokens."""
    grid = images.shape[1] // cfg.patch_size
    x = patchify(images, cfg.patch_size) @ params["patch"]["kernel"]
    x = x + vit.sincos_position_embedding(grid, cfg.width).astype(np.float64)
    return stack(x, params["blocks"], cfg, True, True)


def token_cross_entropy(head, features, targets):
    scores = features @ head
    largest = scores.max(-1)
    log_sum = largest + np.log(np.exp(scores - largest[..., None]).sum(-1))
    losses = log_sum - np.take_along_axis(scores, targets[..., None], -1)[..., 0]
    return np.where(targets != decoder.PAD, losses, 0).sum(-1)


def caption_loss(params, tokens, text, cfg):
    K, T = tokens.shape[1], text.shape[1] - 1
    image = tokens @ params["project"]["kernel"]
    x = np.concatenate([image, params["embed"]["embedding"][text[:, :-1]]], axis=1)
    mask = np.tril(np.ones((K + T, K + T), bool))
    x = layer_norm(stack(x, params["blocks"], cfg, mask, False)[:, K:], params["norm"])
    return token_cross_entropy(params["head"]["kernel"], x, text[:, 1:])

"""JAX against an independent PyTorch: same weights, same numbers, forward and backward."""
import functools

import jax
import numpy as np
import pytest
import torch

import decoder
import layers
import masking
import vit
from benchmarks import torch_reference
from benchmarks.torch_reference import tensor

B, T, V, KEEP = 3, 14, 61, 0.4  # 13 targets: loss pieces of 5 do not divide them
SIDES = (32, 48)                # 16 and 36 patches


def configs(cls=False, prefix="causal", chunk=0, remat="none", dtype="float32"):
    """A small encoder and decoder; no two sizes are equal, so that a mixed-up axis cannot pass."""
    enc = vit.ViTConfig(depth=3, width=64, num_heads=4, mlp_dim=112, patch_size=8, cls_token=cls, remat=remat, dtype=dtype)
    dec = decoder.DecoderConfig(depth=2, width=48, num_heads=3, mlp_dim=80, vocab_size=V, image_width=64, prefix_attention=prefix,
                                loss_chunk=chunk, remat=remat, dtype=dtype)
    return enc, dec


@functools.cache
def parameters(cls=False):
    """Random weights of about the initial scale, but biases are not 0 and norm scales not 1."""
    enc, dec = configs(cls)
    rng = np.random.default_rng(5)

    def draw(w):
        noise = rng.standard_normal(w.shape, np.float32)
        return 1 + 0.1 * noise if w.std is None else (0.1 + w.std) * noise
    return jax.tree.map(draw, {"encoder": vit.param_specs(enc), "decoder": decoder.param_specs(dec)}, is_leaf=layers.is_spec)


def batch(side):
    """uint8 images, and captions of several lengths: the first fills its row, the last has one word."""
    rng = np.random.default_rng(side)
    text = rng.integers(3, V, (B, T))
    text[:, 0] = decoder.BOS
    for row, end in zip(text, (T - 1, 7, 2)):
        row[end], row[end + 1:] = decoder.EOS, decoder.PAD
    return rng.integers(0, 256, (B, side, side, 3), np.uint8), text.astype(np.int32)


def error(ours, theirs):
    assert ours.shape == tuple(theirs.shape)
    return np.abs(np.asarray(ours, np.float32) - theirs.detach().numpy()).max()


def loss(params, images, text, enc, dec):
    """The project's mean caption loss, and which patches it kept."""
    tokens = vit.vit(params["encoder"], images, enc)["tokens"]
    kept, chosen = masking.keep_random_tokens(jax.random.split(jax.random.key(7), B), tokens, KEEP)
    total = decoder.caption_loss(params["decoder"], kept, text, dec).sum()
    return total / decoder.count_targets(text).sum(), chosen


def step(side, enc, dec):
    """Loss, gradient tree and kept patches in JAX; XLA does all its own passes, LLVM hurries, which halves the wait."""
    run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=(3, 4),
                  compiler_options={"xla_backend_optimization_level": 0})
    (value, chosen), grads = run(parameters(enc.cls_token), *batch(side), enc, dec)
    return float(value), grads, chosen


def torch_step(side, enc, dec, chosen):
    """Loss and gradient tree in PyTorch, of the same patches."""
    twin, (images, text) = torch_reference.from_jax(parameters(enc.cls_token)), map(tensor, batch(side))
    value = torch_reference.mean_loss(twin["encoder"], twin["decoder"], images, tensor(chosen), text, enc, dec)
    value.backward()
    return value.item(), jax.tree.map(lambda w: (torch.zeros_like(w) if w.grad is None else w.grad).numpy(), twin)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("cls", [False, True])
def test_encoder(side, cls):
    enc, _ = configs(cls)
    params, images = parameters(cls)["encoder"], batch(side)[0]
    ours = jax.jit(vit.vit, static_argnums=(2, 3))(params, images, enc, True)
    for maps in ([], None):  # with torch's softmax written out, and with its fused attention
        x, tokens, pooled = torch_reference.encoder(torch_reference.from_jax(params), tensor(images), enc, maps)
        assert error(ours["tokens"], tokens) <= 1e-4
        assert error(ours["pooled"], pooled) <= 1e-4
        assert ("cls" in ours) == cls and (not cls or error(ours["cls"], x[:, 0]) <= 1e-4)
        assert maps is None or error(ours["attention"], torch.stack(maps)) <= 1e-4


def test_norm_of_a_faint_token():
    """So faint that the epsilon is a good part of its variance."""
    x = 1e-3 * np.random.default_rng(0).standard_normal((2, 5, 64), np.float32)
    w = {"scale": np.full(64, 1.5, np.float32), "bias": np.full(64, 0.5, np.float32)}
    assert error(layers.layer_norm(x, w), torch_reference.norm(tensor(x), torch_reference.from_jax(w))) <= 1e-4


@pytest.mark.parametrize("prefix", ["causal", "bidirectional"])
@pytest.mark.parametrize("K", [6, 14])
def test_logits(prefix, K):
    enc, dec = configs(prefix=prefix)
    params, text = parameters()["decoder"], batch(32)[1]
    image_tokens = np.random.default_rng(K).standard_normal((B, K, enc.width), np.float32)
    ours = jax.jit(decoder.logits, static_argnums=3)(params, image_tokens, text, dec)
    theirs = torch_reference.decoder(torch_reference.from_jax(params), tensor(image_tokens), tensor(text), dec)
    assert error(ours, theirs) <= 1e-4


@pytest.mark.parametrize("remat, side, cls, prefix, chunk", [  # every pair of two settings' values occurs
    ("none", 32, False, "causal", 0), ("none", 48, True, "bidirectional", 5),
    ("dots", 32, False, "bidirectional", 5), ("dots", 48, True, "causal", 0),
    ("block", 32, True, "causal", 5), ("block", 48, False, "bidirectional", 0)])
def test_gradient_of_every_parameter(remat, side, cls, prefix, chunk):
    enc, dec = configs(cls, prefix, chunk, remat)
    ours, grads, chosen = step(side, enc, dec)
    theirs, wanted = torch_step(side, enc, dec, chosen)
    assert abs(ours - theirs) <= 1e-5 * theirs
    assert jax.tree.structure(grads) == jax.tree.structure(wanted)
    for (path, a), b in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(wanted)):
        name, size = jax.tree_util.keystr(path, simple=True, separator="/"), np.linalg.norm(b)
        if name.startswith("encoder/norm/"):  # the final norm serves `pooled`, which the loss never sees
            assert size == 0 and not np.any(a), name
        else:
            assert size > 0 and np.linalg.norm(a - b) <= 1e-3 * size, name


@pytest.mark.parametrize("prefix, chunk, remat", [("causal", 0, "none"), ("bidirectional", 5, "block")])
def test_bfloat16_roughly_agrees(prefix, chunk, remat):
    enc, dec = configs(True, prefix, chunk, remat, "bfloat16")
    ours, grads, chosen = step(32, enc, dec)
    theirs, _ = torch_step(32, enc, dec, chosen)
    exact, wanted = torch_step(32, *configs(True, prefix), chosen)
    assert abs(ours - theirs) <= 5e-2 * theirs and abs(ours - exact) <= 5e-2 * exact
    assert all(a.dtype == np.float32 for a in jax.tree.leaves(grads))
    a, b = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (grads, wanted))
    assert np.linalg.norm(a - b) <= 0.1 * np.linalg.norm(b)


def test_the_wrong_gelu_would_be_seen(monkeypatch):
    right, other = torch.nn.functional.gelu, {"none": "tanh", "tanh": "none"}
    monkeypatch.setattr(torch_reference.F, "gelu", lambda x, approximate: right(x, approximate=other[approximate]))
    (enc, dec), params, (images, text) = configs(), parameters(), batch(32)
    twin = torch_reference.from_jax(params)
    tokens = jax.jit(vit.vit, static_argnums=2)(params["encoder"], images, enc)["tokens"]
    assert error(tokens, torch_reference.encoder(twin["encoder"], tensor(images), enc)[1]) > 1e-4
    scores = jax.jit(decoder.logits, static_argnums=3)(params["decoder"], tokens, text, dec)
    assert error(scores, torch_reference.decoder(twin["decoder"], tensor(tokens), tensor(text), dec)) > 1e-4

"""The model against an independent one in PyTorch: same parameters, same values and gradients."""
import dataclasses
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

B, T, V, KEEP_RATIO = 3, 14, 61, 0.4  # 13 targets: not a multiple of the loss chunk, 5
RESOLUTIONS = (32, 48)                # 16 and 36 patches


def model_configs(cls_token=False, prefix_attention="causal", loss_chunk=0, remat="none",
                  dtype="float32"):
    """A small encoder and decoder. All sizes differ, so that no mixed-up axis can pass."""
    shared = {"remat": remat, "dtype": dtype}
    enc = vit.ViTConfig(depth=3, width=64, num_heads=4, mlp_dim=112, patch_size=8,
                        cls_token=cls_token, **shared)
    dec = decoder.DecoderConfig(depth=2, width=48, num_heads=3, mlp_dim=80, vocab_size=V,
                                image_width=64, prefix_attention=prefix_attention,
                                loss_chunk=loss_chunk, **shared)
    return enc, dec


@functools.cache
def parameters(cls_token=False):
    """Random ones of about the initial scale, but no bias is 0 and no norm scale is 1."""
    enc, dec = model_configs(cls_token)
    rng = np.random.default_rng(5)

    def draw(spec):
        noise = rng.standard_normal(spec.shape, np.float32)
        return 1 + 0.1 * noise if spec.std is None else (0.1 + spec.std) * noise
    specs = {"encoder": vit.param_specs(enc), "decoder": decoder.param_specs(dec)}
    return jax.tree.map(draw, specs, is_leaf=layers.is_spec)


def make_batch(resolution):
    """uint8 images, and captions of several lengths: the first has no padding, the last one
    token."""
    rng = np.random.default_rng(resolution)
    text = rng.integers(3, V, (B, T))
    text[:, 0] = decoder.BOS
    for row, end in zip(text, (T - 1, 7, 2)):
        row[end], row[end + 1:] = decoder.EOS, decoder.PAD
    images = rng.integers(0, 256, (B, resolution, resolution, 3), np.uint8)
    return images, text.astype(np.int32)


def max_error(jax_array, torch_tensor):
    assert jax_array.shape == tuple(torch_tensor.shape)
    return np.abs(np.asarray(jax_array, np.float32) - torch_tensor.detach().numpy()).max()


def mean_loss(params, images, text, enc, dec):
    """The project's mean caption loss, and the indices of the kept patches."""
    tokens = vit.vit(params["encoder"], images, enc)["tokens"]
    keys = jax.random.split(jax.random.key(7), B)
    kept, keep_indices = masking.keep_random_tokens(keys, tokens, KEEP_RATIO)
    losses = decoder.caption_loss(params["decoder"], kept, text, dec)
    return losses.sum() / decoder.count_targets(text).sum(), keep_indices


def jax_step(resolution, enc, dec):
    """Loss, gradients and kept indices. XLA does all of its passes; LLVM optimizes less, which
    halves the time."""
    run = jax.jit(jax.value_and_grad(mean_loss, has_aux=True), static_argnums=(3, 4),
                  compiler_options={"xla_backend_optimization_level": 0})
    params = parameters(enc.cls_token)
    (loss, keep_indices), grads = run(params, *make_batch(resolution), enc, dec)
    return float(loss), grads, keep_indices


def torch_step(resolution, enc, dec, keep_indices):
    """Loss and gradients in PyTorch, with the same kept patches."""
    params = torch_reference.from_jax(parameters(enc.cls_token))
    images, text = map(tensor, make_batch(resolution))
    loss = torch_reference.mean_loss(params["encoder"], params["decoder"], images,
                                     tensor(keep_indices), text, enc, dec)
    loss.backward()

    def gradient(w):
        return (torch.zeros_like(w) if w.grad is None else w.grad).numpy()
    return loss.item(), jax.tree.map(gradient, params)


@pytest.mark.parametrize("resolution", RESOLUTIONS)
@pytest.mark.parametrize("cls_token", [False, True])
def test_encoder_outputs(resolution, cls_token):
    enc, _ = model_configs(cls_token)
    params, images = parameters(cls_token)["encoder"], make_batch(resolution)[0]
    outputs = jax.jit(vit.vit, static_argnums=(2, 3))(params, images, enc, True)
    for attention_weights in ([], None):  # the softmax written out, and torch's fused attention
        x, tokens, pooled = torch_reference.encoder(
            torch_reference.from_jax(params), tensor(images), enc, attention_weights)
        assert max_error(outputs["tokens"], tokens) <= 1e-4
        assert max_error(outputs["pooled"], pooled) <= 1e-4
        assert ("cls" in outputs) == cls_token
        if cls_token:
            assert max_error(outputs["cls"], x[:, 0]) <= 1e-4
        if attention_weights:
            assert max_error(outputs["attention"], torch.stack(attention_weights)) <= 1e-4


def test_layer_norm_of_a_token_with_small_variance():
    """The epsilon is a considerable part of it."""
    x = 1e-3 * np.random.default_rng(0).standard_normal((2, 5, 64), np.float32)
    w = {"scale": np.full(64, 1.5, np.float32), "bias": np.full(64, 0.5, np.float32)}
    expected = torch_reference.layer_norm(tensor(x), torch_reference.from_jax(w))
    assert max_error(layers.layer_norm(x, w), expected) <= 1e-4


@pytest.mark.parametrize("K, prefix_attention, text_pos_embed", [
    (6, "causal", False), (14, "causal", True), (14, "bidirectional", False),
    (6, "bidirectional", True)])
def test_logits(K, prefix_attention, text_pos_embed):
    enc, dec = model_configs(prefix_attention=prefix_attention)
    dec = dataclasses.replace(dec, text_pos_embed=text_pos_embed)
    params, text = parameters()["decoder"], make_batch(32)[1]
    image_tokens = np.random.default_rng(K).standard_normal((B, K, enc.width), np.float32)
    logits = jax.jit(decoder.caption_logits, static_argnums=3)(params, image_tokens, text, dec)
    expected = torch_reference.decoder(torch_reference.from_jax(params), tensor(image_tokens),
                                       tensor(text), dec)
    assert max_error(logits, expected) <= 1e-4


@pytest.mark.parametrize("remat, resolution, cls_token, prefix_attention, loss_chunk", [
    # every pair of values of two settings occurs
    ("none", 32, False, "causal", 0), ("none", 48, True, "bidirectional", 5),
    ("dots", 32, False, "bidirectional", 5), ("dots", 48, True, "causal", 0),
    ("block", 32, True, "causal", 5), ("block", 48, False, "bidirectional", 0)])
def test_gradient_of_every_parameter(remat, resolution, cls_token, prefix_attention, loss_chunk):
    enc, dec = model_configs(cls_token, prefix_attention, loss_chunk, remat)
    loss, grads, keep_indices = jax_step(resolution, enc, dec)
    torch_loss, torch_grads = torch_step(resolution, enc, dec, keep_indices)
    assert abs(loss - torch_loss) <= 1e-5 * torch_loss
    assert jax.tree.structure(grads) == jax.tree.structure(torch_grads)
    for (path, grad), expected in zip(jax.tree.leaves_with_path(grads),
                                      jax.tree.leaves(torch_grads)):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        size = np.linalg.norm(expected)
        if name.startswith("encoder/norm/"):  # of `pooled`, which the loss does not read
            assert size == 0 and not np.any(grad), name
        else:
            assert size > 0 and np.linalg.norm(grad - expected) <= 1e-3 * size, name


@pytest.mark.parametrize("prefix_attention, loss_chunk, remat", [
    ("causal", 0, "none"), ("bidirectional", 5, "block")])
def test_bfloat16_agrees_roughly(prefix_attention, loss_chunk, remat):
    enc, dec = model_configs(True, prefix_attention, loss_chunk, remat, "bfloat16")
    loss, grads, keep_indices = jax_step(32, enc, dec)
    torch_loss, _ = torch_step(32, enc, dec, keep_indices)
    fp32_loss, fp32_grads = torch_step(32, *model_configs(True, prefix_attention), keep_indices)
    assert abs(loss - torch_loss) <= 5e-2 * torch_loss
    assert abs(loss - fp32_loss) <= 5e-2 * fp32_loss
    assert all(grad.dtype == np.float32 for grad in jax.tree.leaves(grads))

    def concatenate(tree):
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
    error = np.linalg.norm(concatenate(grads) - concatenate(fp32_grads))
    assert error <= 0.1 * np.linalg.norm(concatenate(fp32_grads))


def test_the_wrong_gelu_would_be_noticed(monkeypatch):
    gelu, other = torch.nn.functional.gelu, {"none": "tanh", "tanh": "none"}
    monkeypatch.setattr(torch_reference.F, "gelu",
                        lambda x, approximate: gelu(x, approximate=other[approximate]))
    enc, dec = model_configs()
    params, (images, text) = parameters(), make_batch(32)
    torch_params = torch_reference.from_jax(params)
    tokens = jax.jit(vit.vit, static_argnums=2)(params["encoder"], images, enc)["tokens"]
    torch_tokens = torch_reference.encoder(torch_params["encoder"], tensor(images), enc)[1]
    assert max_error(tokens, torch_tokens) > 1e-4
    logits = jax.jit(decoder.caption_logits, static_argnums=3)(params["decoder"], tokens, text, dec)
    torch_logits = torch_reference.decoder(torch_params["decoder"], tensor(tokens), tensor(text),
                                           dec)
    assert max_error(logits, torch_logits) > 1e-4

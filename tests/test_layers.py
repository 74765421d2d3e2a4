"""Layers and parameter specs: values and gradients against plain JAX in double precision."""
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layers


def linear(x, kernel, bias):
    return layers.linear(x, {"kernel": kernel, "bias": bias})


def plain_linear(x, kernel, bias):
    return x @ kernel + bias


def norm_linear(x, scale, shift, kernel, bias):
    normalized = layers.layer_norm(x, {"scale": scale, "bias": shift})
    return layers.linear(normalized, {"kernel": kernel, "bias": bias})


def plain_norm_linear(x, scale, shift, kernel, bias):
    std = jnp.sqrt(x.var(-1, keepdims=True) + layers.LAYER_NORM_EPS)
    normalized = (x - x.mean(-1, keepdims=True)) / std
    return (normalized * scale + shift) @ kernel + bias


def gelu_linear(exact):
    return lambda x, kernel, bias: layers.gelu_linear(x, {"kernel": kernel, "bias": bias}, exact)


def plain_gelu_linear(exact):
    return lambda x, kernel, bias: jax.nn.gelu(x, approximate=not exact) @ kernel + bias


def attention(mask):
    return lambda q, k, v: layers.dot_product_attention(q, k, v, mask)


def plain_attention(mask):
    def attend(q, k, v):
        scores = jnp.einsum("bqhd,bshd->bhqs", q, k) / q.shape[-1] ** 0.5
        if mask is not None:
            scores = jnp.where(mask, scores, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1)
        return jnp.einsum("bhqs,bshd->bqhd", weights, v), weights
    return attend


CAUSAL, LONG_CAUSAL = np.tri(4, dtype=bool), np.tri(513, dtype=bool)
CASES = {  # the layer, the same in plain JAX, and the shapes of its inputs
    "linear": (linear, plain_linear, [(2, 3, 4), (4, 5), (5,)]),
    "norm and linear": (norm_linear, plain_norm_linear, [(2, 3, 8), (8,), (8,), (8, 5), (5,)]),
    "exact gelu": (gelu_linear(True), plain_gelu_linear(True), [(2, 3, 8), (8, 5), (5,)]),
    "tanh gelu": (gelu_linear(False), plain_gelu_linear(False), [(2, 3, 8), (8, 5), (5,)]),
    "attention": (attention(None), plain_attention(None),
                  [(2, 3, 2, 4), (2, 5, 2, 4), (2, 5, 2, 4)]),
    "causal attention": (attention(CAUSAL), plain_attention(CAUSAL), [(2, 4, 2, 8)] * 3),
    "attention in chunks": (attention(None), plain_attention(None),
                            [(1, 513, 1, 4), (1, 3, 1, 4), (1, 3, 1, 4)]),
    "causal attention in chunks": (attention(LONG_CAUSAL), plain_attention(LONG_CAUSAL),
                                   [(1, 513, 1, 4)] * 3),
}


def values_and_grads(f, inputs):
    """All outputs of f, and the gradients of a nonlinear function of them for every input."""
    def loss(*args):
        outputs = jax.tree.leaves(f(*args))
        return sum(jnp.sin(x + i).sum() for i, x in enumerate(outputs)), outputs
    argnums = tuple(range(len(inputs)))
    grads, outputs = jax.jit(jax.grad(loss, argnums, has_aux=True))(*inputs)
    return [np.asarray(x) for x in (*outputs, *grads)]


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_equal_plain_jax_in_double_precision(case):
    layer, plain, shapes = CASES[case]
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal(shape, np.float32) for shape in shapes]
    computed = values_and_grads(layer, inputs)
    with jax.enable_x64(True):
        expected = values_and_grads(plain, [x.astype(np.float64) for x in inputs])
    for x, y in zip(computed, expected, strict=True):
        assert np.linalg.norm(x - y) < 1e-6 * np.linalg.norm(y)


def test_attention_in_chunks_never_holds_all_weights():
    B, Q, H = 2, 1024, 2

    def compiled_bytes(first_chunked: int) -> int:
        q = jax.ShapeDtypeStruct((B, Q, H, 8), jnp.float32)
        original, layers.CHUNKED_QUERIES = layers.CHUNKED_QUERIES, first_chunked
        try:
            grad = jax.jit(jax.grad(lambda *args: attention(None)(*args)[0].sum(), (0, 1, 2)))
            return grad.lower(q, q, q).compile().memory_analysis().temp_size_in_bytes
        finally:
            layers.CHUNKED_QUERIES = original
    weights_bytes = B * H * Q * Q * 4
    assert layers.query_chunk_size(Q) == 256 and layers.query_chunk_size(729) == 243
    assert layers.query_chunk_size(256) == 256  # small
    assert layers.query_chunk_size(521) == 521  # a prime
    assert compiled_bytes(Q) < weights_bytes < compiled_bytes(Q + 1)


@pytest.mark.parametrize("capability, dtype, queries, mask, expected", [
    ("9.0", "bfloat16", 6, None, True),                      # the encoder on an H100
    ("8.0", "bfloat16", 6, np.tri(6, dtype=bool), True),     # the decoder on an A100
    ("9.0", "float32", 6, None, False),
    ("7.5", "bfloat16", 6, None, False),                     # NVIDIA before Ampere
    ("gfx90a", "bfloat16", 6, None, False),                  # AMD
    (None, "bfloat16", 6, None, False),                      # a CPU or a TPU has no capability
    ("9.0", "bfloat16", 5, None, False),
    ("9.0", "bfloat16", 6, np.ones((6, 6), bool), False),
    ("9.0", "bfloat16", 2, np.tri(2, 6, dtype=bool), False),  # generation: two queries of six
])
def test_the_fused_kernel_is_chosen_only_where_it_computes_the_same(
        monkeypatch, capability, dtype, queries, mask, expected):
    device = types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, "local_devices", lambda: [device] if capability else jax.devices())
    q, k = jnp.zeros((1, queries, 2, 8), dtype), jnp.zeros((1, 6, 2, 8), dtype)
    assert layers.has_fused_attention(q, k, mask) is expected


@pytest.mark.parametrize("case", CASES)
def test_gradients_have_the_dtype_of_their_input(case):
    """The fp32 gradient of a bf16 weight would take twice the memory over all layers."""
    layer, _, shapes = CASES[case]
    inputs = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    if case == "norm and linear":  # scale and bias of a norm are fp32 always
        inputs[1:3] = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes[1:3]]

    def loss(*args):
        return jax.tree.leaves(layer(*args))[0].sum()
    grads = jax.eval_shape(jax.grad(loss, tuple(range(len(inputs)))), *inputs)
    assert [g.dtype for g in grads] == [x.dtype for x in inputs]


def test_linear_without_bias_is_the_matmul():
    x, kernel = jax.random.normal(jax.random.key(0), (2, 3, 4)), jnp.ones((4, 5))
    np.testing.assert_array_equal(layers.linear(x, {"kernel": kernel}), x @ kernel)


@pytest.mark.parametrize("distribution", layers.DISTRIBUTIONS)
def test_initial_parameters_have_the_declared_scale(distribution):
    spec = layers.ParamSpec((200, 300), 0.5, distribution)
    drawn = layers.init_params(jax.random.key(0), {"kernel": spec})["kernel"]
    assert float(drawn.std()) == pytest.approx(0.5, rel=0.02)
    assert abs(float(drawn.mean())) < 0.01


@pytest.mark.parametrize("mask", [None, np.tri(6, dtype=bool)], ids=["full", "causal"])
def test_the_fused_kernel_gets_the_same_arguments(monkeypatch, mask):
    dot = jax.nn.dot_product_attention

    def fused(*args, implementation, **options):
        return dot(*args, **options)
    monkeypatch.setattr(layers, "has_fused_attention", lambda *_: True)
    monkeypatch.setattr(jax.nn, "dot_product_attention", fused)
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 6, 2, 8), np.float32)
    outputs, _ = layers.dot_product_attention(q, k, v, mask)
    expected, _ = layers.plain_attention(q, k, v, mask)
    np.testing.assert_allclose(outputs, expected, atol=1e-5)


def test_attention_weights_of_half_precision_inputs_are_float32():
    x = jax.ShapeDtypeStruct((2, 6, 2, 8), jnp.bfloat16)
    weights = jax.eval_shape(lambda q: layers.dot_product_attention(q, q, q, None)[1], x)
    assert weights.dtype == jnp.float32


def test_layer_norm_of_half_precision_inputs_computes_in_float32():
    x = jnp.asarray(1000 + np.random.default_rng(0).standard_normal((4, 64)), jnp.bfloat16)
    w = {"scale": jnp.ones(64), "bias": jnp.zeros(64)}
    exact = layers.layer_norm(x.astype(jnp.float32), w)
    assert np.abs(np.asarray(layers.layer_norm(x, w), np.float32) - exact).max() < 0.02

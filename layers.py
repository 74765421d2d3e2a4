"""The operations of a transformer block: linear layer, layer norm, GELU and attention.

Each is a function of its input and its parameters, a dict: {"kernel", "bias"} for a linear layer,
{"scale", "bias"} for a norm. Matmuls run in the dtype of x; norm statistics and softmax run in
fp32. The last section declares and initializes parameters.

`linear` and `gelu_linear` have hand-written gradients, because XLA's are slow on a CPU and keep
more memory than needed. jax.custom_vjp takes three functions for each: the plain formula; the
forward pass, which also returns the residuals that the gradient needs; and the backward pass. A
training step on two cores, and the memory that XLA plans for it:

    gradients of these two    an earlier toy    Ti/16 at 160 px
    written by hand           107 ms            1,612 ms, 1.49 GiB
    by autodiff               123 ms            1,782 ms, 2.35 GiB

Letters: B images, Q query tokens, C of them in a chunk, S key tokens, D width, F output width, H
heads, Dh = D/H.
"""
import math
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

LAYER_NORM_EPS = 1e-6  # every layer norm of the released models
CHUNKED_QUERIES = 512  # from so many queries on, attention works in chunks (query_chunk_size)


# ---------------------------------------------------------------------------------- linear
def matmul_and_bias(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """x (..., D) @ kernel (D,F) + bias (F,), in x's dtype."""
    return x @ kernel.astype(x.dtype) + bias.astype(x.dtype)


linear_with_bias = jax.custom_vjp(matmul_and_bias)


def linear_forward(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> tuple:
    """Calls matmul_and_bias, because --remat dots cannot see a matmul inside linear_with_bias."""
    return matmul_and_bias(x, kernel, bias), (x, kernel)


def linear_backward(residuals: tuple, g: jax.Array) -> tuple:
    """The bias gradient is a matmul with ones: XLA's column sums are slow on a CPU."""
    x, kernel = residuals
    rows = x.reshape(-1, x.shape[-1])
    g_rows = g.reshape(-1, g.shape[-1])
    ones = jnp.ones((1, len(g_rows)), g.dtype)
    d_x = g @ kernel.astype(g.dtype).T
    d_kernel = jnp.matmul(rows.T, g_rows, preferred_element_type=jnp.float32)
    d_bias = jnp.matmul(ones, g_rows, preferred_element_type=jnp.float32)[0]
    return d_x, d_kernel.astype(kernel.dtype), d_bias.astype(kernel.dtype)  # the bias's dtype too


linear_with_bias.defvjp(linear_forward, linear_backward)


def linear(x: jax.Array, w: dict) -> jax.Array:
    """x (..., D) to (..., F). w: {"kernel" (D,F)} and, where the layer has one, {"bias" (F,)}."""
    if "bias" in w:
        return linear_with_bias(x, w["kernel"], w["bias"])
    return x @ w["kernel"].astype(x.dtype)


# ------------------------------------------------------------------------------ layer norm
def layer_norm(x: jax.Array, w: dict) -> jax.Array:
    """Over the last axis, in fp32 whatever x is; returns x's dtype. w: {"scale", "bias"} (D,)."""
    x32 = x.astype(jnp.float32)
    centered = x32 - x32.mean(-1, keepdims=True)
    rstd = jax.lax.rsqrt(jnp.square(centered).mean(-1, keepdims=True) + LAYER_NORM_EPS)
    return (centered * rstd * w["scale"] + w["bias"]).astype(x.dtype)


# ------------------------------------------------------------------------------------ GELU
def gelu_and_slope(x: jax.Array, exact: bool) -> tuple[jax.Array, jax.Array]:
    """gelu(x) = x * cdf(x) and its derivative. cdf is that of the normal distribution: by erf
    where exact (the encoder), by its tanh approximation otherwise (the decoder), as released."""
    z = x.astype(jnp.float32)
    if exact:
        cdf = 0.5 * (1 + jax.lax.erf(z * math.sqrt(0.5)))
        slope = cdf + z * jnp.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    else:
        a, b = math.sqrt(2 / math.pi), 0.044715
        t = jnp.tanh(a * (z + b * z * z * z))
        cdf = 0.5 * (1 + t)
        slope = cdf + 0.5 * z * (1 - t * t) * a * (1 + 3 * b * z * z)
    return (z * cdf).astype(x.dtype), slope.astype(x.dtype)


def gelu_matmul_and_bias(x: jax.Array, kernel: jax.Array, bias: jax.Array,
                         exact: bool) -> jax.Array:
    """gelu(x) @ kernel + bias."""
    return matmul_and_bias(gelu_and_slope(x, exact)[0], kernel, bias)


gelu_linear_with_bias = jax.custom_vjp(gelu_matmul_and_bias, nondiff_argnums=(3,))


def gelu_linear_forward(x: jax.Array, kernel: jax.Array, bias: jax.Array, exact: bool) -> tuple:
    return gelu_matmul_and_bias(x, kernel, bias, exact), (x, kernel)


def gelu_linear_backward(exact: bool, residuals: tuple, g: jax.Array) -> tuple:
    """gelu(x) and its slope are cheaper to compute again than to keep. Without the barrier XLA:CPU
    would compute erf again inside each matmul that reads it."""
    x, kernel = residuals
    hidden, slope = fusion_barrier(gelu_and_slope(x, exact))
    d_hidden, d_kernel, d_bias = linear_backward((hidden, kernel), g)
    return d_hidden * slope, d_kernel, d_bias


gelu_linear_with_bias.defvjp(gelu_linear_forward, gelu_linear_backward)


def gelu_linear(x: jax.Array, w: dict, exact: bool) -> jax.Array:
    """linear(gelu(x), w)."""
    return gelu_linear_with_bias(x, w["kernel"], w["bias"], exact)


def fusion_barrier(tree: tuple) -> tuple:
    """Keeps XLA:CPU from fusing the computation of `tree` into the operations that read it. Does
    nothing on other devices."""
    return jax.lax.platform_dependent(tree, cpu=jax.lax.optimization_barrier,
                                      default=lambda x: x)


# ------------------------------------------------------------------------------- attention
def dot_product_attention(q: jax.Array, k: jax.Array, v: jax.Array,
                          mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """q (B,Q,H,Dh), k and v (B,S,H,Dh); mask broadcastable to (B,H,Q,S), True where a query may
    attend. Returns the outputs (B,Q,H,Dh) and the attention weights (B,H,Q,S), fp32."""
    if has_fused_attention(q, k, mask):
        outputs = jax.nn.dot_product_attention(q, k, v, is_causal=mask is not None,
                                               implementation="cudnn")
        return outputs, plain_attention(q, k, v, mask)[1]  # XLA drops these weights if unused
    return plain_attention(q, k, v, mask)


def has_fused_attention(q: jax.Array, k: jax.Array, mask: Any) -> bool:
    """Whether cuDNN's fused kernel, which never stores the attention weights, can be used: bf16 on
    an NVIDIA GPU (Ampere or newer), even numbers of tokens (it has no gradient for others), and no
    mask or the causal one. A step of L/14 at 224 px: 121 ms with it, 135 ms without, on an H200."""
    capability = str(getattr(jax.local_devices()[0], "compute_capability", "")).split(".")[0]
    if q.dtype != jnp.bfloat16 or not capability.isdecimal() or int(capability) < 8:
        return False
    if q.shape[1] % 2 or k.shape[1] % 2:
        return False
    return mask is None or is_causal_mask(mask, q.shape[1])


def is_causal_mask(mask: Any, Q: int) -> bool:
    """False for a mask that JAX traces, because its values are not known."""
    return isinstance(mask, np.ndarray) and np.array_equal(mask, np.tri(Q))


def plain_attention(q: jax.Array, k: jax.Array, v: jax.Array,
                    mask: Any) -> tuple[jax.Array, jax.Array]:
    """dot_product_attention by its formula, on any device; in chunks where there are many queries.
    """
    q = q * q.shape[-1] ** -0.5
    q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))                      # (B,H,Q or S,Dh)
    C = query_chunk_size(q.shape[2])
    attend = softmax_attention if q.shape[2] == C else chunked_attention
    outputs, attention_weights = attend(q, k, v, mask)
    return outputs.swapaxes(1, 2), attention_weights


def softmax_attention(q: jax.Array, k: jax.Array, v: jax.Array,
                      mask: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """q (B,H,Q,Dh), scaled, and k, v (B,H,S,Dh): outputs (B,H,Q,Dh) and weights (B,H,Q,S)."""
    scores = (q @ k.swapaxes(2, 3)).astype(jnp.float32)                  # (B,H,Q,S)
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    attention_weights = jax.nn.softmax(scores, axis=-1)
    return attention_weights.astype(v.dtype) @ v, attention_weights


def chunked_attention(q: jax.Array, k: jax.Array, v: jax.Array,
                      mask: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """softmax_attention, one chunk of queries after the other."""
    B, H, Q, Dh = q.shape
    C = query_chunk_size(Q)
    chunks = [q.reshape(B, H, Q // C, C, Dh)]
    if mask is not None:  # to four axes with all Q rows, so that it can be cut into chunks as q is
        mask = jnp.broadcast_to(mask, (*mask.shape[:-2], Q, k.shape[2]))
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
        chunks.append(mask.reshape(*mask.shape[:2], Q // C, C, -1))
    chunks = [jnp.moveaxis(chunk, 2, 0) for chunk in chunks]             # (Q/C,B,H,C,...)

    @jax.checkpoint
    def attend(chunk: list) -> tuple:
        q_chunk, *mask_chunk = chunk
        return softmax_attention(q_chunk, k, v, *mask_chunk)
    outputs, attention_weights = jax.lax.map(attend, chunks)             # (Q/C,B,H,C,Dh or S)
    return (jnp.moveaxis(outputs, 0, 2).reshape(B, H, Q, Dh),
            jnp.moveaxis(attention_weights, 0, 2).reshape(B, H, Q, -1))


def query_chunk_size(Q: int) -> int:
    """How many of Q queries attend at a time: usually all. From CHUNKED_QUERIES on (as at 448 px),
    it is the largest divisor of Q from 64 to 256, if there is one. The result is the same, in less
    memory: the backward pass computes the weights of one chunk at a time."""
    divisors = [C for C in range(64, 257) if Q % C == 0]
    return divisors[-1] if Q >= CHUNKED_QUERIES and divisors else Q


# ------------------------------------------------------------------------------ parameters
class ParamSpec(NamedTuple):
    """One array, declared once: initialization and counts derive from it."""
    shape: tuple[int, ...]
    std: float | None                  # standard deviation; 0 gives zeros, None gives ones
    distribution: str = "normal"       # a key of DISTRIBUTIONS


DISTRIBUTIONS = {  # samples with standard deviation 1, from (key, shape)
    "normal": jax.random.normal,
    "uniform": lambda key, shape: jax.random.uniform(key, shape, minval=-(3**0.5), maxval=3**0.5),
    # a normal cut at two standard deviations has a standard deviation of 0.87962566
    "truncated": lambda key, shape: jax.random.truncated_normal(key, -2, 2, shape) / 0.87962566,
}


def dense_specs(fan_in: int, fan_out: int, stack: tuple[int, ...] = (), copies: int = 1,
                bias: bool = True) -> dict:
    """A linear layer with Xavier scale, stacked over layers where `stack` is (L,). `copies`
    matrices side by side (q, k, v) are each scaled on their own."""
    xavier = math.sqrt(2 / (fan_in + fan_out))
    specs = {"kernel": ParamSpec((*stack, fan_in, copies * fan_out), xavier)}
    if bias:
        specs["bias"] = ParamSpec((*stack, copies * fan_out), 0.0)
    return specs


def norm_specs(width: int, stack: tuple[int, ...] = ()) -> dict:
    return {"scale": ParamSpec((*stack, width), None), "bias": ParamSpec((*stack, width), 0.0)}


def is_spec(x: Any) -> bool:
    return isinstance(x, ParamSpec)


def init_params(key: jax.Array, specs: dict) -> dict:
    """fp32 arrays for a tree of specs. Each name has a key of its own, so that a new parameter
    changes no other."""
    def draw(path: tuple, spec: ParamSpec) -> jax.Array:
        if spec.std is None:
            return jnp.ones(spec.shape, jnp.float32)
        if spec.std == 0:
            return jnp.zeros(spec.shape, jnp.float32)
        name = jax.tree_util.keystr(path).encode()
        param_key = jax.random.fold_in(key, zlib.crc32(name))
        return spec.std * DISTRIBUTIONS[spec.distribution](param_key, spec.shape)
    return jax.tree_util.tree_map_with_path(draw, specs, is_leaf=is_spec)


def count_params(specs: dict) -> int:
    """Parameters in a tree of specs."""
    return sum(math.prod(spec.shape) for spec in jax.tree.leaves(specs, is_leaf=is_spec))


def with_init_scales(specs: dict, scales: dict) -> dict:
    """The same specs with other initial scales, {layer: (distribution, std from (fan_in, fan_out))}
    as in vit.RELEASED_INIT. Biases, norms, position tables and unnamed layers keep theirs."""
    def rescale(path: tuple, spec: ParamSpec) -> ParamSpec:
        layer = path[-2].key if len(path) > 1 else ""
        if path[-1].key not in ("kernel", "embedding") or layer not in scales:
            return spec
        distribution, std = scales[layer]
        return ParamSpec(spec.shape, std(*spec.shape[-2:]), distribution)
    return jax.tree_util.tree_map_with_path(rescale, specs, is_leaf=is_spec)

"""The layers of a transformer block, with hand-written gradients: what is kept for the backward pass, and what is not.

Autodiff keeps what each small operation needs, about 26 numbers a token, layer and unit of width; these keep 12, and
compute the cheap rest again. They hold no weights and know no model. Parameters come as {"kernel", "bias"} or
{"scale", "bias"}; matmuls run in the dtype of x, statistics and exponentials in fp32.

Letters: B images, Q and S tokens that look and that are looked at, D width, F outputs, H heads, Dh = D/H.
"""
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

EPS = 1e-6  # every layer norm of the released models


def fence(tree: Any) -> Any:
    """On a CPU, keep XLA from merging what is before into each thing after: it would compute the activation's erf anew,
    element by element, inside every matmul's operand and column sum that reads it. It halves the training step there.
    Elsewhere such merging pays, and this is nothing."""
    return jax.lax.platform_dependent(tree, cpu=jax.lax.optimization_barrier, default=lambda x: x)


def kernel_and_bias_gradients(x: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of x @ kernel + bias, fp32, from its input and its output's gradient. The bias's is a matmul with ones, for XLA's
    column sums are slow on a CPU."""
    rows, g_rows = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    product = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
    return product(rows.T, g_rows), product(jnp.ones((1, len(g_rows)), g.dtype), g_rows)[0]


# -------------------------------------------------------------------------------------------------------------- linear
@jax.custom_vjp
def affine(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """x (..., D) @ kernel (D,F) + bias (F,). Keeps x."""
    return fence(x @ kernel.astype(x.dtype) + bias.astype(x.dtype))


def affine_backward(saved: tuple, g: jax.Array) -> tuple:
    x, kernel = saved
    g = fence(g)
    return g @ kernel.astype(g.dtype).T, *(d.astype(kernel.dtype) for d in kernel_and_bias_gradients(x, g))


affine.defvjp(lambda x, kernel, bias: (affine(x, kernel, bias), (x, kernel)), affine_backward)


def linear(x: jax.Array, w: dict) -> jax.Array:
    return affine(x, w["kernel"], w["bias"]) if "bias" in w else x @ w["kernel"].astype(x.dtype)


# ---------------------------------------------------------------------------------------------------------- layer norm
def standardise(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Over the last axis: x with mean 0 and deviation 1, in x's dtype, and what it was multiplied by, fp32 (..., 1)."""
    x32 = x.astype(jnp.float32)
    centred = x32 - x32.mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + EPS)
    return (centred * inverse).astype(x.dtype), inverse


def layer_norm(x: jax.Array, w: dict) -> jax.Array:
    """Over the last axis, in fp32 whatever x is; returns x's dtype."""
    unit, _ = standardise(x.astype(jnp.float32))
    return (unit * w["scale"] + w["bias"]).astype(x.dtype)


@jax.custom_vjp
def norm_affine(x: jax.Array, scale: jax.Array, shift: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """A layer norm and the matmul that reads it. As (unit * scale + shift) @ kernel is unit @ (scale * kernel) + shift @ kernel,
    the norm's weights go into the matmul's, forwards and backwards: no pass over the tokens is spent on them.
    Keeps unit, x standardised."""
    return norm_affine_forward(x, scale, shift, kernel, bias)[0]


def norm_affine_forward(x: jax.Array, scale: jax.Array, shift: jax.Array, kernel: jax.Array, bias: jax.Array) -> tuple[jax.Array, tuple]:
    unit, inverse = fence(standardise(x))
    folded = (scale[:, None] * kernel).astype(x.dtype)
    moved = (shift[:, None] * kernel).sum(0) + bias
    return fence(unit @ folded + moved.astype(x.dtype)), (unit, inverse, scale, shift, kernel)


def norm_affine_backward(saved: tuple, g: jax.Array) -> tuple:
    unit, inverse, scale, shift, kernel = saved
    g = fence(g)
    d_folded, d_bias = kernel_and_bias_gradients(unit, g)
    d_unit = fence(g @ (scale[:, None] * kernel).astype(g.dtype).T).astype(jnp.float32)
    along = (d_unit * unit).mean(-1, keepdims=True)
    d_x = inverse * (d_unit - d_unit.mean(-1, keepdims=True) - unit * along)
    d_kernel = scale[:, None] * d_folded + shift[:, None] * d_bias
    return d_x.astype(g.dtype), (kernel * d_folded).sum(1), kernel @ d_bias, d_kernel.astype(kernel.dtype), d_bias.astype(kernel.dtype)


norm_affine.defvjp(norm_affine_forward, norm_affine_backward)


def norm_linear(x: jax.Array, norm: dict, w: dict) -> jax.Array:
    """linear(layer_norm(x, norm), w)."""
    return norm_affine(x, norm["scale"], norm["bias"], w["kernel"], w["bias"])


# ---------------------------------------------------------------------------------------------------------------- gelu
def gelu_and_slope(x: jax.Array, exact: bool) -> tuple[jax.Array, jax.Array]:
    """x times the normal distribution's mass below x, exact by erf or the tanh approximation; and its derivative."""
    z = x.astype(jnp.float32)
    if exact:
        below = 0.5 * (1 + jax.lax.erf(z * math.sqrt(0.5)))
        slope = below + z * jnp.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    else:
        a, b = math.sqrt(2 / math.pi), 0.044715
        t = jnp.tanh(a * (z + b * z * z * z))
        below = 0.5 * (1 + t)
        slope = below + 0.5 * z * (1 - t * t) * a * (1 + 3 * b * z * z)
    return (z * below).astype(x.dtype), slope.astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def gelu_affine(x: jax.Array, kernel: jax.Array, bias: jax.Array, exact: bool) -> jax.Array:
    """gelu(x) @ kernel + bias. Keeps x; gelu and slope, each as wide, are cheaper to compute again than to store."""
    return affine(fence(gelu_and_slope(x, exact)[0]), kernel, bias)


def gelu_affine_backward(exact: bool, saved: tuple, g: jax.Array) -> tuple:
    x, kernel = saved
    hidden, slope = fence(gelu_and_slope(x, exact))
    d_hidden, *d_weights = affine_backward((hidden, kernel), g)
    return d_hidden * slope, *d_weights


gelu_affine.defvjp(lambda x, kernel, bias, exact: (gelu_affine(x, kernel, bias, exact), (x, kernel)), gelu_affine_backward)


def gelu_linear(x: jax.Array, w: dict, exact: bool) -> jax.Array:
    return gelu_affine(x, w["kernel"], w["bias"], exact)


# ----------------------------------------------------------------------------------------------------------- attention
@jax.custom_vjp
def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """q (B,Q,H,Dh), k and v (B,S,H,Dh), mask broadcastable to (B,H,Q,S), True where looking is allowed.
    Returns the mixed values (B,Q,H,Dh) and who looked at whom (B,H,Q,S), fp32, rows summing to 1. Keeps q, k, v with
    the heads in front, as batched matmuls want them, and the looks."""
    return attend_forward(q, k, v, mask)[0]


def attend_forward(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> tuple[tuple[jax.Array, jax.Array], tuple]:
    q, k, v = fence(tuple(a.swapaxes(1, 2) for a in (q * q.shape[-1] ** -0.5, k, v)))     # (B,H,Q or S,Dh)
    scores = (q @ k.swapaxes(2, 3)).astype(jnp.float32)
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    powers = fence(jnp.exp(scores - scores.max(-1, keepdims=True)))
    looks = fence(powers / powers.sum(-1, keepdims=True))
    kept = looks.astype(v.dtype)
    return (fence(kept @ v).swapaxes(1, 2), looks), (q, k, v, kept)


def attend_backward(saved: tuple, g: tuple[jax.Array, jax.Array]) -> tuple:
    q, k, v, looks = saved
    d_mixed = fence(g[0].swapaxes(1, 2))                                                  # (B,H,Q,Dh)
    d_looks = (d_mixed @ v.swapaxes(2, 3)).astype(jnp.float32) + g[1]
    d_scores = fence((looks * (d_looks - (d_looks * looks).sum(-1, keepdims=True))).astype(q.dtype))
    d_q, d_k, d_v = d_scores @ k * q.shape[-1] ** -0.5, d_scores.swapaxes(2, 3) @ q, looks.swapaxes(2, 3) @ d_mixed
    return *(a.swapaxes(1, 2) for a in fence((d_q, d_k, d_v))), None


attend.defvjp(attend_forward, attend_backward)

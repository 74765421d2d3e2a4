"""The contrastive parts that CLIP and OpenVision share: a text encoder and a loss over a batch.

Letters: B images, T text positions, D decoder width.
"""
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

import decoder
import vit
from decoder import EOS
from layers import ParamSpec, dense_specs, layer_norm, linear, norm_specs
from vit import block_specs

INIT_TEMPERATURE = 0.07  # CLIP's; the inverse of the learned one stays below MAX_SCALE
MAX_SCALE = 100


def text_encoder_specs(cfg: decoder.DecoderConfig, text_len: int) -> dict:
    """A text encoder of the decoder's size, with CLIP's learned positions."""
    return {
        "embed": {"embedding": ParamSpec((cfg.vocab_size, cfg.width), 0.02)},
        "positions": {"table": ParamSpec((text_len, cfg.width), 0.01)},
        "blocks": block_specs(cfg.depth, cfg.width, cfg.mlp_dim),
        "norm": norm_specs(cfg.width),
        "project": dense_specs(cfg.width, cfg.width, bias=False),
    }


def text_encoder_flops(cfg: decoder.DecoderConfig, text_len: int) -> float:
    """Forward FLOPs for one caption, its projection included."""
    return (vit.block_flops(text_len, cfg.width, cfg.mlp_dim, cfg.depth)
            + 2 * cfg.width * cfg.width)


def pair_specs(model: Any) -> dict:
    """The projection of the image feature, and the learned temperature."""
    return {"image": dense_specs(model.encoder.width, model.decoder.width, bias=False),
            "temperature": {"log": ParamSpec((), 0.0)}}


@jax.named_scope("text encoder")
def encode_text(params: dict, text: jax.Array,
                cfg: decoder.DecoderConfig) -> tuple[jax.Array, jax.Array]:
    """text (B,T) to its tokens (B,T,D) and the caption's feature (B,D).

    As in CLIP, the mask is causal and the feature is the output at eos, after the final norm: only
    eos attends to all tokens and to no padding. (OpenVision's text encoder has no causal mask and
    takes the last position.)
    """
    T = text.shape[1]
    x = params["embed"]["embedding"][text] + params["positions"]["table"][:T]
    mask = decoder.attention_mask(0, T, "causal")
    x, _ = vit.transformer_stack(x.astype(cfg.dtype), params["blocks"], cfg, mask=mask,
                                 exact_gelu=False)
    eos_position = (text == EOS).argmax(-1)
    last = jnp.take_along_axis(x, eos_position[:, None, None], axis=1)[:, 0]
    return x, linear(layer_norm(last, params["norm"]), params["project"])


def l2_normalize(x: jax.Array) -> jax.Array:
    """(..., D) to unit length, fp32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-12)


@jax.named_scope("contrast")
def contrastive_loss(image: jax.Array, text: jax.Array, has_caption: jax.Array,
                     scale: jax.Array) -> jax.Array:
    """CLIP's loss of each of this device's images, (B,): the mean of two cross-entropies, of its
    caption among all captions of the global batch and of its image among all images.

    image and text (B,D) have unit length. Rows without `has_caption` (B,) are no candidates, and
    their loss is 0."""
    all_gather = functools.partial(jax.lax.all_gather, axis_name="devices", tiled=True)
    match = scale * (image * text).sum(-1)

    def cross_entropy(queries: jax.Array, candidates: jax.Array) -> jax.Array:
        logits = scale * queries @ all_gather(candidates).T
        logits = jnp.where(all_gather(has_caption), logits, jnp.finfo(jnp.float32).min)
        return jax.nn.logsumexp(logits, axis=-1) - match
    both = cross_entropy(image, text) + cross_entropy(text, image)
    return jnp.where(has_caption, both / 2, 0)


def logit_scale(params: dict) -> jax.Array:
    """1 / temperature, at most MAX_SCALE (CLIP section 2.5). The gradient passes the bound, because
    a scale that once reached it could otherwise never fall again."""
    log_scale = params["pair"]["temperature"]["log"] - math.log(INIT_TEMPERATURE)
    excess = jnp.maximum(log_scale - math.log(MAX_SCALE), 0)
    return jnp.exp(log_scale - jax.lax.stop_gradient(excess))

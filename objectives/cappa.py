"""CapPa (arXiv:2306.07915): captioning by cross-attention. Most captions are predicted in parallel.

In each block the text attends to the image between its self-attention and its MLP. A caption is
predicted token by token or (drawn at random for each image) all at once, from mask tokens that
attend to each other. The positions are learned, because without a causal mask nothing else orders
the tokens.
"""
import functools
from typing import Any

import jax
import jax.numpy as jnp

import decoder
import vit
from decoder import BOS, EOS, PAD
from layers import (
    ParamSpec,
    dense_specs,
    dot_product_attention,
    gelu_linear,
    layer_norm,
    linear,
    norm_specs,
)
from vit import block_specs

PARALLEL_PROB = 0.75  # of a caption to be predicted in parallel (its section 3, released config)


def param_specs(model: Any) -> dict:
    return {"decoder": cross_decoder_specs(model.decoder, model.max_text_len)}


def cross_decoder_specs(cfg: decoder.DecoderConfig, text_len: int) -> dict:
    """The last row of the embedding is the mask token."""
    stack, D = (cfg.depth,), cfg.width
    cross_attention = {
        "norm3": norm_specs(D, stack),
        "query": dense_specs(D, D, stack),
        "memory": dense_specs(cfg.image_width, D, stack, copies=2),
        "cross": dense_specs(D, D, stack),
    }
    return {
        "embed": {"embedding": ParamSpec((cfg.vocab_size + 1, D), 1.0)},
        "positions": {"table": ParamSpec((text_len, D), D**-0.5)},
        "blocks": block_specs(cfg.depth, D, cfg.mlp_dim) | cross_attention,
        "norm": norm_specs(D),
        "head": dense_specs(D, cfg.vocab_size, bias=False),
    }


def flops(model: Any, resolution: int, text_len: int) -> dict[str, float]:
    enc, dec = model.encoder, model.decoder
    N, T, D = (resolution // enc.patch_size) ** 2, text_len - 1, dec.width
    cross = dec.depth * (4 * T * D * D + 4 * N * enc.width * D + 4 * T * N * D)
    blocks = vit.block_flops(T, D, dec.mlp_dim, dec.depth)
    return {"encoder": vit.flops(enc, resolution),
            "decoder": blocks + cross + 2 * T * D * dec.vocab_size}


def cross_block(x: jax.Array, w: dict, num_heads: int, memory: jax.Array,
                mask: jax.Array) -> tuple[jax.Array, dict]:
    """x = x + attention(norm(x)); x = x + attention(norm(x), memory); x = x + mlp(norm(x)).

    x (B,T,D) in and out, memory (B,N,E). mask, broadcastable to (B,H,T,T), says which text tokens
    attend to which; each attends to all patches.
    """
    B, T, D = x.shape

    def split_heads(a: jax.Array, parts: int) -> list[jax.Array]:
        return [p.reshape(*p.shape[:2], num_heads, D // num_heads)
                for p in jnp.split(a, parts, axis=-1)]
    q, k, v = split_heads(linear(layer_norm(x, w["norm1"]), w["qkv"]), 3)
    attended, _ = dot_product_attention(q, k, v, mask)
    x = x + linear(attended.reshape(B, T, D), w["out"])
    (q,) = split_heads(linear(layer_norm(x, w["norm2"]), w["query"]), 1)
    k, v = split_heads(linear(memory, w["memory"]), 2)
    attended, _ = dot_product_attention(q, k, v, None)
    x = x + linear(attended.reshape(B, T, D), w["cross"])
    hidden = linear(layer_norm(x, w["norm3"]), w["fc1"])
    return x + gelu_linear(hidden, w["fc2"], False), {}


@jax.named_scope("decoder")
def cross_features(params: dict, memory: jax.Array, text: jax.Array, mask: jax.Array,
                   cfg: decoder.DecoderConfig) -> jax.Array:
    """What the head reads, (B,T,D), for text (B,T), in which V is the mask token."""
    x = params["embed"]["embedding"][text] + params["positions"]["table"][:text.shape[1]]
    x, _ = vit.transformer_stack(x.astype(cfg.dtype), params["blocks"], cfg, block=cross_block,
                                 memory=memory, mask=mask)
    return layer_norm(x, params["norm"])


def encode_memory(params: dict, images: jax.Array, model: Any) -> jax.Array:
    """All patch tokens (B,N,E) after the final norm, as CapPa's decoder reads them."""
    tokens = vit.vit(params["encoder"], images, model.encoder)["tokens"]
    return layer_norm(tokens, params["encoder"]["norm"])


def loss(params: dict, batch: dict, keys: jax.Array, model: Any,
         parallel_prob: float = PARALLEL_PROB) -> tuple[jax.Array, jax.Array]:
    text, memory = batch["text"], encode_memory(params, batch["images"], model)
    parallel = jax.vmap(jax.random.uniform)(keys) < parallel_prob                  # (B,)
    inputs = jnp.where(parallel[:, None], model.decoder.vocab_size, text[:, :-1])
    causal = decoder.attention_mask(0, inputs.shape[1], "causal")
    mask = parallel[:, None, None, None] | causal                                  # (B,1,T-1,T-1)
    hidden = cross_features(params["decoder"], memory, inputs, mask, model.decoder)
    losses = decoder.token_cross_entropy(params["decoder"], hidden, text[:, 1:], model.decoder)
    return losses.sum(), decoder.count_targets(text).sum()


# CapPa is validated token by token only, as in its released code.
validation_loss = functools.partial(loss, parallel_prob=0.0)


def generate(params: dict, batch: dict, model: Any) -> jax.Array:
    """Greedy captions (B,T). Everything is computed again for each token: plain, not fast."""
    memory, T = encode_memory(params, batch["images"], model), model.max_text_len
    mask = decoder.attention_mask(0, T, "causal")

    def generate_token(t: jax.Array, text: jax.Array) -> jax.Array:
        hidden = cross_features(params["decoder"], memory, text, mask, model.decoder)[:, t - 1]
        token = linear(hidden, params["decoder"]["head"]).argmax(-1).astype(jnp.int32)
        return text.at[:, t].set(jnp.where((text == EOS).any(-1), PAD, token))
    text = jnp.full((len(memory), T), PAD, jnp.int32).at[:, 0].set(BOS)
    return jax.lax.fori_loop(1, T, generate_token, text)


def blind_loss(facts: Any) -> float | None:
    return facts.nats_per_token

"""GenLIP (arXiv:2605.00809): the encoder itself writes the caption; there is no decoder.

One transformer reads [patches ; caption tokens]. Patches attend to all patches, tokens to all
patches and to the tokens before them. So the patches never see the caption, and the encoder of a
run is used without it as any other. All patch tokens stay, and the features are those after the
final norm. The gate of its attention, which matters most in its ablations, is --gated-attention.

Like the other objectives this one uses our blocks. The paper's have SwiGLU, LayerScale and rotary
positions; here --text-pos-embed gives positions to the caption.

Letters: B images, S encoder tokens (patches, and CLS), T text positions, E encoder width,
V vocabulary size.
"""
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

import decoder
import vit
from decoder import BOS, EOS, PAD
from layers import ParamSpec, dense_specs, layer_norm, linear


def param_specs(model: Any) -> dict:
    """What the caption needs beside the encoder: token embedding and head."""
    E, V = model.encoder.width, model.decoder.vocab_size
    return {"text": {"embed": {"embedding": ParamSpec((V, E), 1.0)},
                     "head": dense_specs(E, V, bias=False)}}


def flops(model: Any, resolution: int, text_len: int) -> dict[str, float]:
    """The encoder's are those of an image alone, the text's what its tokens add."""
    enc, T = model.encoder, text_len - 1
    S = (resolution // enc.patch_size) ** 2 + enc.cls_token
    sizes = enc.width, enc.mlp_dim, enc.depth, enc.gated_attention
    added = vit.block_flops(S + T, *sizes) - vit.block_flops(S, *sizes)
    return {"encoder": vit.flops(enc, resolution),
            "text": added + 2 * T * enc.width * model.decoder.vocab_size}


def text_features(params: dict, images: jax.Array, text: jax.Array, model: Any) -> jax.Array:
    """What the head reads: (B,T,E) for text (B,T), one vector per token."""
    enc = model.encoder
    patches = vit.embed_patches(params["encoder"], images, enc)                    # (B,S,E)
    as_wide_as_encoder = dataclasses.replace(model.decoder, width=enc.width)
    tokens = decoder.embed_tokens(params["text"], text, as_wide_as_encoder)        # (B,T,E)
    S, T = patches.shape[1], text.shape[1]
    mask = decoder.attention_mask(S, S + T, "bidirectional")
    x, _ = vit.transformer_stack(jnp.concatenate([patches, tokens], axis=1),
                                 params["encoder"]["blocks"], enc, mask=mask)
    return layer_norm(x[:, S:], params["encoder"]["norm"])


def loss(params: dict, batch: dict, keys: jax.Array, model: Any) -> tuple[jax.Array, jax.Array]:
    text = batch["text"]
    features = text_features(params, batch["images"], text[:, :-1], model)
    losses = decoder.token_cross_entropy(params["text"], features, text[:, 1:], model.decoder)
    return losses.sum(), decoder.count_targets(text).sum()


def generate(params: dict, batch: dict, model: Any) -> jax.Array:
    """Greedy captions (B,T). Everything is computed again for each token: plain, not fast."""
    images, T = batch["images"], model.max_text_len

    def generate_token(t: jax.Array, text: jax.Array) -> jax.Array:
        features = text_features(params, images, text, model)[:, t - 1]
        token = linear(features, params["text"]["head"]).argmax(-1).astype(jnp.int32)
        return text.at[:, t].set(jnp.where((text == EOS).any(-1), PAD, token))
    text = jnp.full((len(images), T), PAD, jnp.int32).at[:, 0].set(BOS)
    return jax.lax.fori_loop(1, T, generate_token, text)


def blind_loss(facts: Any) -> float | None:
    return facts.nats_per_token

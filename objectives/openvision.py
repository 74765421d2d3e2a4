"""OpenVision (arXiv:2505.04601) with the losses of CLIPS (arXiv:2411.16828): the image against its
web caption and its dense caption, and the dense caption predicted from the image and the web one.

The decoder reads the caption tokens before each target, as the CLIPS paper says; the released one
reads learned queries instead. Its prefix tokens attend to each other both ways.
"""
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

import decoder
import vit
from layers import dense_specs, linear
from objectives import clip
from objectives.contrastive import (
    contrastive_loss,
    encode_text,
    l2_normalize,
    logit_scale,
    pair_specs,
    text_encoder_flops,
    text_encoder_specs,
)

embed_images, embed_texts = clip.embed_images, clip.embed_texts
CAPTION_WEIGHT, CONTRASTIVE_WEIGHT = 2.0, 1.0  # released config


def param_specs(model: Any) -> dict:
    enc, dec = model.encoder, model.decoder
    return {"decoder": decoder.param_specs(dec),
            "text": text_encoder_specs(dec, model.max_text_len),
            "pair": pair_specs(model),
            "web": dense_specs(dec.width, enc.width, bias=False)}


def flops(model: Any, resolution: int, text_len: int) -> dict[str, float]:
    enc, dec = model.encoder, model.decoder
    prefix = (resolution // enc.patch_size) ** 2 + text_len
    web_projection = 2 * text_len * dec.width * enc.width
    return {"encoder": vit.flops(enc, resolution),
            "decoder": decoder.flops(dec, prefix, text_len - 1) + web_projection,
            "text": 2 * text_encoder_flops(dec, text_len) + 2 * enc.width * dec.width}


def bidirectional(cfg: decoder.DecoderConfig) -> decoder.DecoderConfig:
    return dataclasses.replace(cfg, prefix_attention="bidirectional")


def decoder_prefix(params: dict, tokens: jax.Array, web: jax.Array) -> jax.Array:
    """What the decoder reads before the caption, (B,N+T,E): all patch tokens (B,N,E) and the text
    encoder's tokens of the web caption (B,T,D)."""
    return jnp.concatenate([tokens, linear(web, params["web"])], axis=1)


def loss(params: dict, batch: dict, keys: jax.Array, model: Any) -> tuple[jax.Array, jax.Array]:
    B = len(batch["text"])
    encoded = vit.vit(params["encoder"], batch["images"], model.encoder)
    image = l2_normalize(linear(encoded["pooled"], params["pair"]["image"]))
    both_captions = jnp.concatenate([batch["alt"], batch["text"]])
    tokens, text = encode_text(params["text"], both_captions, model.decoder)
    num_targets = decoder.count_targets(batch["text"])
    has_caption, scale = num_targets > 0, logit_scale(params)
    web_pair = contrastive_loss(image, l2_normalize(text[:B]), has_caption, scale)
    dense_pair = contrastive_loss(image, l2_normalize(text[B:]), has_caption, scale)
    prefix = decoder_prefix(params, encoded["tokens"], tokens[:B])
    captions = decoder.caption_loss(params["decoder"], prefix, batch["text"],
                                    bidirectional(model.decoder))
    # The contrastive mean is over images, the caption mean over tokens: the step divides by tokens.
    all_tokens, all_images = jax.lax.psum((num_targets.sum(), has_caption.sum()), "devices")
    contrastive = (web_pair + dense_pair).sum() / 2 * all_tokens / jnp.maximum(all_images, 1)
    return CAPTION_WEIGHT * captions.sum() + CONTRASTIVE_WEIGHT * contrastive, num_targets.sum()


def generate(params: dict, batch: dict, model: Any) -> jax.Array:
    """Greedy captions (B,T), from the image and the web caption."""
    tokens = vit.vit(params["encoder"], batch["images"], model.encoder)["tokens"]
    web, _ = encode_text(params["text"], batch["alt"], model.decoder)
    prefix = decoder_prefix(params, tokens, web)
    return decoder.generate(params["decoder"], prefix, bidirectional(model.decoder),
                            model.max_text_len)


def blind_loss(facts: Any) -> float | None:
    """Without the image and without the web caption."""
    if facts.nats_per_token is None:
        return None
    return CAPTION_WEIGHT * facts.nats_per_token + CONTRASTIVE_WEIGHT * facts.matching_nats

"""CLIP (arXiv:2103.00020). For each image, its own caption must have the most similar feature among
all captions of the batch. For each caption, its own image must, among all images."""
from typing import Any

import jax

import decoder
import vit
from layers import linear
from objectives.contrastive import (
    contrastive_loss,
    encode_text,
    l2_normalize,
    logit_scale,
    pair_specs,
    text_encoder_flops,
    text_encoder_specs,
)


def param_specs(model: Any) -> dict:
    return {"text": text_encoder_specs(model.decoder, model.max_text_len),
            "pair": pair_specs(model)}


def flops(model: Any, resolution: int, text_len: int) -> dict[str, float]:
    enc, dec = model.encoder, model.decoder
    text = text_encoder_flops(dec, text_len) + 2 * enc.width * dec.width
    return {"encoder": vit.flops(enc, resolution), "text": text}


def embed_images(params: dict, images: jax.Array, model: Any) -> jax.Array:
    """images (B,R,R,3) to vectors (B,D) of length 1."""
    pooled = vit.vit(params["encoder"], images, model.encoder)["pooled"]
    return l2_normalize(linear(pooled, params["pair"]["image"]))


def embed_texts(params: dict, text: jax.Array, model: Any) -> jax.Array:
    """text (B,T) to vectors (B,D) of length 1."""
    return l2_normalize(encode_text(params["text"], text, model.decoder)[1])


def loss(params: dict, batch: dict, keys: jax.Array, model: Any) -> tuple[jax.Array, jax.Array]:
    image = embed_images(params, batch["images"], model)
    text = embed_texts(params, batch["text"], model)
    has_caption = decoder.count_targets(batch["text"]) > 0
    return contrastive_loss(image, text, has_caption, logit_scale(params)).sum(), has_caption.sum()


def blind_loss(facts: Any) -> float:
    return facts.matching_nats

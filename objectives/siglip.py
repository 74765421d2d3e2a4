"""SigLIP (arXiv:2303.15343): CLIP's two encoders, but each image and caption of the batch is judged
as a pair of its own: do they belong together? No softmax over the batch."""
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

import decoder
from layers import ParamSpec
from objectives import clip

INIT_SCALE, INIT_BIAS = 10.0, -10.0  # so at first no pair is predicted to match: most do not


def param_specs(model: Any) -> dict:
    """CLIP's, and the learned bias. Scale and bias are kept as differences from their start."""
    specs = clip.param_specs(model)
    return specs | {"pair": specs["pair"] | {"bias": {"offset": ParamSpec((), 0.0)}}}


flops, embed_images, embed_texts = clip.flops, clip.embed_images, clip.embed_texts


def sigmoid_loss(image: jax.Array, text: jax.Array, has_caption: jax.Array, scale: jax.Array,
                 bias: jax.Array) -> jax.Array:
    """(B,) for each image of this device: the binary cross-entropy of its pairs with all captions
    of the global batch, summed. image and text (B,D) have unit length. Rows without `has_caption`
    (B,) are in no pair."""
    all_gather = functools.partial(jax.lax.all_gather, axis_name="devices", tiled=True)
    logits = scale * image @ all_gather(text).T + bias                       # (B, global batch)
    own_caption = jax.lax.axis_index("devices") * len(image) + jnp.arange(len(image))
    is_match = own_caption[:, None] == jnp.arange(logits.shape[1])
    losses = jax.nn.softplus(jnp.where(is_match, -logits, logits))
    return jnp.where(has_caption[:, None] & all_gather(has_caption), losses, 0).sum(-1)


def loss(params: dict, batch: dict, keys: jax.Array, model: Any) -> tuple[jax.Array, jax.Array]:
    pair = params["pair"]
    image = embed_images(params, batch["images"], model)
    text = embed_texts(params, batch["text"], model)
    has_caption = decoder.count_targets(batch["text"]) > 0
    scale = INIT_SCALE * jnp.exp(pair["temperature"]["log"])
    losses = sigmoid_loss(image, text, has_caption, scale, INIT_BIAS + pair["bias"]["offset"])
    return losses.sum(), has_caption.sum()


def blind_loss(facts: Any) -> float:
    """Without the image, the best prediction for each pair of a batch of n is a match with
    probability 1/n. The mean is over images."""
    total = 0.0
    for n in facts.batch_sizes:
        if n > 1:
            total += n * (math.log(n) + (n - 1) * math.log(n / (n - 1)))
    return total / sum(facts.batch_sizes)

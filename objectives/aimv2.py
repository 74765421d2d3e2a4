"""AIMv2 (arXiv:2411.14402): the decoder predicts each next patch and each next caption token.

The encoder's patches attend to a prefix of random length and to the patches before them. Both
losses are means over an image's own patches and tokens, as the paper writes them. In use the
encoder has no mask; the random prefixes prepare it for that."""
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import decoder
import vit
from layers import dense_specs, layer_norm, linear

PIXEL_WEIGHT = 0.4  # of the pixel loss beside the text loss (AIMv2's table 9c)


def param_specs(model: Any) -> dict:
    enc, dec = model.encoder, model.decoder
    return {"decoder": decoder.param_specs(dec)
            | {"pixels": dense_specs(dec.width, enc.patch_size**2 * 3)}}


def flops(model: Any, resolution: int, text_len: int) -> dict[str, float]:
    enc, dec = model.encoder, model.decoder
    N = (resolution // enc.patch_size) ** 2
    pixel_head = 2 * (N - 1) * dec.width * enc.patch_size**2 * 3
    return {"encoder": vit.flops(enc, resolution),
            "decoder": decoder.flops(dec, N, text_len - 1) + pixel_head}


def prefix_mask(prefix_len: jax.Array, S: int) -> jax.Array:
    """(B,1,S,S), True where token i attends: to itself, to what is before it, and to the first
    prefix_len (B,) tokens."""
    i, j = jnp.arange(S)[:, None], jnp.arange(S)
    return ((j <= i) | (j < prefix_len[:, None, None]))[:, None]


def pixel_targets(images: jax.Array, patch_size: int) -> jax.Array:
    """images (B,R,R,3) uint8 to (B,N,P*P*3) fp32: each patch with mean 0 and variance 1, by the
    formula of MAE (arXiv:2111.06377)."""
    x = vit.patchify(vit.normalize(images), patch_size)
    return (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True, ddof=1) + 1e-6)


def causal(cfg: decoder.DecoderConfig) -> decoder.DecoderConfig:
    """With a bidirectional prefix the decoder would see the patches that it predicts."""
    return dataclasses.replace(cfg, prefix_attention="causal")


def loss(params: dict, batch: dict, keys: jax.Array, model: Any) -> tuple[jax.Array, jax.Array]:
    text = batch["text"]
    targets = pixel_targets(batch["images"], model.encoder.patch_size)
    N, cls = targets.shape[1], int(model.encoder.cls_token)
    prefix_len = jax.vmap(lambda key: jax.random.randint(key, (), 1, N))(keys)     # (B,) in 1..N-1
    mask = prefix_mask(prefix_len + cls, N + cls)
    tokens = vit.vit(params["encoder"], batch["images"], model.encoder, mask=mask)["tokens"]
    hidden = decoder.hidden_states(params["decoder"], tokens, text[:, :-1], causal(model.decoder))
    hidden = layer_norm(hidden, params["decoder"]["norm"])                         # (B,N+T-1,D)
    predicted = linear(hidden[:, :N - 1], params["decoder"]["pixels"]).astype(jnp.float32)
    patch_losses = jnp.square(predicted - targets[:, 1:]).mean(-1)                 # (B,N-1)
    after_prefix = jnp.arange(1, N) >= prefix_len[:, None]                         # (B,N-1)
    pixel_loss = jnp.where(after_prefix, patch_losses, 0).sum(-1) / after_prefix.sum(-1)
    num_targets = decoder.count_targets(text)
    text_losses = decoder.token_cross_entropy(params["decoder"], hidden[:, N:], text[:, 1:],
                                              model.decoder)
    text_loss = text_losses / jnp.maximum(num_targets, 1)
    has_caption = num_targets > 0
    return jnp.where(has_caption, text_loss + PIXEL_WEIGHT * pixel_loss, 0).sum(), has_caption.sum()


def generate(params: dict, batch: dict, model: Any) -> jax.Array:
    """Greedy captions (B,T)."""
    tokens = vit.vit(params["encoder"], batch["images"], model.encoder)["tokens"]
    return decoder.generate(params["decoder"], tokens, causal(model.decoder), model.max_text_len)


def blind_loss(facts: Any) -> float | None:
    """The best guess of a patch without the image is the mean patch at its position. `loss` is a
    mean over the N-p patches after a prefix of p, and each length p of 1..N-1 is as likely."""
    if facts.caption_nats is None or facts.caption_tokens is None:
        return None
    text = (facts.caption_nats / facts.caption_tokens).mean()
    patch_losses = np.var(facts.pixel_targets(), axis=0).mean(-1)                  # (N,)
    N = len(patch_losses)
    weights = np.cumsum(1 / (N - np.arange(1, N))) / (N - 1)  # of patches 1..N-1; their sum is 1
    return float(text + PIXEL_WEIGHT * (weights * patch_losses[1:]).sum())

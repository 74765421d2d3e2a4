"""One image in, and out what a run says about it and why. The page of demo.py shows it.

Each token of the caption comes with its probability, with the probability that the same token would
have without the image, and with the attention of the decoder to the patches as it generated the
token (mean over layers and heads). "Without the image": the encoder gets an image of one gray, so
that the decoder still reads tokens of the kind that it was trained on.

One compiled program serves every keep ratio. The decoder has no position embedding for image
tokens, so a token that no other token may attend to is as good as absent: the dropped tokens stay
in the sequence, after the kept ones, and the attention mask hides them.

Letters: N patches, K kept patches, R pixels per side, S = N + T, T text positions, E encoder width,
V vocabulary size.
"""
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import decoder
from caption import Captioner
from layers import layer_norm, linear
from masking import num_kept_tokens, sample_keep_indices
from vit import IMAGENET_MEAN, ViTConfig, transformer_stack, vit

NUM_ALTERNATIVES = 3  # most probable tokens that are listed at each position


class Outputs(NamedTuple):
    """Of one image. Row t belongs to token t + 1 of the caption."""
    text: Any                 # (T,) int32, the greedy caption
    blind_text: Any           # (T,) the greedy caption without the image
    probability: Any          # (T-1,) of the caption's tokens
    without_image: Any        # (T-1,) of the caption's tokens, without the image
    blind_probability: Any    # (T-1,) of the tokens of blind_text
    weights: Any              # (T-1,N) attention to each patch; a dropped patch gets none
    top: Any                  # (T-1,3) the most probable tokens
    top_probability: Any      # (T-1,3)
    order: Any                # (N,) patches in the order of the sequence; the first K are kept


def order_patches(key: jax.Array, num_patches: int, num_kept: Any, shuffled: bool) -> jax.Array:
    """(N,) patches, those first that `keep_random_tokens` with this key keeps, in its order.
    num_kept need not be known when the program is compiled."""
    order = sample_keep_indices(key[None], num_patches, num_patches, shuffled=True)[0]
    if shuffled:
        return order
    is_dropped = jnp.arange(num_patches) >= num_kept
    return jnp.sort(order + num_patches * is_dropped) % num_patches


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def run_model(encoder_cfg: ViTConfig, cfg: decoder.DecoderConfig, shuffled: bool, length: int,
              params: dict, images: jax.Array, key: jax.Array, num_kept: jax.Array) -> Outputs:
    """images (2,R,R,3) uint8: the image, and the gray one. length: T."""
    tokens = vit(params["encoder"], images, encoder_cfg)["tokens"]                   # (2,N,E)
    N = tokens.shape[1]
    order = order_patches(key, N, num_kept, shuffled)
    tokens = tokens[:, order]
    position = jnp.arange(N + length)
    is_read = (position < num_kept) | (position >= N)
    mask = decoder.attention_mask(N, N + length, cfg.prefix_attention) & is_read     # (S,S)
    dec = params["decoder"]
    text = decoder.generate(dec, tokens, cfg, length, mask=mask)                     # (2,T)

    # Once more with all tokens at once: the image, the gray image, and the caption with gray tokens
    tokens, text = tokens[jnp.array([0, 1, 1])], text[jnp.array([0, 1, 0])]
    x = decoder.embed_sequence(dec, tokens, text[:, :-1], cfg)
    x, extras = transformer_stack(x, dec["blocks"], cfg, extra_names=("attention_weights",),
                                  mask=mask[:-1, :-1], exact_gelu=False)
    scores = linear(layer_norm(x[:, N:], dec["norm"]), dec["head"]).astype(jnp.float32)
    probabilities = jax.nn.softmax(scores, axis=-1)                                  # (3,T-1,V)
    chosen = jnp.take_along_axis(probabilities, text[:, 1:, None], axis=2)[..., 0]   # (3,T-1)
    weights = extras["attention_weights"][:, 0].mean((0, 1))[N:, :N]                 # (T-1,N)
    by_patch = jnp.zeros_like(weights).at[:, order].set(weights)
    top_probability, top = jax.lax.top_k(probabilities[0], NUM_ALTERNATIVES)
    return Outputs(text[0], text[1], chosen[0], chosen[2], chosen[1], by_patch, top,
                   top_probability, order)


class Explainer:
    """A run's captioner, and what its captions come from."""

    def __init__(self, captioner: Captioner):
        self.captioner = captioner
        self.num_patches = (captioner.resolution // captioner.encoder.patch_size) ** 2
        gray = np.array(IMAGENET_MEAN) * 255
        shape = captioner.resolution, captioner.resolution, 3
        self.gray = np.broadcast_to(np.rint(gray).astype(np.uint8), shape)

    def outputs(self, pixels: np.ndarray, keep_ratio: float = 0.0, seed: int = 0) -> Outputs:
        """pixels (R,R,3) uint8; keep_ratio 0: the run's. The kept patches and the caption are those
        of `caption.py RUN IMAGE --seed SEED --keep-ratio RATIO`."""
        c = self.captioner
        num_kept = num_kept_tokens(self.num_patches, keep_ratio or c.settings.keep_ratio)
        key = jax.random.split(jax.random.fold_in(jax.random.key(seed), 0))[0]
        images = np.stack([pixels, self.gray])
        return jax.device_get(run_model(c.encoder, c.decoder, c.settings.shuffle_kept,
                                        c.settings.max_text_len, c.params, images, key,
                                        np.int32(num_kept)))

    def explain(self, pixels: np.ndarray, keep_ratio: float = 0.0, seed: int = 0) -> dict:
        """`outputs` in words and numbers that JSON can hold."""
        num_kept = num_kept_tokens(self.num_patches,
                                   keep_ratio or self.captioner.settings.keep_ratio)
        out, decode = self.outputs(pixels, keep_ratio, seed), self.captioner.tokenizer.decode
        tokens = []
        for t in range(caption_length(out.text)):
            alternatives = []
            for token, probability in zip(out.top[t], out.top_probability[t].tolist()):
                alternatives.append([self.piece(token), round(probability, 4)])
            tokens.append({
                "text": self.piece(out.text[t + 1]),
                "probability": round(float(out.probability[t]), 4),
                "without_image": round(float(out.without_image[t]), 4),
                "alternatives": alternatives,
                "image_share": round(float(out.weights[t].sum()), 4),
                "weights": [round(w, 5) for w in out.weights[t].tolist()]})
        blind = []
        for t in range(caption_length(out.blind_text)):
            blind.append({"text": self.piece(out.blind_text[t + 1]),
                          "probability": round(float(out.blind_probability[t]), 4)})
        return {"caption": decode(out.text), "tokens": tokens,
                "blind_caption": decode(out.blind_text), "blind_tokens": blind,
                "num_patches": self.num_patches, "kept": out.order[:num_kept].tolist()}

    def piece(self, token: int) -> str:
        """A token as text."""
        if token in (decoder.PAD, decoder.EOS):
            return "(end)"
        return self.captioner.tokenizer.decode(np.array([token])) or "(unknown)"


def caption_length(text: np.ndarray) -> int:
    """Tokens of a generated row (T,), the end included, without the start. An untrained decoder may
    generate padding before other tokens."""
    return int(np.flatnonzero(text != decoder.PAD)[-1])

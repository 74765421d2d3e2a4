"""The decoder: a causal transformer over [image tokens ; caption tokens] that predicts the caption (section 2.2).

It exists to train the encoder: "simple concatenation of visual tokens in the text decoder", where CapPa has
cross-attention. The released layout: token table, image projection without bias, pre-norm blocks with tanh gelu, final
norm, untied head without bias, and no position embedding (but for --text-pos-embed): the causal mask alone orders the words.

Letters: B images, K image tokens, T text positions, S = K + T, D width, H heads, V words, E encoder width, L layers.
Text is [bos] words [eos], padded with 0. The word at place t is predicted from all image tokens and the words before t.

    python decoder.py        shows who may look at whom, and the decoders by size
"""
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layers import layer_norm, linear
from vit import ParamSpec, block_flops, block_specs, count_params, dense_specs, init_params, norm_specs, transformer_block, transformer_stack

PAD, BOS, EOS = 0, 1, 2
# The paper names no decoder for So400m and g. We take those that OpenVision 1 released: So400m's
# has the size of its encoder, which also gives the FLOPs in the paper; g's is the same as H's.
#           layers, width, heads, mlp
DECODER_SIZES = {
    "micro": (3, 96, 3, 384),  # ours: for the toy
    "Ti": (12, 192, 3, 768),
    "S": (12, 384, 6, 1536),
    "B": (12, 512, 8, 2048),
    "L": (12, 768, 12, 3072),
    "So400m": (27, 1152, 16, 4304),
    "H": (24, 1024, 16, 4096),
}
RELEASED_DEPTH = 12  # the released blocks scale by this depth, whatever the decoder's own depth is
RELEASED_INIT = {  # --init-scale released, in the form of vit.RELEASED
    "embed": ("normal", lambda inputs, outputs: 0.02),
    "project": ("normal", lambda inputs, outputs: inputs**-0.5),
    "qkv": ("normal", lambda inputs, outputs: inputs**-0.5),
    "out": ("normal", lambda inputs, outputs: (2 * RELEASED_DEPTH * outputs) ** -0.5),
    "fc1": ("normal", lambda inputs, outputs: (2 * inputs) ** -0.5),
    "fc2": ("normal", lambda inputs, outputs: (2 * RELEASED_DEPTH * outputs) ** -0.5),
    "head": ("normal", lambda inputs, outputs: inputs**-0.5),
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    depth: int
    width: int
    num_heads: int
    mlp_dim: int
    vocab_size: int                 # V
    image_width: int           # E
    prefix_attention: str = "causal"     # "causal": the mask is causal everywhere (released v2; the paper's "vanilla autoregressive");
                               # "bidirectional": image tokens see each other both ways (released v1)
    dtype: str = "float32"
    remat: str = "none"
    scan_unroll: int = 1
    text_pos_embed: bool = False    # sin-cos positions for the words, which the released decoder has not
    loss_chunk: int = 0        # text positions a piece of the loss; 0 for all at once


def decoder_config(name: str, vocab: int, image_width: int, **changes: Any) -> DecoderConfig:
    """The decoder of that size. ValueError for an unknown name or prefix."""
    if name not in DECODER_SIZES:
        raise ValueError(f"unknown decoder {name!r}: it must be one of {', '.join(DECODER_SIZES)}")
    cfg = DecoderConfig(*DECODER_SIZES[name], vocab_size=vocab, image_width=image_width, **changes)
    if cfg.prefix_attention not in ("causal", "bidirectional"):
        raise ValueError(f"unknown prefix {cfg.prefix_attention!r}: it must be causal or bidirectional")
    return cfg


def param_specs(cfg: DecoderConfig) -> dict:
    return {
        "embed": {"embedding": ParamSpec((cfg.vocab_size, cfg.width), 1.0)},
        "project": dense_specs(cfg.image_width, cfg.width, bias=False),
        "blocks": block_specs(cfg.depth, cfg.width, cfg.mlp_dim),
        "norm": norm_specs(cfg.width),
        "head": dense_specs(cfg.width, cfg.vocab_size, bias=False),
    }


def init(key: jax.Array, cfg: DecoderConfig) -> dict:
    return init_params(key, param_specs(cfg))


def attention_mask(K: int, S: int, prefix: str) -> jax.Array:
    """(S,S) bool, row i True where token i may look: itself and what stands before it; with a bidirectional prefix
    also the K image tokens among each other. Text sees the whole prefix and no future either way."""
    i, j = jnp.arange(S)[:, None], jnp.arange(S)[None, :]
    return (j <= i) | ((i < K) & (j < K)) if prefix == "bidirectional" else j <= i


def embed_tokens(params: dict, text: jax.Array, cfg: DecoderConfig, first: int = 0) -> jax.Array:
    """Vectors (B,T,D) of text (B,T), which begins at position `first`."""
    x = params["embed"]["embedding"].astype(cfg.dtype)[text]
    if cfg.text_pos_embed:
        omega = 10000.0 ** (-np.arange(cfg.width // 2) / (cfg.width // 2))
        angle = (first + jnp.arange(text.shape[1]))[:, None] * omega
        x = x + jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=1).astype(cfg.dtype)
    return x


def embed_sequence(params: dict, image_tokens: jax.Array, text: jax.Array, cfg: DecoderConfig) -> jax.Array:
    """image_tokens (B,K,E), text (B,T) int32 to the sequence (B,K+T,D)."""
    image = linear(image_tokens.astype(cfg.dtype), params["project"])
    return jnp.concatenate([image, embed_tokens(params, text, cfg)], axis=1)


@jax.named_scope("decoder")
def hidden_states(params: dict, image_tokens: jax.Array, text: jax.Array, cfg: DecoderConfig) -> jax.Array:
    """What comes out of the blocks, before the norm: (B,K+T,D)."""
    K, T = image_tokens.shape[1], text.shape[1]
    x = embed_sequence(params, image_tokens, text, cfg)
    return transformer_stack(x, params["blocks"], cfg, mask=attention_mask(K, K + T, cfg.prefix_attention), exact_gelu=False)[0]


def text_features(params: dict, image_tokens: jax.Array, text: jax.Array, cfg: DecoderConfig) -> jax.Array:
    """What the head reads: (B,T,D), one vector a text position, which predicts the word that comes next."""
    return layer_norm(hidden_states(params, image_tokens, text, cfg)[:, image_tokens.shape[1]:], params["norm"])


def logits(params: dict, image_tokens: jax.Array, text: jax.Array, cfg: DecoderConfig) -> jax.Array:
    """(B,T,V) fp32. For looking at; the loss never holds so much at once."""
    return linear(text_features(params, image_tokens, text, cfg), params["head"]).astype(jnp.float32)


def caption_loss(params: dict, image_tokens: jax.Array, text: jax.Array, cfg: DecoderConfig) -> jax.Array:
    """Cross-entropy of each caption: (B,) fp32, summed over its words and eos. Bos and pad are no targets.
    The mean loss is this over `target_count`. The released code multiplies that by 2, which under Adam is no change."""
    return token_cross_entropy(params, text_features(params, image_tokens, text[:, :-1], cfg), text[:, 1:], cfg)


def token_cross_entropy(params: dict, hidden: jax.Array, targets: jax.Array, cfg: DecoderConfig) -> jax.Array:
    """Cross-entropy of the words targets (B,T) by the head on hidden (B,T,D): (B,) fp32, summed over what is not pad.

    The logits exist for one piece of `loss_chunk` text positions at a time, in the backward pass too: at V = 32,000,
    the batch's logits would weigh more than all else together."""
    B, T, D = hidden.shape

    @jax.named_scope("loss")
    def piece(hidden, targets):                                                          # (B,C,D), (B,C)
        scores = linear(hidden, params["head"]).astype(jnp.float32)                      # (B,C,V)
        right = jnp.arange(cfg.vocab_size) == targets[..., None]
        losses = jax.nn.logsumexp(scores, axis=-1) - jnp.where(right, scores, 0).sum(-1)
        return jnp.where(targets != PAD, losses, 0).sum(-1)

    C = cfg.loss_chunk
    if not 0 < C < T:
        return piece(hidden, targets)
    short = -T % C                                                                       # pad targets add nothing
    hidden = jnp.pad(hidden, ((0, 0), (0, short), (0, 0))).reshape(B, -1, C, D).swapaxes(0, 1)
    targets = jnp.pad(targets, ((0, 0), (0, short))).reshape(B, -1, C).swapaxes(0, 1)
    add = jax.checkpoint(lambda total, part: (total + piece(*part), None), prevent_cse=False)
    return jax.lax.scan(add, jnp.zeros(B, jnp.float32), (hidden, targets))[0]


def count_targets(text: jax.Array) -> jax.Array:
    """(B,) words and eos to predict in each row of text (B,T)."""
    return (text[:, 1:] != PAD).sum(-1)


def sample_top_p(key: jax.Array, scores: jax.Array, top_p: float, temperature: float) -> jax.Array:
    """Draw from the smallest set of words that together hold top_p of the probability. scores (B,V) to words (B,)."""
    p = jax.nn.softmax(scores / temperature, axis=-1)
    order = jnp.argsort(-p, axis=-1)
    ranked = jnp.take_along_axis(p, order, axis=-1)
    ranked = jnp.where(ranked.cumsum(-1) - ranked < top_p, ranked, 0)                    # the first always stays
    drawn = jax.random.categorical(key, jnp.log(ranked), axis=-1)
    return jnp.take_along_axis(order, drawn[:, None], axis=-1)[:, 0]


def generate(params: dict, image_tokens: jax.Array, cfg: DecoderConfig, length: int, key: jax.Array | None = None,
             top_p: float = 0.9, temperature: float = 1.0) -> jax.Array:
    """Captions (B,length) int32 for image_tokens (B,K,E): bos, words, eos, pad. Greedy without a key, else top-p.

    Keys and values of all that was read are kept, so each word costs one token's work. Without a key this equals
    taking the best word of `logits` again and again."""
    B, K, _ = image_tokens.shape
    S, Dh = K + length, cfg.width // cfg.num_heads
    bos = jnp.full((B, 1), BOS, jnp.int32)
    see = attention_mask(K, S, cfg.prefix_attention)

    def read(tokens, cache, place):
        """tokens (B,Q,D) go to `place`; returns scores (B,V) after the last of them, and the fuller cache."""
        rows = jax.lax.dynamic_slice_in_dim(see, place, tokens.shape[1], axis=0)

        def body(x, layer):
            w, keys, values = layer
            x, extra = transformer_block(x, w, cfg.num_heads, mask=rows, exact_gelu=False, cache=(keys, values, place))
            return x, (extra["keys"], extra["values"])
        x, cache = jax.lax.scan(body, tokens, (params["blocks"], *cache))
        return linear(layer_norm(x[:, -1], params["norm"]), params["head"]).astype(jnp.float32), cache

    def choose(scores, t):
        if key is None:
            return scores.argmax(-1).astype(jnp.int32)
        return sample_top_p(jax.random.fold_in(key, t), scores, top_p, temperature).astype(jnp.int32)

    def write(state, t):
        scores, cache, done = state
        word = jnp.where(done, PAD, choose(scores, t))
        scores, cache = read(embed_tokens(params, word[:, None], cfg, t), cache, K + t)
        return (scores, cache, done | (word == EOS)), word

    empty = jnp.zeros((cfg.depth, B, S, cfg.num_heads, Dh), cfg.dtype)
    scores, cache = read(embed_sequence(params, image_tokens, bos, cfg), (empty, empty), 0)
    _, told = jax.lax.scan(write, (scores, cache, jnp.zeros(B, bool)), jnp.arange(1, length))
    return jnp.concatenate([bos, told.T], axis=1)


def flops(cfg: DecoderConfig, K: int, T: int) -> float:
    """Forward FLOPs of the decoder for one image with K image tokens and T text positions, 2 a multiply-add."""
    return (block_flops(K + T, cfg.width, cfg.mlp_dim, cfg.depth) + 2 * K * cfg.image_width * cfg.width
            + 2 * T * cfg.width * cfg.vocab_size)


if __name__ == "__main__":
    K, words = 4, ["[bos]", "a", "red", "circle"]
    for prefix in ("causal", "bidirectional"):
        print(f"{prefix} prefix: {K} image tokens, then text. A row looks at the columns with an x.")
        names = [f"patch {i}" for i in range(K)] + words
        for name, row in zip(names, attention_mask(K, K + len(words), prefix).tolist()):
            print(f"{name:>8}  " + " ".join("x" if may else "." for may in row))
    print(f"\n{'decoder':>8} {'layers':>6} {'width':>6} {'params':>8}   GFLOPs an image, 89 image and 127 text tokens")
    for size, (layers, width, *_) in DECODER_SIZES.items():
        c = decoder_config(size, vocab_size=32000, image_width=1024)
        print(f"{size:>8} {layers:6d} {width:6d} {count_params(param_specs(c)) / 1e6:7.1f}M   {flops(c, 89, 127) / 1e9:.1f}")

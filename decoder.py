"""The decoder: a causal transformer over [image tokens ; caption tokens] (paper section 2.2).

It predicts the caption and exists only to train the encoder. Image tokens stand before the text (a
"simple concatenation", as the paper says); CapPa uses cross-attention instead. In training it reads
text[:, :-1] and predicts text[:, 1:], so the blocks get T - 1 text positions.

The layout is as released (vit.py says what that means): token embedding, image projection without
bias, pre-norm blocks with tanh GELU, final norm, untied head without bias. There is no position
embedding (except with --text-pos-embed): only the causal mask orders the tokens.

Letters: B images, K image tokens, T text positions (one fewer, where a function gets text[:, :-1]
or text[:, 1:]), C text positions in a chunk of the loss,
S = K + T, Q positions in a block's input, D width, H heads, Dh = D/H, V vocabulary size, E encoder
width, L layers. Text is [bos] tokens [eos], padded with 0. Each token is predicted from all image
tokens and the tokens before it.

    python decoder.py        prints the attention mask, and the decoders by size
"""
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layers import (
    ParamSpec,
    count_params,
    dense_specs,
    init_params,
    layer_norm,
    linear,
    norm_specs,
)
from vit import block_flops, block_specs, transformer_block, transformer_stack

PAD, BOS, EOS = 0, 1, 2  # those of inputs/tokenizer.py; a test compares them
# The release lists no decoder for So400m and g: we take OpenVision 1's. So400m's is as large as its
# encoder: with both, an image of 384 px takes 1,008.7 GFLOPs; the paper has 1,017.7. g uses H's.
DECODER_SIZES = {  # depth, width, num_heads, mlp_dim
    "micro": (3, 96, 3, 256),          # ours: for the toy
    "Ti": (12, 192, 3, 768),
    "S": (12, 384, 6, 1536),
    "B": (12, 512, 8, 2048),
    "L": (12, 768, 12, 3072),
    "So400m": (27, 1152, 16, 4304),
    "H": (24, 1024, 16, 4096),
}
RELEASED_DEPTH = 12  # the released init scales by this depth, whatever the decoder's own depth is
RELEASED_INIT = {    # --init-scale released, in the form of vit.RELEASED_INIT
    "embed": ("normal", lambda fan_in, fan_out: 0.02),
    "project": ("normal", lambda fan_in, fan_out: fan_in**-0.5),
    "qkv": ("normal", lambda fan_in, fan_out: fan_in**-0.5),
    "out": ("normal", lambda fan_in, fan_out: (2 * RELEASED_DEPTH * fan_out) ** -0.5),
    "fc1": ("normal", lambda fan_in, fan_out: (2 * fan_in) ** -0.5),
    "fc2": ("normal", lambda fan_in, fan_out: (2 * RELEASED_DEPTH * fan_out) ** -0.5),
    "head": ("normal", lambda fan_in, fan_out: fan_in**-0.5),
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    depth: int
    width: int
    num_heads: int
    mlp_dim: int
    vocab_size: int                   # V
    image_width: int                  # E
    prefix_attention: str = "causal"  # "causal": the mask is causal everywhere (OpenVision 2, as
                                      # released); "bidirectional": image tokens attend to each
                                      # other both ways (OpenVision 1, as released)
    dtype: str = "float32"
    remat: str = "none"
    scan_unroll: int = 1
    text_pos_embed: bool = False      # sin-cos positions for text; the released decoder has none
    loss_chunk: int = 0               # text positions per chunk of the loss; 0 for all at once


def decoder_config(size: str, vocab_size: int, image_width: int, **changes: Any) -> DecoderConfig:
    """The decoder of that size. ValueError for an unknown size or prefix_attention."""
    if size not in DECODER_SIZES:
        raise ValueError(f"unknown decoder {size!r}: it must be one of {', '.join(DECODER_SIZES)}")
    cfg = DecoderConfig(*DECODER_SIZES[size], vocab_size, image_width, **changes)
    if cfg.prefix_attention not in ("causal", "bidirectional"):
        raise ValueError(f"unknown prefix_attention {cfg.prefix_attention!r}: it must be causal or "
                         "bidirectional")
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


# -------------------------------------------------------------------------------- sequence
def attention_mask(K: int, S: int, prefix_attention: str) -> np.ndarray:
    """(S,S) bool, True where token i (row) attends to token j: to itself and to what is before it.
    With a bidirectional prefix (the K image tokens), these attend to each other too. Text attends
    to the complete prefix and to no later token."""
    i, j = np.arange(S)[:, None], np.arange(S)[None, :]
    causal_mask = j <= i
    if prefix_attention == "causal":
        return causal_mask
    return causal_mask | ((i < K) & (j < K))


def embed_tokens(params: dict, text: jax.Array, cfg: DecoderConfig,
                 first_position: int = 0) -> jax.Array:
    """text (B,T) to vectors (B,T,D). text[:, 0] is at first_position of the caption."""
    x = params["embed"]["embedding"][text].astype(cfg.dtype)  # cast last: gradients add up in fp32
    if not cfg.text_pos_embed:
        return x
    # The first Transformer's frequencies (arXiv:1706.03762), without the -1 of the encoder's table.
    omega = 10000.0 ** (-np.arange(cfg.width // 2) / (cfg.width // 2))
    angle = (first_position + jnp.arange(text.shape[1]))[:, None] * omega                # (T,D/2)
    return x + jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=1).astype(cfg.dtype)


def embed_sequence(params: dict, image_tokens: jax.Array, text: jax.Array,
                   cfg: DecoderConfig) -> jax.Array:
    """image_tokens (B,K,E) and text (B,T) int32 to the sequence (B,K+T,D)."""
    projected = linear(image_tokens.astype(cfg.dtype), params["project"])              # (B,K,D)
    return jnp.concatenate([projected, embed_tokens(params, text, cfg)], axis=1)


@jax.named_scope("decoder")
def hidden_states(params: dict, image_tokens: jax.Array, text: jax.Array,
                  cfg: DecoderConfig, select: Callable | None = None) -> jax.Array:
    """The output of the blocks, before the final norm: (B,K+T,D), or only the tokens that `select`
    picks on axis 1."""
    K, T = image_tokens.shape[1], text.shape[1]
    x = embed_sequence(params, image_tokens, text, cfg)
    mask = attention_mask(K, K + T, cfg.prefix_attention)
    return transformer_stack(x, params["blocks"], cfg, select=select, mask=mask,
                             exact_gelu=False)[0]


def text_features(params: dict, image_tokens: jax.Array, text: jax.Array,
                  cfg: DecoderConfig) -> jax.Array:
    """What the head reads: (B,T,D), one vector per text position, which predicts the next token."""
    K = image_tokens.shape[1]
    x = hidden_states(params, image_tokens, text, cfg, select=lambda x: x[:, K:])
    return layer_norm(x, params["norm"])


def caption_logits(params: dict, image_tokens: jax.Array, text: jax.Array,
                   cfg: DecoderConfig) -> jax.Array:
    """(B,T,V) fp32. For inspection; the loss can compute them in chunks."""
    features = text_features(params, image_tokens, text, cfg)
    return linear(features, params["head"]).astype(jnp.float32)


# ------------------------------------------------------------------------------------ loss
def caption_loss(params: dict, image_tokens: jax.Array, text: jax.Array,
                 cfg: DecoderConfig) -> jax.Array:
    """Cross-entropy of each caption, (B,) fp32, summed over its tokens and eos. bos and pad are not
    targets. The loss of a batch is the sum of these divided by the sum of `count_targets`: a mean
    over tokens. The released code multiplies that by 2, which changes nothing under Adam."""
    features = text_features(params, image_tokens, text[:, :-1], cfg)
    return token_cross_entropy(params, features, text[:, 1:], cfg)


def token_cross_entropy(params: dict, features: jax.Array, targets: jax.Array,
                        cfg: DecoderConfig) -> jax.Array:
    """Cross-entropy of targets (B,T) from the head's logits for features (B,T,D): (B,) fp32, summed
    over the targets that are not pad.

    With cfg.loss_chunk, the logits of only that many text positions exist at a time, in the
    backward pass too: with V = 32,000 those of a batch would take more memory than all else."""
    B, T, D = features.shape

    @jax.named_scope("loss")
    def chunk_loss(features: jax.Array, targets: jax.Array) -> jax.Array:
        logits = linear(features, params["head"]).astype(jnp.float32)                    # (B,C,V)
        # Not take_along_axis: its gradient is a scatter, which is slow.
        is_target = jnp.arange(cfg.vocab_size) == targets[..., None]
        target_logits = jnp.where(is_target, logits, 0).sum(-1)
        losses = jax.nn.logsumexp(logits, axis=-1) - target_logits
        return jnp.where(targets != PAD, losses, 0).sum(-1)

    C = cfg.loss_chunk
    if not 0 < C < T:
        return chunk_loss(features, targets)
    padding = -T % C  # pads add 0 to the loss
    features = jnp.pad(features, ((0, 0), (0, padding), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, padding)))
    chunks = (features.reshape(B, -1, C, D).swapaxes(0, 1),                       # (T/C,B,C,D)
              targets.reshape(B, -1, C).swapaxes(0, 1))

    def add(total: jax.Array, chunk: tuple) -> tuple:
        return total + chunk_loss(*chunk), None
    add = jax.checkpoint(add, prevent_cse=False)  # the backward pass computes the logits again
    return jax.lax.scan(add, jnp.zeros(B, jnp.float32), chunks)[0]


def count_targets(text: jax.Array) -> jax.Array:
    """(B,): how many tokens (eos included) are predicted in each row of text (B,T)."""
    return (text[:, 1:] != PAD).sum(-1)


# ------------------------------------------------------------------------------ generation
def sample_top_p(key: jax.Array, logits: jax.Array, top_p: float, temperature: float) -> jax.Array:
    """logits (B,V) to tokens (B,), drawn from the smallest set of tokens that together hold
    top_p of the probability."""
    p = jax.nn.softmax(logits / temperature, axis=-1)
    order = jnp.argsort(-p, axis=-1)
    ranked = jnp.take_along_axis(p, order, axis=-1)
    mass_before = ranked.cumsum(-1) - ranked
    ranked = jnp.where(mass_before < top_p, ranked, 0)  # the likeliest token always stays
    rank = jax.random.categorical(key, jnp.log(ranked), axis=-1)
    return jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0]


def generate(params: dict, image_tokens: jax.Array, cfg: DecoderConfig, length: int,
             key: jax.Array | None = None, top_p: float = 0.9, temperature: float = 1.0,
             mask: jax.Array | None = None) -> jax.Array:
    """Captions (B,length) int32 for image_tokens (B,K,E): bos, tokens, eos, pad. Greedy without a
    key, otherwise top-p sampling. mask (K+length,K+length): in place of `attention_mask`.

    The keys and values of the tokens so far are cached, so that a step computes one new token only.
    This changes no caption: each greedy token is still the argmax of its `caption_logits`."""
    B, K, _ = image_tokens.shape
    S, Dh = K + length, cfg.width // cfg.num_heads
    mask = attention_mask(K, S, cfg.prefix_attention) if mask is None else mask

    def run_blocks(x: jax.Array, cache: tuple, position: Any) -> tuple:
        """Runs the tokens x (B,Q,D), the first of which is at `position`. Returns the logits (B,V)
        of the token after the last one, and the new cache: keys and values (L,B,S,H,Dh)."""
        rows = jax.lax.dynamic_slice_in_dim(mask, position, x.shape[1], axis=0)          # (Q,S)

        def body(x: jax.Array, layer: tuple) -> tuple:
            w, keys, values = layer
            x, extras = transformer_block(x, w, cfg.num_heads, mask=rows, exact_gelu=False,
                                          cache=(keys, values, position))
            return x, (extras["keys"], extras["values"])
        x, cache = jax.lax.scan(body, x, (params["blocks"], *cache))
        features = layer_norm(x[:, -1], params["norm"])
        return linear(features, params["head"]).astype(jnp.float32), cache

    def generate_token(state: tuple, t: jax.Array) -> tuple:
        logits, cache, done = state
        if key is None:
            token = logits.argmax(-1).astype(jnp.int32)
        else:
            token_key = jax.random.fold_in(key, t)
            token = sample_top_p(token_key, logits, top_p, temperature).astype(jnp.int32)
        token = jnp.where(done, PAD, token)                                              # (B,)
        logits, cache = run_blocks(embed_tokens(params, token[:, None], cfg, t), cache, K + t)
        return (logits, cache, done | (token == EOS)), token

    empty = jnp.zeros((cfg.depth, B, S, cfg.num_heads, Dh), cfg.dtype)
    bos = jnp.full((B, 1), BOS, jnp.int32)
    logits, cache = run_blocks(embed_sequence(params, image_tokens, bos, cfg), (empty, empty), 0)
    start = (logits, cache, jnp.zeros(B, bool))
    _, tokens = jax.lax.scan(generate_token, start, jnp.arange(1, length))
    return jnp.concatenate([bos, tokens.T], axis=1)


def flops(cfg: DecoderConfig, K: int, T: int) -> float:
    """Forward FLOPs for one image with K image tokens and T text positions, 2 per multiply-add."""
    blocks = block_flops(K + T, cfg.width, cfg.mlp_dim, cfg.depth)
    return blocks + 2 * K * cfg.image_width * cfg.width + 2 * T * cfg.width * cfg.vocab_size


if __name__ == "__main__":
    names = ["patch 0", "patch 1", "patch 2", "patch 3", "[bos]", "a", "red", "circle"]
    for prefix_attention in ("causal", "bidirectional"):
        print(f"{prefix_attention} prefix: 4 image tokens, then text. A row attends to the columns "
              "with an x.")
        rows = attention_mask(4, len(names), prefix_attention).tolist()
        for name, row in zip(names, rows):
            print(f"{name:>8}  " + " ".join("x" if attends else "." for attends in row))
    print("\nwith a vocabulary of 32,000, an encoder of width 1,024, 89 image and 127 text tokens:")
    print(" decoder  depth  width   params   GFLOPs per image")
    for size in DECODER_SIZES:
        c = decoder_config(size, vocab_size=32000, image_width=1024)
        millions = count_params(param_specs(c)) / 1e6
        gflops = flops(c, 89, 127) / 1e9
        print(f"{size:>8} {c.depth:6d} {c.width:6d} {millions:7.1f}M   {gflops:.1f}")

"""The systems that the paper compares its method with, on the same encoder, decoder blocks, data and training step.

    python train.py --objective clip           contrastive (arXiv:2103.00020)
    python train.py --objective openvision     contrastive against two captions, and a caption (arXiv:2505.04601, 2411.16828)
    python train.py --objective cappa          captions by cross-attention, most of them in parallel (arXiv:2306.07915)
    python train.py --objective aimv2          the next patch and the next word (arXiv:2411.14402)

Each is one function in the shape of train.method: (params, batch, keys, model) -> (summed loss, by how much to divide it),
two sums over this device's pictures. What differs from the sources on purpose is what all share here: the transformer block (no
SwiGLU, no RMSNorm), the plain ViT with mean pooling, and a decoder that sees all patch tokens.

Letters: B images, N patches, S = N (+1 with a CLS token), T text positions, D decoder width, E encoder width, H heads, V words.

    python baselines.py                        what each has beside the encoder, and its FLOPs
"""
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import decoder
import masking
import vit
from decoder import BOS, EOS, PAD
from layers import attend, gelu_linear, layer_norm, linear, norm_linear
from vit import Weight, block_weights, dense, norm_weights

PARALLEL = 0.75          # CapPa: the chance of a picture's caption to be predicted in parallel (its section 3 and released config)
CAPTION, PAIR = 2.0, 1.0  # OpenVision: the weights of its caption loss and of its contrastive one (released config)
ALPHA = 0.4              # AIMv2: the weight of the pixels beside the text (its table 9c)
TEMPERATURE = 0.07       # CLIP: where the learned temperature starts; its inverse stays below 100


# ---------------------------------------------------------------------------------------------------------------- weights
def text_weights(cfg: decoder.DecoderConfig, length: int) -> dict:
    """A text encoder of the decoder's size, with CLIP's learned positions."""
    return {"embed": {"embedding": Weight((cfg.vocab, cfg.width), 0.02)}, "positions": {"table": Weight((length, cfg.width), 0.01)},
            "blocks": block_weights(cfg.layers, cfg.width, cfg.mlp), "norm": norm_weights(cfg.width), "project": dense(cfg.width, cfg.width, bias=False)}


def cross_weights(cfg: decoder.DecoderConfig, length: int) -> dict:
    """CapPa's decoder: in each block the words look at the image between looking at each other and the MLP. The last row of the word
    table is the mask token. It has learned positions, for without a causal mask nothing else orders the words."""
    stack, D = (cfg.layers,), cfg.width
    blocks = block_weights(cfg.layers, D, cfg.mlp) | {"norm3": norm_weights(D, stack), "query": dense(D, D, stack),
                                                      "memory": dense(cfg.image_width, D, stack, copies=2), "cross": dense(D, D, stack)}
    return {"embed": {"embedding": Weight((cfg.vocab + 1, D), 1.0)}, "positions": {"table": Weight((length, D), D**-0.5)},
            "blocks": blocks, "norm": norm_weights(D), "head": dense(D, cfg.vocab, bias=False)}


def weights(model: Any) -> dict:
    """{part: declared weights}: what the model's objective has beside the encoder."""
    enc, dec = model.encoder, model.decoder
    if model.objective == "cappa":
        return {"decoder": cross_weights(dec, model.length)}
    parts = {"decoder": decoder.weights(dec)}
    if model.objective == "aimv2":
        parts["decoder"]["pixels"] = dense(dec.width, enc.patch**2 * 3)
    if model.objective in ("clip", "openvision"):
        parts |= {"text": text_weights(dec, model.length),
                  "pair": {"image": dense(enc.width, dec.width, bias=False), "temperature": {"log": Weight((), 0.0)}}}
    if model.objective == "openvision":
        parts["web"] = dense(dec.width, enc.width, bias=False)
    if model.objective == "clip":
        del parts["decoder"]
    return parts


# ------------------------------------------------------------------------------------------------------------ contrastive
@jax.named_scope("text encoder")
def read(params: dict, text: jax.Array, cfg: decoder.DecoderConfig) -> tuple[jax.Array, jax.Array]:
    """text (B,T) to its tokens (B,T,D) and the caption's feature (B,D): as in CLIP, a causal mask, and the normed token of the eos,
    which alone has seen all words and no padding. (OpenVision's own reads both ways and takes the last place.)"""
    x = (params["embed"]["embedding"][text] + params["positions"]["table"][:text.shape[1]]).astype(cfg.dtype)
    x, _ = vit.stack(x, params["blocks"], cfg, mask=decoder.visible(0, text.shape[1], "causal"), exact_gelu=False)
    end = jnp.take_along_axis(x, (text == EOS).argmax(-1)[:, None, None], axis=1)[:, 0]
    return x, linear(layer_norm(end, params["norm"]), params["project"])


def unit(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-12)


@jax.named_scope("contrast")
def contrast(image: jax.Array, text: jax.Array, real: jax.Array, scale: jax.Array) -> jax.Array:
    """CLIP's loss of each of this device's pictures, (B,): the mean of two cross-entropies, its caption among all of the batch, and
    its caption's picture among all. image and text (B,D) have length 1; pictures that are not `real` (B,) are no choice and cost 0."""
    everyones = functools.partial(jax.lax.all_gather, axis_name="devices", tiled=True)
    match = scale * (image * text).sum(-1)

    def among(mine: jax.Array, others: jax.Array) -> jax.Array:
        scores = jnp.where(everyones(real), scale * mine @ everyones(others).T, jnp.finfo(jnp.float32).min)
        return jax.nn.logsumexp(scores, axis=-1) - match
    return jnp.where(real, (among(image, text) + among(text, image)) / 2, 0)


def sharpness(params: dict) -> jax.Array:
    """1 / temperature, at most 100 (CLIP section 2.5). The bound lets the gradient pass, or what once reached it could never leave."""
    log = params["pair"]["temperature"]["log"] - math.log(TEMPERATURE)
    return jnp.exp(log - jax.lax.stop_gradient(jnp.maximum(log - math.log(100), 0)))


def clip(params: dict, batch: dict, keys: jax.Array, model: Any) -> tuple[jax.Array, jax.Array]:
    """CLIP: the picture's pooled feature must find its caption in the batch, and the caption its picture."""
    image = unit(linear(vit.vit(params["encoder"], batch["images"], model.encoder)["pooled"], params["pair"]["image"]))
    text = unit(read(params["text"], batch["text"], model.decoder)[1])
    real = decoder.target_count(batch["text"]) > 0
    return contrast(image, text, real, sharpness(params)).sum(), real.sum()


def both_ways(cfg: decoder.DecoderConfig) -> decoder.DecoderConfig:
    return dataclasses.replace(cfg, prefix="bidirectional")  # OpenVision's decoder mask


def openvision_prefix(params: dict, tokens: jax.Array, web: jax.Array) -> jax.Array:
    """What OpenVision's decoder has before the caption: all patch tokens (B,N,E), and the text encoder's tokens of the web caption (B,T,D)."""
    return jnp.concatenate([tokens, linear(web, params["web"])], axis=1)


def openvision(params: dict, batch: dict, keys: jax.Array, model: Any) -> tuple[jax.Array, jax.Array]:
    """OpenVision, with the losses of CLIPS: the picture against the web caption and against the dense one, and the dense one
    predicted from the picture and the web caption. Both captions are read whole, and the decoder reads the words that it has
    told (as CLIPS is described), where the released one sees learned queries instead."""
    found, B = vit.vit(params["encoder"], batch["images"], model.encoder), len(batch["text"])
    image = unit(linear(found["pooled"], params["pair"]["image"]))
    tokens, text = read(params["text"], jnp.concatenate([batch["alt"], batch["text"]]), model.decoder)
    words = decoder.target_count(batch["text"])
    pairs = [contrast(image, unit(t), words > 0, sharpness(params)) for t in (text[:B], text[B:])]
    told = decoder.caption_loss(params["decoder"], openvision_prefix(params, found["tokens"], tokens[:B]), batch["text"], both_ways(model.decoder))
    all_words, pictures = jax.lax.psum((words.sum(), (words > 0).sum()), "devices")  # the pairs' mean is over pictures, the words' over words
    return CAPTION * told.sum() + PAIR * sum(pairs).sum() / 2 * all_words / jnp.maximum(pictures, 1), words.sum()


def openvision_tell(params: dict, batch: dict, model: Any) -> jax.Array:
    tokens = vit.vit(params["encoder"], batch["images"], model.encoder)["tokens"]
    web, _ = read(params["text"], batch["alt"], model.decoder)
    return decoder.generate(params["decoder"], openvision_prefix(params, tokens, web), both_ways(model.decoder), model.length)


# ------------------------------------------------------------------------------------------------------------------ CapPa
def cross_block(x: jax.Array, w: dict, heads: int, memory: jax.Array, mask: jax.Array) -> tuple[jax.Array, dict]:
    """x = x + attention(norm(x)); x = x + attention(norm(x), memory); x = x + mlp(norm(x)). x (B,T,D) in and out, memory (B,N,E);
    mask broadcastable to (B,H,T,T) is for the words among each other: the image is seen whole."""
    B, T, D = x.shape

    def split(a: jax.Array, parts: int) -> list[jax.Array]:
        return [p.reshape(*p.shape[:2], heads, D // heads) for p in jnp.split(a, parts, axis=-1)]
    mixed, _ = attend(*split(norm_linear(x, w["norm1"], w["qkv"]), 3), mask)
    x = x + linear(mixed.reshape(B, T, D), w["out"])
    mixed, _ = attend(*split(norm_linear(x, w["norm2"], w["query"]), 1), *split(linear(memory, w["memory"]), 2), None)
    x = x + linear(mixed.reshape(B, T, D), w["cross"])
    return x + gelu_linear(norm_linear(x, w["norm3"], w["fc1"]), w["fc2"], False), {}


@jax.named_scope("decoder")
def cross_features(params: dict, memory: jax.Array, words: jax.Array, mask: jax.Array, cfg: decoder.DecoderConfig) -> jax.Array:
    """What the head reads, (B,T,D), of words (B,T), V for the mask token."""
    x = (params["embed"]["embedding"][words] + params["positions"]["table"][:words.shape[1]]).astype(cfg.dtype)
    x, _ = vit.stack(x, params["blocks"], cfg, layer=cross_block, memory=memory, mask=mask)
    return layer_norm(x, params["norm"])


def cappa_memory(params: dict, images: jax.Array, model: Any) -> jax.Array:
    """All patch tokens (B,N,E) after the final norm, as CapPa's decoder looks at them."""
    return layer_norm(vit.vit(params["encoder"], images, model.encoder)["tokens"], params["encoder"]["norm"])


def cappa(params: dict, batch: dict, keys: jax.Array, model: Any, parallel: float = PARALLEL) -> tuple[jax.Array, jax.Array]:
    """CapPa: a caption is told word by word, or, by the picture's own draw, all at once from mask tokens that see each other."""
    text, memory = batch["text"], cappa_memory(params, batch["images"], model)
    at_once = jax.vmap(jax.random.uniform)(keys) < parallel                                                   # (B,)
    words = jnp.where(at_once[:, None], model.decoder.vocab, text[:, :-1])
    mask = at_once[:, None, None, None] | decoder.visible(0, words.shape[1], "causal")                        # (B,1,T-1,T-1)
    hidden = cross_features(params["decoder"], memory, words, mask, model.decoder)
    return decoder.word_loss(params["decoder"], hidden, text[:, 1:], model.decoder).sum(), decoder.target_count(text).sum()


def cappa_tell(params: dict, batch: dict, model: Any) -> jax.Array:
    """Word by word, all read anew for each: plain, not fast."""
    memory, T = cappa_memory(params, batch["images"], model), model.length
    see = decoder.visible(0, T, "causal")

    def write(t: jax.Array, text: jax.Array) -> jax.Array:
        hidden = cross_features(params["decoder"], memory, text, see, model.decoder)[:, t - 1]
        word = linear(hidden, params["decoder"]["head"]).argmax(-1).astype(jnp.int32)
        return text.at[:, t].set(jnp.where((text == EOS).any(-1), PAD, word))
    return jax.lax.fori_loop(1, T, write, jnp.full((len(memory), T), PAD, jnp.int32).at[:, 0].set(BOS))


# ------------------------------------------------------------------------------------------------------------------ AIMv2
def prefix_mask(prefix: jax.Array, S: int) -> jax.Array:
    """(B,1,S,S), True where token i may look: at itself, at what stands before it, and at the first prefix (B,) tokens."""
    i, j = jnp.arange(S)[:, None], jnp.arange(S)
    return ((j <= i) | (j < prefix[:, None, None]))[:, None]


def pixel_targets(images: jax.Array, patch: int) -> jax.Array:
    """(B,R,R,3) uint8 to (B,N,P*P*3) fp32: each patch with mean 0 and variance 1, by the formula of MAE (arXiv:2111.06377)."""
    x = vit.patchify(vit.normalise(images), patch)
    return (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True, ddof=1) + 1e-6)


def one_way(cfg: decoder.DecoderConfig) -> decoder.DecoderConfig:
    return dataclasses.replace(cfg, prefix="causal")  # or the decoder would see the patches that it predicts


def aimv2(params: dict, batch: dict, keys: jax.Array, model: Any) -> tuple[jax.Array, jax.Array]:
    """AIMv2: the encoder's patches see a prefix of random length (1 to N-1, drawn for each picture) and what is before them; the
    decoder predicts each next patch behind the prefix, and each next word. Both are means over a picture's own patches and words,
    as the paper writes them. In use the encoder has no mask: the prefixes have prepared it for that."""
    targets, text = pixel_targets(batch["images"], model.encoder.patch), batch["text"]
    N, cls = targets.shape[1], int(model.encoder.cls)
    prefix = jax.vmap(lambda key: jax.random.randint(key, (), 1, N))(keys)                                    # (B,)
    tokens = vit.vit(params["encoder"], batch["images"], model.encoder, mask=prefix_mask(prefix + cls, N + cls))["tokens"]
    hidden = decoder.sequence(params["decoder"], tokens, text[:, :-1], one_way(model.decoder))
    hidden = layer_norm(hidden, params["decoder"]["norm"])                                                    # (B,N+T-1,D)
    guesses = linear(hidden[:, :N - 1], params["decoder"]["pixels"]).astype(jnp.float32)                      # of patches 1 to N-1
    wrong = jnp.square(guesses - targets[:, 1:]).mean(-1)
    behind = jnp.arange(1, N) >= prefix[:, None]                                                              # (B,N-1)
    picture = jnp.where(behind, wrong, 0).sum(-1) / behind.sum(-1)
    words = decoder.target_count(text)
    caption = decoder.word_loss(params["decoder"], hidden[:, N:], text[:, 1:], model.decoder) / jnp.maximum(words, 1)
    return jnp.where(words > 0, caption + ALPHA * picture, 0).sum(), (words > 0).sum()


def aimv2_tell(params: dict, batch: dict, model: Any) -> jax.Array:
    tokens = vit.vit(params["encoder"], batch["images"], model.encoder)["tokens"]
    return decoder.generate(params["decoder"], tokens, one_way(model.decoder), model.length)


# ---------------------------------------------------------------------------------------------------------- what they are
OBJECTIVES: dict[str, Callable] = {"clip": clip, "openvision": openvision, "cappa": cappa, "aimv2": aimv2}
HELD_OUT = OBJECTIVES | {"cappa": functools.partial(cappa, parallel=0.0)}  # CapPa is measured word by word alone, as in its code
TELL: dict[str, Callable] = {"openvision": openvision_tell, "cappa": cappa_tell, "aimv2": aimv2_tell}  # (params, batch, model) -> captions (B,T)


def floor(objective: str, batches: list[int], surprise: np.ndarray | None, words: np.ndarray | None, patches: Callable[[], np.ndarray]) -> float | None:
    """The held-out loss of one who sees no picture (nor a web caption), None if that is not known. batches: pictures in each evaluated
    batch, among which a contrastive loss is; surprise and words (n,): nats and words of each caption; patches(): pixel targets (n,N,P*P*3),
    of which the best guess without a picture is their mean: of scenes it takes a sixth off what gray patches cost."""
    guess = sum(n * math.log(n) for n in batches) / sum(batches)
    if objective == "clip":
        return guess
    if surprise is None or words is None:
        return None
    caption = float(surprise.sum() / words.sum())
    if objective == "openvision":
        return CAPTION * caption + PAIR * guess
    if objective == "aimv2":
        return float((surprise / words).mean() + ALPHA * np.var(patches(), axis=0).mean())
    return caption


def kept(model: Any, N: int) -> int:
    """Patch tokens that the decoder (or the pooling) gets, of N."""
    return masking.kept_count(N, model.keep_ratio) if model.objective == "openvision2" else N


def flops(model: Any, resolution: int, length: int) -> dict[str, float]:
    """Forward FLOPs of each part for one image whose captions have `length` positions, 2 a multiply-add, matmuls alone. The scores
    of a contrastive batch, 4 B D an image and caption, are left out."""
    enc, dec = model.encoder, model.decoder
    N, T, D = (resolution // enc.patch) ** 2, length - 1, dec.width
    parts = {"encoder": vit.flops(enc, resolution), "decoder": decoder.flops(dec, kept(model, N), T)}
    one = vit.block_flops(length, D, dec.mlp, dec.layers) + 2 * D * D
    if model.objective == "clip":
        parts = {"encoder": parts["encoder"], "text": one + 2 * enc.width * D}
    elif model.objective == "openvision":
        parts |= {"decoder": decoder.flops(dec, N + length, T) + 2 * length * D * enc.width, "text": 2 * one + 2 * enc.width * D}
    elif model.objective == "cappa":
        cross = dec.layers * (4 * T * D * D + 4 * N * enc.width * D + 4 * T * N * D)
        parts["decoder"] = vit.block_flops(T, D, dec.mlp, dec.layers) + cross + 2 * T * D * dec.vocab
    elif model.objective == "aimv2":
        parts["decoder"] += 2 * (N - 1) * D * enc.patch**2 * 3
    return parts


if __name__ == "__main__":
    import config
    cfg, resolution = config.PRESETS["l14"], 224
    print(f"{cfg.encoder} with decoder {cfg.decoder} at {resolution} px, {cfg.text_length} text positions: millions of parameters, GFLOPs an image forward")
    for name in ("openvision2", *OBJECTIVES):
        model = config.model(dataclasses.replace(cfg, objective=name))
        sizes = {"encoder": vit.weights(model.encoder)} | weights(model)
        costs = flops(model, resolution, cfg.text_length)
        print(f"{name:>12}  {'  '.join(f'{part} {vit.count(w) / 1e6:.1f} M' for part, w in sizes.items()):76s} {sum(costs.values()) / 1e9:6.1f} ("
              + ", ".join(f"{part} {cost / 1e9:.1f}" for part, cost in costs.items()) + ")")

"""Zero-shot classification by caption likelihood, as CapPa does: which class's sentence does the decoder find likeliest?

No classifier is trained: the score of a class is log p(sentence | picture), summed over the sentence's words and its end. Common
sentences are likely whatever the picture; "prior subtracted" takes off log p(sentence), p being the mean over the measured
pictures. The decoder was trained on a random share of the patches and is given all of them here: of 200 scenes the toy ranks the own
caption first among 200 for 99.5% either way, and finds it likelier so (-1.43 nats against -1.72 with one draw of kept patches).
With `draws`, the log-probabilities of so many draws are averaged.

Letters: P pictures, N patches, K kept patches, S sentences, T text positions, D width, H heads, L layers.
"""
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import decoder
from caption import Captioner
from evaluation.labels import LabeledImages
from inputs import scene_captions, sources
from layers import layer_norm, linear
from masking import keep_random_tokens
from runtime.errors import DataError
from vit import transformer_block, transformer_stack

PIECE = 256  # sentences that are scored at once: their logits are what takes memory


def classes(pictures: LabeledImages, rows: np.ndarray, names: str | None, template: str) -> tuple[list[str], np.ndarray]:
    """(sentences (S,), which of them is true of each of the pictures `rows`, or -1). names: a file with one a line, "all" for every label of
    `pictures`, None for the labels of `rows`. The classes of scenes are their captions in one wording: only what is there tells
    them apart. DataError if there are fewer than two."""
    if isinstance(pictures.source, sources.SceneSource):
        told = [scene_captions.caption(pictures.source.scene(i) | {"wording": 0}) for i in pictures.indices]
    else:
        told = next(iter(pictures.labels.values()))[:, 0].tolist()
    kinds = told if names else [told[i] for i in rows]
    if names and names != "all":
        try:
            with open(names, encoding="utf-8-sig") as f:  # an editor may begin it with a mark
                kinds = [line.strip() for line in f if line.strip()]
        except UnicodeDecodeError:
            raise DataError(f"{names} is not UTF-8 text: give a file with one class a line") from None
    spelt: dict[str, str] = {}
    for kind in kinds:
        spelt.setdefault(kind.lower(), kind)              # "Cat" and "cat" are one class, spelt as it first is
    if len(spelt) < 2:
        raise DataError(f"there is nothing to tell apart: {len(spelt)} class in {names or 'the held-out pictures'}")
    number = {kind: n for n, kind in enumerate(spelt)}
    truth = np.array([number.get(told[i].lower(), -1) for i in rows])
    if (truth < 0).all():
        raise DataError(f"{names} has none of the labels of the held-out pictures, such as {told[0]!r}: name their field with --label-fields")
    return [template.replace("{}", kind) for kind in spelt.values()], truth


@functools.partial(jax.jit, static_argnames="cfg")
def score(params: dict, image_tokens: jax.Array, text: jax.Array, cfg: decoder.DecoderConfig) -> jax.Array:
    """log p(sentence | picture), (P,S) fp32, for image_tokens (P,K,E) and text (S,T): minus decoder.caption_loss of each pair. The decoder
    reads a picture's tokens once; their keys and values serve all sentences."""
    K, (S, T) = image_tokens.shape[1], text.shape
    words, targets = decoder.embed_tokens(params, text[:, :-1], cfg), text[:, 1:]
    see = decoder.attention_mask(K, K + T - 1, cfg.prefix_attention)
    prefix = linear(image_tokens.astype(cfg.dtype), params["project"])
    _, cache = transformer_stack(prefix, params["blocks"], cfg, wanted=("keys", "values"), mask=see[:K, :K], exact_gelu=False)     # (L,P,K,H,Dh)

    def one(keys_and_values: tuple) -> jax.Array:                                                # (L,K,H,Dh) each
        def body(x, layer):
            w, *known = layer
            room = [jnp.broadcast_to(jnp.pad(a, ((0, T - 1), (0, 0), (0, 0))), (S, K + T - 1, *a.shape[1:])) for a in known]
            return transformer_block(x, w, cfg.num_heads, mask=see[K:], exact_gelu=False, cache=(*room, K))[0], None
        x, _ = jax.lax.scan(body, words, (params["blocks"], *keys_and_values))
        scores = jax.nn.log_softmax(linear(layer_norm(x, params["norm"]), params["head"]).astype(jnp.float32))
        said = jnp.take_along_axis(scores, targets[..., None], -1)[..., 0]
        return jnp.where(targets != decoder.PAD, said, 0).sum(-1)
    return jax.lax.map(one, tuple(a.swapaxes(0, 1) for a in (cache["keys"], cache["values"])))


def likelihood(captioner: Captioner, tokens: np.ndarray, sentences: list[str], draws: int = 0, seed: int = 0) -> np.ndarray:
    """log p(sentence | picture) (P,S) for the encoder's tokens (P,N,E), from all patches, or averaged over draws of kept ones."""
    text, which = np.unique([captioner.tokenizer.encode(s, captioner.settings.max_text_len) for s in sentences], axis=0, return_inverse=True)
    lengths = (text != decoder.PAD).sum(1)
    order = lengths.argsort(kind="stable")                                       # short ones together, as what is filled up is computed too
    filled = text[np.concatenate([order, order[-1:].repeat(-len(text) % min(PIECE, 1 << (len(text) - 1).bit_length()))])]
    total = np.zeros((len(tokens), len(filled)))
    for draw in range(max(draws, 1)):
        kept = tokens
        if draws:
            keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.fold_in(jax.random.key(seed), draw)))(np.arange(len(tokens)))
            kept, _ = keep_random_tokens(keys, jnp.asarray(tokens), captioner.settings.keep_ratio, captioner.settings.shuffle_kept)
        pieces = [score(captioner.params["decoder"], kept, piece[:, :-(-int((piece != decoder.PAD).sum(1).max()) // 4) * 4], captioner.decoder)
                  for piece in (filled[n:n + PIECE] for n in range(0, len(filled), PIECE))]      # few lengths are compiled
        total += np.concatenate(pieces, 1) / max(draws, 1)
    found = np.empty((len(tokens), len(text)))
    found[:, order] = total[:, :len(text)]
    return found[:, which.ravel()]                                               # to the bit the same for the same words


def measure(captioner: Captioner, tokens: np.ndarray, sentences: list[str], truth: np.ndarray, draws: int = 0, seed: int = 0) -> dict[str, Any]:
    """Shares of pictures whose own sentence, truth (P,), comes first and among the first five: tokens (P,N,E) as the captioner's encoder gives them."""
    scores = likelihood(captioner, tokens, sentences, draws, seed)
    prior = jax.nn.logsumexp(scores, axis=0) - np.log(len(scores))
    found: dict[str, Any] = {"pictures": len(scores), "names": len(sentences), "chance": 1 / len(sentences)}
    for name, points in (("likelihood", scores), ("prior subtracted", scores - np.asarray(prior))):
        place = (points >= np.take_along_axis(points, truth[:, None], 1)).sum(1) - 1  # what is cut, or unknown, to the same words is not told apart
        found |= {name: float((place == 0).mean()), f"{name}, first five": float((place < 5).mean())}
    return found

"""Zero-shot classification by caption likelihood, as CapPa does it. No classifier is trained.

The score of a class is log p(sentence | image): the sum over the sentence's tokens and its end.
Common sentences are likely for every image. "prior subtracted" subtracts log p(sentence), where p
is the mean over the measured images.

In training the decoder reads a random share of the patches; here it reads all of them. An earlier
toy ranks an image's own caption first among 200 for 99.5% of the images either way, and gives it
-1.43 nats with all patches, -1.72 with one draw.

Letters: P images, N patches, S sentences, T text positions, E encoder width,
H heads, Dh head width, L layers.
"""
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import decoder
from caption import Captioner
from evaluation.labels import LabeledImages
from evaluation.tasks import progress
from inputs import scene_captions, sources
from layers import layer_norm, linear
from runtime.errors import DataError
from vit import transformer_block, transformer_stack

CHUNK = 256  # sentences that are scored at once: their logits take memory


def make_classes(labeled: LabeledImages, rows: np.ndarray, classnames: str | None,
                 template: str) -> tuple[list[str], np.ndarray]:
    """(sentences (S,), the index of each image's own sentence or -1), for the images `rows`.

    classnames: a file with one class per line, "all" for every label of `labeled`, None for the
    labels of `rows`. The classes of scenes are their captions in one wording, so that only the
    content differs. Case does not count. DataError if there are fewer than two classes."""
    if isinstance(labeled.source, sources.SceneSource):
        records = [labeled.source.scene(i) | {"wording": 0} for i in labeled.indices]
        labels = [scene_captions.caption(record) for record in records]
    else:
        labels = next(iter(labeled.labels.values()))[:, 0].tolist()
    if classnames == "all":
        names = labels
    elif classnames:
        names = read_classnames(classnames)
    else:
        names = [labels[i] for i in rows]
    spelling: dict[str, str] = {}  # the first spelling of a class stays
    for name in names:
        spelling.setdefault(name.lower(), name)
    if len(spelling) < 2:
        raise DataError(f"there is nothing to tell apart: {len(spelling)} class in "
                        f"{classnames or 'the validation images'}")
    index = {name: n for n, name in enumerate(spelling)}
    truth = np.array([index.get(labels[i].lower(), -1) for i in rows])
    if (truth < 0).all():
        raise DataError(f"{classnames} has none of the labels of the validation images, such as "
                        f"{labels[0]!r}: name their field with --label-fields")
    return [template.replace("{}", name) for name in spelling.values()], truth


def groups_of_classes(labeled: LabeledImages, names: list[str]) -> dict[str, np.ndarray]:
    """{label: (C,)} for each label after the first: that of the first image of each class, "" where
    there is none. Scenes have none, because their classes are captions."""
    if isinstance(labeled.source, sources.SceneSource):
        return {}
    (_, classes), *others = labeled.labels.items()
    groups = {}
    for label, texts in others:
        of_class = dict(zip(map(str.lower, classes[::-1, 0].tolist()), texts[::-1, 0].tolist()))
        groups[label] = np.array([of_class.get(name.lower(), "") for name in names])
    return groups


def read_classnames(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8-sig") as file:  # some editors write a byte order mark
            return [line.strip() for line in file if line.strip()]
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text: give a file with one class per line") from None


@functools.partial(jax.jit, static_argnames="cfg")
def score(params: dict, image_tokens: jax.Array, text: jax.Array,
          cfg: decoder.DecoderConfig) -> jax.Array:
    """log p(sentence | image), (P,S) fp32, for image_tokens (P,N,E) and text (S,T): minus
    decoder.caption_loss of each pair. The decoder reads an image once, and all sentences use its
    keys and values."""
    N, (S, T) = image_tokens.shape[1], text.shape
    token_embeddings, targets = decoder.embed_tokens(params, text[:, :-1], cfg), text[:, 1:]
    mask = decoder.attention_mask(N, N + T - 1, cfg.prefix_attention)
    prefix = linear(image_tokens.astype(cfg.dtype), params["project"])
    _, cache = transformer_stack(prefix, params["blocks"], cfg, extra_names=("keys", "values"),
                                 mask=mask[:N, :N], exact_gelu=False)              # (L,P,N,H,Dh)

    def with_room(a: jax.Array) -> jax.Array:
        """One layer's keys or values (N,H,Dh), for each sentence, with room for its tokens."""
        padded = jnp.pad(a, ((0, T - 1), (0, 0), (0, 0)))
        return jnp.broadcast_to(padded, (S, *padded.shape))

    def score_image(keys_and_values: tuple) -> jax.Array:                          # (L,N,H,Dh) each
        def layer(x: jax.Array, inputs: tuple) -> tuple:
            w, keys, values = inputs
            x, _ = transformer_block(x, w, cfg.num_heads, mask=mask[N:], exact_gelu=False,
                                     cache=(with_room(keys), with_room(values), N))
            return x, None
        x, _ = jax.lax.scan(layer, token_embeddings, (params["blocks"], *keys_and_values))
        logits = linear(layer_norm(x, params["norm"]), params["head"]).astype(jnp.float32)
        log_probs = jax.nn.log_softmax(logits)                                     # (S,T-1,V)
        of_targets = jnp.take_along_axis(log_probs, targets[..., None], -1)[..., 0]
        return jnp.where(targets != decoder.PAD, of_targets, 0).sum(-1)
    by_image = cache["keys"].swapaxes(0, 1), cache["values"].swapaxes(0, 1)
    return jax.lax.map(score_image, by_image)


def score_all(captioner: Captioner, tokens: jax.Array, text: np.ndarray) -> np.ndarray:
    """`score`, CHUNK sentences at a time. A chunk is cut to its longest sentence, in steps of four
    positions, so that few shapes are compiled."""
    chunks = []
    for start in progress(range(0, len(text), CHUNK), "sentences"):
        chunk = text[start:start + CHUNK]
        longest = int((chunk != decoder.PAD).sum(1).max())
        chunk = chunk[:, :4 * -(-longest // 4)]
        chunks.append(score(captioner.params["decoder"], tokens, chunk, captioner.decoder))
    return np.concatenate(chunks, 1)


def likelihood(captioner: Captioner, tokens: np.ndarray, sentences: list[str]) -> np.ndarray:
    """log p(sentence | image) (P,S) for the encoder's tokens (P,N,E). Sentences of the same tokens
    get the same bits."""
    length = captioner.settings.max_text_len
    encoded = [captioner.tokenizer.encode(text, length) for text in sentences]
    text, row_of_sentence = np.unique(encoded, axis=0, return_inverse=True)
    order = (text != decoder.PAD).sum(1).argsort(kind="stable")  # similar lengths share a chunk
    multiple = min(CHUNK, 1 << (len(text) - 1).bit_length())
    padding = order[-1:].repeat(-len(text) % multiple)
    ordered = score_all(captioner, tokens, text[np.concatenate([order, padding])])
    scores = np.empty((len(tokens), len(text)))
    scores[:, order] = ordered[:, :len(text)]
    return scores[:, row_of_sentence.ravel()]


def measure(captioner: Captioner, tokens: np.ndarray, sentences: list[str],
            truth: np.ndarray) -> dict[str, Any]:
    """The shares of images whose own sentence, truth (P,), ranks first and among the first five.
    tokens (P,N,E) are those of the captioner's encoder."""
    scores = likelihood(captioner, tokens, sentences)
    prior = np.asarray(jax.nn.logsumexp(scores, axis=0) - np.log(len(scores)))
    figures: dict[str, Any] = {"images": len(scores), "names": len(sentences),
                               "chance": 1 / len(sentences)}
    # A sentence of the same tokens counts as ranked above, and so does a score that is NaN.
    for name, points in (("likelihood", scores), ("prior subtracted", scores - prior)):
        own = np.take_along_axis(points, truth[:, None], 1)
        rank = points.shape[1] - (points < own).sum(1) - 1
        figures[name] = float((rank == 0).mean())
        figures[f"{name}, first five"] = float((rank < 5).mean())
    return figures

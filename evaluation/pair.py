"""Images and captions as vectors of one space, by a run with a text encoder (clip, siglip, lit or
openvision): zero-shot classification. evaluation/retrieval.py and search.py use the vectors too.

Letters: n images or texts, C classes, D width, R pixels per side.
"""
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from caption import load_run_checkpoint
from config import Config
from inputs import tokenizer
from objectives.registry import CONTRASTIVE, ModelSpec, init_params, model_spec, objective_module
from runtime import checkpoint
from runtime.errors import CheckpointError

BATCH = 128  # images or texts that are embedded at once


class Pair(NamedTuple):
    """The encoder and the text encoder of a checkpoint."""
    params: dict
    model: ModelSpec
    tokenizer: tokenizer.WordPiece
    settings: Config
    resolution: int


def read_pair(path: str) -> Pair:
    """From a run's folder (its last checkpoint) or a checkpoint. CheckpointError if it cannot be
    read, or has no text encoder."""
    settings, arrays, meta = load_run_checkpoint(path)
    if settings.objective not in CONTRASTIVE:
        raise CheckpointError(f"{path} is a run of --objective {settings.objective}, which has no "
                              "text encoder: train one with --objective lit --init-encoder "
                              f"{path}")
    settings = dataclasses.replace(settings, dtype="float32", remat="none")
    model = model_spec(settings)
    target = jax.eval_shape(lambda: init_params(settings, model))
    params = jax.device_put(checkpoint.restore(arrays, target, path, "params"))
    try:
        tok = tokenizer.from_state(meta["vocabulary"])
    except ValueError as problem:
        raise CheckpointError(f"{path}: {problem}") from None
    return Pair(params, model, tok, settings, checkpoint.encoder_config(meta)[1])


# ---------------------------------------------------------------------------------- vectors
@functools.partial(jax.jit, static_argnames=("model", "kind"))
def embed(params: dict, inputs: jax.Array, model: ModelSpec, kind: str) -> jax.Array:
    return getattr(objective_module(model.objective), kind)(params, inputs, model)


def embed_in_batches(pair: Pair, inputs: np.ndarray, kind: str) -> np.ndarray:
    """(n,D) fp32 of length 1. A last batch is filled up to a power of two, so that few shapes are
    compiled."""
    vectors = []
    for start in range(0, len(inputs), BATCH):
        batch = inputs[start:start + BATCH]
        size = min(BATCH, 1 << (len(batch) - 1).bit_length())
        padded = np.concatenate([batch, batch[-1:].repeat(size - len(batch), 0)])
        vectors.append(np.asarray(embed(pair.params, padded, pair.model, kind))[:len(batch)])
    return np.concatenate(vectors).astype(np.float32)


def embed_images(pair: Pair, pixels: np.ndarray) -> np.ndarray:
    """(n,R,R,3) uint8 to (n,D)."""
    return embed_in_batches(pair, pixels, "embed_images")


def embed_texts(pair: Pair, texts: Sequence[str]) -> np.ndarray:
    """(n,D)."""
    tokens = [pair.tokenizer.encode(text, pair.settings.max_text_len) for text in texts]
    return embed_in_batches(pair, np.array(tokens), "embed_texts")


# -------------------------------------------------------------------- zero-shot classification
def embed_classes(pair: Pair, names: Sequence[str], templates: Sequence[str]) -> np.ndarray:
    """(C,D): for each class the mean of its sentences' vectors, of length 1."""
    total = np.zeros(())
    for template in templates:
        total = total + embed_texts(pair, [template.replace("{}", name) for name in names])
    return total / np.linalg.norm(total, axis=1, keepdims=True)


def classify(image_vectors: np.ndarray, class_vectors: np.ndarray, truth: np.ndarray,
             class_groups: dict[str, np.ndarray] | None = None) -> dict[str, Any]:
    """The shares of images whose own class, truth (n,), is nearest and among the nearest five.

    class_groups {label: (C,)}: the group of each class; for each label the share of images whose
    nearest class has the group of their own."""
    scores = image_vectors @ class_vectors.T
    own = np.take_along_axis(scores, truth[:, None], 1)
    rank = scores.shape[1] - (scores < own).sum(1) - 1  # an equal class counts as ranked above
    figures: dict[str, Any] = {
        "images": len(scores), "names": scores.shape[1], "chance": 1 / scores.shape[1],
        "nearest": float((rank == 0).mean()), "nearest five": float((rank < 5).mean())}
    for label, groups in (class_groups or {}).items():
        figures[label] = float((groups[scores.argmax(1)] == groups[truth]).mean())
    return figures

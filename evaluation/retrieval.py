"""Retrieval: the caption of each image among all captions of a pool, and the image of each caption.

By vectors, if the run has a text encoder (evaluation/pair.py), or by the likelihood of the caption,
if it has a decoder. Image to text then also subtracts the caption's own likelihood, the mean over
the pool's images, because common captions are likely for every image (arXiv:2306.01879).

R@k is the share of queries whose answer is among the first k. Equal captions are one, and any of
its images is right; an equal score counts as ranked above. The memory is that of the scores, 4
bytes each (400 MB for the largest pool), and of one block of images.

Letters: P images, S different captions, b images of a block, R pixels per side.
"""
from collections.abc import Callable, Iterator

import jax
import numpy as np

from caption import Captioner
from evaluation import pair as pairs
from evaluation.zeroshot import likelihood
from inputs.images import decode_and_augment
from interop.encoder import Encoder
from runtime.errors import BadSample, DataError

MAX_POOL = 10_000  # images
BLOCK = 64         # images that are decoded and scored at once, and rows that are ranked at once
TOP = (1, 5, 10)


class Pool:
    """At most MAX_POOL captioned images of a source. Samples that cannot be read are left out."""

    def __init__(self, source: object, count: int):
        """DataError if fewer than two different captions are left."""
        self.source, self.indices = source, []
        captions, reason = [], "its captions are all the same"
        if count > MAX_POOL:
            raise DataError(f"--num-samples {count}: a pool has at most {MAX_POOL:,} images")
        for i in range(min(count, len(source))):
            try:
                text = source.caption(i).strip()
                decode_and_augment(source.image(i), 16)
            except BadSample as problem:
                reason = f"{source.name(i)}: {problem}"
                continue
            captions.append(text)
            self.indices.append(i)
        self.captions, self.caption_of_image = np.unique(captions, return_inverse=True)
        if len(self.captions) < 2:
            raise DataError(f"a pool of {len(self.indices)} images and {len(self.captions)} "
                            f"captions leaves nothing to find ({reason})")

    def pixels(self, resolution: int) -> Iterator[np.ndarray]:
        """(b,R,R,3) uint8, block by block."""
        for start in range(0, len(self.indices), BLOCK):
            block = [decode_and_augment(self.source.image(i), resolution)
                     for i in self.indices[start:start + BLOCK]]
            yield np.stack(block)

    def scores(self, resolution: int, score_block: Callable) -> np.ndarray:
        """(P,S) fp32 from a function of the pixels of a block to (b,S)."""
        scores = np.empty((len(self.indices), len(self.captions)), np.float32)
        for n, pixels in enumerate(self.pixels(resolution)):
            scores[n * BLOCK:n * BLOCK + len(pixels)] = score_block(pixels)
        return scores


# ------------------------------------------------------------------------------------ ranks
def image_to_text_ranks(scores: np.ndarray, caption_of_image: np.ndarray,
                        prior: np.ndarray | float = 0.0) -> np.ndarray:
    """(P,), from 0: the captions that are not below the image's own."""
    ranks = []
    for start in range(0, len(scores), BLOCK):
        block = scores[start:start + BLOCK] - prior
        own = np.take_along_axis(block, caption_of_image[start:start + BLOCK, None], 1)
        ranks.append(scores.shape[1] - (block < own).sum(1) - 1)
    return np.concatenate(ranks)


def text_to_image_ranks(scores: np.ndarray, caption_of_image: np.ndarray) -> np.ndarray:
    """(S,), from 0: the images of other captions that are not below the best of its own."""
    ranks = []
    for start in range(0, scores.shape[1], BLOCK):
        block = scores[:, start:start + BLOCK]
        is_own = caption_of_image[:, None] == start + np.arange(block.shape[1])
        best = np.where(is_own, block, -np.inf).max(0)
        ranks.append((~(block < best) & ~is_own).sum(0))
    return np.concatenate(ranks)


def recalls(ranks: np.ndarray) -> dict[str, float]:
    return {f"R@{k}": float((ranks < k).mean()) for k in TOP}


# --------------------------------------------------------------------------------- measures
def measure_vectors(pair: pairs.Pair, pool: Pool) -> dict[str, dict[str, float]]:
    texts = pairs.embed_texts(pair, pool.captions)
    scores = pool.scores(pair.resolution,
                         lambda pixels: pairs.embed_images(pair, pixels) @ texts.T)
    return {"image to text, vectors": recalls(image_to_text_ranks(scores, pool.caption_of_image)),
            "text to image, vectors": recalls(text_to_image_ranks(scores, pool.caption_of_image))}


def measure_likelihood(captioner: Captioner, encoder: Encoder,
                       pool: Pool) -> dict[str, dict[str, float]]:
    """The decoder reads all patches."""
    captions = pool.captions.tolist()
    scores = pool.scores(encoder.resolution,
                         lambda pixels: likelihood(captioner, encoder(pixels).tokens, captions))
    prior = column_log_means(scores)
    with_prior = image_to_text_ranks(scores, pool.caption_of_image, prior)
    without = image_to_text_ranks(scores, pool.caption_of_image)
    to_image = text_to_image_ranks(scores, pool.caption_of_image)
    return {"image to text, prior subtracted": recalls(with_prior),
            "image to text, likelihood": recalls(without),
            "text to image, likelihood": recalls(to_image)}


def column_log_means(scores: np.ndarray) -> np.ndarray:
    """(S,): the log of the mean over images of exp(scores)."""
    means = []
    for start in range(0, scores.shape[1], BLOCK):
        block = scores[:, start:start + BLOCK].astype(np.float64)
        means.append(np.asarray(jax.nn.logsumexp(block, axis=0)) - np.log(len(block)))
    return np.concatenate(means)

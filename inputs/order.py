"""The order in which training reads the samples of a source, and the random streams of a run.

Samples are numbered in the order of the source. A shard is a part of the source: a tar, or a row
group of a parquet file. A chunk is a series of samples that one read of a shard covers. A position
counts the images of the run, from 0.
"""
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

# One random stream per purpose: np.random.default_rng((seed, STREAM, ...)). So what is drawn for
# one purpose does not depend on the draws for another.
SHARD_ORDER, AUGMENTATION, SAMPLE_ORDER, CAPTION_OF_LIST, CAPTION_FIELD = 1, 2, 3, 4, 5

NUM_LANES = 64  # chunks that a batch mixes, where the samples do not all fit in memory


class LaneShuffle:
    """The sample at each position of a run. The order in an epoch follows from (seed, epoch) alone.

    Data that fit in memory have no chunks: all samples are shuffled together. Otherwise the shards
    are shuffled, then the chunks in each shard, then the samples in each chunk. This sequence is
    cut into NUM_LANES equal parts, the lanes, and the order takes one sample from each in turn. So
    a batch mixes NUM_LANES chunks. If each of n processes takes every n-th position and n divides
    NUM_LANES, no two processes read the same lane."""

    def __init__(self, starts: np.ndarray, seed: int, chunk_of: Callable | None = None):
        """starts (shards + 1,): the first sample of each shard, then the number of samples.
        chunk_of(samples): the number of each sample's chunk in its shard; None for no chunks."""
        self.starts, self.seed, self.chunk_of = starts, seed, chunk_of
        # The results are kept: of two epochs, because one begins while another ends.
        self.shuffle_shards = functools.lru_cache(2)(self.shuffle_shards)
        self.shuffle_samples = functools.lru_cache(2)(self.shuffle_samples)
        self.shuffle_chunks = functools.lru_cache(2 * NUM_LANES)(self.shuffle_chunks)

    def __call__(self, position: int) -> int:
        """The sample at a position of the run."""
        num_samples = int(self.starts[-1])
        epoch, offset = divmod(position, num_samples)
        if self.chunk_of is None:
            return int(self.shuffle_samples(epoch)[offset])
        row, lane = divmod(offset, NUM_LANES)
        length, num_longer = divmod(num_samples, NUM_LANES)
        lane_begin = lane * length + min(lane, num_longer)  # the longer lanes have one sample more
        index = lane_begin + row  # in the sequence of all samples
        shards, begins = self.shuffle_shards(epoch)
        rank = int(np.searchsorted(begins, index, side="right")) - 1  # of its shard in the sequence
        samples = self.shuffle_chunks(epoch, int(shards[rank]))
        return int(samples[index - begins[rank]])

    def shuffle_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in this epoch's order, and where each begins in the sequence."""
        rng = np.random.default_rng((self.seed, SHARD_ORDER, epoch))
        shards = rng.permutation(len(self.starts) - 1)
        return shards, np.cumsum([0, *np.diff(self.starts)[shards]])

    def shuffle_samples(self, epoch: int) -> np.ndarray:
        """All samples, shuffled together."""
        shards, _ = self.shuffle_shards(epoch)
        samples = [np.arange(self.starts[shard], self.starts[shard + 1]) for shard in shards]
        rng = np.random.default_rng((self.seed, SAMPLE_ORDER, epoch, 0))
        return rng.permutation(np.concatenate(samples))

    def shuffle_chunks(self, epoch: int, shard: int) -> np.ndarray:
        """The samples of a shard, one chunk after the other."""
        samples = np.arange(self.starts[shard], self.starts[shard + 1])
        chunks = self.chunk_of(samples)
        rng = np.random.default_rng((self.seed, SAMPLE_ORDER, epoch, shard))
        chunk_ranks = rng.permutation(chunks.max() + 1)
        noise = rng.random(len(samples))
        return samples[np.lexsort((noise, chunk_ranks[chunks]))]  # by chunk, then at random


def order_name(source: Any) -> str:
    """The order of a source's samples in training, as checkpoints name it ("runs" are chunks)."""
    if source.shuffle_by_chunk:
        return f"in runs of {source.chunk_length} samples"
    return "shuffled whole"


def former_order_name(source: Any) -> str:
    """`order_name` of an old checkpoint that lacks it: windows of 16 tars were shuffled then."""
    one_window = source.starts is None or len(source.starts) <= 17
    return "shuffled whole" if one_window else "shuffled in windows of 16 tars"

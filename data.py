"""Samples as batches that are a function of (seed, step) alone.

Which samples a step reads, how each is cropped and what replaces a broken one depend on the seed
and on the position in the run: not on threads, devices, hosts or earlier steps. A broken sample is
never used and never stops a run. The next one replaces it, and it is counted and listed with the
reason.

Letters: B images, R pixels per side, T text positions.

    python data.py [WHERE [CAPTION]]     draws contact.png: crops and captions as training gets them
"""
import collections
import contextlib
import dataclasses
import functools
import itertools
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from inputs import sources, tars, tokenizer
from inputs.files import choose_first
from inputs.images import Augment, decode_and_augment, silence_pillow
from inputs.sources import SceneSource, Source
from inputs.tokenizer import EOS, WordPiece
from runtime.errors import BadSample, ConfigError, DataError, run_command

SAMPLES_PER_TASK = 8  # of a thread: a small image is decoded faster than a thread wakes up


class LaneShuffle:
    """The order of the samples in each epoch, from (seed, epoch) alone.

    Without runs, all samples are shuffled as one. With runs (tars that do not fit in memory), the
    tars are shuffled, then the runs in each tar, then the samples in each run. That sequence is cut
    into NUM_LANES equal parts, the lanes, and the order takes one sample from each lane in turn. So
    a batch mixes NUM_LANES places of the set, each run is read once, and at most NUM_LANES runs are
    in use. If each of n processes takes every n-th position, and n divides NUM_LANES, each has its
    own lanes."""

    def __init__(self, starts: np.ndarray, seed: int, run_of: Callable | None = None):
        """starts (shards + 1,) and run_of as in inputs/sources.py."""
        self.starts, self.seed, self.run_of = starts, seed, run_of
        self.shards = functools.lru_cache(2)(self.shuffle_shards)
        self.samples = functools.lru_cache(2)(self.shuffle_samples)
        self.shard_samples = functools.lru_cache(2 * tars.NUM_LANES)(self.shuffle_runs)

    def shuffle_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in this epoch's order, and where each begins in the sequence."""
        rng = np.random.default_rng((self.seed, 1, epoch))
        order = rng.permutation(len(self.starts) - 1)
        return order, np.cumsum([0, *np.diff(self.starts)[order]])

    def shuffle_samples(self, epoch: int) -> np.ndarray:
        """All samples, as one."""
        order, _ = self.shards(epoch)
        samples = [np.arange(self.starts[shard], self.starts[shard + 1]) for shard in order]
        return np.random.default_rng((self.seed, 3, epoch, 0)).permutation(np.concatenate(samples))

    def shuffle_runs(self, epoch: int, shard: int) -> np.ndarray:
        """The samples of a shard, run by run."""
        samples = np.arange(self.starts[shard], self.starts[shard + 1])
        runs = self.run_of(samples)
        rng = np.random.default_rng((self.seed, 3, epoch, shard))
        rank = rng.permutation(runs.max() + 1)
        return samples[np.lexsort((rng.random(len(samples)), rank[runs]))]

    def __call__(self, position: int) -> int:
        """The sample at a position of the run."""
        n = int(self.starts[-1])
        epoch, offset = divmod(position, n)
        if self.run_of is None:
            return int(self.samples(epoch)[offset])
        row, lane = divmod(offset, tars.NUM_LANES)
        length, longer = divmod(n, tars.NUM_LANES)  # the first `longer` lanes have one sample more
        place = lane * length + min(lane, longer) + row
        order, begins = self.shards(epoch)
        nth = int(np.searchsorted(begins, place, side="right")) - 1
        return int(self.shard_samples(epoch, int(order[nth]))[place - begins[nth]])


def order_name(source: Source) -> str:
    """The order of a source's samples in training. A continued run needs the same."""
    return f"in runs of {source.run_length} samples" if source.run_length else "shuffled whole"


def former_order_name(source: Source) -> str:
    """The order of a checkpoint that does not name it: it is from when windows were shuffled."""
    few = source.starts is None or len(source.starts) <= 17
    return "shuffled whole" if few else "shuffled in windows of 16 tars"


class Loader:
    """Batches of a source. Position p of the run is sample p mod n of epoch p // n: in that epoch's
    order with augmentation (training), in the source's order without (validation)."""

    def __init__(self, source: Source, tokenizer: WordPiece, max_text_len: int, seed: int,
                 augment: Augment | None, workers: int, alt_field: str = ""):
        """alt_field: the field of each sample's second text, if one is needed. workers: threads."""
        self.source, self.tokenizer, self.max_text_len = source, tokenizer, max_text_len
        self.seed, self.augment = seed, augment
        self.fields = {"text": "", "alt": alt_field} if alt_field else {"text": ""}
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
        self.is_random = augment not in (None, Augment(min_crop_area=1.0))
        self.bad: dict[int, str] = {}  # samples that cannot be used, with the reason
        self.order: Callable[[int], int] = lambda position: position % len(source)
        if augment is not None and source.starts is not None:
            run_of = source.run_of if source.run_length else None
            self.order = LaneShuffle(source.starts, seed, run_of)

    def choose_caption(self, position: int, i: int) -> Callable[[int], int]:
        """Which of n captions of sample i to use: in training a draw per epoch, else the first."""
        if self.augment is None:
            return choose_first
        epoch = position // len(self.source)
        return lambda n: int(np.random.default_rng((self.seed, 4, epoch, i)).integers(n))

    def load(self, position: int, i: int, resolution: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """Image (R,R,3) uint8 and texts, each (T,) int32, of sample i, or BadSample."""
        choose = self.choose_caption(position, i)
        captions, image = self.source.sample(i, self.fields.values(), choose, bool(self.augment))
        texts = [self.tokenizer.encode(caption, self.max_text_len) for caption in captions]
        if any(text[1] == EOS for text in texts):  # nothing but control characters
            raise BadSample("caption holds no word")
        rng = np.random.default_rng((self.seed, 2, position)) if self.is_random else None
        return decode_and_augment(image, resolution, self.augment, rng), texts

    def load_or_replace(self, position: int, first: int, resolution: int) -> tuple:
        """`load` of sample `first`, or of the first usable one after it; and which one that is."""
        for step in range(len(self.source)):
            i = (first + step) % len(self.source)
            if i not in self.bad:
                try:
                    return *self.load(position, i, resolution), i
                except BadSample as problem:
                    self.bad[i] = str(problem)
        raise DataError("not one usable sample in the data; the last: "
                        f"{self.source.name(i)} {self.bad[i]}")

    def batch(self, positions: range, resolution: int) -> dict[str, Any]:
        """{"images" (B,R,R,3) uint8; "text", and "alt" with an alt_field, (B,T) int32;
        "sample_index" (B,) int32, the position in the run; "source_index" (B,), the sample; "bad"
        {sample: reason}}.

        A bad sample is in "bad" where its own turn comes in the first epoch: so every host and
        every continued run counts the same."""
        jobs = [(position, self.order(position)) for position in positions]
        tasks = [jobs[n:n + SAMPLES_PER_TASK] for n in range(0, len(jobs), SAMPLES_PER_TASK)]

        def run_task(task: list[tuple[int, int]]) -> list[tuple]:
            return [self.load_or_replace(position, first, resolution) for position, first in task]

        samples = itertools.chain.from_iterable(self.pool.map(run_task, tasks))
        images, texts, source_index = zip(*samples)
        batch = {"images": np.stack(images), "source_index": np.array(source_index)}
        for name, column in zip(self.fields, zip(*texts)):
            batch[name] = np.stack(column)
        batch["sample_index"] = np.array([p & 0x7FFFFFFF for p in positions], np.int32)
        batch["bad"] = {i: self.bad[i] for position, i in jobs
                        if position < len(self.source) and i in self.bad}
        return batch

    def prefetch(self, requests: Iterable[tuple[range, int]], transfer: Callable[[dict], Any],
                 depth: int = 2) -> Iterator[tuple[Any, dict[int, str]]]:
        """(transfer(batch), batch["bad"]) for each (positions, resolution). A thread works `depth`
        batches ahead: the next one is decoded, and on its way to the device, during a step."""
        def prepare(positions: range, resolution: int) -> tuple[Any, dict[int, str]]:
            batch = self.batch(positions, resolution)
            return transfer(batch), batch["bad"]

        thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        pending: collections.deque = collections.deque()
        try:
            for request in requests:
                pending.append(thread.submit(prepare, *request))
                if len(pending) > depth:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:  # wait: a thread that still runs when the program ends would crash it
            thread.shutdown(cancel_futures=True)


def open_data(cfg: Any) -> tuple[Source, Source]:
    """(training source, validation source) of a run's Config."""
    if not cfg.data:
        raise ConfigError("--data is missing: give a folder of captioned images, tars, or scenes")
    if cfg.alt_field and cfg.data != "scenes" and cfg.caption_field == "txt":
        raise ConfigError(f"--alt-field {cfg.alt_field} is a field of the KEY.json, from which "
                          "--caption-field must then come too: name its field")
    source = sources.open_source(cfg.data, cfg.caption_field, cfg.seed, "train")
    if not cfg.val and cfg.data != "scenes":
        return sources.train_val_split(source, cfg.val_samples)
    val_source = sources.open_source(cfg.val or "scenes", cfg.caption_field, cfg.seed, "val",
                                     cfg.val_samples)
    return source, sources.subsample(val_source, cfg.val_samples)


def open_validation_data(cfg: Any) -> Source:
    """The validation source. With --val, the training data need not exist."""
    return open_data(dataclasses.replace(cfg, data=cfg.val or cfg.data))[1]


def open_tokenizer(cfg: Any, source: Source) -> WordPiece:
    """The one that --vocab names, or one built from the captions of at most 100,000 samples."""
    if not cfg.vocab:
        try:
            return tokenizer.train_vocab(vocab_captions(source, cfg.alt_field), cfg.vocab_size)
        except ValueError as problem:
            raise ConfigError(str(problem)) from None
    try:
        vocab = tokenizer.load(cfg.vocab)
    except (OSError, ValueError) as problem:
        raise ConfigError(f"--vocab: {problem}") from None
    if len(vocab) > cfg.vocab_size:
        raise ConfigError(f"--vocab-size {cfg.vocab_size} is less than the {len(vocab)} pieces of "
                          f"{cfg.vocab}")
    return vocab


def vocab_captions(source: Source, alt_field: str = "") -> Iterator[str]:
    for i in range(min(len(source), 4000 if isinstance(source, SceneSource) else 100_000)):
        with contextlib.suppress(BadSample):
            yield source.caption(i)
            if alt_field:
                yield source.caption(i, alt_field)


def main(argv: list[str]) -> int:
    silence_pillow()
    where = argv[0] if argv else "scenes"
    source = sources.open_source(where, *argv[1:2])
    vocab = tokenizer.train_vocab(itertools.islice(vocab_captions(source), 200), 4000)
    augment = Augment(min_crop_area=1.0 if where == "scenes" else 0.4)
    batch = Loader(source, vocab, 48, 0, augment, workers=2).batch(range(16), 160)
    sheet = Image.new("RGB", (8 * 168, 2 * 220), "white")
    pen = ImageDraw.Draw(sheet)
    for n, (pixels, i) in enumerate(zip(batch["images"], batch["source_index"])):
        x, y = n % 8 * 168, n // 8 * 220
        sheet.paste(Image.fromarray(pixels), (x, y))
        pen.multiline_text((x, y + 164), textwrap.fill(source.caption(i)[:108], 27), fill="black")
    sheet.save("contact.png")
    print(f"contact.png: 16 training images of {where}; skipped: {dict(source.skipped) or 'none'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))

"""Makes batches of samples. Each batch is a function of (seed, step) alone.

Which samples a step reads, how each is cropped and what replaces a broken one depend on the seed
and on the position in the run: not on workers, devices, hosts or earlier steps. A broken sample is
never used and never stops a run: it is counted, listed with a reason, and replaced by the next.

Letters: B images, R pixels per side, T text positions.

    python data.py [WHERE [FIELD]]     draws contact.png: crops and captions as training gets them
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
from inputs.files import ReadOptions, caption_weights, choose_first, open_storage
from inputs.images import Augment, decode_and_augment, read_image, silence_pillow
from inputs.sources import SceneSource, Source
from inputs.tokenizer import EOS, WordPiece
from runtime.errors import BadSample, ConfigError, DataError, run_command

FIRST_AHEAD, LOOK_AHEAD = 512, 4096  # positions a remote source fetches early: at the start, later
SAMPLES_PER_TASK = 8  # of a thread: waking it takes longer than decoding one small image


class LaneShuffle:
    """The order of the samples in each epoch, from (seed, epoch) alone.

    A chunk is a series of samples that one read of a tar covers. Data that fit in memory have no
    chunks: all samples are shuffled together. Otherwise the tars are shuffled, then the chunks in
    each tar, then the samples in each chunk. This sequence is cut into NUM_LANES equal parts, the
    lanes, and the order takes one sample from each in turn. So a batch mixes NUM_LANES chunks. If
    each of n processes takes every n-th position and n divides NUM_LANES, they share no lane."""

    def __init__(self, starts: np.ndarray, seed: int, chunk_of: Callable | None = None):
        """starts (shards + 1,): the first sample of each shard, then the number of samples.
        chunk_of(samples): of each, the number of its chunk in its shard."""
        self.starts, self.seed, self.chunk_of = starts, seed, chunk_of
        self.shards = functools.lru_cache(2)(self.shuffle_shards)
        self.samples = functools.lru_cache(2)(self.shuffle_samples)
        self.shard_samples = functools.lru_cache(2 * tars.NUM_LANES)(self.shuffle_chunks)

    def shuffle_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in this epoch's order, and where each begins in the sequence."""
        rng = np.random.default_rng((self.seed, 1, epoch))
        order = rng.permutation(len(self.starts) - 1)
        return order, np.cumsum([0, *np.diff(self.starts)[order]])

    def shuffle_samples(self, epoch: int) -> np.ndarray:
        """All samples, shuffled together."""
        order, _ = self.shards(epoch)
        samples = [np.arange(self.starts[shard], self.starts[shard + 1]) for shard in order]
        return np.random.default_rng((self.seed, 3, epoch, 0)).permutation(np.concatenate(samples))

    def shuffle_chunks(self, epoch: int, shard: int) -> np.ndarray:
        """The samples of a shard, one chunk after the other."""
        samples = np.arange(self.starts[shard], self.starts[shard + 1])
        chunks = self.chunk_of(samples)
        rng = np.random.default_rng((self.seed, 3, epoch, shard))
        rank = rng.permutation(chunks.max() + 1)
        return samples[np.lexsort((rng.random(len(samples)), rank[chunks]))]

    def __call__(self, position: int) -> int:
        """The sample at a position of the training run."""
        n = int(self.starts[-1])
        epoch, offset = divmod(position, n)
        if self.chunk_of is None:
            return int(self.samples(epoch)[offset])
        row, lane = divmod(offset, tars.NUM_LANES)
        length, longer = divmod(n, tars.NUM_LANES)  # the first `longer` lanes have one sample more
        index = lane * length + min(lane, longer) + row  # in the sequence
        order, begins = self.shards(epoch)
        n_before = int(np.searchsorted(begins, index, side="right")) - 1  # shards before this one
        samples = self.shard_samples(epoch, int(order[n_before]))
        return int(samples[index - begins[n_before]])


def order_name(source: Source) -> str:
    """The order of a source's samples in training, as checkpoints name it ("runs" are chunks)."""
    return f"in runs of {source.chunk_length} samples" if source.chunk_length else "shuffled whole"


def former_order_name(source: Source) -> str:
    """`order_name` of an old checkpoint that lacks it: windows of 16 tars were shuffled then."""
    one_window = source.starts is None or len(source.starts) <= 17
    return "shuffled whole" if one_window else "shuffled in windows of 16 tars"


class Loader:
    """Batches of a source of n samples. Position p of a run is number p mod n in epoch p // n. With
    augmentation (training) each epoch has its own order; without (validation), the source's."""

    def __init__(self, source: Source, tokenizer: WordPiece, max_text_len: int, seed: int,
                 augment: Augment | None, workers: int, alt_field: str = "",
                 caption_field: str = ""):
        """alt_field: the field of each sample's second text, if one is needed. caption_field: as
        the source's; of several fields, one is drawn per epoch and sample. workers: threads."""
        self.source, self.tokenizer, self.max_text_len = source, tokenizer, max_text_len
        self.seed, self.augment = seed, augment
        self.fields = {"text": "", "alt": alt_field} if alt_field else {"text": ""}
        self.mix = caption_weights(caption_field or "txt")
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
        self.is_random = augment not in (None, Augment(min_crop_area=1.0))  # else it draws nothing
        self.ahead: ThreadPoolExecutor | None = None  # fetches the next samples of a remote source
        self.bad: dict[int, str] = {}  # samples that cannot be used, with the reason
        self.order: Callable[[int], int] = lambda position: position % len(source)
        if augment is not None and source.starts is not None:
            chunk_of = source.chunk_of if source.chunk_length else None
            self.order = LaneShuffle(source.starts, seed, chunk_of)

    def choose_caption(self, position: int, i: int) -> Callable[[int], int]:
        """A function from n to the caption to take of a list of n: in training a draw, else 0."""
        if self.augment is None:
            return choose_first
        epoch = position // len(self.source)
        return lambda n: int(np.random.default_rng((self.seed, 4, epoch, i)).integers(n))

    def text_fields(self, position: int, i: int) -> list[str]:
        """The fields to read. Of a mix of captions, all, in training after a draw: the drawn one is
        first, and the others are for a sample that lacks it."""
        fields = list(self.fields.values())
        if len(self.mix) > 1 and self.augment is not None:
            rng = np.random.default_rng((self.seed, 5, position // len(self.source), i))
            drawn = rng.choice(list(self.mix), p=list(self.mix.values()))
            fields[0] = ",".join([drawn, *(name for name in self.mix if name != drawn)])
        return fields

    def decode(self, position: int, i: int, image: Image.Image, resolution: int) -> np.ndarray:
        """The pixels (R,R,3) uint8 of sample i at a position of the run."""
        rng = np.random.default_rng((self.seed, 2, position)) if self.is_random else None
        return decode_and_augment(image, resolution, self.augment, rng)

    def read(self, position: int, i: int) -> tuple[list[str], bytes | Image.Image]:
        """The captions of sample i, and its image as `Source.sample` gives it, or BadSample."""
        choose = self.choose_caption(position, i)
        return self.source.sample(i, self.text_fields(position, i), choose, bool(self.augment))

    def prepare(self, position: int, i: int, captions: list[str], image: bytes | Image.Image,
                resolution: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """Image (R,R,3) uint8 and texts, each (T,) int32, of sample i, or BadSample."""
        opened = read_image(image)
        texts = [self.tokenizer.encode(caption, self.max_text_len) for caption in captions]
        if any(text[1] == EOS for text in texts):  # nothing but control characters
            raise BadSample("caption holds no word")
        return self.decode(position, i, opened, resolution), texts

    def candidates(self, first: int) -> Iterator[int]:
        """Sample `first` and, to replace it, those after it, without those known to be bad."""
        for i in itertools.chain(range(first, len(self.source)), range(first)):
            if i not in self.bad:
                yield i
        raise DataError("not one usable sample in the data; the last: "
                        f"{self.source.name(i)} {self.bad[i]}")

    def load(self, position: int, first: int, resolution: int) -> tuple:
        """`prepare` of sample `first`, or of the one that replaces it; and which one that is."""
        for i in self.candidates(first):
            try:
                return *self.prepare(position, i, *self.read(position, i), resolution), i
            except BadSample as problem:
                self.bad[i] = str(problem)

    def run_task(self, task: list[tuple[int, int]], resolution: int) -> list[tuple]:
        """`load` of each (position, sample)."""
        return [self.load(position, first, resolution) for position, first in task]

    def batch(self, positions: range, resolution: int) -> dict[str, Any]:
        """{"images" (B,R,R,3) uint8; "text", and "alt" if it is read, (B,T) int32; "sample_index"
        (B,) int32, the position in the run; "source_index" (B,), the sample; "bad" {i: reason}}.

        A bad sample is only in the "bad" of the batch that has its own position in the first epoch.
        So each is counted once, also with several hosts and in a continued run."""
        if self.ahead:
            self.announce(positions)
        jobs = [(position, self.order(position)) for position in positions]
        tasks = [jobs[n:n + SAMPLES_PER_TASK] for n in range(0, len(jobs), SAMPLES_PER_TASK)]
        loaded = itertools.chain(*self.pool.map(self.run_task, tasks, itertools.repeat(resolution)))
        images, texts, source_index = zip(*loaded)
        batch = {"images": np.stack(images), "source_index": np.array(source_index)}
        batch |= {name: np.stack(column) for name, column in zip(self.fields, zip(*texts))}
        batch["sample_index"] = np.array([p & 0x7FFFFFFF for p in positions], np.int32)  # fold_in's
        batch["bad"] = {i: self.bad[i] for position, i in jobs
                        if position < len(self.source) and i in self.bad}
        return batch

    def announce(self, positions: range) -> None:
        """Tells a remote source what will be needed. Much at once would delay the first batches."""
        start = max(positions.start, self.announced)
        start += (positions.start - start) % positions.step
        grown = start - positions.stop + 3 * len(positions) * positions.step // 2
        self.announced = positions.stop + int(np.clip(grown, FIRST_AHEAD, LOOK_AHEAD))
        for position in range(start, self.announced, positions.step):
            self.ahead.submit(self.source.prefetch, self.order(position), bool(self.augment))

    def prefetch(self, requests: Iterable[tuple[range, int]], transfer: Callable[[dict], Any],
                 depth: int = 2) -> Iterator[tuple[Any, dict[int, str]]]:
        """(transfer(batch), batch["bad"]) for each (positions, resolution). A thread works `depth`
        batches ahead: during a step, it decodes the next batches and transfers them."""
        def prepare(positions: range, resolution: int) -> tuple[Any, dict[int, str]]:
            batch = self.batch(positions, resolution)
            return transfer(batch), batch["bad"]

        thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        if "://" in getattr(self.source, "where", ""):
            self.ahead, self.announced = ThreadPoolExecutor(16, thread_name_prefix="ahead"), 0
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
            if self.ahead:
                self.ahead.shutdown(cancel_futures=True)
                self.ahead = None


def read_options(cfg: Any) -> ReadOptions:
    return ReadOptions(cfg.image_field, cfg.alt_field, cfg.cache_dir, cfg.cache_gb)


def open_data(cfg: Any) -> tuple[Source, Source]:
    """(training source, validation source) of a run's Config."""
    if not cfg.data:
        raise ConfigError("--data is missing: give a folder of captioned images, tars, or scenes")
    if cfg.alt_field and cfg.data != "scenes" and cfg.caption_field == "txt":
        raise ConfigError(f"--alt-field {cfg.alt_field} is a field of the KEY.json, from which "
                          "--caption-field must then come too: name its field")
    options = read_options(cfg)
    source = sources.open_source(cfg.data, cfg.caption_field, cfg.seed, "train", options=options)
    if not cfg.val and cfg.data != "scenes":
        return sources.train_val_split(source, cfg.val_samples)
    val_source = sources.open_source(cfg.val or "scenes", cfg.caption_field, cfg.seed, "val",
                                     cfg.val_samples, options)
    return source, sources.subsample(val_source, cfg.val_samples)


def open_validation_data(cfg: Any) -> Source:
    """The validation source. With --val, the training data need not exist."""
    return open_data(dataclasses.replace(cfg, data=cfg.val or cfg.data))[1]


def open_tokenizer(cfg: Any, source: Source) -> WordPiece:
    """The tokenizer of --vocab, or one built from the captions of at most 100,000 samples."""
    if not cfg.vocab:
        try:
            fields = [*caption_weights(cfg.caption_field), *filter(None, [cfg.alt_field])]
            return tokenizer.train_vocab(vocab_captions(source, fields), cfg.vocab_size)
        except ValueError as problem:
            raise ConfigError(str(problem)) from None
    try:
        vocab = tokenizer.load(open_storage(cfg.vocab, read_options(cfg)).local_copy(cfg.vocab))
    except (OSError, ValueError) as problem:
        raise ConfigError(f"--vocab: {problem}") from None
    if len(vocab) > cfg.vocab_size:
        raise ConfigError(f"--vocab-size {cfg.vocab_size} is less than the {len(vocab)} pieces of "
                          f"{cfg.vocab}")
    return vocab


def vocab_captions(source: Source, fields: Iterable[str] = ("",)) -> Iterator[str]:
    for i in range(min(len(source), 4000 if isinstance(source, SceneSource) else 100_000)):
        for field in fields:
            with contextlib.suppress(BadSample):
                yield source.caption(i, field)


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
    print(f"contact.png: 16 training images of {where}; skipped: {sources.skipped_samples(source)}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))

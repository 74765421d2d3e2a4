"""Samples as batches that are a function of (seed, step) alone.

Which samples a step reads, how each is cropped, and which stands in for a broken one follow from the seed and the
position in the run: not from threads, devices, hosts, or what ran before. A broken sample is never used and never
stops a run: the next one takes its place, and it is counted and listed with the reason.

Letters: B images, R pixels a side, T text positions.

    python data.py [WHERE [CAPTION]]        writes contact.png: what training sees, crops and captions
"""
import contextlib
import dataclasses
import itertools
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from config import Config
from decoder import EOS
from inputs import sources, tars, tokenizer
from inputs.files import first_of
from inputs.images import Augment, decode_and_augment
from inputs.sources import SceneSource
from inputs.tokenizer import WordPiece
from runtime.errors import BadSample, ConfigError, DataError

PIECE = 8    # samples that a thread is given at a time: a small picture is made sooner than a thread is woken
class WindowedShuffle:
    """Each epoch's order of the samples, from (seed, epoch) alone. Without runs all are shuffled together.

    With runs (tars that do not fit in memory) the tars are shuffled, then the runs inside each tar, then the samples
    inside each run. That sequence is cut into LANES equal parts, the lanes, and the order takes one sample from each
    lane in turn. So a batch mixes runs from LANES places of the set, the samples of a run are LANES places apart, and
    each run is read once, while at most LANES of them are in use. Where the number of processes divides LANES, each
    process that takes every n-th position has lanes of its own."""

    def __init__(self, starts: np.ndarray, seed: int, run_of: Callable[[np.ndarray], np.ndarray] | None = None):
        """starts: (shards + 1,) at which sample each shard begins; run_of: the runs of samples, numbered in each shard."""
        self.starts, self.seed, self.run_of = starts, seed, run_of
        self.epoch, self.shuffled = lru_cache(2)(self._epoch), lru_cache(2)(self._shuffled)
        self.shard = lru_cache(2 * tars.NUM_LANES)(self._shard)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in this epoch's order, and at which place of their sequence each begins."""
        order = np.random.default_rng((self.seed, 1, epoch)).permutation(len(self.starts) - 1)
        return order, np.cumsum([0, *np.diff(self.starts)[order]])

    def _shuffled(self, epoch: int) -> np.ndarray:
        """All samples in their order."""
        samples = np.concatenate([np.arange(self.starts[s], self.starts[s + 1]) for s in self.epoch(epoch)[0]])
        return np.random.default_rng((self.seed, 3, epoch, 0)).permutation(samples)

    def _shard(self, epoch: int, shard: int) -> np.ndarray:
        """The samples of a shard, run by run, in the order of their lane."""
        samples = np.arange(self.starts[shard], self.starts[shard + 1])
        runs, rng = self.run_of(samples), np.random.default_rng((self.seed, 3, epoch, shard))
        turns = rng.permutation(runs.max() + 1)
        return samples[np.lexsort((rng.random(len(samples)), turns[runs]))]

    def __call__(self, position: int) -> int:
        n, lanes = int(self.starts[-1]), tars.NUM_LANES
        epoch, place = divmod(position, n)
        if self.run_of is None:
            return int(self.shuffled(epoch)[place])
        step, lane = divmod(place, lanes)
        at = lane * (n // lanes) + min(lane, n % lanes) + step  # the first n % lanes of them are longer by one
        order, begins = self.epoch(epoch)
        turn = int(np.searchsorted(begins, at, side="right")) - 1
        return int(self.shard(epoch, int(order[turn]))[at - begins[turn]])


def order_name(source: Any) -> str:
    """Which order a source's samples come in: a run that continues must find the same."""
    return f"in runs of {source.run} samples" if source.run else "shuffled whole"


def former_order_name(source: Any) -> str:
    """The order that was used when checkpoints did not yet name it."""
    few = isinstance(source, SceneSource) or len(source.starts) <= 17
    return "shuffled whole" if few else "shuffled in windows of 16 tars"


class Loader:
    """Samples of a source by position in the run: position p is sample p mod n of epoch p // n, in that epoch's order
    if they are augmented (training), else in the source's."""

    def __init__(self, source: Any, tokenizer: WordPiece, length: int, seed: int, augment: Augment | None, workers: int, alt: str = ""):
        """alt: the field of each sample's second text, if one is wanted."""
        self.source, self.tokenizer, self.length, self.seed, self.augment = source, tokenizer, length, seed, augment
        self.fields = {"text": ""} | ({"alt": alt} if alt else {})
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
        self.draws = augment not in (None, Augment(min_crop_area=1.0))  # whether anything of a picture is left to chance
        self.bad: dict[int, str] = {}       # sample: why it cannot be used
        self.order = None
        if augment is not None and not isinstance(source, SceneSource):
            self.order = WindowedShuffle(source.starts, seed, source.run_of if source.run else None)

    def index(self, position: int) -> int:
        return self.order(position) if self.order else position % len(self.source)

    def choose(self, position: int, i: int) -> Callable[[int], int]:
        """Which of the n captions of sample i is taken: in training one is drawn in each epoch, else it is
        the first."""
        if self.augment is None:
            return first_of
        epoch = position // len(self.source)
        return lambda n: int(np.random.default_rng((self.seed, 4, epoch, i)).integers(n))

    def sample(self, position: int, first: int, resolution: int) -> tuple[np.ndarray, list[np.ndarray], int]:
        """((R,R,3) uint8, (T,) int32 of each text, index) for a position whose turn is sample `first`. A broken sample's place
        is taken by the next in the source."""
        for step in range(len(self.source)):
            i = (first + step) % len(self.source)
            if i in self.bad:
                continue
            try:
                choose = self.choose(position, i)
                captions, image = self.source.sample(i, self.fields.values(), choose, self.order is not None)
                texts = [self.tokenizer.encode(caption, self.length) for caption in captions]
                if any(text[1] == EOS for text in texts):
                    raise BadSample("caption holds no word")  # nothing but control characters
                rng = np.random.default_rng((self.seed, 2, position)) if self.draws else None
                return decode_and_augment(image, resolution, self.augment, rng), texts, i
            except BadSample as problem:
                self.bad[i] = str(problem)
        raise DataError(f"not one usable sample in the data; the last: {self.source.name(i)} {self.bad[i]}")

    def batch(self, positions: range, resolution: int) -> dict[str, Any]:
        """{"images": (B,R,R,3) uint8, "text" (and "alt"): (B,T) int32, "sample_index": (B,) int32 position in the run, "source_index": (B,), "bad": {index: reason}}.
        "bad" has each bad sample where its own turn comes in the first epoch: so every host, and a continued run, counts the same."""
        firsts = [self.index(p) for p in positions]
        jobs = list(zip(positions, firsts))
        pieces = [jobs[n:n + PIECE] for n in range(0, len(jobs), PIECE)]
        done = self.pool.map(lambda piece: [self.sample(p, first, resolution) for p, first in piece], pieces)
        images, texts, index = zip(*itertools.chain.from_iterable(done))
        bad = {i: self.bad[i] for p, i in zip(positions, firsts) if p < len(self.source) and i in self.bad}
        return {"images": np.stack(images), **dict(zip(self.fields, map(np.stack, zip(*texts)))), "source_index": np.array(index),
                "sample_index": np.array([p & 0x7FFFFFFF for p in positions], np.int32), "bad": bad}

    def prefetch(self, wanted: Iterator[tuple[range, int]], put: Callable[[dict], Any], depth: int = 2) -> Iterator[Any]:
        """(put(batch), batch["bad"]) for each wanted (positions, resolution), made in a thread `depth` ahead of its use: so the next
        batch is decoded, and on its way to the device, while the current step runs."""
        ready: queue.Queue = queue.Queue(depth)
        stop = threading.Event()

        def offer(item: Any) -> None:
            while not stop.is_set():
                try:
                    return ready.put(item, timeout=0.1)
                except queue.Full:
                    pass

        def work() -> None:
            try:
                for positions, resolution in itertools.takewhile(lambda _: not stop.is_set(), wanted):
                    batch = self.batch(positions, resolution)
                    offer(((put(batch), batch["bad"]), None))
                offer((None, StopIteration()))
            except BaseException as problem:
                offer((None, problem))
        maker = threading.Thread(target=work, daemon=True, name="batches")
        maker.start()
        try:
            while True:
                batch, problem = ready.get()
                if isinstance(problem, StopIteration):
                    return
                if problem:
                    raise problem
                yield batch
        finally:
            stop.set()
            maker.join()  # a thread that still runs when the program ends brings it down


def open_data(cfg: Config) -> tuple[Any, Any]:
    """(training source, held-out source)."""
    if not cfg.data:
        raise ConfigError("--data is missing: give a folder of captioned images, tars, or scenes")
    if cfg.alt_field and cfg.data != "scenes" and cfg.caption_field == "txt":
        raise ConfigError(f"--alt-field {cfg.alt_field} is a field of the KEY.json, from which --caption-field must then come too: name its field")
    source = sources.open_source(cfg.data, cfg.caption_field, cfg.seed, "train")
    if cfg.val or cfg.data == "scenes":
        return source, sources.subsample(sources.open_source(cfg.val or "scenes", cfg.caption_field, cfg.seed, "val", cfg.val_samples), cfg.val_samples)
    return sources.train_val_split(source, cfg.val_samples)


def open_validation_data(cfg: Config) -> Any:
    """The held-out source; where it lies elsewhere, the training data need not be there, nor have the same captions."""
    return open_data(dataclasses.replace(cfg, data=cfg.val or cfg.data))[1]


def open_tokenizer(cfg: Config, source: Any) -> tokenizer.WordPiece:
    """The one that --vocab names, or one built from the training captions (of 100,000 samples at most)."""
    if cfg.vocab:
        try:
            found = tokenizer.load(cfg.vocab)
        except (OSError, ValueError) as problem:
            raise ConfigError(f"--vocab: {problem}") from None
        if len(found) > cfg.vocab_size:
            raise ConfigError(f"--vocab-size {cfg.vocab_size} is less than the {len(found)} pieces of {cfg.vocab}")
        return found

    def captions() -> Iterator[str]:
        for i in range(min(len(source), 4000 if isinstance(source, sources.SceneSource) else 100_000)):
            with contextlib.suppress(BadSample):
                yield source.caption(i)
                if cfg.alt_field:
                    yield source.caption(i, cfg.alt_field)
    try:
        return tokenizer.train_vocab(captions(), cfg.vocab_size)
    except ValueError as problem:
        raise ConfigError(str(problem)) from None


if __name__ == "__main__":
    import contextlib
    import sys

    from PIL import ImageDraw

    from inputs.images import silence_pillow
    from inputs.sources import open_source
    from inputs.tokenizer import train_vocab
    silence_pillow()
    where, field = [*sys.argv[1:], *("scenes", "txt")[len(sys.argv) - 1:]][:2]
    try:
        source, captions = open_source(where, field), []
        for i in range(min(len(source), 200)):
            with contextlib.suppress(BadSample):
                captions.append(source.caption(i))
        reader = Loader(source, train_vocab(captions, 4000), 48, 0, Augment(min_crop_area=1.0 if where == "scenes" else 0.4), 2)
        batch = reader.batch(range(16), 160)
    except DataError as problem:
        sys.exit(f"error: {problem}")
    sheet = Image.new("RGB", (8 * 168, 2 * 220), "white")
    for n, (pixels, i) in enumerate(zip(batch["images"], batch["source_index"])):
        sheet.paste(Image.fromarray(pixels), (n % 8 * 168, n // 8 * 220))
        caption = source.caption(i)
        lines = "\n".join(caption[k:k + 27] for k in range(0, min(len(caption), 108), 27))
        ImageDraw.Draw(sheet).multiline_text((n % 8 * 168, n // 8 * 220 + 164), lines, fill="black")
    sheet.save("contact.png")
    print(f"contact.png: 16 training pictures of {where}; skipped: {dict(source.skipped) or 'none'}")

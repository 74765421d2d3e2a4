"""Makes batches of samples. Each batch is a function of (seed, step) alone.

Which samples a step reads, how each is cropped and what replaces a bad one depend only on the seed
and the position in the run, not on workers, devices, hosts or earlier steps. A bad sample is never
used: it is counted, listed with a reason, and replaced by the next. A run stops only if there are
too many of them (--max-bad-fraction).

Words: a sample is a captioned image, numbered in its source from 0. A position counts the images of
the run from 0; inputs/order.py says which sample is at each. A chunk is some consecutive samples
that one read covers.
Letters: B images, R pixels per side, T text positions, i the number of a sample.

    python data.py [WHERE [FIELD]]     draws contact.png: randomly cropped images with captions
"""
import collections
import importlib
import itertools
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from inputs import sources
from inputs.files import caption_weights, choose_first
from inputs.images import Augment, decode_and_augment, read_image, silence_pillow
from inputs.opening import vocab_captions
from inputs.order import AUGMENTATION, CAPTION_FIELD, CAPTION_OF_LIST, LaneShuffle
from inputs.sources import Source
from inputs.tokenizer import EOS, WordPiece, train_vocab
from runtime.errors import BadSample, DataError, run_command

SAMPLES_PER_TASK = 8  # one task per sample would cost more in thread wake-ups than in decoding
MAX_FIRST_TRIES = 10_000  # bad samples in a row, before the first good one, that end a run


class Loader:
    """Makes batches of a source of n samples. Position p of a run is number p mod n of epoch
    p // n. In training each epoch has its own order; in validation the order is the source's."""

    def __init__(self, source: Source, tokenizer: WordPiece, max_text_len: int, seed: int,
                 augment: Augment | None, workers: int, alt_field: str = "",
                 caption_field: str = ""):
        """augment: None for validation, where nothing is random. workers: threads. alt_field: the
        field of each sample's second text, if one is needed. caption_field: the one that the source
        was opened with; if it names several, training draws one per epoch and sample."""
        self.source, self.tokenizer, self.max_text_len = source, tokenizer, max_text_len
        self.seed, self.augment = seed, augment
        self.is_training = augment is not None
        # If false, images are only resized, which needs no random numbers.
        self.has_random_augment = augment not in (None, Augment(min_crop_area=1.0))
        self.fields = {"text": ""}  # {batch key: field}; "" is the source's own
        if alt_field:
            self.fields["alt"] = alt_field
        self.field_weights = caption_weights(caption_field or "txt")
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
        self.bad: dict[int, str] = {}  # samples that cannot be used, with the reason
        self.any_good = False          # whether a sample was ever used
        self.order: Callable[[int], int] = lambda position: position % len(source)
        if self.is_training and source.starts is not None:  # None: synthetic samples need no order
            chunk_of = source.chunk_of if source.shuffle_by_chunk else None
            self.order = LaneShuffle(source.starts, seed, chunk_of)

    # ---- one batch
    def batch(self, positions: range, resolution: int) -> dict[str, Any]:
        """{"images" (B,R,R,3) uint8; "text", and "alt" if it is read, (B,T) int32; "position" (B,)
        int32; "sample" (B,), the one that is used; "bad" {sample: reason}}.

        "bad" lists a bad sample only in the first epoch, and only in the batch whose positions
        include it, not in one that tried it as a replacement. So it is counted once, also with
        several hosts and in a continued run."""
        pairs = [(position, self.order(position)) for position in positions]
        tasks = [pairs[n:n + SAMPLES_PER_TASK] for n in range(0, len(pairs), SAMPLES_PER_TASK)]
        loaded = itertools.chain(*self.pool.map(self.run_task, tasks, itertools.repeat(resolution)))
        images, texts, samples = zip(*loaded)
        batch = {"images": np.stack(images), "sample": np.array(samples)}
        for n, name in enumerate(self.fields):
            batch[name] = np.stack([text[n] for text in texts])
        # The random token keep folds positions into the seed's key. Below 2**31 they never equal
        # registry.INIT_DOMAIN, which is folded in for the initial parameters.
        batch["position"] = np.array([position % 2**31 for position in positions], np.int32)
        batch["bad"] = {i: self.bad[i] for position, i in pairs
                        if position < len(self.source) and i in self.bad}
        return batch

    def run_task(self, task: list[tuple[int, int]], resolution: int) -> list[tuple]:
        """`load` of each (position, sample)."""
        return [self.load(position, first, resolution) for position, first in task]

    def load(self, position: int, first: int, resolution: int) -> tuple:
        """(pixels, texts, i) of sample i: `first` or, if that is bad, the next good one."""
        for i in self.candidates(first):
            try:
                captions, image = self.read(position, i)
                pixels, texts = self.prepare(position, i, captions, image, resolution)
                self.any_good = True
                return pixels, texts, i
            except BadSample as problem:
                self.bad[i] = str(problem)

    def candidates(self, first: int) -> Iterator[int]:
        """Sample `first` and, to replace it, those after it, without those known to be bad.
        DataError when none is left, or if none of the first MAX_FIRST_TRIES was good: so it never
        just ends."""
        followers = itertools.chain(range(first, len(self.source)), range(first))
        for number, i in enumerate(followers, start=1):
            if i not in self.bad:
                yield i
            if number >= MAX_FIRST_TRIES and not self.any_good:
                break
        raise DataError(f"no sample in the data can be used; of {number:,} that were tried, the "
                        f"last one: {self.source.name(i)}: {self.bad[i]}")

    # ---- one sample
    def read(self, position: int, i: int) -> tuple[list[str], bytes | Image.Image]:
        """The captions of sample i, and its image as `Source.sample` gives it, or BadSample."""
        with_chunk = self.is_training  # training soon needs the samples around it
        return self.source.sample(i, self.text_fields(position, i),
                                  self.caption_chooser(position, i), with_chunk)

    def text_fields(self, position: int, i: int) -> list[str]:
        """The fields to read. If --caption-field has several, the first entry is "a,b,...": the
        fields in the order to try. In training the first of them is drawn; the others are for a
        sample that lacks it."""
        fields = list(self.fields.values())
        if self.is_training and len(self.field_weights) > 1:
            rng = self.epoch_rng(CAPTION_FIELD, position, i)
            names, weights = list(self.field_weights), list(self.field_weights.values())
            drawn = rng.choice(names, p=weights)
            fields[0] = ",".join([drawn, *(name for name in names if name != drawn)])
        return fields

    def caption_chooser(self, position: int, i: int) -> Callable[[int], int]:
        """For a field that is a list of n captions: a function from n to the index of the one to
        take. In training it is drawn, else the first."""
        if not self.is_training:
            return choose_first
        return lambda n: int(self.epoch_rng(CAPTION_OF_LIST, position, i).integers(n))

    def epoch_rng(self, stream: int, position: int, i: int) -> np.random.Generator:
        """The generator of a random stream for sample i in the epoch of this position."""
        return np.random.default_rng((self.seed, stream, position // len(self.source), i))

    def prepare(self, position: int, i: int, captions: list[str], image: bytes | Image.Image,
                resolution: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """Pixels (R,R,3) uint8 and texts, each (T,) int32, of what `read` returned, or BadSample.
        With --worker-processes, another process does this part."""
        opened = read_image(image)
        texts = [self.tokenizer.encode(caption, self.max_text_len) for caption in captions]
        if any(text[1] == EOS for text in texts):  # nothing but control characters
            raise BadSample("caption holds no word")
        return self.decode(position, i, opened, resolution), texts

    def decode(self, position: int, i: int, image: Image.Image, resolution: int) -> np.ndarray:
        """The pixels (R,R,3) uint8 of sample i at a position of the run. objectives/lit.py
        overrides this: its batches hold the tokens of the frozen encoder, which it caches by i."""
        rng = None
        if self.has_random_augment:
            rng = np.random.default_rng((self.seed, AUGMENTATION, position))
        return decode_and_augment(image, resolution, self.augment, rng)

    # ---- many batches
    def prefetch_batches(self, requests: Iterable[tuple[range, int]],
                         transfer: Callable[[dict], Any],
                         depth: int = 2) -> Iterator[tuple[Any, dict[int, str]]]:
        """(transfer(batch), batch["bad"]) for each (positions, resolution). transfer sends a batch
        to the devices. A thread works `depth` batches ahead: during a step, it makes the next
        batches and transfers them."""
        ahead = None
        if self.source.is_remote:  # imported here, because few runs need it
            fetch_ahead = importlib.import_module("inputs.remote_storage").FetchAhead
            ahead = fetch_ahead(self.source, self.order, self.is_training)

        def make(positions: range, resolution: int) -> tuple[Any, dict[int, str]]:
            if ahead:
                ahead.request(positions)
            batch = self.batch(positions, resolution)
            return transfer(batch), batch["bad"]

        thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        pending: collections.deque = collections.deque()
        try:
            for request in requests:
                pending.append(thread.submit(make, *request))
                if len(pending) > depth:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:  # wait: a thread that still runs when the program ends would crash it
            thread.shutdown(cancel_futures=True)
            if ahead:
                ahead.close()


def main(argv: list[str]) -> int:
    silence_pillow()
    where = argv[0] if argv else "scenes"
    source = sources.open_source(where, *argv[1:2])
    tokenizer = train_vocab(itertools.islice(vocab_captions(source), 200), 4000)
    augment = Augment(min_crop_area=1.0 if where == "scenes" else 0.4)
    loader = Loader(source, tokenizer, max_text_len=48, seed=0, augment=augment, workers=2)
    batch = loader.batch(range(16), resolution=160)
    sheet = Image.new("RGB", (8 * 168, 2 * 220), "white")
    pen = ImageDraw.Draw(sheet)
    for n, (pixels, i) in enumerate(zip(batch["images"], batch["sample"])):
        x, y = n % 8 * 168, n // 8 * 220
        sheet.paste(Image.fromarray(pixels), (x, y))
        pen.multiline_text((x, y + 164), textwrap.fill(source.caption(i)[:108], 27), fill="black")
    sheet.save("contact.png")
    print(f"contact.png: 16 training images of {where}; skipped: {sources.skipped_samples(source)}")
    for i, reason in batch["bad"].items():
        print(f"replaced by the next: {source.name(i)}: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))

"""WebDataset tars as a source: which tar a sample is in, and reads of many samples at once.

Memory does not grow with the number of samples. An index file beside each tar holds a row (offsets
and sizes) per sample (inputs/tar_index.py). Memory holds a few counts per tar, and the rows of the
tars used last.

Words: in the code, `shard` is the number of a tar, and `row` the number of a sample in its tar. A
chunk is chunk_length consecutive samples of a tar, which one read covers. A span is what one read
gets: the bytes begin..end of a tar. Where the tars do not fit in memory, training takes one sample
in turn from each of 64 lanes, which are sequences of samples (order.LaneShuffle).
"""
import contextlib
import functools
import importlib
import threading
import zlib
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np

from inputs import files, order, tar_index
from inputs.files import (
    DEFAULT_OPTIONS,
    ByteRange,
    FileSource,
    ReadOptions,
    check_size,
    printable,
)
from inputs.tar_headers import TEXT_SUFFIXES
from inputs.tar_index import TarIndex, reason
from runtime.errors import BadSample, DataError, raise_passing

MAX_SHUFFLE_BYTES = 256 << 20  # of tars that a process keeps in memory for training
MIN_CHUNKS = 16                # per lane, where the tars do not fit in memory
CHUNKS_AHEAD = 32              # fetched from a server before their captions are read
CACHED_TARS = 80               # tars whose rows are in memory: one per lane, some for validation
Span = tuple[int, int]


class TarSource(FileSource):
    """`where` is a glob, or a brace list such as data/{00000..00011}.tar."""

    def __init__(self, where: str, field: str, options: ReadOptions = DEFAULT_OPTIONS):
        super().__init__(where, field, options)
        try:
            paths = tar_index.matching_paths(where, self.storage)
        except ValueError as problem:
            raise DataError(str(problem)) from None
        if not paths:
            raise DataError(f"no file matches {where}")
        self.paths: list[str] = []
        indexes: list[TarIndex] = []
        unreadable: list[tuple[str, str]] = []
        for path, index_or_error in zip(paths, self.index_tars(paths)):
            if isinstance(index_or_error, TarIndex):
                self.paths.append(path)
                indexes.append(index_or_error)
            else:
                raise_passing(index_or_error, printable(path))
                unreadable.append((printable(path), reason(index_or_error)))
        if unreadable:
            path, why = unreadable[0]
            if not indexes:
                raise DataError(f"{path} cannot be read as an uncompressed tar: {why}")
            skip_reason = f"files that cannot be read as uncompressed tars, first {path} ({why})"
            self.skipped[skip_reason] += len(unreadable)
        self.unsaved_rows = {shard: index.rows for shard, index in enumerate(indexes)
                             if index.rows is not None}  # of tars whose index could not be saved
        self.count_skipped(indexes)
        # (tars, 3): how many have image and text, an image only, a text only
        counts = np.array([index.meta["pairs"][self.text_suffix] for index in indexes], np.int64)
        self.starts = np.cumsum([0, *counts[:, 0]])
        self.crcs = np.array([index.meta["crc"] for index in indexes], np.uint32)
        self.crc = zlib.crc32(self.crcs)
        total_bytes = sum(index.meta["size"] for index in indexes)
        if self.storage.is_remote:
            self.storage.plan_reads(total_bytes)  # a small set is read in fixed-size blocks
        self.plan_chunks(total_bytes)
        self.validate(counts.sum(0).tolist())

    def index_tars(self, paths: list[str]) -> list[TarIndex | OSError | ValueError]:
        if not self.storage.is_remote:
            return tar_index.index_tars(paths)
        return importlib.import_module("inputs.remote_tars").index_tars(self.storage, paths)

    def load_index(self, path: str) -> TarIndex:
        """The index with rows. A tar whose index file is lost or damaged is scanned again."""
        if self.storage.is_remote:
            return importlib.import_module("inputs.remote_tars").load_index(self.storage, path)
        return tar_index.load_index(path, with_rows=True) or tar_index.scan_tar(path)

    def count_skipped(self, indexes: list[TarIndex]) -> None:
        """Sums the counts of all tars. Reasons in WITH_TAR_NAME also name the first such tar."""
        first: dict[str, str] = {}
        for path, index in zip(self.paths, indexes):
            for why, count in index.meta["skipped"].items():
                if why in tar_index.WITH_TAR_NAME:
                    first_tar = first.setdefault(why, printable(path))
                    why = f"{why}, first {first_tar}"
                self.skipped[why] += count

    def plan_chunks(self, total_bytes: int) -> None:
        """Chooses how many samples one read covers. Tars that fit in memory are read once, and all
        samples are shuffled together. Otherwise each lane keeps one chunk in memory. The mean chunk
        takes half of a lane's share of the memory, so that few chunks exceed the share. A chunk
        that a lane ends in is read twice, because the next lane begins in it. A lane has at least
        MIN_CHUNKS, so this adds at most 1/MIN_CHUNKS to what is read."""
        lane_bytes = MAX_SHUFFLE_BYTES // order.NUM_LANES
        fits = total_bytes <= MAX_SHUFFLE_BYTES
        chunk_length = lane_bytes // 2 * len(self) // max(total_bytes, 1)
        if not fits:
            chunk_length = min(chunk_length, len(self) // (MIN_CHUNKS * order.NUM_LANES))
        self.shuffle_by_chunk, self.chunk_length = not fits, max(1, chunk_length)
        self.max_span_bytes = MAX_SHUFFLE_BYTES if fits else lane_bytes
        # rows and chunk_span are load_rows and find_chunk_span with a cache.
        self.rows = functools.lru_cache(None if fits else CACHED_TARS)(self.load_rows)
        self.chunk_span = functools.lru_cache(4 * order.NUM_LANES)(self.find_chunk_span)
        self.span_cache = SpanCache(MAX_SHUFFLE_BYTES, self.storage.read_span)
        self.last_prefetched: deque[tuple[int, int]] = deque(maxlen=4 * order.NUM_LANES)

    def load_rows(self, shard: int) -> np.ndarray:
        """(samples, 4) int64 of one tar: offset and size of the image and of the text. BadSample if
        the tar is gone, DataError if it has changed or for an error that may pass."""
        path, rows = self.paths[shard], self.unsaved_rows.get(shard)
        if rows is None:
            try:
                index = self.load_index(path)
            except (OSError, ValueError) as problem:
                raise_passing(problem, printable(path))
                raise BadSample(f"{printable(path)} can no longer be read "
                                f"({reason(problem)})") from None
            if index.meta["crc"] != self.crcs[shard]:
                raise DataError(f"{printable(path)} has changed since it was opened: start again")
            rows = index.rows
        # Index rows: offset and size of image, txt and json. Offset 0: the sample has none.
        text_column = 2 + 2 * TEXT_SUFFIXES.index(self.text_suffix)
        with_text = rows[rows[:, text_column] > 0]
        return with_text[:, [0, 1, text_column, text_column + 1]]

    def locate(self, i: int) -> tuple[int, int]:
        """(shard, row) of sample i."""
        shard = int(np.searchsorted(self.starts, i, side="right")) - 1
        return shard, int(i - self.starts[shard])

    def byte_ranges(self, i: int) -> tuple[ByteRange, ByteRange]:
        shard, row = self.locate(i)
        path = self.paths[shard]
        offset, size, text_offset, text_size = self.rows(shard)[row].tolist()
        return ByteRange(path, offset, size), ByteRange(path, text_offset, text_size)

    def chunk_of(self, samples: np.ndarray) -> np.ndarray:
        """The number of each sample's chunk in its tar."""
        shards = np.searchsorted(self.starts, samples, side="right") - 1
        return (samples - self.starts[shards]) // self.chunk_length

    def find_span(self, shard: int, first: int, count: int) -> Span | None:
        """The span of `count` rows of a tar. None if more than half of it would be of no use."""
        rows = self.rows(shard)[first:first + count]
        begins, sizes = rows[:, [0, 2]], rows[:, [1, 3]]
        begin, end = int(begins.min()), int((begins + sizes).max())
        headers = 8192 * len(rows)  # generous: three headers and their padding are 3 KB
        return (begin, end) if end - begin <= 2 * int(sizes.sum()) + headers else None

    def find_chunk_span(self, shard: int, chunk: int) -> Span | None:
        """The span of a chunk of a tar. None if `find_span` gives none or it is too large."""
        span = self.find_span(shard, chunk * self.chunk_length, self.chunk_length)
        if span is None or span[1] - span[0] > self.max_span_bytes:
            return None
        return span

    def read_sample(self, i: int, with_chunk: bool) -> tuple[bytes, bytes]:
        """Image and text, by one read if possible. If with_chunk, the complete chunk is read and
        kept for its other samples, unless it has no span or cannot be read."""
        image, text = self.byte_ranges(i)
        check_size(text.size, files.MAX_TEXT_BYTES)
        check_size(image.size, files.MAX_IMAGE_BYTES)
        begin, data = self.read_chunk(i) if with_chunk else (0, None)
        if data is None:
            span = self.find_span(*self.locate(i), 1)
            if span is None:
                return super().read_sample(i, with_chunk)
            begin, end = span
            data = self.read_bytes(ByteRange(image.path, begin, end - begin), end - begin)
        image_bytes = data[image.offset - begin:image.offset - begin + image.size]
        text_bytes = data[text.offset - begin:text.offset - begin + text.size]
        if len(image_bytes) < image.size or len(text_bytes) < text.size:
            raise BadSample("is cut off")
        return image_bytes, text_bytes

    def caption(self, i: int, field: str = "") -> str:
        """From a server, reads the complete chunk and fetches a later one ahead, which suits
        building a vocabulary: it reads the captions of all samples in order, without images."""
        if not self.storage.is_remote:
            return super().caption(i, field)
        shard, row = self.locate(i)
        chunk, row_in_chunk = divmod(row, self.chunk_length)
        later = chunk + CHUNKS_AHEAD
        if row_in_chunk == 0 and later * self.chunk_length < len(self.rows(shard)):
            self.storage.pool.submit(self.prefetch_chunk, shard, later)
        return self.parse_caption(self.read_sample(i, True)[1], field)

    def read_chunk(self, i: int) -> tuple[int, bytes | None]:
        """(offset, bytes) of the chunk that sample i is in; (0, None) if it has no span or cannot
        be read."""
        shard, row = self.locate(i)
        span = self.chunk_span(shard, row // self.chunk_length)
        if span:
            with contextlib.suppress(OSError):
                return span[0], self.span_cache.read(self.paths[shard], *span)
        return 0, None

    def prefetch_sample(self, i: int, with_chunk: bool) -> None:
        """Brings a sample that will be needed soon, or its chunk, into the disk cache."""
        shard, row = self.locate(i)
        chunk = row // self.chunk_length
        if not with_chunk:
            span = self.find_span(shard, row, 1)
            if span:
                self.storage.prefetch_span(self.paths[shard], *span)
        elif (shard, chunk) not in self.last_prefetched:
            self.last_prefetched.append((shard, chunk))
            self.prefetch_chunk(shard, chunk)

    def prefetch_chunk(self, shard: int, chunk: int) -> None:
        span = self.chunk_span(shard, chunk)
        if span:
            self.storage.prefetch_span(self.paths[shard], *span)

    def name(self, i: int) -> str:
        try:
            return super().name(i)
        except BadSample:  # its tar is gone
            return f"sample {i} of {self.where}"


class SpanCache:
    """Spans of files in memory, at most `limit` bytes; the least recently used is dropped first.
    Threads that need the same span wait for one read of it."""

    def __init__(self, limit: int, read_span: Callable[[str, int, int], bytes] = files.read_span):
        self.limit, self.read_span = limit, read_span
        self.num_bytes = 0  # of all spans, those that are being read included
        self.lock = threading.Lock()
        self.spans: OrderedDict[tuple[str, int, int], Future] = OrderedDict()

    def read(self, path: str, begin: int, end: int) -> bytes:
        """Like files.read_span. A span that could not be read is not kept."""
        key = path, begin, end
        with self.lock:
            future = self.spans.get(key)
            is_new = future is None
            if is_new:
                future = self.spans[key] = Future()
                self.num_bytes += end - begin
                while self.num_bytes > self.limit and len(self.spans) > 1:  # not the new one
                    self.drop(next(iter(self.spans)))
            else:
                self.spans.move_to_end(key)
        if is_new:
            try:
                future.set_result(self.read_span(path, begin, end))
            except BaseException as problem:
                with self.lock:
                    if self.spans.get(key) is future:
                        self.drop(key)
                future.set_exception(problem)
        return future.result()

    def drop(self, key: tuple[str, int, int]) -> None:
        """Forgets a span. The caller holds the lock."""
        del self.spans[key]
        self.num_bytes -= key[2] - key[1]

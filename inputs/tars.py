"""WebDataset tars as a source: which tar a sample is in, and reads of many samples at once.

Memory does not grow with the number of samples. An index file beside each tar holds a row (offsets
and sizes) per sample (inputs/tar_index.py). In memory are a few counts of each tar, and the rows of
the tars used last. A chunk is a series of samples that one read covers.
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

from inputs import files, tar_index
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
from runtime.errors import BadSample, DataError

MAX_SHUFFLE_BYTES = 256 << 20  # of tars that a process keeps in memory for training
NUM_LANES = 64                 # of data.LaneShuffle: a batch takes a sample from each in turn
CHUNKS_AHEAD = 32              # are fetched from a server while captions are read in order
CACHED_TARS = 80               # tars whose rows are in memory: one per lane, some for validation
Span = tuple[int, int]         # the bytes begin..end of a tar


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
        for path, index in zip(paths, self.index_tars(paths)):
            if isinstance(index, TarIndex):
                self.paths.append(path)
                indexes.append(index)
            else:
                unreadable.append((printable(path), reason(index)))
        if unreadable:
            path, why = unreadable[0]
            if not indexes:
                raise DataError(f"{path} cannot be read as an uncompressed tar: {why}")
            skip_reason = f"files that cannot be read as uncompressed tars, first {path} ({why})"
            self.skipped[skip_reason] += len(unreadable)
        self.rows_in_memory = {n: index.rows for n, index in enumerate(indexes)
                               if index.rows is not None}
        self.count_skipped(indexes)
        # (tars, 3): samples with image and text, image only, text only
        pairs = np.array([index.meta["pairs"][self.text] for index in indexes], np.int64)
        self.starts = np.cumsum([0, *pairs[:, 0]])
        self.crcs = np.array([index.meta["crc"] for index in indexes], np.uint32)
        self.crc = zlib.crc32(self.crcs)
        total_bytes = sum(index.meta["size"] for index in indexes)
        if self.storage.is_remote:
            self.storage.expect(total_bytes)
        self.plan_reads(total_bytes)
        self.validate(pairs.sum(0).tolist())

    def index_tars(self, paths: list[str]) -> list[TarIndex | OSError | ValueError]:
        if not self.storage.is_remote:
            return tar_index.index_tars(paths)
        return importlib.import_module("inputs.remote_tars").index_tars(self.storage, paths)

    def load_index(self, path: str) -> TarIndex:
        if self.storage.is_remote:
            return importlib.import_module("inputs.remote_tars").load_index(self.storage, path)
        return tar_index.load_index(path, rows=True) or tar_index.scan_tar(path)

    def count_skipped(self, indexes: list[TarIndex]) -> None:
        """Sums the counts of all tars. Reasons in WITH_TAR_NAME also name the first such tar."""
        first: dict[str, str] = {}
        for path, index in zip(self.paths, indexes):
            for why, count in index.meta["skipped"].items():
                if why in tar_index.WITH_TAR_NAME:
                    why = f"{why}, first {first.setdefault(why, printable(path))}"
                self.skipped[why] += count

    def plan_reads(self, total_bytes: int) -> None:
        """Chooses the length of a chunk. It takes half of a lane's memory on average, so that few
        chunks exceed that memory. The chunk at a lane's end is read by the next lane too, so a lane
        gets at least 16: then this costs at most 1/16. Tars that fit in memory are read once."""
        lane_bytes = MAX_SHUFFLE_BYTES // NUM_LANES
        fits = total_bytes <= MAX_SHUFFLE_BYTES
        count = lane_bytes // 2 * len(self) // max(total_bytes, 1)
        if not fits:
            count = min(count, len(self) // (16 * NUM_LANES))
        self.read_length = max(1, count)
        self.chunk_length = 0 if fits else self.read_length  # 0: shuffle all samples together
        self.max_span_bytes = MAX_SHUFFLE_BYTES if fits else lane_bytes
        self.rows = functools.lru_cache(None if fits else CACHED_TARS)(self.load_rows)
        self.fetched_ahead: deque[tuple[int, int]] = deque(maxlen=4 * NUM_LANES)
        self.chunk_span = functools.lru_cache(4 * NUM_LANES)(self.span)
        self.cache = SpanCache(MAX_SHUFFLE_BYTES, self.storage.read_span)

    def load_rows(self, shard: int) -> np.ndarray:
        """(samples, 4) int64 of one tar: offset and size of the image and of the text."""
        path, rows = self.paths[shard], self.rows_in_memory.get(shard)
        if rows is None:
            try:
                index = self.load_index(path)
            except (OSError, ValueError) as problem:
                raise BadSample(f"{printable(path)} can no longer be read "
                                f"({reason(problem)})") from None
            if index.meta["crc"] != self.crcs[shard]:
                raise DataError(f"{printable(path)} has changed since it was opened: start again")
            rows = index.rows
        column = 2 + 2 * TEXT_SUFFIXES.index(self.text)  # the text's offset; then comes its size
        return rows[rows[:, column] > 0][:, [0, 1, column, column + 1]]

    def locate(self, i: int) -> tuple[int, int]:
        """(tar, row): the tar that sample i is in, and its number among the samples there."""
        shard = int(np.searchsorted(self.starts, i, side="right")) - 1
        return shard, int(i - self.starts[shard])

    def byte_ranges(self, i: int) -> tuple[ByteRange, ByteRange]:
        shard, row = self.locate(i)
        path = self.paths[shard]
        offset, size, text_offset, text_size = self.rows(shard)[row].tolist()
        return ByteRange(path, offset, size), ByteRange(path, text_offset, text_size)

    def chunk_of(self, samples: np.ndarray) -> np.ndarray:
        """For each sample, the number of its chunk, counted in its tar."""
        shards = np.searchsorted(self.starts, samples, side="right") - 1
        return (samples - self.starts[shards]) // self.read_length

    def span(self, shard: int, first: int, count: int) -> Span | None:
        """Where `count` samples of a tar begin and end. None if too much else is between them."""
        rows = self.rows(shard)[first:first + count]
        begins, sizes = rows[:, [0, 2]], rows[:, [1, 3]]
        begin, end = int(begins.min()), int((begins + sizes).max())
        headers = 8192 * len(rows)  # about three headers a sample, and the padding of their data
        return (begin, end) if end - begin <= 2 * int(sizes.sum()) + headers else None

    def read_sample(self, i: int, with_chunk: bool) -> tuple[bytes, bytes]:
        """Image and text, by one read if possible. With with_chunk, the complete chunk is read and
        kept for its other samples, unless it is too long or cannot be read."""
        image, text = self.byte_ranges(i)
        check_size(text.size, files.MAX_TEXT_BYTES)
        check_size(image.size, files.MAX_IMAGE_BYTES)
        begin, data = self.read_chunk(i) if with_chunk else (0, None)
        if data is None:
            span = self.span(*self.locate(i), 1)
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
        """From a server, with the samples around it: the vocabulary reads all, one by one. So a
        later chunk is fetched meanwhile."""
        if not self.storage.is_remote:
            return super().caption(i, field)
        shard, row = self.locate(i)
        later = row + CHUNKS_AHEAD * self.read_length
        if row % self.read_length == 0 and later < len(self.rows(shard)):
            self.storage.pool.submit(self.prefetch_span, shard, later, self.read_length)
        return self.parse_caption(self.read_sample(i, True)[1], field)

    def read_chunk(self, i: int) -> tuple[int, bytes | None]:
        """(offset, bytes) of the chunk that sample i is in; (0, None) if one read cannot get it."""
        shard, row = self.locate(i)
        span = self.chunk_span(shard, row - row % self.read_length, self.read_length)
        if span and span[1] - span[0] <= self.max_span_bytes:
            with contextlib.suppress(OSError):
                return span[0], self.cache.read(self.paths[shard], *span)
        return 0, None

    def prefetch(self, i: int, with_chunk: bool) -> None:
        """Brings a sample that will be needed soon, or its chunk, into the disk cache."""
        if not self.storage.is_remote:
            return
        shard, row = self.locate(i)
        chunk = shard, row // self.read_length
        if not with_chunk:
            self.prefetch_span(shard, row, 1)
        elif chunk not in self.fetched_ahead:
            self.fetched_ahead.append(chunk)
            self.prefetch_span(shard, row - row % self.read_length, self.read_length)

    def prefetch_span(self, shard: int, first: int, count: int) -> None:
        span = self.chunk_span(shard, first, count)
        if span and span[1] - span[0] <= self.max_span_bytes:
            self.storage.prefetch(self.paths[shard], *span)

    def name(self, i: int) -> str:
        try:
            return super().name(i)
        except BadSample:  # its tar is gone
            return f"sample {i} of {self.where}"


class SpanCache:
    """Spans of files in memory, at most `limit` bytes; the least recently used is dropped first.
    Threads that need the same span wait for one read of it."""

    def __init__(self, limit: int, read_span: Callable[[str, int, int], bytes] = files.read_span):
        self.limit, self.held, self.read_span = limit, 0, read_span
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
                self.held += end - begin
                while self.held > self.limit and len(self.spans) > 1:
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
        self.held -= key[2] - key[1]

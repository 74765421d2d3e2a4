"""Reads files in buckets and on web servers through a cache on local disk.

What was read is in the cache by the file's version and by the part: a block, a span that a read
covers, or the complete file. So the next epoch and the next run read it from the disk.
"""
import contextlib
import functools
import io
import os
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

from inputs.disk_cache import DiskCache
from inputs.files import ReadOptions, read_span
from inputs.remote import PIECE_BYTES, fetch, file_info, is_http, matching_urls
from runtime.errors import DataError

SMALL_SET_BYTES = 1 << 30  # below it, chunks are shorter than a block, so blocks are read
BLOCK_BYTES = 1 << 20
MAX_SMALL_BYTES = 64 << 20
NUM_THREADS = 16           # requests at once
# How many samples are fetched before they are needed: at least, at most.
MIN_AHEAD, MAX_AHEAD = 512, 4096


def blocks(begin: int, end: int) -> range:
    """The numbers of the blocks that the bytes begin..end of a file are in."""
    return range(begin // BLOCK_BYTES, -(-end // BLOCK_BYTES))


class RemoteStorage:
    """Reads files by address, through the disk cache. Has the methods of files.LocalStorage."""
    is_remote = True

    def __init__(self, options: ReadOptions):
        self.disk = DiskCache(options.cache_dir, int(options.cache_gb * 1e9))
        self.info = functools.cache(file_info)  # of the start: a change is an error
        self.pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="remote")
        self.in_blocks = False

    def plan_reads(self, total_bytes: int) -> None:
        """Decides how files are read that have so many bytes together: a small set in blocks."""
        self.in_blocks = total_bytes <= min(SMALL_SET_BYTES, self.disk.limit // 2)

    def matching_paths(self, patterns: list[str]) -> list[str]:
        return matching_urls(patterns)

    def file_size(self, url: str) -> int:
        return self.info(url).size

    def key(self, url: str, *part: Any) -> str:
        """Of a part of a file in the cache, or of the complete file."""
        info = self.info(url)
        return "\n".join(["remote 1", url, str(info.size), info.version, *map(str, part)])

    def read_span(self, url: str, begin: int, end: int) -> bytes:
        """As files.read_span: from a local copy, from the cache, or from the server."""
        end = min(end, self.info(url).size)
        path = self.disk.find(self.key(url))
        if path:
            with contextlib.suppress(FileNotFoundError):  # deleted to make room
                data = read_span(path, begin, end)
                if len(data) == end - begin:
                    return data
        if self.in_blocks:
            return b"".join(self.read_block(url, n, begin, end) for n in blocks(begin, end))
        return self.cached_span(url, begin, end)

    def prefetch_span(self, url: str, begin: int, end: int) -> None:
        """Brings into the cache what read_span will need."""
        if self.disk.find(self.key(url)):
            return
        if self.in_blocks:
            for n in blocks(begin, end):
                self.block_path(url, n)
        elif not self.disk.find(self.key(url, begin, end)):
            self.cached_span(url, begin, end)

    def block_path(self, url: str, n: int) -> str:
        """The path of block n of a file, which has BLOCK_BYTES except for the last one."""
        start = n * BLOCK_BYTES

        def make(out: BinaryIO) -> None:
            out.write(fetch(url, start, start + BLOCK_BYTES, self.info(url)))
        return self.disk.get(self.key(url, "block", n), make)

    def read_block(self, url: str, n: int, begin: int, end: int) -> bytes:
        """The part of a span that is in block n."""
        start, info = n * BLOCK_BYTES, self.info(url)
        size = min(BLOCK_BYTES, info.size - start)
        begin, end = max(begin, start), min(end, start + size)
        for _ in range(3):
            path = self.block_path(url, n)
            with contextlib.suppress(FileNotFoundError):  # deleted to make room
                if os.path.getsize(path) == size:
                    return read_span(path, begin - start, end - start)
                os.remove(path)  # the machine stopped while it was written
        return fetch(url, begin, end, info)

    def cached_span(self, url: str, begin: int, end: int) -> bytes:
        """A span has its CRC-32 behind it in the cache. A damaged one is fetched again."""
        fetched: list[bytes] = []

        def make(out: BinaryIO) -> None:
            fetched.append(fetch(url, begin, end, self.info(url)))
            out.write(fetched[0])
            out.write(zlib.crc32(fetched[0]).to_bytes(4, "little"))
        for _ in range(3):
            path = self.disk.get(self.key(url, begin, end), make)
            if fetched:
                return fetched[0]
            try:
                with open(path, "rb") as file:
                    data, crc = file.read(end - begin), file.read()
                if zlib.crc32(data).to_bytes(4, "little") == crc:
                    return data
                os.remove(path)
            except FileNotFoundError:
                pass  # deleted to make room
        return fetch(url, begin, end, self.info(url))

    def local_copy(self, url: str) -> str:
        """The path of a complete copy in the cache. It is made by several requests at once."""
        info = self.info(url)

        def make(out: BinaryIO) -> None:
            starts = range(0, info.size, PIECE_BYTES)
            for first in range(0, len(starts), 4):
                pieces = [self.pool.submit(fetch, url, start, start + PIECE_BYTES, info)
                          for start in starts[first:first + 4]]
                for piece in pieces:
                    out.write(piece.result())
        for _ in range(3):
            path = self.disk.get(self.key(url), make)
            with contextlib.suppress(FileNotFoundError):  # another process deletes too
                if os.path.getsize(path) == info.size:
                    break
                os.remove(path)  # the machine stopped while it was written
        return path

    def encoder_copy(self, url: str) -> str:
        """A copy of an encoder's file, or of that in a run's folder: its encoder.npz, or else its
        last checkpoint."""
        if url.endswith(".npz") or is_http(url):
            return self.local_copy(url)
        names = matching_urls([f"{url.rstrip('/')}/*.npz"])
        encoders = [name for name in names if name.endswith("/encoder.npz")]
        checkpoints = [name for name in names if "/step-" in name]
        if not encoders + checkpoints:
            raise DataError(f"{url} has neither encoder.npz nor a checkpoint")
        return self.local_copy([*checkpoints, *encoders][-1])

    def fetch_small(self, url: str) -> bytes:
        """A complete small file, which is not cached. DataError if it is none: a server that
        ignores the end of an address sends another file."""
        info = file_info(url)
        if info.size > MAX_SMALL_BYTES:
            raise DataError(f"{url} is larger than {MAX_SMALL_BYTES >> 20} MiB")
        return fetch(url, 0, info.size, info)

    def open_file(self, url: str) -> BinaryIO:
        return io.BufferedReader(RemoteFile(self, url), PIECE_BYTES)


class RemoteFile(io.RawIOBase):
    """A file to read and seek in, whose bytes are not cached: parquet is kept unpacked."""

    def __init__(self, storage: RemoteStorage, url: str):
        self.url, self.info, self.position = url, storage.info(url), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.info.size}[whence]
        self.position = max(0, base + offset)
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: Any) -> int:
        data = fetch(self.url, self.position, self.position + len(buffer), self.info)
        buffer[:len(data)] = data
        self.position += len(data)
        return len(data)


class FetchAhead:
    """Fetches the samples of the next batches into the disk cache, in threads of its own. Much at
    the start would delay the first batches, so each batch extends how far ahead it fetches."""

    def __init__(self, source: Any, order: Callable[[int], int], with_chunk: bool):
        """order(position): the sample at a position of the run. with_chunk: see sources.Source."""
        self.source, self.order, self.with_chunk = source, order, with_chunk
        self.pool = ThreadPoolExecutor(16, thread_name_prefix="ahead")
        self.num_ahead = 0  # positions behind the batch that are to be fetched
        self.end = 0        # all positions before this one were requested

    def request(self, positions: range) -> None:
        """These positions are read next. Requests them and num_ahead more, as far as they were not
        requested before."""
        batch_size = len(positions) * positions.step  # of all processes
        self.num_ahead = min(max(self.num_ahead + batch_size // 2, MIN_AHEAD), MAX_AHEAD)
        end = positions.stop + self.num_ahead
        for position in range(positions.start, end, positions.step):
            if position >= self.end:
                self.pool.submit(self.source.prefetch_sample, self.order(position), self.with_chunk)
        self.end = end

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)

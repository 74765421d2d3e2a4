"""Files in buckets and on web servers: lists of them, ranges of bytes, and copies on local disk.

https:// needs no package; gs://, s3://, hf:// and others go through fsspec (extra `remote`). Each
request has a time limit and is repeated after failures that may pass. When it fails for good, that
is a DataError, which ends the run: no sample is lost in silence, and the run can be continued.

What was read is kept in the disk cache. Its key includes the file's version. An object that is
replaced during a run is noticed, because its version is compared after each request.
"""
import contextlib
import functools
import glob
import importlib
import io
import os
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

from inputs import http_ranges
from inputs.disk_cache import DiskCache
from inputs.files import ReadOptions, read_span
from inputs.http_ranges import Info, Passing, Refused
from runtime.errors import DataError, MissingExtra

WAITS = (0.5, 1, 2, 4, 8, 16)  # seconds before each repetition: seven attempts in all
REQUEST_SECONDS = 60           # of one attempt
COPY_BYTES = 2 << 30           # of a small set, whose chunks would be short
PIECE_BYTES = 8 << 20          # of a request, when a complete file is copied
NUM_THREADS = 16               # requests at once
PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "hf": "huggingface_hub"}
VERSIONS = ("ETag", "etag", "generation", "blob_id", "md5Hash", "mtime", "created", "LastModified")


def scheme(url: str) -> str:
    return url.partition("://")[0]


def is_http(url: str) -> bool:
    return scheme(url) in ("http", "https")


# ---------------------------------------------------------------------------- file systems
@functools.cache
def filesystem(protocol: str) -> Any:
    """fsspec's file system. MissingExtra without its package, DataError if it cannot be opened."""
    try:
        fsspec = importlib.import_module("fsspec")
        return fsspec.filesystem(protocol, use_listings_cache=False)
    except (ImportError, ValueError) as problem:
        if isinstance(problem, ValueError) and "not known" in str(problem):
            raise DataError(f"{protocol}:// is no kind of address that can be read: "
                            "take https, gs, s3 or hf") from None
        package = PACKAGES.get(protocol, "fsspec")
        raise MissingExtra(f"{protocol}:// needs {package} ({problem}): pip install -e '.[remote]'"
                           ) from None


def call(protocol: str, name: str, *args: Any, seconds: float | None = None,
         **options: Any) -> Any:
    """A method of a file system, within `seconds` (REQUEST_SECONDS) where it is asynchronous."""
    fs = filesystem(protocol)
    if getattr(fs, "async_impl", False):
        sync = importlib.import_module("fsspec.asyn").sync
        return sync(fs.loop, getattr(fs, f"_{name}"), *args, timeout=seconds or REQUEST_SECONDS,
                    **options)
    return getattr(fs, name)(*args, **options)


def classify(problem: Exception) -> Exception:
    """Passing or Refused for what a file system raises."""
    code = getattr(problem, "code", None) or getattr(problem, "status", None)
    text = (str(problem).strip().splitlines() or [""])[0][:200] or type(problem).__name__
    if isinstance(problem, FileNotFoundError) or str(code) == "404":
        return Refused(http_ranges.STATUS_ADVICE[404])
    if "Credential" in type(problem).__name__ or "Credential" in text:
        return Refused(f"no credentials were found ({text}): log in with the tool of your cloud")
    if isinstance(problem, PermissionError) or str(code) in ("401", "403"):
        return Refused(f"access is forbidden ({text}): check your credentials")
    if "InvalidRange" in text or "range not satisfiable" in text.lower() or str(code) == "416":
        return Refused(http_ranges.STATUS_ADVICE[416])
    return Passing(text)


def with_retries(url: str, attempt: Callable[[], Any], use: str = "read") -> Any:
    """attempt(), repeated while its failure may pass. DataError in the end. use: what for."""
    for wait in (*WAITS, None):
        try:
            return attempt()
        except (DataError, MissingExtra):
            raise
        except Exception as problem:  # the clouds' libraries raise many types
            if not isinstance(problem, (Passing, Refused)):
                problem = classify(problem)
            if isinstance(problem, Refused):
                raise DataError(f"{url} cannot be {use}: {problem}") from None
            if wait is None:
                raise DataError(f"{url} cannot be {use}, after {len(WAITS) + 1} attempts: {problem}"
                                "; a run continues from its last checkpoint") from None
        time.sleep(wait)


# ------------------------------------------------------------------------------- requests
def file_info(url: str) -> Info:
    """Size and version. DataError if there is no such file, or it cannot be reached."""
    def attempt() -> Info:
        if is_http(url):
            return http_ranges.fetch(url, 0, 1, time.monotonic() + REQUEST_SECONDS)[1]
        details = call(scheme(url), "info", url)
        if details.get("type") == "directory":
            raise Refused("it is a folder: name files, as 'FOLDER/*.tar' or 'FOLDER/*.parquet'")
        known = [str(details[name]) for name in VERSIONS if details.get(name)]
        return Info(int(details["size"]), known[0] if known else "")
    return with_retries(url, attempt)


def fetch(url: str, begin: int, end: int, info: Info) -> bytes:
    """The bytes begin..end of a file that `info` is of. DataError if it has changed."""
    end = min(end, info.size)
    if begin >= end:
        return b""

    def attempt() -> bytes:
        if is_http(url):
            deadline = time.monotonic() + REQUEST_SECONDS
            data, now = http_ranges.fetch(url, begin, end, deadline)
        else:
            data = call(scheme(url), "cat_file", url, start=begin, end=end)
            now = file_info(url)
        if now != info:
            raise Refused("it has changed since it was opened: start again")
        if len(data) != end - begin:
            raise Passing(f"{len(data)} bytes came, not {end - begin}")
        return data
    return with_retries(url, attempt)


def matching_urls(patterns: list[str]) -> list[str]:
    """The files of addresses and globs, sorted. An address without a glob need not exist."""
    urls: set[str] = set()
    for pattern in patterns:
        protocol = scheme(pattern)
        if is_http(pattern):
            if "*" in pattern:
                raise DataError(f"{pattern}: a web server lists no files: name them in braces, as "
                                "{00000..00011}")
            urls.add(pattern)
        elif not glob.has_magic(pattern):
            urls.add(pattern)
        else:
            names = with_retries(pattern, functools.partial(call, protocol, "glob", pattern))
            urls.update(f"{protocol}://{name.partition('://')[2] or name}" for name in names)
    return sorted(urls)


# -------------------------------------------------------------------------------- storage
class RemoteStorage:
    """Reads files by address, through the disk cache. Has the methods of files.LocalStorage."""
    is_remote = True

    def __init__(self, options: ReadOptions):
        self.disk = DiskCache(options.cache_dir, int(options.cache_gb * 1e9))
        self.info = functools.cache(file_info)  # of the start: a change is an error
        self.pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="remote")
        self.copies_all = False  # of a small set, complete files are copied

    def expect(self, total_bytes: int) -> None:
        """How large all files are together, before they are read."""
        self.copies_all = total_bytes <= min(COPY_BYTES, self.disk.limit // 2)

    def matching_paths(self, patterns: list[str]) -> list[str]:
        return matching_urls(patterns)

    def file_size(self, url: str) -> int:
        return self.info(url).size

    def key(self, url: str, *part: int) -> str:
        """Of a part of a file in the cache, or of the complete file."""
        info = self.info(url)
        return "\n".join(["remote 1", url, str(info.size), info.version, *map(str, part)])

    def read_span(self, url: str, begin: int, end: int) -> bytes:
        """As files.read_span: from a local copy, from the cache, or from the server."""
        end = min(end, self.info(url).size)
        path = self.local_copy(url) if self.copies_all else self.disk.find(self.key(url))
        if path:
            with contextlib.suppress(FileNotFoundError):  # deleted to make room
                data = read_span(path, begin, end)
                if len(data) == end - begin:
                    return data
        return self.cached_span(url, begin, end)

    def cached_span(self, url: str, begin: int, end: int) -> bytes:
        """A span has its CRC-32 behind it in the cache. A damaged one is fetched again."""
        fetched: list[bytes] = []

        def make(out: BinaryIO) -> None:
            fetched.append(fetch(url, begin, end, self.info(url)))
            out.write(fetched[0] + zlib.crc32(fetched[0]).to_bytes(4, "little"))
        for _ in range(3):
            path = self.disk.get(self.key(url, begin, end), make)
            if fetched:
                return fetched[0]
            try:
                with open(path, "rb") as file:
                    content = file.read()
                if zlib.crc32(content[:-4]).to_bytes(4, "little") == content[-4:]:
                    return content[:-4]
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
        path = self.disk.get(self.key(url), make)
        if os.path.exists(path) and os.path.getsize(path) != info.size:  # the machine stopped
            os.remove(path)
            path = self.disk.get(self.key(url), make)
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
        """A complete small file, which is not cached."""
        info = file_info(url)
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

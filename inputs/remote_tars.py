"""Indexes of tars in buckets and on web servers.

An index that lies beside the remote tar is used. Without one, the tar is copied into the cache once
and indexed there; the index stays in the cache also when the copy is deleted to make room. So for a
large set, index the tars before they are uploaded: `python -m inputs.tar_index TAR...`.
"""
import contextlib
import io
import json
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

from tqdm import tqdm

from inputs import tar_index
from inputs.http_ranges import Info
from inputs.remote import is_http
from inputs.tar_index import INDEX_SUFFIX, INDEX_VERSION, TarIndex
from runtime.errors import DataError

NUM_TARS = 4  # indexed at once
LOST = "the cache {} loses its files as they are used: set --cache-gb higher"


def index_tars(storage: Any, urls: list[str]) -> list[TarIndex | ValueError]:
    """The index of each tar, without rows; ValueError in place of one that is no tar. DataError for
    one that cannot be reached."""
    with ThreadPoolExecutor(16, thread_name_prefix="info") as pool:
        list(pool.map(storage.info, urls))  # a wrong address fails before the first copy

    def index(url: str) -> TarIndex | ValueError:
        try:
            return load_index(storage, url, with_rows=False)
        except ValueError as problem:
            return problem
    with ThreadPoolExecutor(NUM_TARS, thread_name_prefix="index") as pool:
        return list(tqdm(pool.map(index, urls), total=len(urls), desc="indexing tars",
                         unit=" tars", delay=1, leave=False))


def load_index(storage: Any, url: str, with_rows: bool = True) -> TarIndex:
    """From the cache, or made. ValueError if the file is no tar."""
    key = f"index {INDEX_VERSION}\n{storage.key(url)}"

    def make(out: BinaryIO) -> None:
        content = index_beside(storage, url, storage.info(url))
        out.write(content or made_index(storage, url))
    for _ in range(3):
        path = storage.disk.get(key, make)
        index = tar_index.read_index(path, with_rows)
        if index is not None:
            return index
        with contextlib.suppress(FileNotFoundError):  # another process deletes too
            os.remove(path)  # damaged
    raise DataError(LOST.format(storage.disk.folder))


def beside(url: str, suffix: str, without: str = "") -> str:
    """The address of a file beside another. The query of a web address comes behind the name."""
    name, mark, query = url.partition("?") if is_http(url) else (url, "", "")
    return f"{name.removesuffix(without)}{suffix}{mark}{query}"


def index_beside(storage: Any, url: str, info: Info) -> bytes | None:
    """The content of TAR.index.npz beside a tar. None if there is none for a tar of this size."""
    try:
        content = storage.fetch_small(beside(url, INDEX_SUFFIX))
    except DataError:
        return None
    index = tar_index.read_index(io.BytesIO(content), with_rows=True)
    return content if index is not None and index.meta["size"] == info.size else None


def made_index(storage: Any, url: str) -> bytes:
    """The index of a copy in the cache."""
    expected = 0
    try:
        stats = json.loads(storage.fetch_small(beside(url, "_stats.json", without=".tar")))
        expected = int(stats["successes"])
    except (DataError, ValueError, LookupError, TypeError, OverflowError, RecursionError):
        pass
    out = io.BytesIO()
    for _ in range(5):
        with storage.disk.hold(storage.key(url)), contextlib.suppress(FileNotFoundError):
            tar_index.write_index(out, tar_index.scan_tar(storage.local_copy(url), expected))
            return out.getvalue()  # else another run deleted the copy
    raise DataError(LOST.format(storage.disk.folder))

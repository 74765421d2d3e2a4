"""A cache on local disk with a size limit. The files that were used least recently go first.

Each entry is one file, named by a hash of its key, and can be made again at any time. It appears by
a rename, complete. So several runs may share a folder without locks, and a process that is killed
leaves at most a file NAME.part, which is deleted later. Deleting the folder is always safe.
"""
import contextlib
import hashlib
import os
import re
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from typing import BinaryIO

from runtime.errors import DISK_FULL, DataError

OWN_NAME = re.compile(r"[0-9a-f]{2}/[0-9a-f]{38}(\.[0-9a-f]{32}\.part)?")
STALE_SECONDS = 3600  # after which a .part file is what a killed process left


def default_folder() -> str:
    """Where --cache-dir is without the flag."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "openvision2")


class DiskCache:
    """Files in `folder`, of `limit` bytes in total; one larger file is kept alone."""

    def __init__(self, folder: str, limit: int):
        self.folder, self.limit = folder or default_folder(), limit
        self.lock = threading.Lock()
        self.being_made: dict[str, threading.Lock] = {}
        self.held: Counter = Counter()  # paths that this process must not delete
        self.added = limit  # bytes since the folder was last counted: count at the first addition

    def path(self, key: str) -> str:
        """Where the entry of a key is, if it exists."""
        name = hashlib.sha1(key.encode("utf-8", "surrogateescape")).hexdigest()
        return os.path.join(self.folder, name[:2], name[2:])

    def find(self, key: str) -> str | None:
        """The path of an entry, which then counts as used now. None if there is none."""
        path = self.path(key)
        try:
            os.utime(path)
        except OSError:
            return None
        return path

    def get(self, key: str, make: Callable[[BinaryIO], None]) -> str:
        """The path of an entry; make(file) writes it if it is missing. Threads that need the same
        entry wait for one of them. DataError if the folder cannot be written to or is full."""
        with self.lock:
            making = self.being_made.setdefault(key, threading.Lock())
        with making:
            path = self.find(key)
            if path is None:
                path = self.path(key)
                try:
                    size = self.write(path, make)
                except OSError as problem:
                    self.explain(problem)
                    raise
                self.delete_oldest(size, path)
        with self.lock:
            self.being_made.pop(key, None)
        return path

    @contextlib.contextmanager
    def hold(self, key: str) -> Iterator[None]:
        """Inside, this process does not delete the entry of a key. Others may."""
        path = self.path(key)
        with self.lock:
            self.held[path] += 1
        try:
            yield
        finally:
            with self.lock:
                self.held[path] -= 1
            self.delete_oldest(0, path)

    def write(self, path: str, make: Callable[[BinaryIO], None]) -> int:
        """Writes a complete file or none. Returns its size."""
        part = f"{path}.{uuid.uuid4().hex}.part"
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(part, "wb") as file:
                make(file)
                size = file.tell()
            os.replace(part, path)
            return size
        finally:
            with contextlib.suppress(OSError):
                os.remove(part)

    def explain(self, problem: OSError) -> None:
        """DataError if the problem is one of the cache or of a folder above it, and not of what is
        read."""
        name = os.fspath(problem.filename or "")
        if problem.errno in DISK_FULL:
            raise DataError(f"the disk of the cache {self.folder} is full: make room, or name "
                            "another folder with --cache-dir or a limit below "
                            f"{self.limit / 1e9:g} with --cache-gb") from None
        if name and (name.startswith(self.folder) or self.folder.startswith(f"{name}/")):
            raise DataError(f"the cache {self.folder} cannot be written to ({problem.strerror}): "
                            "name another folder with --cache-dir") from None

    def delete_oldest(self, size: int, newest: str) -> None:
        """After `size` bytes were added: keeps the folder below the limit, and `newest` in it.
        Other runs may add too, so that the folder is counted again now and then."""
        with self.lock:
            self.added += size
            if self.added < self.limit // 20:
                return
            self.added = 0
            entries = sorted(self.entries())
            total = sum(bytes_ for _, bytes_, _ in entries)
            for _, bytes_, path in entries:
                if total <= self.limit * 0.95:
                    return
                if path != newest and not self.held[path]:
                    with contextlib.suppress(OSError):  # another run deletes too
                        os.remove(path)
                    total -= bytes_
            self.added = self.limit  # too much is held: count again when one is not any more

    def entries(self) -> list[tuple[float, int, str]]:
        """(time of last use, bytes, path) of each entry. What killed processes left is deleted."""
        entries = []
        for folder, _, names in os.walk(self.folder):
            for name in names:
                path = os.path.join(folder, name)
                if not OWN_NAME.fullmatch(os.path.relpath(path, self.folder)):
                    continue  # never touch what somebody else put there
                with contextlib.suppress(OSError):
                    stat = os.stat(path)
                    if not name.endswith(".part"):
                        entries.append((stat.st_mtime, stat.st_size, path))
                    elif time.time() - stat.st_mtime > STALE_SECONDS:
                        os.remove(path)
        return entries

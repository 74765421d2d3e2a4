"""The index of a tar: which samples are in it, in a small file TAR.index.npz beside it.

The index has a row (offsets and sizes) per sample, counts of what was left out and why, and the
size and time of the tar, so that it is made again when the tar changes. Any number of processes and
machines may make the same index at once: each writes a file of its own, and the last rename wins.

    python -m inputs.tar_index TAR...        indexes tars and prints what they contain
"""
import errno
import glob
import json
import os
import random
import re
import sys
import threading
import uuid
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from inputs.files import LOCAL, pair_files, printable
from inputs.tar_headers import DAMAGED, NO_END, TEXT_SUFFIXES, Member, list_members

INDEX_SUFFIX = ".index.npz"
INDEX_VERSION = 1  # of the rules in this file and tar_headers.py: a new one makes all indexes anew
NUM_COLUMNS = 2 + 2 * len(TEXT_SUFFIXES)  # of rows: offset and size of the image and of each text
MISSING = "missing from shards, by the _stats.json beside them"  # a reason in `skipped`
WITH_TAR_NAME = (DAMAGED, NO_END, MISSING)  # reasons that are reported with the first such tar
LOAD_ERRORS = (OSError, ValueError, LookupError, EOFError, TypeError, AttributeError, RuntimeError,
               MemoryError, zipfile.BadZipFile, zlib.error)  # what a damaged index can raise
# Python 3.11 can fail (SystemError) if two threads parse the headers of numpy arrays at once.
NUMPY_HEADERS = threading.Lock()


class TarIndex(NamedTuple):
    """meta: version; size and mtime_ns of the tar; skipped {reason: count}; pairs {text suffix: how
    many have [image and text, image only, text only]}; crc, a checksum of names and rows.
    rows: (samples, 6) int64, offset and size of the image, the .txt and the .json; offset 0 for one
    that is missing. None where they stay on disk."""
    meta: dict[str, Any]
    rows: np.ndarray | None


def reason(problem: Exception) -> str:
    """What an error says, without the path that an OSError adds."""
    return getattr(problem, "strerror", None) or str(problem)


# ------------------------------------------------------------------------------------ names
def expand_braces(pattern: str) -> list[str]:
    """Braces as in a shell: a{1,2}b and a{00..11}b, left to right. ValueError for a range whose end
    has more than 7 digits."""
    braces = re.search(r"\{([^{}]*)\}", pattern)
    if not braces:
        return [pattern]
    options = braces[1].split(",")
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", braces[1]):
        first, last = numbers.groups()
        if len(last) > 7:
            raise ValueError(f"{pattern} lists too many files: give a range below ten million")
        options = [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
    names = []
    for option in options:
        names += expand_braces(pattern[:braces.start()] + option + pattern[braces.end():])
    return names


def matching_paths(where: str, storage: Any = LOCAL) -> list[str]:
    """The files of a glob, a brace list or a plain name, sorted, without indexes. A plain name need
    not exist. ValueError for a brace list that is too long."""
    patterns = [where] if os.path.exists(where) else expand_braces(where)  # braces in a file's name
    if storage.is_remote:
        return [path for path in storage.matching_paths(patterns) if INDEX_SUFFIX not in path]
    paths: set[str] = set()
    for pattern in patterns:
        if os.path.exists(pattern) or not glob.has_magic(pattern):  # a name may contain brackets
            paths.add(pattern)
        else:
            paths.update(glob.glob(pattern, recursive=True))
    return sorted(path for path in paths if INDEX_SUFFIX not in path)


# --------------------------------------------------------------------------------- one index
def scan_tar(path: str, expected: int | None = None) -> TarIndex:
    """The index of a tar, from its headers. OSError if it cannot be read, ValueError if it is no
    tar. expected: how many samples it should have; None to look that up in its _stats.json."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe of that name must not block
    try:
        stat = os.fstat(fd)
        if not stat.st_size:
            raise ValueError("empty file")
        skipped: Counter = Counter()
        members = list_members(fd, stat.st_size, skipped)
    finally:
        os.close(fd)
    samples, pairs = pair_files(map(split_name, members), skipped)
    rows = np.zeros((len(samples), NUM_COLUMNS), np.int64)
    for row, locations in zip(rows, samples):
        for n, location in enumerate(locations):
            row[2 * n:2 * n + 2] = location or (0, 0)
    expected = expected_samples(path) if expected is None else expected
    if expected > len(rows):
        skipped[MISSING] += expected - len(rows)
    crc = zlib.crc32(b"\0".join(member.name for member in members), zlib.crc32(rows))
    meta = {"version": INDEX_VERSION, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns,
            "pairs": pairs, "skipped": dict(skipped), "crc": crc}
    return TarIndex(meta, rows)


def split_name(member: Member) -> tuple[bytes, str, tuple[int, int]]:
    """(key, suffix, (offset, size)) for `pair_files`."""
    key, _, suffix = member.name.rpartition(b".")
    return key, suffix.lower().decode("latin-1"), (member.offset, member.size)


def expected_samples(path: str) -> int:
    """How many samples img2dataset wrote to a tar, by the _stats.json beside it; 0 if unknown. A
    tar that was cut between two members shows the loss in no other way."""
    try:
        with open(path.removesuffix(".tar") + "_stats.json", encoding="utf-8") as f:
            return int(json.load(f)["successes"])
    except (OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError):
        return 0


def load_index(path: str, with_rows: bool = False) -> TarIndex | None:
    """The index beside a tar, with or without its rows. None if it is missing, damaged, of another
    tar or of another version."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    index = read_index(path + INDEX_SUFFIX, with_rows)
    if index and (index.meta["size"], index.meta["mtime_ns"]) != (stat.st_size, stat.st_mtime_ns):
        return None
    return index


def read_index(file: str | BinaryIO, with_rows: bool) -> TarIndex | None:
    """An index in a file, with or without its rows. None if it is missing, damaged or of another
    version."""
    try:
        with NUMPY_HEADERS, np.load(file, allow_pickle=False) as f:
            meta = json.loads(f["meta"].tobytes())
            if meta["version"] != INDEX_VERSION:
                return None
            rows = f["rows"] if with_rows else None
        numbers = [meta["crc"], meta["size"], meta["mtime_ns"], *meta["skipped"].values()]
        for text in TEXT_SUFFIXES:
            numbers += [meta["pairs"][text][n] for n in range(3)]
        if not all(isinstance(number, int) and number >= 0 for number in numbers):
            return None
        if with_rows and (rows.dtype != np.int64 or rows.shape[1:] != (NUM_COLUMNS,)):
            return None
        return TarIndex(meta, rows)
    except LOAD_ERRORS:
        return None


def save_index(path: str, index: TarIndex) -> None:
    """Write an index beside its tar, completely or not at all. OSError if the folder forbids it."""
    if not os.stat(os.path.dirname(path) or ".").st_mode & 0o222:  # root could write there anyway
        raise PermissionError(errno.EACCES, "write-protected")
    temporary = f"{path}{INDEX_SUFFIX}.{uuid.uuid4().hex}.part"
    try:
        with open(temporary, "wb") as f:
            write_index(f, index)
        os.replace(temporary, path + INDEX_SUFFIX)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def write_index(file: BinaryIO, index: TarIndex) -> None:
    meta = np.frombuffer(json.dumps(index.meta).encode(), np.uint8)
    np.savez_compressed(file, meta=meta, rows=index.rows)


# ------------------------------------------------------------------------------ many indexes
def index_tar(path: str) -> TarIndex | OSError | ValueError:
    """A tar's index, which is made and saved if necessary. Its rows are None, unless it could not
    be saved. For a tar that cannot be read, the error."""
    try:
        if index := load_index(path):
            return index
        index = scan_tar(path)
    except (OSError, ValueError) as problem:
        return problem
    try:
        save_index(path, index)
    except OSError:
        return index
    return TarIndex(index.meta, None)


def index_tars(paths: list[str]) -> list[TarIndex | OSError | ValueError]:
    """`index_tar` of many tars, by threads. Each process takes them in a random order, so that
    machines which start together share the work."""
    shuffled = random.SystemRandom().sample(paths, len(paths))
    num_threads = min(16, 2 * (os.cpu_count() or 1))
    with ThreadPoolExecutor(num_threads, thread_name_prefix="index") as pool:
        results = tqdm(pool.map(index_tar, shuffled), total=len(paths), desc="indexing tars",
                       unit=" tars", delay=1, leave=False)
        indexes = dict(zip(shuffled, results))
    unsaved = [path for path in paths if getattr(indexes[path], "rows", None) is not None]
    if unsaved:
        print(f"beside {printable(unsaved[0])} no index of a tar can be written: {len(unsaved)} of "
              "them are kept in memory, and made again at each start", flush=True)
    return [indexes[path] for path in paths]


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m inputs.tar_index TAR...")
    status = 0
    for name, index in zip(sys.argv[1:], index_tars(sys.argv[1:])):
        if isinstance(index, TarIndex):
            counts = [f"{n[0]:,} with a .{text}" for text, n in index.meta["pairs"].items()]
            print(f"{name}: {', '.join(counts)}; skipped: {index.meta['skipped'] or 'none'}")
        else:
            print(f"error: {name}: {reason(index)}", file=sys.stderr)
            status = 1
    sys.exit(status)

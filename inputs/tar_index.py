"""Which samples lie where in a tar: one pass over its headers, remembered in a small file beside it. And the reading of
spans of it.

A sample is an image KEY.jpg (.png, .webp …) and its text, KEY.txt or KEY.json. The pass reads headers alone, and goes on
behind damage: at a header whose checksum is wrong it looks for the next good one, so that a hole costs the samples it
lies in and no others. What it found is kept as TAR.index.npz: rows of places, counts of what was left out and why, and
the size and time of the tar it describes, so that it is made again when the tar changes. Any number of processes and
machines may make the same index at once: each writes under a name of its own, and the last rename wins.

Format: POSIX.1-2017 pax/ustar interchange format, and GNU's long names.

    python -m inputs.tar_index TAR...        indexes tars and shows what they hold
"""
import errno
import glob
import json
import os
import random
import re
import uuid
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from inputs.files import pair_files
from inputs.tar_headers import DAMAGED, NO_END, TEXT_SUFFIXES, list_members

INDEX_SUFFIX = ".index.npz"
INDEX_VERSION = 1              # of the rules in this file: another one makes every index anew
MISSING = "missing from shards, by the _stats.json beside them"
PLACED = (DAMAGED, NO_END, MISSING)  # reasons for which the tar matters


class TarIndex(NamedTuple):
    """What is known of one tar. `rows` may be left on the disk (None)."""
    meta: dict[str, Any]      # version, size and mtime_ns of the tar, pairs, skipped {reason: count}, crc
    rows: np.ndarray | None   # (samples, 6) int64: offset and bytes of the image, the .txt, the .json; offset 0 for one that is not there


def expand_braces(pattern: str) -> list[str]:
    """Braces as shells have them: a{1,2}b and a{00..11}b, left to right."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if not found:
        return [pattern]
    inside = found[1]
    if span := re.fullmatch(r"(\d+)\.\.(\d+)", inside):
        if len(span[2]) > 7:
            raise ValueError(f"{pattern} lists too many files: give a range below ten million")
        options = [f"{n:0{len(span[1])}d}" for n in range(int(span[1]), int(span[2]) + 1)]
    else:
        options = inside.split(",")
    return [whole for o in options for whole in expand_braces(pattern[:found.start()] + o + pattern[found.end():])]


def matching_paths(where: str) -> list[str]:
    """The files of a glob, a brace list or a plain name, sorted, without indexes. A plain name need not exist. ValueError
    for a brace list too long."""
    named = [where] if os.path.exists(where) else expand_braces(where)  # a name may itself hold brackets
    paths = {p for one in named for p in ([one] if os.path.exists(one) or not glob.has_magic(one) else glob.glob(one))}
    return sorted(p for p in paths if INDEX_SUFFIX not in p)


def scan_tar(path: str) -> TarIndex:
    """Read a tar's headers. OSError if it cannot be read, ValueError if it is no tar."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe of that name must not block
    try:
        stat = os.fstat(fd)
        if not stat.st_size:
            raise ValueError("empty file")
        skipped: Counter = Counter()
        files = list_members(fd, stat.st_size, skipped)
    finally:
        os.close(fd)
    split = [(name.rpartition(b"."), place) for name, *place in files]
    grouped, pairs = pair_files(((key, suffix.lower().decode("latin-1"), place) for (key, _, suffix), place in split), skipped)
    rows = np.array([[n for place in row for n in place or (0, 0)] for row in grouped], np.int64).reshape(-1, 6)
    if (missing := expected_samples(path) - len(rows)) > 0:
        skipped[MISSING] += missing
    crc = zlib.crc32(b"\0".join(name for name, *_ in files), zlib.crc32(rows))
    return TarIndex({"version": INDEX_VERSION, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "pairs": pairs, "skipped": dict(skipped), "crc": crc}, rows)


def expected_samples(path: str) -> int:
    """How many samples img2dataset says it has put in a tar, 0 if it does not say: the only witness of lost ends."""
    try:
        with open(path.removesuffix(".tar") + "_stats.json", encoding="utf-8") as f:
            return int(json.load(f)["successes"])
    except (OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError):
        return 0


def load_index(path: str, rows: bool = False) -> TarIndex | None:
    """The index that lies beside a tar, None if there is none, or it is damaged, of another tar or of other rules."""
    try:
        stat = os.stat(path)
        with np.load(path + INDEX_SUFFIX, allow_pickle=False) as f:
            meta = json.loads(f["meta"].tobytes())
            now = {"version": INDEX_VERSION, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
            if {k: meta.get(k) for k in now} != now:
                return None
            table = f["rows"] if rows else None
        counts = [meta["crc"], *meta["skipped"].values(), *(n for t in TEXT_SUFFIXES for n in meta["pairs"][t])]
        whole = table is None or (table.dtype == np.int64 and table.shape[1:] == (6,))
        return TarIndex(meta, table) if whole and all(isinstance(n, int) and n >= 0 for n in counts) else None
    except (OSError, ValueError, LookupError, EOFError, TypeError, AttributeError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error):
        return None


def save_index(path: str, index: TarIndex) -> None:
    """Write an index beside its tar, whole or not at all. OSError where the folder does not take it."""
    if not os.stat(os.path.dirname(path) or ".").st_mode & 0o222:
        raise PermissionError(errno.EACCES, "write-protected")  # which would not stop root, as whom containers run
    part = f"{path}{INDEX_SUFFIX}.{uuid.uuid4().hex}.part"
    try:
        with open(part, "wb") as f:
            np.savez_compressed(f, meta=np.frombuffer(json.dumps(index.meta).encode(), np.uint8), rows=index.rows)
        os.replace(part, path + INDEX_SUFFIX)
    finally:
        if os.path.exists(part):
            os.remove(part)


def index_tar(path: str) -> TarIndex | OSError | ValueError:
    """A tar's index, made if it must be; its rows are left out if they lie on the disk. A tar that cannot be read gives
    the reason."""
    try:
        if found := load_index(path):
            return found
        made = scan_tar(path)
    except (OSError, ValueError) as problem:
        return problem
    try:
        save_index(path, made)
    except OSError:
        return made
    return TarIndex(made.meta, None)


def index_tars(paths: list[str]) -> list[TarIndex | OSError | ValueError]:
    """`index` of many tars, by threads. Their order is drawn anew by each process, so that machines which begin
    together mostly find the work of the others done."""
    turn = random.SystemRandom().sample(paths, len(paths))
    with ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1)), thread_name_prefix="index") as pool:
        found = dict(zip(turn, tqdm(pool.map(index_tar, turn), total=len(turn), desc="indexing tars", unit=" tars", delay=1, leave=False)))
    kept = [p for p in paths if isinstance(found[p], TarIndex) and found[p].rows is not None]
    if kept:
        print(f"beside {os.fsencode(kept[0]).decode('utf-8', 'replace')} no index of a tar can be written: "
              f"{len(kept)} of them are kept in memory, and made anew at each start", flush=True)
    return [found[p] for p in paths]


if __name__ == "__main__":
    import sys
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m inputs.tar_index TAR...")
    for name, one in zip(sys.argv[1:], index_tars(sys.argv[1:])):
        if isinstance(one, TarIndex):
            with_text = ", ".join(f"{counts[0]:,} with a .{text}" for text, counts in one.meta["pairs"].items())
            print(f"{name}: {with_text}; skipped: {one.meta['skipped'] or 'none'}")
        else:
            print(f"{name}: {getattr(one, 'strerror', None) or one}")

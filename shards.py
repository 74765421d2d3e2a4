"""Which samples lie where in a tar: one pass over its headers, remembered in a small file beside it. And the reading of
spans of it.

A sample is an image KEY.jpg (.png, .webp …) and its text, KEY.txt or KEY.json. The pass reads headers alone, and goes on
behind damage: at a header whose checksum is wrong it looks for the next good one, so that a hole costs the samples it
lies in and no others. What it found is kept as TAR.index.npz: rows of places, counts of what was left out and why, and
the size and time of the tar it describes, so that it is made again when the tar changes. Any number of processes and
machines may make the same index at once: each writes under a name of its own, and the last rename wins.

Format: POSIX.1-2017 pax/ustar interchange format, and GNU's long names.

    python shards.py TAR...        indexes tars and shows what they hold
"""
import errno
import glob
import json
import os
import random
import re
import threading
import uuid
import zipfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
TEXTS = ("txt", "json")
SUFFIX = ".index.npz"
VERSION = 1              # of the rules in this file: another one makes every index anew
BLOCK = 512
DAMAGED = "damaged places in shards (what lies around them is used)"
NO_END = "shards without an end mark (cut off or damaged; what could be read is used)"
MISSING = "missing from shards, by the _stats.json beside them"
PLACED = (DAMAGED, NO_END, MISSING)  # reasons for which the tar matters
FORKS = "notes that macOS keeps beside a file (._NAME)"


class Index(NamedTuple):
    """What is known of one tar. `rows` may be left on the disk (None)."""
    meta: dict[str, Any]      # version, size and mtime_ns of the tar, pairs, skipped {reason: count}, crc
    rows: np.ndarray | None   # (samples, 6) int64: offset and bytes of the image, the .txt, the .json; offset 0 for one that is not there


# ----------------------------------------------------------------------------------------------------------------- names
def expand(pattern: str) -> list[str]:
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
    return [whole for o in options for whole in expand(pattern[:found.start()] + o + pattern[found.end():])]


def matching(where: str) -> list[str]:
    """The files of a glob, a brace list or a plain name, sorted, without indexes. A plain name need not exist. ValueError
    for a brace list too long."""
    named = [where] if os.path.exists(where) else expand(where)  # a name may itself hold brackets
    paths = {p for one in named for p in ([one] if os.path.exists(one) or not glob.has_magic(one) else glob.glob(one))}
    return sorted(p for p in paths if SUFFIX not in p)


# --------------------------------------------------------------------------------------------------------------- pairing
def group(files: Iterable[tuple[Hashable, str, Any]], skipped: Counter) -> tuple[list[tuple[Any, Any, Any]], dict[str, list[int]]]:
    """Samples of (key, suffix, place) files: (image, txt, json) places of each key with an image, None for what it
    lacks; and for each kind of text [with image and text, image alone, text alone]. Of equal names the last counts, as
    when a tar is unpacked."""
    keys: dict[Hashable, dict[str, Any]] = {}
    for key, suffix, place in files:
        parts = keys.setdefault(key, {})
        if suffix in parts:
            skipped["replaced by a later file of the same name"] += 1
        parts[suffix] = place
    rows, pairs = [], {text: [0, 0, 0] for text in TEXTS}
    for parts in keys.values():
        images = [parts[s] for s in IMAGES if s in parts]
        if len(images) > 1:
            skipped["beside another image of the same name"] += len(images) - 1
        if images:
            rows.append((images[0], *map(parts.get, TEXTS)))
        for text, counts in pairs.items():
            if images or text in parts:
                counts[0 if images and text in parts else 1 if images else 2] += 1
    return rows, pairs


# ------------------------------------------------------------------------------------------------------------ tar headers
def number(field: bytes) -> int:
    """A number of a header: octal digits, or big-endian bytes behind 0x80. ValueError if neither."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    return int(field.partition(b"\0")[0].strip() or b"0", 8)


def header(block: bytes) -> tuple[bytes, int, bytes] | None:
    """(name, bytes, type) of a header, or None where the checksum says that it is none."""
    try:
        if len(block) < BLOCK or number(block[148:156]) != sum(block) - sum(block[148:156]) + 8 * ord(" "):
            return None
        size = number(block[124:136])
    except ValueError:
        return None
    name, prefix = block[:100].partition(b"\0")[0], block[345:500].partition(b"\0")[0]
    if prefix and block[257:263] == b"ustar\0":
        name = prefix + b"/" + name
    return (name, size, block[156:157]) if size >= 0 else None


def pax(data: bytes) -> dict[bytes, bytes]:
    """The records 'LENGTH KEY=VALUE\\n' of an extended header; what cannot be read ends them."""
    told, at = {}, 0
    while (space := data.find(b" ", at, at + 20)) > at and data[at:space].isdigit():
        end = at + int(data[at:space])
        if not space + 2 <= end <= len(data):
            break
        key, _, value = data[space + 1:end - 1].partition(b"=")
        told[key], at = value, end
    return told


def find(fd: int, at: int) -> int | None:
    """Where the next good header begins, at `at` or later, on any byte; None if there is none. Its magic is looked for
    first, which is quick."""
    step = 1 << 13
    while chunk := os.pread(fd, step + BLOCK, at):
        place = -1
        while (place := chunk.find(b"ustar", place + 1)) >= 0:
            start = at + place - 257
            if place >= 257 and start + BLOCK <= at + len(chunk) and header(chunk[place - 257:place - 257 + BLOCK]):
                return start
        at, step = at + step, min(2 * step, 1 << 20)  # overlapping by a header
    return None


def past_zeros(fd: int, at: int) -> int:
    """The first block from `at` on that is not all zeros: most often the end of the file."""
    step = BLOCK
    while chunk := os.pread(fd, step, at):
        if rest := len(chunk.lstrip(b"\0")):
            return at + (len(chunk) - rest) // BLOCK * BLOCK
        at, step = at + len(chunk), min(2 * step, 1 << 20)
    return at


def members(fd: int, size: int, skipped: Counter) -> list[tuple[bytes, int, int]]:
    """(name, offset, bytes) of a tar's images and texts. What is damaged, cut off or no plain file is counted.
    ValueError if there is no header in the whole file."""
    found: list[tuple[bytes, int, int]] = []
    told: dict[bytes, bytes] = {}   # what an extended header says of the next member
    at, body, ended, any_header = 0, 0, False, False
    last = None                     # the member before, if it is in `found`: it is taken back if another begins inside it
    while at < size:
        block = os.pread(fd, BLOCK, at)
        if not block.strip(b"\0"):  # the end mark; behind it may stand another tar, or what a hole has left
            at = body = past_zeros(fd, at)
            ended, last, told = True, None, {}
            continue
        head = header(block)
        length = head[1] if head else 0
        if (size_told := told.get(b"size", b"")).isdigit() and len(size_told) < 20:
            length = int(size_told)
        if head is None or at + BLOCK + length > size:  # a size may be wrong too: so look on from the last good header, not from where it led
            there = find(fd, body if head is None else at + BLOCK)
            if there is not None:
                skipped[DAMAGED] += 1
                if last and there < at:
                    found.pop()
                at = body = there
                ended, last, told = False, None, {}
                continue
            if head is None:
                break
        any_header = True
        name, kind = told.get(b"path", head[0]), head[2]
        body = at + BLOCK
        if kind in b"123456":       # links, devices, folders: no data stands behind their headers
            length = 0
        at, ended, last = body + (length + BLOCK - 1) // BLOCK * BLOCK, False, None
        if kind in (b"x", b"L", b"K", b"g"):
            data = os.pread(fd, min(length, 1 << 20), body)
            told |= pax(data) if kind == b"x" else {b"path": data.rstrip(b"\0")} if kind == b"L" else {}
            continue
        sparse, told = kind == b"S" or any(k.startswith(b"GNU.sparse") for k in told), {}
        _, dot, suffix = name.rpartition(b".")
        if not dot or suffix.lower().decode("latin-1") not in IMAGES + TEXTS or kind == b"5":
            continue
        if kind not in (b"0", b"\0", b"7") or sparse:
            skipped["links or sparse files in a tar, which hold no picture or text to read"] += 1
        elif name.rpartition(b"/")[2].startswith(b"._"):
            skipped[FORKS] += 1
        elif body + length > size:
            skipped["cut off by the end of a shard"] += 1
        else:
            last = (name, body, length)
            found.append(last)
    if not any_header and not ended:
        raise ValueError("no tar header in it")
    if not ended:
        skipped[NO_END] += 1
    return found


# ----------------------------------------------------------------------------------------------------------- the index
def scan(path: str) -> Index:
    """Read a tar's headers. OSError if it cannot be read, ValueError if it is no tar."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe of that name must not block
    try:
        stat = os.fstat(fd)
        if not stat.st_size:
            raise ValueError("empty file")
        skipped: Counter = Counter()
        files = members(fd, stat.st_size, skipped)
    finally:
        os.close(fd)
    split = [(name.rpartition(b"."), place) for name, *place in files]
    grouped, pairs = group(((key, suffix.lower().decode("latin-1"), place) for (key, _, suffix), place in split), skipped)
    rows = np.array([[n for place in row for n in place or (0, 0)] for row in grouped], np.int64).reshape(-1, 6)
    if (missing := expected(path) - len(rows)) > 0:
        skipped[MISSING] += missing
    crc = zlib.crc32(b"\0".join(name for name, *_ in files), zlib.crc32(rows))
    return Index({"version": VERSION, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "pairs": pairs, "skipped": dict(skipped), "crc": crc}, rows)


def expected(path: str) -> int:
    """How many samples img2dataset says it has put in a tar, 0 if it does not say: the only witness of lost ends."""
    try:
        with open(path.removesuffix(".tar") + "_stats.json", encoding="utf-8") as f:
            return int(json.load(f)["successes"])
    except (OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError):
        return 0


def recall(path: str, rows: bool = False) -> Index | None:
    """The index that lies beside a tar, None if there is none, or it is damaged, of another tar or of other rules."""
    try:
        stat = os.stat(path)
        with np.load(path + SUFFIX, allow_pickle=False) as f:
            meta = json.loads(f["meta"].tobytes())
            now = {"version": VERSION, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
            if {k: meta.get(k) for k in now} != now:
                return None
            table = f["rows"] if rows else None
        counts = [meta["crc"], *meta["skipped"].values(), *(n for t in TEXTS for n in meta["pairs"][t])]
        whole = table is None or (table.dtype == np.int64 and table.shape[1:] == (6,))
        return Index(meta, table) if whole and all(isinstance(n, int) and n >= 0 for n in counts) else None
    except (OSError, ValueError, LookupError, EOFError, TypeError, AttributeError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error):
        return None


def remember(path: str, index: Index) -> None:
    """Write an index beside its tar, whole or not at all. OSError where the folder does not take it."""
    if not os.stat(os.path.dirname(path) or ".").st_mode & 0o222:
        raise PermissionError(errno.EACCES, "write-protected")  # which would not stop root, as whom containers run
    part = f"{path}{SUFFIX}.{uuid.uuid4().hex}.part"
    try:
        with open(part, "wb") as f:
            np.savez_compressed(f, meta=np.frombuffer(json.dumps(index.meta).encode(), np.uint8), rows=index.rows)
        os.replace(part, path + SUFFIX)
    finally:
        if os.path.exists(part):
            os.remove(part)


def index(path: str) -> Index | OSError | ValueError:
    """A tar's index, made if it must be; its rows are left out if they lie on the disk. A tar that cannot be read gives
    the reason."""
    try:
        if found := recall(path):
            return found
        made = scan(path)
    except (OSError, ValueError) as problem:
        return problem
    try:
        remember(path, made)
    except OSError:
        return made
    return Index(made.meta, None)


def index_all(paths: list[str]) -> list[Index | OSError | ValueError]:
    """`index` of many tars, by threads. Their order is drawn anew by each process, so that machines which begin
    together mostly find the work of the others done."""
    turn = random.SystemRandom().sample(paths, len(paths))
    with ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1)), thread_name_prefix="index") as pool:
        found = dict(zip(turn, tqdm(pool.map(index, turn), total=len(turn), desc="indexing tars", unit=" tars", delay=1, leave=False)))
    kept = [p for p in paths if isinstance(found[p], Index) and found[p].rows is not None]
    if kept:
        print(f"beside {os.fsencode(kept[0]).decode('utf-8', 'replace')} no index of a tar can be written: "
              f"{len(kept)} of them are kept in memory, and made anew at each start", flush=True)
    return [found[p] for p in paths]


# --------------------------------------------------------------------------------------------------------------- reading
def read_span(path: str, begin: int, end: int) -> bytes:
    """The bytes begin..end of a file, fewer where it ends before. OSError if they cannot be read."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe of that name must not block
    try:
        parts = []
        while begin < end and (part := os.pread(fd, end - begin, begin)):  # the system may return less than asked for
            parts.append(part)
            begin += len(part)
        return b"".join(parts)
    finally:
        os.close(fd)


class SpanCache:
    """Spans of files in memory, together `limit` bytes at most: the one used longest ago is dropped first.
    Threads that want the same span wait for one read of it."""

    def __init__(self, limit: int):
        self.limit, self.held, self.lock = limit, 0, threading.Lock()
        self.spans: OrderedDict[tuple[str, int, int], Future] = OrderedDict()

    def read(self, path: str, begin: int, end: int) -> bytes:
        """As `read_span`. A span that could not be read is not kept."""
        key = path, begin, end
        with self.lock:
            span = self.spans.get(key)
            missing = span is None
            if missing:
                span = self.spans[key] = Future()
                self.held += end - begin
                while self.held > self.limit and len(self.spans) > 1:
                    self.drop(next(iter(self.spans)))
            else:
                self.spans.move_to_end(key)
        if missing:
            try:
                span.set_result(read_span(path, begin, end))
            except BaseException as problem:
                with self.lock:
                    if self.spans.get(key) is span:
                        self.drop(key)
                span.set_exception(problem)
        return span.result()

    def drop(self, key: tuple[str, int, int]) -> None:
        """Forget a span; the lock is held."""
        del self.spans[key]
        self.held -= key[2] - key[1]


if __name__ == "__main__":
    import sys
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python shards.py TAR...")
    for name, one in zip(sys.argv[1:], index_all(sys.argv[1:])):
        if isinstance(one, Index):
            with_text = ", ".join(f"{counts[0]:,} with a .{text}" for text, counts in one.meta["pairs"].items())
            print(f"{name}: {with_text}; skipped: {one.meta['skipped'] or 'none'}")
        else:
            print(f"{name}: {getattr(one, 'strerror', None) or one}")

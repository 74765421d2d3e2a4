"""TODO."""
import os
from collections import Counter

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
TEXT_SUFFIXES = ("txt", "json")
BLOCK_BYTES = 512
DAMAGED = "damaged places in shards (what lies around them is used)"
NO_END = "shards without an end mark (cut off or damaged; what could be read is used)"
FORKS = "notes that macOS keeps beside a file (._NAME)"


def parse_number(field: bytes) -> int:
    """A number of a header: octal digits, or big-endian bytes behind 0x80. ValueError if neither."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    return int(field.partition(b"\0")[0].strip() or b"0", 8)


def parse_header(block: bytes) -> tuple[bytes, int, bytes] | None:
    """(name, bytes, type) of a header, or None where the checksum says that it is none."""
    try:
        if len(block) < BLOCK_BYTES or parse_number(block[148:156]) != sum(block) - sum(block[148:156]) + 8 * ord(" "):
            return None
        size = parse_number(block[124:136])
    except ValueError:
        return None
    name, prefix = block[:100].partition(b"\0")[0], block[345:500].partition(b"\0")[0]
    if prefix and block[257:263] == b"ustar\0":
        name = prefix + b"/" + name
    return (name, size, block[156:157]) if size >= 0 else None


def parse_pax(data: bytes) -> dict[bytes, bytes]:
    """The records 'LENGTH KEY=VALUE\\n' of an extended header; what cannot be read ends them."""
    told, at = {}, 0
    while (space := data.find(b" ", at, at + 20)) > at and data[at:space].isdigit():
        end = at + int(data[at:space])
        if not space + 2 <= end <= len(data):
            break
        key, _, value = data[space + 1:end - 1].partition(b"=")
        told[key], at = value, end
    return told


def find_next_header(fd: int, at: int) -> int | None:
    """Where the next good header begins, at `at` or later, on any byte; None if there is none. Its magic is looked for
    first, which is quick."""
    step = 1 << 13
    while chunk := os.pread(fd, step + BLOCK_BYTES, at):
        place = -1
        while (place := chunk.find(b"ustar", place + 1)) >= 0:
            start = at + place - 257
            if place >= 257 and start + BLOCK_BYTES <= at + len(chunk) and parse_header(chunk[place - 257:place - 257 + BLOCK_BYTES]):
                return start
        at, step = at + step, min(2 * step, 1 << 20)  # overlapping by a header
    return None


def skip_zero_blocks(fd: int, at: int) -> int:
    """The first block from `at` on that is not all zeros: most often the end of the file."""
    step = BLOCK_BYTES
    while chunk := os.pread(fd, step, at):
        if rest := len(chunk.lstrip(b"\0")):
            return at + (len(chunk) - rest) // BLOCK_BYTES * BLOCK_BYTES
        at, step = at + len(chunk), min(2 * step, 1 << 20)
    return at


def list_members(fd: int, size: int, skipped: Counter) -> list[tuple[bytes, int, int]]:
    """(name, offset, bytes) of a tar's images and texts. What is damaged, cut off or no plain file is counted.
    ValueError if there is no header in the whole file."""
    found: list[tuple[bytes, int, int]] = []
    told: dict[bytes, bytes] = {}   # what an extended header says of the next member
    at, body, ended, any_header = 0, 0, False, False
    last = None                     # the member before, if it is in `found`: it is taken back if another begins inside it
    while at < size:
        block = os.pread(fd, BLOCK_BYTES, at)
        if not block.strip(b"\0"):  # the end mark; behind it may stand another tar, or what a hole has left
            at = body = skip_zero_blocks(fd, at)
            ended, last, told = True, None, {}
            continue
        head = parse_header(block)
        length = head[1] if head else 0
        if (size_told := told.get(b"size", b"")).isdigit() and len(size_told) < 20:
            length = int(size_told)
        if head is None or at + BLOCK_BYTES + length > size:  # a size may be wrong too: so look on from the last good header, not from where it led
            there = find_next_header(fd, body if head is None else at + BLOCK_BYTES)
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
        body = at + BLOCK_BYTES
        if kind in b"123456":       # links, devices, folders: no data stands behind their headers
            length = 0
        at, ended, last = body + (length + BLOCK_BYTES - 1) // BLOCK_BYTES * BLOCK_BYTES, False, None
        if kind in (b"x", b"L", b"K", b"g"):
            data = os.pread(fd, min(length, 1 << 20), body)
            told |= parse_pax(data) if kind == b"x" else {b"path": data.rstrip(b"\0")} if kind == b"L" else {}
            continue
        sparse, told = kind == b"S" or any(k.startswith(b"GNU.sparse") for k in told), {}
        _, dot, suffix = name.rpartition(b".")
        if not dot or suffix.lower().decode("latin-1") not in IMAGE_SUFFIXES + TEXT_SUFFIXES or kind == b"5":
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

"""Passes on what C++ writes to a process's error stream, until it tells of a lost process: from then on to a file.

jax ends a process from C++ when another one is lost, and writes a long trace of its functions. The terminal gets a sentence instead, and
the file gets everything: what the terminal has had, the trace, and all that comes after it. Used by runtime/devices.py, which starts

    python stderr_filter.py SENTENCE FILE        the file is made when it is needed, or a temporary one where it cannot be made
"""
import collections
import sys
import tempfile
from typing import BinaryIO

LOST = (b"error from coordination service", b"fatal errors")  # what jax's diagnosis of a lost process contains
KEPT = 10_000  # lines before it that the file gets too


def open_log(path: str) -> tuple[BinaryIO, str]:
    """(the file, its path), or a temporary one where the folder does not exist or cannot be written."""
    try:
        return open(path, "ab"), path
    except OSError:
        descriptor, path = tempfile.mkstemp(prefix="stderr-", suffix=".txt")
        return open(descriptor, "ab"), path


def write(file: BinaryIO, data: bytes) -> None:
    file.write(data)
    file.flush()


def main(sentence: str, path: str) -> None:
    """Until the error stream ends, which it does with the process that writes it."""
    terminal, log = sys.stderr.buffer, None
    before: collections.deque[bytes] = collections.deque(maxlen=KEPT)
    for line in sys.stdin.buffer:
        if log is None and any(mark in line for mark in LOST):
            log, path = open_log(path)
            write(terminal, f"error: {sentence}. What jax said is in {path}\n".encode())
            line = b"".join(before) + line
        before.append(line)
        try:
            write(log or terminal, line)
        except OSError:  # a full disk: better here than nowhere
            write(terminal, line)


if __name__ == "__main__":
    main(*sys.argv[1:])

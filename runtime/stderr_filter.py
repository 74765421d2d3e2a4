"""Passes on a process's error stream until JAX reports a lost process; from then on to a log file.

When a process is lost, JAX ends the others from C++ with a long stack trace. This filter prints one
sentence instead. The log file gets everything: the lines before, the trace, and all that follows.
runtime/distributed.py starts it as

    python stderr_filter.py SENTENCE FILE      FILE is created when it is needed, or a temporary one
                                               where it cannot be created
"""
import collections
import sys
import tempfile
from typing import BinaryIO

LOST = (b"error from coordination service", b"fatal errors")  # in JAX's report of a lost process
LINES_BEFORE = 10_000  # lines before the report that the log file gets too


def open_log(path: str) -> tuple[BinaryIO, str]:
    """(the log file, its path); a temporary one if the folder is missing or cannot be written."""
    try:
        return open(path, "ab"), path
    except OSError:
        descriptor, path = tempfile.mkstemp(prefix="stderr-", suffix=".txt")
        return open(descriptor, "ab"), path


def write(file: BinaryIO, data: bytes) -> None:
    file.write(data)
    file.flush()


def main(sentence: str, path: str) -> None:
    """Runs until the error stream ends, which it does with the process that writes it."""
    terminal, log = sys.stderr.buffer, None
    before: collections.deque[bytes] = collections.deque(maxlen=LINES_BEFORE)
    for line in sys.stdin.buffer:
        if log is None and any(mark in line for mark in LOST):
            log, path = open_log(path)
            write(terminal, f"error: {sentence}. What jax said is in {path}\n".encode())
            line = b"".join(before) + line
        before.append(line)
        try:
            write(log or terminal, line)
        except OSError:  # the disk is full
            write(terminal, line)


if __name__ == "__main__":
    main(*sys.argv[1:])

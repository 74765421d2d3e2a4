"""What a user can do wrong, and how a command says so: one sentence, and a non-zero exit status."""
import errno
import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """The message names the file or flag, and says what to do."""


class ConfigError(UserError):
    """A setting is impossible."""


class DataError(UserError):
    """The data cannot be used at all."""


class BadSample(UserError):
    """One sample cannot be used; the message says why."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or not of this model."""


class DistributedError(UserError):
    """The processes cannot work together, or one of them failed."""


class TrainingError(UserError):
    """Training cannot go on."""


class LayoutError(UserError):
    """Arrays are not those of this encoder in any known layout."""


class ConvertError(UserError):
    """A file cannot be read, or an encoder cannot become what is wanted."""


class MissingExtra(UserError):
    """An optional package is not installed; the message names the extra."""


DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def run_command(main: Callable[[list[str]], int], argv: list[str]) -> int:
    """main(argv), with the user's mistakes reported as one line on stderr. Returns the status."""
    try:
        return main(argv)
    except UserError as problem:
        print(f"error: {problem}", file=sys.stderr)
    except OSError as problem:
        if problem.strerror is None:
            raise
        advice = ""
        if problem.errno in DISK_FULL:
            advice = ": make room, and the same command continues from the last checkpoint"
        name = os.fspath(problem.filename) if problem.filename else "output"
        print(f"error: {name}: {problem.strerror}{advice}", file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 1

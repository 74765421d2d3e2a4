"""What a user can do wrong, and how a command says so: one sentence, and a non-zero exit status."""
import argparse
import difflib
import errno
import os
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn


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


def first_problems(problems: list[str], limit: int) -> str:
    """The first problems of a list, and how many more there are."""
    more = [f"and {len(problems) - limit} more"] if len(problems) > limit else []
    return "; ".join(problems[:limit] + more)


def check_output_file(flag: str, path: str) -> None:
    """ConfigError if a file cannot be written where `flag` says. "" is no file."""
    if path and os.path.isdir(path):
        raise ConfigError(f"{flag} {path} is a folder: name a file")
    if path and not os.access(os.path.dirname(os.path.abspath(path)), os.W_OK):
        raise ConfigError(f"{flag} {path}: its folder does not exist or cannot be written")


class CommandParser(argparse.ArgumentParser):
    """Of a command line. What cannot be parsed gets one sentence and exit status 2, without the
    usage lines, which -h prints. Flags must be spelled out."""

    def __init__(self, **settings: Any):
        super().__init__(allow_abbrev=False, **settings)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Expands ~/ where the shell does not, as in --data=~/a.tar,~/b.tar. Refuses an unknown
        flag first, because argparse takes its value for a word of its own."""
        home = os.path.join(os.path.expanduser("~"), "")
        words = [re.sub("(?<![^=,])~/", lambda _: home, word) for word in args or ()]
        flags = self._option_string_actions
        for word in words:
            name = word.partition("=")[0]
            if not self._subparsers and name[:2] == "--" != name and name not in flags:
                close = difflib.get_close_matches(name[2:], [flag[2:] for flag in flags], 1)
                advice = f": is --{close[0]} meant?" if close else ""
                self.error(f"unknown flag {name}{advice}")
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} ({self.prog} -h lists what can be given)\n")


# Of the machine or a file server: a later attempt may succeed, so they say nothing about a file.
PASSING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT)
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def raise_passing(problem: Exception, name: str) -> None:
    """DataError if an error is one of PASSING: a file must not be left out because of it."""
    if isinstance(problem, OSError) and problem.errno in PASSING:
        raise DataError(f"{name} cannot be read ({problem.strerror}): start the same command "
                        "again, which continues from the last checkpoint") from None


def run_command(command: Callable[[Any], int], args: Any) -> int:
    """command(args), its exit status; a user's mistake becomes one line on stderr and status 1."""
    try:
        return command(args)
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

"""Parts of files on web servers, by the standard library alone.

Every request asks for a range of bytes, and the answer must be that range. A server that ignores
ranges would send the complete file, of which nothing is read then.

Source: RFC 9110, sections 13 (versions), 14 (ranges) and 15 (status codes).
"""
import http.client
import re
import socket
import string
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import NamedTuple

SILENCE_SECONDS = 20       # without a byte, after which a request has failed
CHUNK_BYTES = 1 << 16
PASSING = {408, 425, 429}  # and all from 500 on: status codes of states that pass


class Info(NamedTuple):
    """Of a file: its bytes, and what changes when its content does ("" where nothing is known)."""
    size: int
    version: str


class Passing(Exception):
    """A failure that a later attempt may not meet."""


class Refused(Exception):
    """A failure that stays: the message says what to do."""


STATUS_ADVICE = {
    401: "it asks for a login", 403: "access is forbidden: check the address and your rights",
    404: "nothing of that name exists", 410: "it is gone",
    416: "it is shorter than it was: it has changed since it was opened, start again"}


def fetch(url: str, begin: int, end: int, deadline: float) -> tuple[bytes, Info]:
    """The bytes begin..end of a file (at least one), and what the file is; of an empty file none.
    `deadline` is a value of time.monotonic(). Raises Passing or Refused."""
    headers = {"Range": f"bytes={begin}-{end - 1}", "User-Agent": "openvision2",
               "Accept-Encoding": "identity"}
    address = urllib.parse.quote(url, safe=string.punctuation)  # spaces, letters beyond ASCII
    request = urllib.request.Request(address, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=SILENCE_SECONDS) as answer:
            info = check_answer(answer, begin)
            return read_body(answer, min(end, info.size) - begin, deadline), info
    except urllib.error.HTTPError as problem:
        if problem.headers.get("Content-Range", "").strip() == "bytes */0":  # with status 416
            return b"", Info(0, "")
        if problem.code in PASSING or problem.code >= 500:
            raise Passing(f"status {problem.code}") from None
        raise Refused(STATUS_ADVICE.get(problem.code, f"status {problem.code}")) from None
    except (ValueError, http.client.InvalidURL) as problem:  # of an address
        raise Refused(str(problem)) from None
    except (OSError, http.client.HTTPException) as problem:
        cause = getattr(problem, "reason", problem)
        if isinstance(cause, socket.gaierror):
            raise Passing(f"the server's name is not found ({cause.strerror})") from None
        raise Passing(str(cause) or type(cause).__name__) from None


def check_answer(answer: http.client.HTTPResponse, begin: int) -> Info:
    """What the file is, by an answer's headers. Refused unless it is the range asked for."""
    content_range = answer.headers.get("Content-Range", "")
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", content_range.strip())
    if answer.status != 206 or not match or int(match[1]) != begin:
        raise Refused("its server ignores requests for a part of a file: download it and name the "
                      "local files, or use a server that knows ranges")
    version = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
    return Info(int(match[2]), version)


def read_body(answer: http.client.HTTPResponse, size: int, deadline: float) -> bytes:
    """`size` bytes. Passing if the server sends fewer, or is too slow."""
    parts, missing = [], size
    while missing > 0:
        if time.monotonic() > deadline:
            raise Passing("it sends too slowly")
        part = answer.read1(min(CHUNK_BYTES, missing))
        if not part:
            raise Passing(f"the connection ended {missing} bytes early")
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)

"""Files in buckets and on web servers: lists of them, their sizes, and ranges of their bytes.

https:// needs no package; gs://, s3://, hf:// and others go through fsspec (extra `remote`). Each
request has a time limit and is repeated after failures that may pass. When it fails for good, that
is a DataError, which ends the run: no sample is lost in silence, and the run can be continued. An
object that is replaced during a run is noticed, because its version is compared after each request.
"""
import functools
import glob
import importlib
import time
from collections.abc import Callable
from typing import Any

from inputs import http_ranges
from inputs.http_ranges import Info, Passing, Refused
from runtime.errors import DataError, MissingExtra

WAITS = (0.5, 1, 2, 4, 8, 16)  # seconds before each repetition: seven attempts in all
REQUEST_SECONDS = 60           # of one attempt
PIECE_BYTES = 8 << 20          # of a request, when a complete file is copied
PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "hf": "huggingface_hub"}
CAT_OPTIONS = {"hf": {"cache_type": "none"}}  # or each read fetches 5 MB more than it needs
VERSIONS = ("ETag", "etag", "generation", "blob_id", "md5Hash", "mtime", "created", "LastModified")


def scheme(url: str) -> str:
    return url.partition("://")[0]


def is_http(url: str) -> bool:
    return scheme(url) in ("http", "https")


# ---------------------------------------------------------------------------- file systems
@functools.cache
def filesystem(protocol: str) -> Any:
    """fsspec's file system. MissingExtra without its package, DataError if it cannot be opened."""
    try:
        fsspec = importlib.import_module("fsspec")
        return fsspec.filesystem(protocol, use_listings_cache=False)
    except (ImportError, ValueError) as problem:
        if isinstance(problem, ValueError) and "not known" in str(problem):
            raise DataError(f"{protocol}:// is no kind of address that can be read: "
                            "take https, gs, s3 or hf") from None
        package = PACKAGES.get(protocol, "fsspec")
        raise MissingExtra(f"{protocol}:// needs {package} ({problem}): pip install -e '.[remote]'"
                           ) from None


def call(protocol: str, name: str, *args: Any, seconds: float | None = None,
         **options: Any) -> Any:
    """A method of a file system, within `seconds` (REQUEST_SECONDS) where it is asynchronous."""
    fs = filesystem(protocol)
    if getattr(fs, "async_impl", False):
        sync = importlib.import_module("fsspec.asyn").sync
        return sync(fs.loop, getattr(fs, f"_{name}"), *args, timeout=seconds or REQUEST_SECONDS,
                    **options)
    return getattr(fs, name)(*args, **options)


@functools.cache
def newest_commit(repo_type: str, repo_id: str, revision: str) -> str:
    api = importlib.import_module("huggingface_hub").HfApi()
    return api.repo_info(repo_id, repo_type=repo_type, revision=revision).sha


def at_commit(url: str) -> str:
    """An hf:// address at the commit that is the newest when it is first asked for. So a run reads
    one version of a data set, also when another one is uploaded meanwhile."""
    if scheme(url) != "hf":
        return url
    place = filesystem("hf").resolve_path(url)
    if not hasattr(place, "repo_id"):  # one of the hub's buckets, which have no commits
        return url
    commit = newest_commit(place.repo_type, place.repo_id, place.revision)
    place = type(place)(place.repo_type, place.repo_id, commit, place.path_in_repo)
    return f"hf://{place.unresolve()}"


def classify(problem: Exception) -> Exception:
    """Passing or Refused for what a file system raises."""
    code = getattr(problem, "code", None) or getattr(problem, "status", None)
    text = (str(problem).strip().splitlines() or [""])[0][:200] or type(problem).__name__
    if type(problem.__cause__ or problem).__name__ in ("RepositoryNotFoundError", "GatedRepoError"):
        return Refused("the hub has no such repository, or only for those with access: check the "
                       "name, or log in with hf auth login")
    if isinstance(problem, FileNotFoundError) or str(code) == "404":
        return Refused(http_ranges.STATUS_ADVICE[404])
    if "Credential" in type(problem).__name__ or "Credential" in text:
        return Refused(f"no credentials were found ({text}): log in with the tool of your cloud")
    if isinstance(problem, PermissionError) or str(code) in ("401", "403"):
        return Refused(f"access is forbidden ({text}): check your credentials")
    if "InvalidRange" in text or "range not satisfiable" in text.lower() or str(code) == "416":
        return Refused(http_ranges.STATUS_ADVICE[416])
    return Passing(text)


def with_retries(url: str, attempt: Callable[[], Any], use: str = "read") -> Any:
    """attempt(), repeated while its failure may pass. DataError in the end. use: what for."""
    for wait in (*WAITS, None):
        try:
            return attempt()
        except (DataError, MissingExtra):
            raise
        except Exception as problem:  # the clouds' libraries raise many types
            if not isinstance(problem, (Passing, Refused)):
                problem = classify(problem)
            if isinstance(problem, Refused):
                raise DataError(f"{url} cannot be {use}: {problem}") from None
            if wait is None:
                raise DataError(f"{url} cannot be {use}, after {len(WAITS) + 1} attempts: {problem}"
                                "; a run continues from its last checkpoint") from None
        time.sleep(wait)


# ------------------------------------------------------------------------------- requests
def file_info(url: str) -> Info:
    """Size and version. DataError if there is no such file, or it cannot be reached."""
    def attempt() -> Info:
        if is_http(url):
            return http_ranges.fetch(url, 0, 1, time.monotonic() + REQUEST_SECONDS)[1]
        details = call(scheme(url), "info", at_commit(url))
        if details.get("type") == "directory":
            raise Refused("it is a folder: name files, as 'FOLDER/*.tar' or 'FOLDER/*.parquet'")
        known = [str(details[name]) for name in VERSIONS if details.get(name)]
        return Info(int(details["size"]), known[0] if known else "")
    return with_retries(url, attempt)


def fetch(url: str, begin: int, end: int, info: Info) -> bytes:
    """The bytes begin..end of a file that `info` is of. DataError if it has changed."""
    end = min(end, info.size)
    if begin >= end:
        return b""

    def attempt() -> bytes:
        if is_http(url):
            deadline = time.monotonic() + REQUEST_SECONDS
            data, now = http_ranges.fetch(url, begin, end, deadline)
        else:
            options = CAT_OPTIONS.get(scheme(url), {})
            data = call(scheme(url), "cat_file", at_commit(url), start=begin, end=end, **options)
            now = file_info(url)
        if now != info:
            raise Refused("it has changed since it was opened: start again")
        if len(data) != end - begin:
            raise Passing(f"{len(data)} bytes came, not {end - begin}")
        return data
    return with_retries(url, attempt)


def matching_urls(patterns: list[str]) -> list[str]:
    """The files of addresses and globs, sorted. An address without a glob need not exist."""
    urls: set[str] = set()
    for pattern in patterns:
        protocol = scheme(pattern)
        if is_http(pattern):
            if "*" in pattern:
                raise DataError(f"{pattern}: a web server lists no files: name them in braces, as "
                                "{00000..00011}")
            urls.add(pattern)
        elif not glob.has_magic(pattern):
            urls.add(pattern)
        else:
            names = with_retries(pattern, functools.partial(call, protocol, "glob", pattern))
            urls.update(f"{protocol}://{name.partition('://')[2] or name}" for name in names)
    return sorted(urls)

"""Data at hf:// addresses, from an imitation of the hub on this machine."""
import os
import shutil

import numpy as np
import pytest

from inputs import remote
from inputs.sources import open_source
from runtime.errors import DataError
from tests.remote.test_buckets import batches, files  # noqa: F401


@pytest.fixture
def repo(hub, files, tmp_path, monkeypatch):  # noqa: F811
    """The folder of a new data set `owner/set` at the hub."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "WAITS", (0.01,))
    shutil.rmtree(hub.folder)
    for cached in (remote.filesystem, remote.newest_commit):
        cached.cache_clear()
    remote.filesystem("hf").invalidate_cache()
    hub.newest = "1" * 40
    folder = os.path.join(hub.folder, hub.newest, "owner", "set", "data")
    shutil.copytree(files, folder)
    hub.requests.clear()
    return folder


def assert_same(first, second):
    for a, b in zip(first, second, strict=True):
        assert all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_the_hub_gives_the_batches_of_local_files(hub, repo, kind):
    local = open_source(f"{repo}/*.{kind}")
    for names in ("**/*", "data/*", "data/{0..2}"):
        source = open_source(f"hf://datasets/owner/set/{names}.{kind}")
        assert source.fingerprint() == local.fingerprint()
        assert_same(batches(source), batches(local))
    sizes = [os.path.getsize(f"{repo}/{n}.{kind}") for n in range(3)]
    read = sum(end - begin for _, begin, end in hub.requests)
    assert read < 3 * sum(sizes)  # tars once, parquet with its footers and captions


def test_a_run_reads_the_commit_of_its_start(hub, repo):
    where = "hf://datasets/owner/set/data/*.tar"
    expected = batches(open_source(f"{repo}/*.tar"))
    source = open_source(where)
    shutil.rmtree(os.environ["XDG_CACHE_HOME"])
    source.span_cache.spans.clear()
    newer = os.path.join(hub.folder, "2" * 40, "owner", "set", "data")
    shutil.copytree(repo, newer, ignore=shutil.ignore_patterns("*.npz"))  # indexes
    shutil.copy(f"{newer}/1.tar", f"{newer}/0.tar")
    hub.newest = "2" * 40
    assert_same(batches(source), expected)
    remote.newest_commit.cache_clear()  # as in a new process
    assert open_source(where).fingerprint() != source.fingerprint()


@pytest.mark.parametrize("where, message", [
    ("owner/none/*.tar", "the hub has no such repository"), ("closed/set/*.tar", "hf auth login"),
    ("owner/set/9.tar", "nothing of that name"), ("owner/set/none/*.tar", "no file matches")])
def test_what_is_missing_is_one_sentence(repo, where, message):
    with pytest.raises(DataError, match=message) as problem:
        open_source(f"hf://datasets/{where}")
    assert "\n" not in str(problem.value)

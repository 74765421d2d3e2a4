"""What the local cache keeps and when it is stale, and samples that are fetched ahead."""
import os
from types import SimpleNamespace

from inputs import remote_storage
from inputs.disk_cache import DiskCache
from inputs.files import ReadOptions
from inputs.http_ranges import Info
from inputs.remote_storage import FetchAhead, RemoteStorage
from inputs.sources import open_source
from tests.inputs.test_parquet import row, write


def test_the_least_recently_used_entry_is_deleted(tmp_path):
    cache = DiskCache(str(tmp_path), 3000)
    for n, key in enumerate("abc"):
        path = cache.get(key, lambda file: file.write(bytes(900)))
        os.utime(path, (n, n))
    assert cache.find("a")  # it now counts as used last
    cache.get("d", lambda file: file.write(bytes(900)))
    assert [bool(cache.find(key)) for key in "abcd"] == [True, False, True, True]


def test_spans_of_a_remote_file_follow_its_version(tmp_path, monkeypatch):
    for version, content in (("1", b"old!"), ("2", b"new!")):
        monkeypatch.setattr(remote_storage, "fetch",
                            lambda url, begin, end, info, c=content: c[begin:end])
        monkeypatch.setattr(remote_storage, "file_info", lambda url, v=version: Info(4, v))
        storage = RemoteStorage(ReadOptions(cache_dir=str(tmp_path)))
        assert storage.read_span("s3://b/a", 0, 4) == content


def test_groups_of_a_parquet_file_follow_its_content(tmp_path):
    options = ReadOptions(cache_dir=str(tmp_path / "cache"))
    for caption in ("a cat 2", "a dog 2"):
        rows = [row(i) | ({"caption": caption} if i == 2 else {}) for i in range(5)]
        source = open_source(write(tmp_path / "a.parquet", rows), "caption", options=options)
        assert source.sample(2, [""], lambda n: 0)[0] == [caption]


def test_each_sample_is_fetched_ahead_once():
    fetched = []
    source = SimpleNamespace(prefetch_sample=lambda i, with_chunk: fetched.append(i))
    ahead = FetchAhead(source, lambda position: position, True)
    ahead.request(range(0, 8))
    ahead.request(range(8, 16))
    ahead.pool.shutdown(wait=True)
    assert len(fetched) == len(set(fetched))
    assert max(fetched) >= 15 + 512

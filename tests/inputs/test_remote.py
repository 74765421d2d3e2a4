"""Tars and parquet by address: the same samples as from local files, each byte fetched once, and a
server's faults are survived or stop the run with one sentence. No sample is ever lost."""
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from inputs import http_ranges, order, remote, remote_storage, tar_index, tars
from inputs.disk_cache import DiskCache
from inputs.files import ReadOptions, open_storage
from inputs.sources import Subset, open_source
from runtime.errors import DataError
from tests.helpers.paths import ROOT
from tests.helpers.samples import members, put, reader, sample
from tests.helpers.web import serve

TARS = "{00000..00003}.tar"


@pytest.fixture(autouse=True)
def settings(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "WAITS", (0.01, 0.01))
    monkeypatch.setattr(remote, "REQUEST_SECONDS", 5)
    monkeypatch.setattr(http_ranges, "SILENCE_SECONDS", 0.3)
    remote.filesystem.cache_clear()


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "www"
    folder.mkdir()
    for n in range(4):
        put(folder / f"{n:05}.tar", members(15, start=15 * n))
        rows = [{"image": {"bytes": sample(i)["jpg"], "path": ""}, "txt": f"a cat {i}"}
                for i in range(15 * n, 15 * n + 15)]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{n:05}.parquet")
    with serve(folder) as running:
        yield running


def batches(source, count=2):
    """The batches of two epochs, as training reads them."""
    loader = reader(source)
    n = len(source)
    requests = [(range(k * n, k * n + n), 8) for k in range(count)]
    batches = loader.prefetch_batches(requests, lambda batch: batch)
    read = [batch for batch, bad in batches if not bad]
    assert len(read) == count
    return read


def assert_same(first, second):
    for a, b in zip(first, second):
        assert all(np.array_equal(a[name], b[name]) for name in a)


def memory_copy(server):
    """The same files at memory://."""
    fs = remote.filesystem("memory")
    for name in os.listdir(server.folder):
        with open(os.path.join(server.folder, name), "rb") as file:
            fs.pipe_file(f"/www/{name}", file.read())
    return fs


# ------------------------------------------------------------------------------ what is read
def test_an_address_may_have_spaces_and_any_letters(server):
    folder = os.path.join(server.folder, "größere Bilder")
    os.mkdir(folder)
    shutil.copy(os.path.join(server.folder, "00000.tar"), folder)
    local = open_source(os.path.join(folder, "00000.tar"))
    for name in ("größere Bilder", "gr%C3%B6%C3%9Fere%20Bilder"):
        source = open_source(f"{server.url}/{name}/{{00000..00000}}.tar")
        assert_same(batches(source, 1), batches(local, 1))


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_local_files_web_servers_and_buckets_give_the_same_batches(server, kind):
    memory_copy(server)
    local = open_source(f"{server.folder}/*.{kind}")
    expected = batches(local)
    for where in (f"{server.url}/{{00000..00003}}.{kind}", f"memory://www/*.{kind}",
                  f"memory://www/0000{{0,1,2,3}}.{kind}", f"memory://www/0000?.{kind}"):
        source = open_source(where)
        assert source.fingerprint() == local.fingerprint()
        assert_same(batches(source), expected)


def fetched(server):
    """The parts of tars that were asked for, without the requests for what they are."""
    return [(path, begin, end) for path, begin, end in server.requests
            if path.endswith(".tar") and end - begin > 1]


def test_a_small_set_is_read_in_blocks_each_once(server, monkeypatch):
    monkeypatch.setattr(http_ranges, "SILENCE_SECONDS", 20)
    monkeypatch.setattr(remote_storage, "BLOCK_BYTES", 5000)
    tar_index.index_tars([f"{server.folder}/{n:05}.tar" for n in range(4)])
    source = open_source(f"{server.url}/{TARS}")
    assert_same(batches(source), batches(open_source(f"{server.folder}/*.tar")))
    parts = fetched(server)
    assert len(set(parts)) == len(parts) > 20
    assert all(begin % 5000 == 0 and end - begin <= 5000 for _, begin, end in parts)


def test_a_second_start_reads_from_the_cache_alone(server):
    where = f"{server.url}/{TARS}?token=1"
    first = batches(open_source(where))
    server.requests.clear()
    assert_same(batches(open_source(where)), first)
    assert all(end - begin == 1 for _, begin, end in server.requests)  # whether they have changed


@pytest.mark.parametrize("beside", [True, False])
def test_indexes_beside_the_tars_are_used(server, beside):
    paths = [f"{server.folder}/{n:05}.tar" for n in range(4)]
    if beside:
        tar_index.index_tars(paths)
    source = open_source(f"{server.url}/{TARS}")
    read = sum(end - begin for path, begin, end in server.requests if path.endswith(".tar"))
    total = sum(map(os.path.getsize, paths))
    assert read < total / 2 if beside else read >= total  # opening reads the first chunk
    assert_same(batches(source), batches(open_source(f"{server.folder}/*.tar")))


def test_indexes_are_beside_the_tars_also_where_addresses_have_a_query(server):
    paths = [f"{server.folder}/{n:05}.tar" for n in range(4)]
    for path in paths:
        with open(path.replace(".tar", "_stats.json"), "w") as file:
            file.write('{"successes": 16}')
    assert open_source(f"{server.url}/{TARS}?token=1").skipped[f"{tar_index.MISSING}, first "
                                                              f"{server.url}/00000.tar?token=1"]
    shutil.rmtree(os.environ["XDG_CACHE_HOME"])
    server.requests.clear()
    tar_index.index_tars(paths)
    open_source(f"{server.url}/{TARS}?token=1")
    read = sum(end - begin for path, begin, end in server.requests if ".tar?" in path)
    assert read < sum(map(os.path.getsize, paths)) / 2


def test_a_file_beside_a_tar_that_is_no_small_one_is_not_fetched(server, monkeypatch):
    """As where a server answers each address with the tar."""
    monkeypatch.setattr(remote_storage, "MAX_SMALL_BYTES", 1000)
    shutil.copy(f"{server.folder}/00000.tar", f"{server.folder}/00000.tar.index.npz")
    assert len(open_source(f"{server.url}/00000.tar")) == 15
    assert [end - begin for path, begin, end in server.requests if "index" in path] == [1]


def large_set(server, monkeypatch):
    """A source that is read as one of many gigabytes is."""
    monkeypatch.setattr(http_ranges, "SILENCE_SECONDS", 20)
    monkeypatch.setattr(remote_storage, "SMALL_SET_BYTES", 0)
    monkeypatch.setattr(tars, "MAX_SHUFFLE_BYTES", 1 << 16)
    monkeypatch.setattr(order, "NUM_LANES", 1)
    tar_index.index_tars([f"{server.folder}/{n:05}.tar" for n in range(4)])
    source = open_source(f"{server.url}/{TARS}")
    assert source.chunk_length > 1
    source.storage.pool.shutdown()  # it has fetched later captions
    server.requests.clear()
    return source


def test_a_large_set_is_fetched_in_chunks_and_each_byte_once(server, monkeypatch):
    read = batches(large_set(server, monkeypatch))
    assert sorted(read[0]["sample"].tolist()) == list(range(60))
    sizes = [end - begin for _, begin, end in fetched(server)]
    total = sum(os.path.getsize(f"{server.folder}/{n:05}.tar") for n in range(4))
    assert sum(sizes) < 1.3 * total
    assert len(sizes) < 60


def test_of_a_large_set_validation_fetches_its_samples_alone_and_once(server, monkeypatch):
    source = large_set(server, monkeypatch)
    loader = reader(Subset(source, np.arange(0, 60, 5)), augment=None)
    (_, bad), = loader.prefetch_batches([(range(12), 8)], lambda batch: batch)
    assert not bad and len(fetched(server)) == 12


def test_a_tiny_cache_costs_time_and_no_sample(server):
    source = open_source(f"{server.url}/{TARS}", options=ReadOptions(cache_gb=3e-5))
    assert_same(batches(source), batches(open_source(f"{server.folder}/*.tar")))
    assert sum(size for _, size, _ in source.storage.disk.entries()) < 80_000


def test_entries_above_the_limit_are_deleted_when_nobody_holds_them_any_more(tmp_path):
    cache = DiskCache(str(tmp_path), 1000)
    with cache.hold("a"), cache.hold("b"):
        for key in "ab":
            cache.get(key, lambda file: file.write(bytes(900)))
        assert len(cache.entries()) == 2
    assert len(cache.entries()) == 1


def test_damaged_and_vanishing_cache_files_are_made_again(server):
    """Cut off, as by a machine that stops; gone; and overwritten, where it is a part of a file."""
    where = f"{server.url}/{TARS}"
    tar_index.index_tars([f"{server.folder}/{n:05}.tar" for n in range(4)])
    expected = batches(open_source(where))
    def overwrite(path):
        with open(path, "r+b") as file:
            file.write(b"noise" * 9)
    for damage in (lambda path: os.truncate(path, 60), os.remove, overwrite):
        source = open_source(where)
        for _, _, path in source.storage.disk.entries():
            damage(path)
        assert_same(batches(source), expected)


def test_two_runs_may_delete_the_same_damaged_copy(server, monkeypatch):
    storage, url = open_storage(server.url), f"{server.url}/00000.tar"
    os.truncate(storage.local_copy(url), 60)
    getsize = os.path.getsize

    def lose(path):
        """As if another run were faster."""
        monkeypatch.setattr(os.path, "getsize", getsize)
        size = getsize(path)
        os.remove(path)
        return size
    monkeypatch.setattr(os.path, "getsize", lose)
    assert getsize(storage.local_copy(url)) == getsize(f"{server.folder}/00000.tar")


def test_two_runs_share_a_cache(server):
    def run(_):
        return batches(open_source(f"{server.url}/{TARS}"))
    with ThreadPoolExecutor(3) as pool:
        first, *others = pool.map(run, range(3))
    for other in others:
        assert_same(other, first)


def test_killed_while_caching(server, tmp_path):
    """SIGKILL at random moments: the next start reads the same samples."""
    code = ("import sys; from inputs.sources import open_source; "
            "source = open_source(sys.argv[1]); [source.image(i) for i in range(60)]")
    server.delay = 0.02
    where = f"{server.url}/{TARS}"
    for wait in (0.9, 1.1, 1.3):
        process = subprocess.Popen([sys.executable, "-c", code, where], cwd=ROOT)
        time.sleep(wait)
        process.kill()
        process.wait()
    server.delay = 0
    assert_same(batches(open_source(where)), batches(open_source(f"{server.folder}/*.tar")))


# ------------------------------------------------------------------------------------ faults
@pytest.mark.parametrize("kind", ["tar", "parquet"])
@pytest.mark.parametrize("fault", ["500", "503", "429", "408", "close", "reset", "silence"])
def test_a_fault_that_passes_costs_nothing(server, fault, kind):
    where = f"{server.url}/{{00000..00003}}.{kind}"
    expected = batches(open_source(f"{server.folder}/*.{kind}"), 1)
    server.misbehave(fault, times=2)
    source = open_source(where)
    server.misbehave(fault, times=2)
    assert_same(batches(source, 1), expected)
    assert server.remaining == 0 or source.storage.is_remote


STAYS = [
    ("401", "asks for a login"), ("403", "access is forbidden"), ("404", "nothing of that name"),
    ("410", "it is gone"), ("500", "after 3 attempts: status 500"),
    ("close", "after 3 attempts"), ("reset", "bytes early"), ("silence", "timed out"),
    ("no ranges", "ignores requests for a part of a file")]


@pytest.mark.parametrize("fault, message", STAYS)
def test_a_fault_that_stays_is_one_sentence_in_a_bounded_time(server, fault, message):
    kind = "tar" if fault in ("reset", "silence", "404") else "parquet"
    where = f"{server.url}/{{00000..00003}}.{kind}"
    start = time.monotonic()
    server.misbehave(fault, only="00002")
    with pytest.raises(DataError, match=message) as problem:
        open_source(where)
    assert "00002" in str(problem.value) and "\n" not in str(problem.value)
    server.misbehave("", 0)
    source = open_source(where)
    shutil.rmtree(os.environ["XDG_CACHE_HOME"])
    server.misbehave(fault, only="00002")
    with pytest.raises(DataError, match=message):
        batches(source)
    assert time.monotonic() - start < 25


def test_a_slow_trickle_ends_at_the_time_limit(server, monkeypatch):
    source = open_source(f"{server.url}/00000.tar")
    shutil.rmtree(os.environ["XDG_CACHE_HOME"])
    monkeypatch.setattr(remote, "REQUEST_SECONDS", 0.5)
    monkeypatch.setattr(remote, "WAITS", (0.01,))
    server.misbehave("trickle")
    start = time.monotonic()
    with pytest.raises(DataError, match="it sends too slowly"):
        source.image(0)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_an_object_that_is_replaced_during_a_run_stops_it(server, kind):
    memory_copy(server)
    sources = [open_source(f"{where}/00000.{kind}") for where in (server.url, "memory://www")]
    shutil.rmtree(os.environ["XDG_CACHE_HOME"])
    shutil.copy(f"{server.folder}/00001.{kind}", f"{server.folder}/00000.{kind}")
    memory_copy(server)
    for source in sources:
        source.span_cache.spans.clear()  # what opening has read
        with pytest.raises(DataError, match="has changed since it was opened"):
            batches(source)


def test_a_broken_tar_among_good_ones_is_counted(server):
    with open(f"{server.folder}/00002.tar", "wb") as file:
        file.write(b"no tar" * 99)
    source = open_source(f"{server.url}/{TARS}")
    assert len(source) == 45
    why, = source.skipped
    assert "00002.tar" in why


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_an_empty_file_on_a_web_server_is_counted_as_a_local_one(server, kind):
    with open(f"{server.folder}/00002.{kind}", "wb"):
        pass
    source = open_source(f"{server.url}/{{00000..00003}}.{kind}")
    local = open_source(f"{server.folder}/*.{kind}")
    assert len(source) == len(local) == 45
    assert [*source.skipped] == [why.replace(server.folder, server.url) for why in local.skipped]


def test_a_full_cache_disk_is_one_sentence(server, monkeypatch):
    source = open_source(f"{server.url}/{TARS}")
    shutil.rmtree(os.environ["XDG_CACHE_HOME"])

    def fail(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("inputs.disk_cache.os.replace", fail)
    with pytest.raises(DataError, match=r"is full: make room, or .*--cache-dir"):
        batches(source)


@pytest.mark.parametrize("where, message", [
    ("http://127.0.0.1:9/a.tar", "after 3 attempts"), ("https://x.example/*.tar", "lists no files"),
    ("memory://none/*.tar", "no file matches"), ("memory://none/a.tar", "nothing of that name"),
    ("nope://b/a.tar", "no kind of address"),
    ("https://127.0.0.1:80a/a.tar", "cannot be read: nonnumeric port"),
    ("http:///a.tar", "cannot be read")])
def test_wrong_addresses_are_one_sentence(where, message):
    with pytest.raises(DataError, match=message) as problem:
        open_source(where)
    assert "\n" not in str(problem.value)


def test_a_vocabulary_and_an_encoder_by_address(server):
    with open(f"{server.folder}/vocab.txt", "w") as file:
        file.write("\n".join(["[PAD]", "[unused0]", "a", "cat"]))
    for name in ("encoder.npz", "step-00000002.npz", "step-00000010.npz"):
        with open(f"{server.folder}/{name}", "w") as file:
            file.write(name)
    fs = memory_copy(server)
    storage = open_storage("memory://www")

    def text(path):
        with open(path) as file:
            return file.read()
    assert text(storage.local_copy(f"{server.url}/vocab.txt")).endswith("cat")
    assert text(storage.encoder_copy("memory://www/")) == "encoder.npz"
    assert text(storage.encoder_copy("memory://www/step-00000002.npz")) == "step-00000002.npz"
    fs.rm_file("/www/encoder.npz")
    assert text(storage.encoder_copy("memory://www")) == "step-00000010.npz"
    with pytest.raises(DataError, match="has neither"):
        storage.encoder_copy("memory://none")

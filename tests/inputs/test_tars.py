"""Reading tars for training: in long chunks, each once per epoch, in bounded memory."""
import ast
import itertools
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from inputs import order, tar_index, tars
from inputs.order import LaneShuffle
from inputs.sources import open_source, train_val_split
from tests.helpers.samples import members, put, reader


def open_large(tmp_path, monkeypatch):
    """40 tars of 30 samples that do not fit in the memory for reading: 4 lanes of 256 KiB."""
    monkeypatch.setattr(tars, "MAX_SHUFFLE_BYTES", 1 << 20)
    monkeypatch.setattr(order, "NUM_LANES", 4)
    if not (tmp_path / "00.tar").exists():
        for n in range(40):
            put(tmp_path / f"{n:02}.tar", members(30, start=30 * n))
    return open_source(str(tmp_path / "*.tar"))


def total_bytes(source):
    return sum(os.path.getsize(path) for path in source.paths)


@pytest.fixture
def reads(monkeypatch):
    """sizes: bytes of each read. opened: how often each tar is opened."""
    sizes, opened = [], Counter()
    plain_open, plain_pread = os.open, os.pread

    def counting_open(path, *args, **options):
        if os.fspath(path).endswith(".tar"):
            opened[os.fspath(path)] += 1
        return plain_open(path, *args, **options)

    def counting_pread(fd, size, offset):
        data = plain_pread(fd, size, offset)
        sizes.append(len(data))
        return data

    monkeypatch.setattr("os.open", counting_open)
    monkeypatch.setattr("os.pread", counting_pread)
    return SimpleNamespace(sizes=sizes, opened=opened)


def epoch_of(source, num_processes=1, process=0):
    """The samples that one process uses in an epoch of batches of 24."""
    loader = reader(source, workers=4)
    batches = []
    for start in range(0, len(source) // 24 * 24, 24):
        positions = range(start + process, start + 24, num_processes)
        batches.append(loader.batch(positions, 8)["sample"])
    return np.concatenate(batches).tolist()


# -------------------------------------------------------------------------- what does not fit
def test_training_reads_a_large_set_in_long_chunks_and_each_once(tmp_path, monkeypatch, reads):
    """1,200 samples in 40 tars: one read per chunk, image and caption together, few bytes twice."""
    source = open_large(tmp_path, monkeypatch)
    size = total_bytes(source)
    assert size > 4 * tars.MAX_SHUFFLE_BYTES
    source.rows(0)
    reads.sizes.clear()
    reads.opened.clear()
    assert sorted(epoch_of(source)) == list(range(1200))
    assert sum(reads.opened.values()) == len(reads.sizes) <= 1200 / 8
    assert sum(reads.sizes) <= 1.2 * size
    assert max(reads.sizes) <= tars.MAX_SHUFFLE_BYTES // order.NUM_LANES


@pytest.mark.parametrize("num_processes", [2, 4])
def test_each_process_reads_only_its_share(tmp_path, monkeypatch, reads, num_processes):
    source = open_large(tmp_path, monkeypatch)
    size = total_bytes(source)
    used = []
    for process in range(num_processes):
        own = open_large(tmp_path, monkeypatch)
        reads.sizes.clear()
        used.append(epoch_of(own, num_processes, process))
        assert sum(reads.sizes) <= 1.2 * size / num_processes
    assert sorted(itertools.chain(*used)) == list(range(1200))
    expected = epoch_of(source)
    share = 24 // num_processes
    for step in range(1200 // 24):
        batch = itertools.chain(*(samples[step * share:(step + 1) * share] for samples in used))
        assert sorted(batch) == sorted(expected[step * 24:(step + 1) * 24])


def test_the_samples_of_a_run_are_spread_and_come_from_all_tars(tmp_path, monkeypatch):
    source = open_large(tmp_path, monkeypatch)
    order = LaneShuffle(source.starts, 5, source.chunk_of)
    samples = [order(position) for position in range(3600)]
    epochs = np.array(samples).reshape(3, 1200)
    assert all(sorted(epoch) == list(range(1200)) for epoch in epochs.tolist())
    distance = np.abs(np.diff(epochs, axis=1))
    assert (distance < source.chunk_length).mean() < 0.05  # neighbors in a tar are not in a batch
    num_tars = [len(set(row)) for row in (epochs // 30).reshape(-1, 4).tolist()]
    assert np.mean(num_tars) > 3.8  # of the four lanes
    first, second = ({tuple(batch) for batch in (epoch // 30).reshape(-1, 24).tolist()}
                     for epoch in epochs[:2])
    assert not first & second
    assert [order(position) for position in (3599, 0, 2000)] == [samples[3599], samples[0],
                                                                 samples[2000]]


def test_the_training_part_of_a_split_is_read_in_the_chunks_of_its_tars(tmp_path, monkeypatch,
                                                                        reads):
    """Validation samples are taken out of tars: the others are still read in one read per chunk."""
    train, val = train_val_split(open_large(tmp_path, monkeypatch), 100)
    size = total_bytes(train.source)
    reads.sizes.clear()
    used = epoch_of(train)
    assert len(used) == len(set(used)) == 1100 // 24 * 24
    assert sum(reads.sizes) <= 1.2 * size
    assert len(reads.sizes) < 1100 / 8
    reads.sizes.clear()
    batch = reader(val, augment=None).batch(range(100), 8)
    assert batch["sample"].tolist() == list(range(100))
    assert len(reads.sizes) == 100  # image and caption in one
    expected = [train.source.caption(int(i)) for i in val.indices[:3]]
    assert [val.caption(i) for i in range(3)] == expected


def test_a_chunk_that_cannot_be_read_costs_no_good_sample(tmp_path, monkeypatch):
    source = open_large(tmp_path, monkeypatch)
    _, begin, size = source.byte_ranges(7)[0]
    plain_pread = os.pread

    def failing_pread(fd, count, offset):
        in_damage = offset < begin + size and offset + count > begin
        if in_damage and os.readlink(f"/proc/self/fd/{fd}").endswith("00.tar"):
            raise OSError(5, "Input/output error")
        return plain_pread(fd, count, offset)

    source.rows(0)
    monkeypatch.setattr("os.pread", failing_pread)
    loader = reader(source, workers=4)
    used = set(loader.batch(range(1200), 8)["sample"].tolist())
    assert used == set(range(1200)) - {7}
    assert loader.bad == {7: "cannot be read (Input/output error)"}


# ----------------------------------------------------------------------------- what fits
def test_a_set_that_fits_in_memory_is_read_once_and_shuffled_as_one(tmp_path, reads):
    for n in range(20):
        put(tmp_path / f"{n:02}.tar", members(12, start=12 * n))
    source = open_source(str(tmp_path / "*.tar"))
    size = total_bytes(source)
    reads.sizes.clear()
    loader = reader(source, workers=4)
    epochs = loader.batch(range(3 * 240), 8)["sample"].reshape(3, 240)
    assert sum(reads.sizes) <= size
    assert len(reads.sizes) <= 20
    assert all(sorted(epoch) == list(range(240)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3
    num_tars = [len(set(batch)) for batch in (epochs // 12).reshape(-1, 24).tolist()]
    assert min(num_tars) >= 9  # 24 consecutive samples are from everywhere


def test_a_small_set_of_many_tars_keeps_all_its_rows(tmp_path, monkeypatch):
    """Shuffled as one, any sample comes after any other: each index is read once."""
    monkeypatch.setattr(tars, "CACHED_TARS", 2)
    for n in range(12):
        put(tmp_path / f"{n:02}.tar", members(5, start=5 * n))
    source = open_source(str(tmp_path / "*.tar"))
    reader(source, workers=1).batch(range(120), 8)
    assert source.rows.cache_info().misses == 12


# ---------------------------------------------------------------------------------- the cache
def test_samples_larger_than_a_chunk_may_be_are_read_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "MAX_SHUFFLE_BYTES", 1 << 20)
    monkeypatch.setattr(order, "NUM_LANES", 4)
    files = []
    for name, content in members(40):
        tail = bytes(300_000) if name.endswith("7.jpg") else b""  # a JPEG may have any tail
        files.append((name, content + tail))
    source = open_source(put(tmp_path / "a.tar", files))
    assert sorted(reader(source).batch(range(40), 8)["sample"]) == list(range(40))
    held = sum(end - begin for _, begin, end in source.span_cache.spans)
    assert held == source.span_cache.num_bytes <= 1 << 20


def test_threads_that_need_the_same_bytes_wait_for_one_read(tmp_path, reads):
    content = bytes(range(256)) * 400
    path = str(tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(content)
    cache, barrier = tars.SpanCache(1 << 15), threading.Barrier(8)

    def read(_):
        barrier.wait(30)
        return cache.read(path, 5000, 9000)

    with ThreadPoolExecutor(8) as pool:
        results = set(pool.map(read, range(8)))
    assert results == {content[5000:9000]}
    assert len(reads.sizes) == 1
    for begin in range(0, 90_000, 10_000):
        cache.read(path, begin, begin + 10_000)
        assert cache.num_bytes == sum(end - start for _, start, end in cache.spans) <= 1 << 15
    with pytest.raises(OSError, match="No such file"):
        cache.read(path + "x", 0, 9)
    assert (path + "x", 0, 9) not in cache.spans


def test_one_thread_at_a_time_parses_the_headers_of_indexes(tmp_path, monkeypatch):
    """Python 3.11's parser, which numpy calls for a header, is not safe in threads."""
    put(tmp_path / "a.tar", members(3))
    source = open_source(str(tmp_path / "a.tar"))
    plain, lock, overlaps = ast.literal_eval, threading.Lock(), []

    def slow_parser(text):
        is_alone = lock.acquire(blocking=False)
        if not is_alone:
            overlaps.append(text)
            return plain(text)
        try:
            time.sleep(0.002)
            return plain(text)
        finally:
            lock.release()
    monkeypatch.setattr("ast.literal_eval", slow_parser)
    with ThreadPoolExecutor(4) as pool:
        rows = list(pool.map(source.load_rows, [0] * 12))
    assert not overlaps
    assert all(len(table) == 3 for table in rows)


def test_the_index_command_reports_what_cannot_be_read(tmp_path):
    good = put(tmp_path / "good.tar", members(2))
    done = subprocess.run([sys.executable, "-m", "inputs.tar_index", good, "none.tar"],
                          capture_output=True, text=True)
    assert done.returncode == 1 and "2 with a .txt" in done.stdout
    assert "error: none.tar: No such file or directory" in done.stderr.splitlines()


def test_the_index_of_another_version_is_made_again(tmp_path, monkeypatch):
    path = put(tmp_path / "a.tar", members(2))
    tar_index.index_tar(path)
    assert tar_index.load_index(path) is not None
    monkeypatch.setattr(tar_index, "INDEX_VERSION", 99)
    assert tar_index.load_index(path) is None

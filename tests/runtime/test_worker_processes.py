"""Worker processes: batches equal those of threads bit for bit, bad samples are handled alike, and
no worker outlives its loader. A run with them is killed and continued in test_survive.py."""
import gc
import itertools
import os
import pickle
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import data
from data import Loader
from inputs.files import ReadOptions
from inputs.sources import open_source, train_val_split
from runtime.errors import DataError, DistributedError
from runtime.worker_processes import ProcessLoader, answer
from tests.helpers.paths import ROOT
from tests.helpers.samples import TOK, TRAINING, members, put, reader, sample, spill
from tests.helpers.workers import wait_for_end, workers_of


def process_reader(source, processes=2, augment=TRAINING, **options):
    return ProcessLoader(source, TOK, 12, 0, augment, processes, **options)


def assert_same(one, other):
    assert one.keys() == other.keys() and one.pop("bad") == other.pop("bad")
    for name, array in one.items():
        assert array.dtype == other[name].dtype and np.array_equal(array, other[name]), name


def make_source(kind, tmp_path):
    if kind == "scenes":
        return open_source("scenes", seed=5)
    if kind == "folder":
        return open_source(spill(tmp_path / "all", members(13)), "re_caption")
    if kind == "parquet":
        images = [sample(i)["jpg"] for i in range(13)]
        table = pa.table({"image": images, "caption": [f"a cat {i}" for i in range(13)]})
        pq.write_table(table, tmp_path / "a.parquet")
        options = ReadOptions(cache_dir=str(tmp_path / "cache"))
        return open_source(str(tmp_path / "a.parquet"), "caption", options=options)
    tar = open_source(put(tmp_path / "a.tar", members(13)))
    return tar if kind == "tar" else train_val_split(tar, 2)[0]


@pytest.mark.parametrize("kind", ["tar", "part of a tar", "folder", "parquet", "scenes"])
def test_batches_are_those_of_threads(kind, tmp_path):
    source = make_source(kind, tmp_path)
    loader = process_reader(source, processes=1 if kind == "scenes" else 2)
    for positions, resolution in ((range(20), 16), (range(21, 60, 3), 24)):
        expected = reader(source).batch(positions, resolution)
        assert_same(loader.batch(positions, resolution), expected)


def test_two_texts_and_no_augmentation(tmp_path):
    source = open_source(spill(tmp_path / "all", members(10)), "re_caption")
    with pytest.raises(DataError, match="no sample in the data can be used"):  # n is a number
        process_reader(source, 1, alt_field="n").batch(range(2), 8)
    source, fields = open_source("scenes", "conditioned"), ("web", "conditioned,txt")
    first = ProcessLoader(source, TOK, 12, 0, None, 1, *fields).batch(range(9), 8)
    assert "alt" in first
    assert_same(first, Loader(source, TOK, 12, 0, None, 1, *fields).batch(range(9), 8))


def test_bad_samples_are_replaced_and_counted_as_by_threads(tmp_path):
    """Of images that cannot be opened or decoded, and captions without a word."""
    files = []
    for name, content in members(40):
        number, _, suffix = name.partition(".")
        if suffix == "jpg" and int(number) in (3, 4, 5, 17):
            content = content[:300] if int(number) == 17 else b"no image"
        if suffix == "txt" and int(number) in (18, 30):
            content = b"\x01\x02" if int(number) == 18 else b"\xff"
        files.append((name, content))
    source = open_source(put(tmp_path / "a.tar", files))
    threads, processes = reader(source), process_reader(source)
    bad = set()
    for start in range(0, 80, 16):
        expected = threads.batch(range(start, start + 16), 8)
        bad |= expected["bad"].keys()
        assert_same(processes.batch(range(start, start + 16), 8), expected)
    assert bad == {3, 4, 5, 17, 18, 30}


def test_many_bad_samples_in_a_row_after_a_good_one_do_not_end_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MAX_FIRST_TRIES", 3)
    files = [(name, b"no image" if name.endswith("jpg") and name > "000000001.jpg" else content)
             for name, content in members(9)]
    loader = process_reader(open_source(put(tmp_path / "a.tar", files)), 1, augment=None)
    assert loader.batch(range(2), 8)["sample"].tolist() == [0, 1]
    assert loader.batch(range(2, 4), 8)["sample"].tolist() == [0, 0]


def test_missing_memory_in_a_worker_is_one_sentence():
    def fail(*_):
        raise DataError("memory ran out")
    reply = answer(SimpleNamespace(prepare=fail), (), 8)
    loader = process_reader(open_source("scenes"), 1)
    loader.ask = lambda requests, _: [pickle.loads(pickle.dumps(reply))] * len(requests)
    with pytest.raises(DataError, match="memory ran out"):
        loader.batch(range(2), 8)


def test_signals_to_a_worker_are_ignored_and_a_killed_one_is_an_error(tmp_path):
    """SIGTERM and SIGINT are for the training process, which needs its workers until it ends."""
    before = workers_of(os.getpid())
    source = open_source(put(tmp_path / "a.tar", members(13)))
    loader = process_reader(source, 1)
    loader.batch(range(8), 8)
    [pid] = workers_of(os.getpid()) - before
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(pid, number)
    assert_same(loader.batch(range(8, 16), 8), reader(source).batch(range(8, 16), 8))
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(DistributedError, match=r"ended by SIGKILL.*lower --worker-processes"):
        loader.batch(range(16, 24), 8)


def test_no_worker_outlives_its_loader():
    before = workers_of(os.getpid())
    loader = process_reader(open_source("scenes"), 2)
    requests = ((range(64 * n, 64 * n + 64), 8) for n in itertools.count())
    batches = loader.prefetch_batches(requests, lambda batch: batch)
    next(batches)
    started = workers_of(os.getpid()) - before
    assert len(started) == 2
    batches.close()
    assert workers_of(os.getpid()) - before == started  # they wait for the next request
    del loader, batches, requests
    gc.collect()
    wait_for_end(started)


ENDLESS = """
import itertools
from inputs.sources import open_source
from tests.runtime.test_worker_processes import process_reader

loader = process_reader(open_source("scenes"), 2)
for n in itertools.count():
    loader.batch(range(64 * n, 64 * n + 64), 64)
    print(n, flush=True)
"""


def test_workers_end_when_the_training_process_is_killed(tmp_path):
    """Started in a folder whose data.py they must not take for the project's."""
    (tmp_path / "data.py").write_text("raise AssertionError")
    process = subprocess.Popen([sys.executable, "-P", "-c", ENDLESS], cwd=tmp_path, text=True,
                               env=os.environ | {"PYTHONPATH": ROOT}, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    assert process.stdout.readline() == "0\n"
    workers = workers_of(process.pid)
    assert len(workers) == 2
    process.kill()
    _, errors = process.communicate()  # to the end of the workers' error stream too
    assert not errors
    wait_for_end(workers)

"""Batches are a function of (seed, step) alone."""
import itertools
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import data
from inputs.sources import open_source, subsample, train_val_split
from runtime import run_folder
from runtime.errors import DataError
from tests.helpers.samples import members, photo, put, reader


def is_same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one)


def joined(parts):
    """One batch from its parts."""
    names = [name for name in parts[0] if name != "bad"]
    batch = {name: np.concatenate([part[name] for part in parts]) for name in names}
    return batch | {"bad": {}}


@pytest.fixture(params=["tar", "scenes", "part"])
def source(request, tmp_path):
    if request.param == "scenes":
        return open_source("scenes", seed=5)
    tar = open_source(put(tmp_path / "a.tar", members(13)))
    return tar if request.param == "tar" else train_val_split(tar, 2)[0]


def test_data_of_which_nothing_can_be_used_is_not_read_to_its_end(tmp_path, monkeypatch):
    """Unless a sample was good: then more bad ones in a row are passed over."""
    monkeypatch.setattr(data, "MAX_FIRST_TRIES", 5)
    files = [(name, b"no image" if name.endswith("jpg") else content)
             for name, content in members(30)]
    loader = reader(open_source(put(tmp_path / "bad.tar", files)), workers=1)
    with pytest.raises(DataError, match="no sample in the data can be used; of 5 that were tried"):
        loader.batch(range(4), 16)
    assert len(loader.bad) == 5
    mixed = put(tmp_path / "mixed.tar", members(1) + files[3:])
    loader = reader(open_source(mixed), augment=None, workers=1)
    assert set(loader.batch(range(30), 16)["sample"]) == {0}


# ------------------------------------------------------------------------------------ batches
def test_a_batch_follows_from_seed_and_position(source):
    steps = [range(8 * s, 8 * s + 8) for s in range(5)]
    loader = reader(source, workers=1)
    batches = [loader.batch(positions, 16) for positions in steps]
    assert batches[0]["images"].shape == (8, 16, 16, 3) and batches[0]["images"].dtype == np.uint8
    assert batches[0]["text"].shape == (8, 12)
    for s in (4, 2, 3, 0):  # by a new loader, from the middle, in any order
        assert is_same(batches[s], reader(source, workers=4).batch(steps[s], 16))
    for positions, batch in zip(steps, batches):
        parts = [reader(source).batch(positions[i:i + 4], 16) for i in (0, 4)]
        assert is_same(batch, joined(parts))
    requests = ((positions, 16) for positions in steps)
    prefetched = reader(source).prefetch_batches(requests, lambda b: b)
    for batch, (other, bad) in zip(batches, prefetched):
        assert is_same(batch, other)
        assert bad == {}
    other = reader(source, seed=1).batch(steps[0], 16)
    assert not np.array_equal(other["images"], batches[0]["images"])
    images = [image.tobytes() for batch in batches for image in batch["images"]]
    assert len(set(images)) == 40  # no crop comes twice


def test_an_epoch_has_each_sample_once_in_an_order_of_its_own(tmp_path):
    source = open_source(put(tmp_path / "a.tar", members(13)))
    epochs = reader(source).batch(range(13 * 4), 8)["sample"].reshape(4, 13)
    assert all(sorted(epoch) == list(range(13)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4
    validation = reader(source, augment=None).batch(range(13), 8)
    assert validation["sample"].tolist() == list(range(13))


def test_each_process_takes_every_nth_position_of_a_batch(monkeypatch):
    stage = SimpleNamespace(start=2, end=5, first_image=160, batch=64, resolution=16)
    requests = []
    for process in range(4):
        monkeypatch.setattr("jax.process_index", lambda process=process: process)
        parallel = SimpleNamespace(num_processes=4, shard_batch=None)
        loader = SimpleNamespace(prefetch_batches=lambda requests, transfer: list(requests))
        run = SimpleNamespace(step=3, parallel=parallel, loader=loader)
        requests.append(run_folder.Run.batches(run, stage))
    for step, shares in enumerate(zip(*requests)):
        first = 160 + 64 * (1 + step)
        for process, (positions, _) in enumerate(shares):
            assert list(positions) == list(range(first + process, first + 64, 4))


def test_a_broken_sample_is_reported_by_the_batch_of_its_own_turn(tmp_path):
    files = []
    for name, content in members(12):
        is_broken = name.endswith("jpg") and int(name[:9]) in (3, 4, 9)
        files.append((name, b"" if is_broken else content))
    source = open_source(put(tmp_path / "a.tar", files))
    steps = [range(4 * s, 4 * s + 4) for s in range(9)]
    batches = [reader(source).batch(positions, 8) for positions in steps]
    reported = [batch["bad"] for batch in batches]
    assert sorted(itertools.chain(*reported)) == [3, 4, 9]
    assert not any(reported[3:])  # once, in the first epoch
    used = {i for batch in batches for i in batch["sample"].tolist()}
    assert used == set(range(12)) - {3, 4, 9}
    requests = ((positions, 8) for positions in steps)
    prefetched = reader(source, workers=4).prefetch_batches(requests, lambda b: None)
    assert reported == [bad for _, bad in prefetched]
    for start in range(1, 9):  # continued, by a loader that has met no broken sample
        rest = reader(source)
        for positions, batch in zip(steps[start:], batches[start:]):
            assert is_same(rest.batch(positions, 8), batch)
    hosts = [reader(source), reader(source)]  # each reads its half of every batch
    for positions, batch in zip(steps, batches):
        first, second = (hosts[n].batch(positions[2 * n:2 * n + 2], 8) for n in range(2))
        images = np.concatenate([first["images"], second["images"]])
        assert np.array_equal(images, batch["images"])
        assert first["bad"] | second["bad"] == batch["bad"]


# ----------------------------------------------------------------------------------- prefetch
def test_prefetch_passes_errors_on():
    def transfer(batch):
        if batch["position"][0] == 4:
            raise DataError("no more")
        return batch

    requests = ((range(4 * n, 4 * n + 4), 8) for n in itertools.count())
    batches = reader(open_source("scenes")).prefetch_batches(requests, transfer)
    assert len(next(batches)[0]["position"]) == 4
    with pytest.raises(DataError, match="no more"):
        next(batches)


def test_prefetch_ends_when_its_user_does():
    before = set(threading.enumerate())
    requests = ((range(4), 8) for _ in itertools.count())
    batches = reader(open_source("scenes")).prefetch_batches(requests, lambda b: b)
    next(batches)
    new = set(threading.enumerate()) - before
    [thread] = [thread for thread in new if thread.name.startswith("batches")]
    batches.close()
    thread.join(30)
    assert not thread.is_alive()


def test_prefetch_works_ahead_of_its_use():
    made = threading.Semaphore(0)

    def transfer(batch):
        made.release()
        return batch

    requests = ((range(4), 8) for _ in itertools.count())
    batches = reader(open_source("scenes")).prefetch_batches(requests, transfer, depth=2)
    next(batches)
    assert all(made.acquire(timeout=30) for _ in range(3))  # the one in use and two ahead
    batches.close()


# ---------------------------------------------------------------------- validation samples
def test_training_and_validation_samples_together_are_all_samples(tmp_path):
    source = open_source(put(tmp_path / "a.tar", members(43)))
    expected = sorted(source.caption(i) for i in range(43))
    for count, num_validation in ((2, 2), (512, 4)):
        train, val = train_val_split(source, count)
        captions = [val.caption(i) for i in range(len(val))]
        assert len(captions) == num_validation
        captions += [train.caption(i) for i in range(len(train))]
        assert sorted(captions) == expected
        assert val.name(0) == source.name(int(val.indices[0]))
        assert train.fingerprint() != val.fingerprint() != source.fingerprint()
    with pytest.raises(DataError, match="--val"):
        train_val_split(open_source(put(tmp_path / "b.tar", members(1))), 1)


def test_validation_samples_are_a_fixed_draw_from_the_entire_set(tmp_path):
    for i in range(40):
        photo().save(tmp_path / f"{i:02}.png")
        (tmp_path / f"{i:02}.txt").write_text(f"image {i}")
    source = open_source(str(tmp_path))
    first, again = (subsample(source, 10) for _ in range(2))
    captions = [first.caption(i) for i in range(10)]
    assert captions == [again.caption(i) for i in range(10)]
    assert len(set(captions)) == 10
    assert captions != sorted(captions)
    assert max(int(caption.split()[1]) for caption in captions) > 20  # not the first ten
    assert sorted(subsample(source, 50).indices) == list(range(40))


def test_the_contact_sheet_names_the_image_that_cannot_be_decoded(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    for n in range(12):
        Image.new("RGB", (16, 16), (20 * n, 0, 0)).save(folder / f"{n}.png")
        (folder / f"{n}.txt").write_text(f"number {n}")
    (folder / "5.png").write_bytes((folder / "5.png").read_bytes()[:40])
    monkeypatch.chdir(tmp_path)
    assert data.main([str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "replaced by the next: " in printed and "5.png" in printed
    assert (tmp_path / "contact.png").exists()


def test_positions_from_2_to_the_31_start_again_at_zero():
    batch = reader(open_source("scenes")).batch(range(2**31 + 5, 2**31 + 8), 8)
    assert batch["position"].tolist() == [5, 6, 7]

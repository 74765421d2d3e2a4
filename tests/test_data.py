"""From a picture of any kind to pixels, and from samples to batches that are a function of (seed, step) alone."""
import itertools
import os
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageOps

import data
from inputs import files, images, sources, tars
from inputs.images import Augment, decode_and_augment
from inputs.sources import open_source, train_val_split
from runtime import run_folder
from runtime.errors import BadSample, DataError
from tests.helpers.samples import members, opened, photo, put, reader


def near(a, b, most=1.0):
    return np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).mean() <= most


def halves(mode, left, right):
    image = Image.new(mode, (40, 20), right)
    image.paste(left, (0, 0, 20, 20))
    return image


PALETTE = halves("P", 0, 1)


PALETTE.putpalette((0, 0, 255, 255, 0, 0))


SIXTEEN = Image.fromarray(np.repeat(np.array([[0x4000, 0xFFFF]], np.uint16), 20, 1).repeat(20, 0))
FRAMES = {"save_all": True, "append_images": [Image.new("RGB", (40, 20), "green")] * 2}
KINDS = {
    "rgb": (halves("RGB", "red", "blue"), "PNG", {}, (255, 0, 0), (0, 0, 255)),
    "rgba on white": (halves("RGBA", (0, 0, 0, 0), (255, 0, 0, 128)), "PNG", {}, (255, 255, 255), (255, 127, 127)),
    "palette with a clear color": (PALETTE, "PNG", {"transparency": 0}, (255, 255, 255), (255, 0, 0)),
    "palette with alphas": (PALETTE, "PNG", {"transparency": bytes((255, 0))}, (0, 0, 255), (255, 255, 255)),
    "rgb with a clear color": (halves("RGB", "red", "blue"), "PNG", {"transparency": (255, 0, 0)}, (255, 255, 255), (0, 0, 255)),
    "gray and alpha": (halves("LA", (0, 255), (0, 0)), "PNG", {}, (0, 0, 0), (255, 255, 255)),
    "cmyk": (halves("CMYK", (255, 0, 0, 0), (0, 0, 0, 255)), "JPEG", {"quality": 95}, (0, 255, 255), (0, 0, 0)),
    "gray": (halves("L", 10, 200), "JPEG", {"quality": 95}, (10, 10, 10), (200, 200, 200)),
    "16-bit": (SIXTEEN, "PNG", {}, (64, 64, 64), (255, 255, 255)),
    "16-bit tiff": (SIXTEEN, "TIFF", {}, (64, 64, 64), (255, 255, 255)),
    "1-bit": (halves("1", 0, 1), "PNG", {}, (0, 0, 0), (255, 255, 255)),
    "bmp": (halves("RGB", "red", "blue"), "BMP", {}, (255, 0, 0), (0, 0, 255)),
    "animated gif": (halves("RGB", "red", "blue"), "GIF", FRAMES, (255, 0, 0), (0, 0, 255)),
    "animated webp": (halves("RGB", "red", "blue"), "WEBP", FRAMES | {"lossless": True}, (255, 0, 0), (0, 0, 255)),
    "animated png": (halves("RGB", "red", "blue"), "PNG", FRAMES, (255, 0, 0), (0, 0, 255)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_of_any_mode_shows_its_colors(kind):
    image, form, how, left, right = KINDS[kind]
    pixels = decode_and_augment(opened(image, form, **how), 16)
    assert pixels.shape == (16, 16, 3) and pixels.dtype == np.uint8
    assert near(pixels[:, 2], left, 3) and near(pixels[:, -3], right, 3)
    for seed in range(5):
        assert decode_and_augment(opened(image, form, **how), 9, Augment(0.3, True, 0.4, 0.1, 0.5), np.random.default_rng(seed)).shape == (9, 9, 3)


def test_numbers_without_a_known_white_are_refused():
    for image in (Image.new("F", (9, 9), 0.5), Image.new("I", (9, 9), 70000)):
        with pytest.raises(BadSample, match="32-bit"):
            decode_and_augment(opened(image, "TIFF"), 4)


@pytest.mark.parametrize("form, mode", [("JPEG", "RGB"), ("PNG", "RGB"), ("PNG", "RGBA"), ("WEBP", "RGBA"), ("PNG", "I;16"), ("TIFF", "RGB")])
def test_a_cameras_orientation_is_undone(form, mode):
    upright = photo(40, 60).convert("L").convert("RGB")
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        back = next(t for t in (None, *Image.Transpose) if np.array_equal(upright, ImageOps.exif_transpose(with_exif(turn(upright, t), exif))))
        stored = turn(upright, back)
        if mode == "I;16":
            stored = Image.fromarray(np.asarray(stored.convert("L")).astype(np.uint16) * 257)
        elif mode == "RGBA":
            stored.putalpha(254)
        found = decode_and_augment(opened(stored, form, exif=exif, **({} if form in ("PNG", "TIFF") else {"quality": 95})), 24)
        assert near(found, decode_and_augment(upright, 24), 4), orientation


def turn(image, how):
    return image.copy() if how is None else image.transpose(how)


def with_exif(image, exif):
    image.info["exif"] = exif.tobytes()
    return image


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (2, 2), (5000, 3)])
@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_extreme_shapes(size, form):
    color = (200, 100, 50)
    for seed in range(20):
        augment = (Augment(), np.random.default_rng(seed)) if seed else ()
        assert near(decode_and_augment(opened(Image.new("RGB", size, color), form), 16, *augment), color, 3)


@pytest.mark.parametrize("size", [(411, 307), (1003, 771)])  # no multiples of the 8 x 8 blocks
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_jpeg_decoded_small_is_nearly_the_picture_decoded_whole(mode, size):
    whole = opened(photo(*size, detail=20).convert(mode), "JPEG", quality=95)
    whole.load()  # decoded: draft does nothing now
    for seed in range(8):
        augment = (Augment(), np.random.default_rng(seed)) if seed else ()
        again = (Augment(), np.random.default_rng(seed)) if seed else ()
        small = decode_and_augment(opened(photo(*size, detail=20).convert(mode), "JPEG", quality=95), 64, *augment)
        assert near(small, decode_and_augment(whole.copy(), 64, *again), 2)


def test_a_crop_lies_inside_and_keeps_the_area_it_should():
    shares = []
    for seed, (w, h) in itertools.product(range(300), ((100, 80), (33, 47), (400, 300))):
        x0, y0, x1, y1 = images.random_crop_box(w, h, 0.4, np.random.default_rng(seed))
        assert 0 <= x0 < x1 <= w + 1e-9 and 0 <= y0 < y1 <= h + 1e-9
        assert (x0, y0, x1, y1) == images.random_crop_box(w, h, 0.4, np.random.default_rng(seed))
        shares.append((x1 - x0) * (y1 - y0) / (w * h))
    assert 0.4 <= min(shares) < 0.45 and 0.95 < max(shares) <= 1 + 1e-9 and len(set(shares)) > 600


def test_only_what_is_asked_for_is_changed():
    image, rng = photo(), np.random.default_rng
    plain = decode_and_augment(image, 24)
    assert not Augment().hflip and all(np.array_equal(decode_and_augment(image, 24, Augment(min_crop_area=1.0), rng(s)), plain) for s in range(20))
    seen = {decode_and_augment(image, 24, Augment(min_crop_area=1.0, hflip=True), rng(s)).tobytes() for s in range(20)}
    assert seen == {plain.tobytes(), plain[:, ::-1].tobytes()}
    grays = [decode_and_augment(image, 24, Augment(min_crop_area=1.0, grayscale_prob=0.5), rng(s)) for s in range(20)]
    assert {bool(np.ptp(g, axis=-1).max() == 0) for g in grays} == {True, False}
    jittered = {decode_and_augment(image, 24, Augment(min_crop_area=1.0, jitter=0.4), rng(s)).tobytes() for s in range(20)}
    assert 10 < len(jittered) < 20 and plain.tobytes() in jittered


@pytest.fixture(params=["tar", "scenes", "part"])
def source(request, tmp_path):
    if request.param == "scenes":
        return open_source("scenes", seed=5)
    whole = open_source(put(tmp_path / "a.tar", members(13)))
    return whole if request.param == "tar" else train_val_split(whole, 2)[0]


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one)


def test_a_batch_follows_from_seed_and_position(source):
    steps = [range(8 * s, 8 * s + 8) for s in range(5)]
    one = reader(source, workers=1)
    run = [one.batch(p, 16) for p in steps]
    assert run[0]["images"].shape == (8, 16, 16, 3) and run[0]["images"].dtype == np.uint8 and run[0]["text"].shape == (8, 12)
    assert all(same(run[s], reader(source, workers=4).batch(steps[s], 16)) for s in (4, 2, 3, 0))  # anew, from the middle, in any order
    halves = [[reader(source).batch(p[i:i + 4], 16) for i in (0, 4)] for p in steps]
    assert all(same(whole, {k: np.concatenate([a[k], b[k]]) for k in a if k != "bad"} | {"bad": {}}) for whole, (a, b) in zip(run, halves))
    assert all(same(a, b) and bad == {} for a, (b, bad) in zip(run, reader(source).prefetch(((p, 16) for p in steps), lambda b: b)))
    other = reader(source, seed=1).batch(steps[0], 16)
    assert not np.array_equal(other["images"], run[0]["images"])
    assert len({x.tobytes() for b in run for x in b["images"]}) == 40  # no crop comes twice


def test_an_epoch_has_each_sample_once_in_an_order_of_its_own(tmp_path):
    whole = open_source(put(tmp_path / "a.tar", members(13)))
    index = reader(whole).batch(range(13 * 4), 8)["source_index"].reshape(4, 13)
    assert all(sorted(epoch) == list(range(13)) for epoch in index.tolist())
    assert len({tuple(e) for e in index.tolist()}) == 4
    assert reader(whole, augment=None).batch(range(13), 8)["source_index"].tolist() == list(range(13))


def large(tmp_path, monkeypatch, tars=40, each=30):
    """Tars of `tars` * `each` samples that do not fit in the memory for reading: 4 lanes of 256 KiB."""
    monkeypatch.setattr("inputs.tars.MAX_SHUFFLE_BYTES", 1 << 20)
    monkeypatch.setattr("inputs.tars.NUM_LANES", 4)
    if not (tmp_path / "00.tar").exists():
        for n in range(tars):
            put(tmp_path / f"{n:02}.tar", members(each, start=each * n))
    return open_source(str(tmp_path / "*.tar"))


@pytest.fixture
def reads(monkeypatch):
    """(path, offset, bytes) of what is read from tars, and the number of times that one is opened."""
    found, opened, files = [], Counter(), {}
    plain_open, plain_pread = os.open, os.pread

    def counting_open(path, *how, **more):
        fd = plain_open(path, *how, **more)
        if os.fspath(path).endswith(".tar"):
            opened[os.fspath(path)] += 1
            files[fd] = os.fspath(path)
        return fd

    def counting_pread(fd, size, offset):
        data = plain_pread(fd, size, offset)
        found.append((files.get(fd), offset, len(data)))
        return data
    monkeypatch.setattr("os.open", counting_open)
    monkeypatch.setattr("os.pread", counting_pread)
    return SimpleNamespace(found=found, opened=opened)


def epoch_of(source, workers=4, seed=0, processes=1, process=0, epoch=0):
    """The samples that one process uses in an epoch of batches of 24."""
    one, n = reader(source, seed=seed, workers=workers), len(source) // 24 * 24
    steps = [range(p + process, p + 24, processes) for p in range(epoch * n, (epoch + 1) * n, 24)]
    return np.concatenate([one.batch(p, 8)["source_index"] for p in steps]).tolist()


def test_training_reads_a_large_set_in_long_runs_and_each_once(tmp_path, monkeypatch, reads):
    """Of 1,200 samples in 40 tars: one read per run of samples, image and caption together, and hardly a
    byte twice."""
    source = large(tmp_path, monkeypatch)
    size = sum(os.path.getsize(path) for path in source.paths)
    assert size > 4 * tars.MAX_SHUFFLE_BYTES
    source.rows(0)
    reads.found.clear()
    reads.opened.clear()
    assert sorted(epoch_of(source)) == list(range(1200))
    assert sum(reads.opened.values()) == len(reads.found) <= 1200 / 8
    assert sum(length for _, _, length in reads.found) <= 1.2 * size
    assert max(length for _, _, length in reads.found) <= tars.MAX_SHUFFLE_BYTES // tars.NUM_LANES


@pytest.mark.parametrize("processes", [2, 4])
def test_each_process_reads_its_share_alone(tmp_path, monkeypatch, reads, processes):
    source = large(tmp_path, monkeypatch)
    size = sum(os.path.getsize(path) for path in source.paths)
    used = []
    for process in range(processes):
        one = large(tmp_path, monkeypatch)
        reads.found.clear()
        used.append(epoch_of(one, processes=processes, process=process))
        assert sum(length for _, _, length in reads.found) <= 1.2 * size / processes
    assert sorted(itertools.chain(*used)) == list(range(1200))
    steps = zip(*([u[k:k + 24 // processes] for k in range(0, len(u), 24 // processes)] for u in used))
    whole = epoch_of(source)
    for k, shares in enumerate(steps):
        assert sorted(itertools.chain(*shares)) == sorted(whole[24 * k:24 * k + 24])


def test_a_set_that_fits_in_memory_is_read_once_and_shuffled_whole(tmp_path, reads):
    for n in range(20):
        put(tmp_path / f"{n:02}.tar", members(12, start=12 * n))
    source = open_source(str(tmp_path / "*.tar"))
    size = sum(os.path.getsize(path) for path in source.paths)
    reads.found.clear()
    one = reader(source, workers=4)
    epochs = np.array([one.batch(range(240 * e, 240 * e + 240), 8)["source_index"] for e in range(3)])
    assert sum(length for _, _, length in reads.found) <= size and len(reads.found) <= 20
    assert all(sorted(e) == list(range(240)) for e in epochs.tolist()) and len({tuple(e) for e in epochs.tolist()}) == 3
    for epoch in epochs // 12:  # 24 samples that follow one another are from all over
        assert min(len(set(epoch[i:i + 24].tolist())) for i in range(0, 240, 24)) >= 9


def test_the_samples_of_a_run_are_spread_and_its_runs_drawn_from_all_tars(tmp_path, monkeypatch):
    source = large(tmp_path, monkeypatch)
    order = data.LaneShuffle(source.starts, 5, source.run_of)
    epochs = np.array([order(p) for p in range(3600)]).reshape(3, 1200)
    assert all(sorted(e) == list(range(1200)) for e in epochs.tolist())
    apart = np.abs(np.diff(epochs, axis=1))
    assert (apart < source.run_length).mean() < 0.05  # neighbours in a tar are none in a batch
    shards = epochs // 30
    for epoch in shards:  # the four lanes are in four tars
        assert np.mean([len(set(epoch[i:i + 4].tolist())) for i in range(0, 1200, 4)]) > 3.8
    firsts = [{tuple(e[i:i + 24].tolist()) for i in range(0, 1200, 24)} for e in shards]
    assert not firsts[0] & firsts[1]
    assert [order(p) for p in (3599, 0, 2000)] == [epochs.ravel()[p] for p in (3599, 0, 2000)]


def test_what_is_left_for_training_is_read_in_the_runs_of_the_tars(tmp_path, monkeypatch, reads):
    """Validation samples are taken out of tars: the rest are still read in one read per run."""
    train, val = train_val_split(large(tmp_path, monkeypatch), 100)
    size = sum(os.path.getsize(path) for path in train.source.paths)
    reads.found.clear()
    used = epoch_of(train)
    assert len(used) == len(set(used)) == 1100 // 24 * 24
    assert sum(length for _, _, length in reads.found) <= 1.2 * size and len(reads.found) < 1100 / 8
    reads.found.clear()
    batch = reader(val, augment=None).batch(range(100), 8)
    assert batch["source_index"].tolist() == list(range(100)) and len(reads.found) == 100  # image and caption in one
    assert [val.caption(i) for i in range(3)] == [train.source.caption(int(i)) for i in val.indices[:3]]


def test_a_run_that_cannot_be_read_costs_no_good_sample(tmp_path, monkeypatch):
    source = large(tmp_path, monkeypatch)
    plain, (begin, end) = os.pread, source.byte_ranges(7)[0][1:]

    def failing(fd, size, offset):
        if offset < begin + end and offset + size > begin and os.readlink(f"/proc/self/fd/{fd}").endswith("00.tar"):
            raise OSError(5, "Input/output error")
        return plain(fd, size, offset)
    source.rows(0)
    monkeypatch.setattr("os.pread", failing)
    one = reader(source, workers=4)
    index = one.batch(range(1200), 8)["source_index"]
    assert set(index.tolist()) == set(range(1200)) - {7} and one.bad == {7: "cannot be read (Input/output error)"}


def test_samples_larger_than_a_run_may_be_are_read_one_by_one(tmp_path, monkeypatch, reads):
    monkeypatch.setattr("inputs.tars.MAX_SHUFFLE_BYTES", 1 << 20)
    monkeypatch.setattr("inputs.tars.NUM_LANES", 4)
    files = []
    for name, content in members(40):
        tail = bytes(300_000) if name.endswith("7.jpg") else b""  # behind the end of a JPEG anything may stand
        files.append((name, content + tail))
    source = open_source(put(tmp_path / "a.tar", files))
    reads.found.clear()
    assert sorted(reader(source).batch(range(40), 8)["source_index"]) == list(range(40))
    held = sum(end - begin for _, begin, end in source.cache.spans)
    assert held == source.cache.held <= 1 << 20


def test_threads_that_want_the_same_bytes_wait_for_one_read(tmp_path, reads):
    (tmp_path / "a.tar").write_bytes(bytes(range(256)) * 400)
    cache, path, gate = tars.SpanCache(1 << 15), str(tmp_path / "a.tar"), threading.Barrier(8)

    def work(n):
        gate.wait(30)
        return cache.read(path, 5000, 9000)
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(work, range(8)))
    assert found == {(bytes(range(256)) * 400)[5000:9000]} and len(reads.found) == 1
    for begin in range(0, 90_000, 10_000):
        cache.read(path, begin, begin + 10_000)
        assert cache.held == sum(end - begin for _, begin, end in cache.spans) <= 1 << 15
    with pytest.raises(OSError, match="No such file"):
        cache.read(path + "x", 0, 9)
    assert (path + "x", 0, 9) not in cache.spans


def test_a_small_set_of_many_tars_keeps_what_it_knows_of_them(tmp_path, monkeypatch):
    """Shuffled whole, any sample comes after any other: each index is read once."""
    monkeypatch.setattr("inputs.tars.CACHED_TARS", 2)
    for n in range(12):
        put(tmp_path / f"{n:02}.tar", members(5, start=5 * n))
    source = open_source(str(tmp_path / "*.tar"))
    reader(source, workers=1).batch(range(120), 8)
    assert source.rows.cache_info().misses == 12


def test_each_process_takes_every_nth_row_of_a_batch(monkeypatch):
    stage = SimpleNamespace(start=2, end=5, first_image=160, batch=64, resolution=16)
    taken = []
    for process in range(4):
        monkeypatch.setattr("jax.process_index", lambda process=process: process)
        parallel = SimpleNamespace(num_processes=4, shard_batch=None)
        loader = SimpleNamespace(prefetch=lambda requests, transfer: list(requests))
        run = SimpleNamespace(step=3, parallel=parallel, reader=loader)
        taken.append(run_folder.Run.batches(run, stage))
    for step, shares in enumerate(zip(*taken)):
        first = 160 + 64 * (1 + step)
        assert [list(rows) for rows, _ in shares] == [list(range(first + n, first + 64, 4)) for n in range(4)]


def test_a_broken_sample_is_told_by_the_batch_of_its_own_turn(tmp_path):
    hurt = [(n, b"" if n.endswith("jpg") and int(n[:9]) in (3, 4, 9) else c) for n, c in members(12)]
    source = open_source(put(tmp_path / "a.tar", hurt))
    steps = [range(4 * s, 4 * s + 4) for s in range(9)]
    run = [reader(source).batch(p, 8) for p in steps]
    told = [b["bad"] for b in run]
    assert sorted(i for t in told for i in t) == [3, 4, 9] and not any(told[3:])  # once, in the first epoch
    assert {i for b in run for i in b["source_index"].tolist()} == set(range(12)) - {3, 4, 9}
    assert told == [bad for _, bad in reader(source, workers=4).prefetch(((p, 8) for p in steps), lambda b: None)]
    for start in range(1, 9):  # continued, by one that has met none of them
        rest = reader(source)
        assert all(same(rest.batch(p, 8), b) for p, b in zip(steps[start:], run[start:]))
    hosts = [reader(source), reader(source)]  # each reads its half of every batch
    for p, b in zip(steps, run):
        shares = [h.batch(p[2 * n:2 * n + 2], 8) for n, h in enumerate(hosts)]
        assert np.array_equal(np.concatenate([s["images"] for s in shares]), b["images"]) and shares[0]["bad"] | shares[1]["bad"] == b["bad"]


def test_held_out_samples_and_the_rest_are_the_whole(tmp_path):
    whole = open_source(put(tmp_path / "a.tar", members(43)))
    for count, held in ((2, 2), (512, 4)):
        train, val = train_val_split(whole, count)
        parts = [[p.caption(i) for i in range(len(p))] for p in (train, val)]
        assert len(parts[1]) == held and sorted(parts[0] + parts[1]) == sorted(whole.caption(i) for i in range(43))
        assert val.name(0) == whole.name(int(val.indices[0])) and train.fingerprint() != val.fingerprint() != whole.fingerprint()
    with pytest.raises(DataError, match="--val"):
        train_val_split(open_source(put(tmp_path / "b.tar", members(1))), 1)


def test_reading_ahead_passes_errors_on_and_ends_with_its_user():
    def transfer(batch):
        if batch["sample_index"][0] == 4:
            raise DataError("no more")
        return batch

    requests = ((range(4 * n, 4 * n + 4), 8) for n in itertools.count())
    batches = reader(open_source("scenes")).prefetch(requests, transfer)
    assert len(next(batches)[0]["sample_index"]) == 4
    with pytest.raises(DataError, match="no more"):
        next(batches)
    before = set(threading.enumerate())
    endless = reader(open_source("scenes")).prefetch(((range(4), 8) for _ in itertools.count()), lambda b: b)
    next(endless)
    [thread] = [t for t in set(threading.enumerate()) - before if t.name.startswith("batches")]
    endless.close()
    thread.join(30)
    assert not thread.is_alive()


def test_held_out_draw_is_fixed_and_from_all_over(tmp_path):
    for i in range(40):
        photo().save(tmp_path / f"{i:02}.png")
        (tmp_path / f"{i:02}.txt").write_text(f"image {i}")
    source = sources.open_source(str(tmp_path))
    first, again = (sources.subsample(source, 10) for _ in range(2))
    captions = [first.caption(i) for i in range(10)]
    assert captions == [again.caption(i) for i in range(10)] and len(set(captions)) == 10
    assert captions != sorted(captions) and max(int(c.split()[1]) for c in captions) > 20  # not the first ten
    assert sorted(sources.subsample(source, 50).indices) == list(range(40))

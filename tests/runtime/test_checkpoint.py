"""Checkpoints: arrays return bit for bit, damage is reported and never loaded, and a crash leaves
the older ones."""
import io
import json
import os
import pickle
import random
import stat
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from runtime import checkpoint
from runtime.errors import CheckpointError

TREE = {"encoder": {"kernel": np.arange(4000, dtype=np.float32).reshape(40, 100),
                    "bias": np.zeros((0, 3), np.float32)},
        "moments": [jnp.linspace(-3, 3, 700, dtype=jnp.bfloat16), np.int32(7)],
        "nan": np.array([np.nan, -0.0, np.inf], ml_dtypes.bfloat16)}
META = {"step": 5, "note": "käse", "list": [1, None, 2.5]}


@pytest.fixture
def saved(tmp_path):
    path = str(tmp_path / "one.npz")
    checkpoint.save(path, TREE, META)
    return path


def bits(x):
    x = np.asarray(x)
    return x.dtype, x.shape, x.tobytes()


def test_every_leaf_returns_bit_for_bit(saved):
    arrays, meta = checkpoint.load(saved)
    restored = checkpoint.restore(arrays, TREE)
    assert jax.tree.structure(restored) == jax.tree.structure(TREE)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(TREE)):
        assert bits(a) == bits(b)
    assert arrays["moments/0"].dtype == ml_dtypes.bfloat16 and meta == META


def test_numpy_alone_reads_a_checkpoint(saved):
    with np.load(saved, allow_pickle=False) as f:
        assert np.array_equal(f["encoder/kernel"], TREE["encoder"]["kernel"])
        meta = json.loads(f["meta"].tobytes())
        halves = f["moments/0"]
    assert meta["bits"] == {"moments/0": "bfloat16", "nan": "bfloat16"}
    assert halves.dtype == np.uint16
    widened = (halves.astype(np.uint32) << 16).view(np.float32)
    assert np.array_equal(widened, np.asarray(TREE["moments"][0], np.float32))


def test_a_part_is_restored_into_shapes(saved):
    arrays, _ = checkpoint.load(saved)
    shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, TREE["encoder"]))
    restored = checkpoint.restore(arrays, shapes, prefix="encoder")
    assert np.array_equal(restored["kernel"], TREE["encoder"]["kernel"])


def test_a_misfit_names_the_array_and_both_shapes(saved):
    arrays, _ = checkpoint.load(saved)
    message = r"runs/x does not fit this model: kernel is \(40, 100\), not \(40, 101\)"
    with pytest.raises(CheckpointError, match=message):
        checkpoint.restore(arrays, {"kernel": np.zeros((40, 101))}, "runs/x", prefix="encoder")
    with pytest.raises(CheckpointError, match="scale is missing"):
        checkpoint.restore(arrays, {"scale": np.zeros(3)}, prefix="encoder")
    with pytest.raises(CheckpointError, match="and 6 more"):
        checkpoint.restore(arrays, {f"x{i}": np.zeros(1) for i in range(9)})


def load_with_byte(path: str, raw: bytes, i: int, value: int) -> dict | None:
    """The arrays of a file with one changed byte, None if it is refused."""
    Path(path).write_bytes(raw[:i] + bytes([value]) + raw[i + 1:])
    try:
        return checkpoint.load(path)[0]
    except CheckpointError as problem:
        assert str(problem).startswith(path + " is damaged")
        return None


def test_a_changed_byte_is_refused_or_harmless_anywhere(saved):
    """Wherever one byte changes, the file is refused, or lacks an array, or has equal arrays."""
    good, _ = checkpoint.load(saved)
    raw, rng, refused = Path(saved).read_bytes(), random.Random(0), 0
    offsets = [*rng.sample(range(len(raw)), 400), *range(len(raw) - 400, len(raw))]
    for name in (b"encoder/kernel", b"moments/0"):
        offsets += range(raw.index(name) - 30, raw.index(name) + 140)
    for i in offsets:
        for value in (raw[i] ^ 1 << rng.randrange(8), rng.randrange(256), ord("2")):
            arrays = load_with_byte(saved, raw, i, value)
            if arrays is None:
                refused += 1
                continue
            for name in arrays.keys() & good.keys():
                assert bits(arrays[name]) == bits(good[name]), i
    assert refused > 1000


@pytest.mark.parametrize("keep", [0, 1, 10, 0.3, 0.9, -1, -20, -60])
def test_a_truncated_file_is_refused(saved, keep):
    raw = Path(saved).read_bytes()
    with open(saved, "wb") as f:
        f.write(raw[:int(keep * len(raw)) if isinstance(keep, float) else keep])
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoint.load(saved)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("pickle-ran",)


def test_pickles_are_refused_and_not_run(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickled = io.BytesIO()
    np.save(pickled, np.array([Bomb()], object), allow_pickle=True)
    with zipfile.ZipFile(saved, "a") as f:
        f.writestr("params/evil.npy", pickled.getvalue())
    (tmp_path / "bare.npz").write_bytes(pickle.dumps(Bomb()))
    for path in (saved, str(tmp_path / "bare.npz")):
        with pytest.raises(CheckpointError, match="is damaged or no checkpoint"):
            checkpoint.load(path)
    assert not os.path.exists("pickle-ran")


def member(shape: tuple, dtype: str, content: bytes) -> bytes:
    file = io.BytesIO()
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + content


@pytest.mark.parametrize("content, compression", [
    (member((1 << 40,), "<f4", b"few"), zipfile.ZIP_STORED),              # claims 4 terabytes
    (member((1 << 28,), "|u1", bytes(1 << 28)), zipfile.ZIP_DEFLATED),    # 256 MB in 256 kB
    (member((3,), "|O", b"cos\nsystem\n"), zipfile.ZIP_STORED)])
def test_a_file_that_claims_more_than_it_holds_is_refused_by_its_header(
        saved, monkeypatch, content, compression):
    with zipfile.ZipFile(saved, "a") as f:
        f.writestr("huge.npy", content, compress_type=compression)
    monkeypatch.setattr(np, "load", lambda *a, **k: pytest.fail("an array was read"))
    with pytest.raises(CheckpointError, match=r"huge\.npy is not what its header says"):
        checkpoint.load(saved)


def test_a_misfit_is_refused_before_its_arrays_are_read(tmp_path, monkeypatch):
    checkpoint.save_step(str(tmp_path), 1, TREE, META)

    def check(path, shapes, meta):
        assert meta["note"] == "käse" and shapes["moments/0"].dtype == ml_dtypes.bfloat16
        checkpoint.check_shapes(shapes, {"encoder": {"kernel": np.zeros((41, 100))}}, path)
    monkeypatch.setattr(checkpoint, "load", lambda path: pytest.fail("its arrays were read"))
    message = r"encoder/kernel is \(40, 100\), not \(41, 100\)"
    with pytest.raises(CheckpointError, match=message):
        checkpoint.latest(str(tmp_path), check)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    np.savez(tmp_path / "bare.npz", a=np.zeros(3))
    np.save(tmp_path / "array.npz.npy", np.zeros(3))
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "folder.npz").mkdir()
    for name in ("bare.npz", "array.npz.npy", "text.npz", "folder.npz"):
        with pytest.raises(CheckpointError, match=f"{name} is damaged or no checkpoint"):
            checkpoint.load(str(tmp_path / name))
    with pytest.raises(CheckpointError, match=r"none\.npz does not exist"):
        checkpoint.load(str(tmp_path / "none.npz"))


@pytest.mark.parametrize("fails", ["write", "fsync", "replace"])
def test_a_failed_save_leaves_the_old_file_and_nothing_else(saved, tmp_path, monkeypatch, fails):
    def full(*args, **options):
        raise OSError(28, "No space left on device")
    before = Path(saved).read_bytes()
    if fails == "write":
        monkeypatch.setattr(np, "savez", full)
    else:
        monkeypatch.setattr(os, fails, full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(saved, {"a": np.zeros(3)}, {})
    assert Path(saved).read_bytes() == before and os.listdir(tmp_path) == ["one.npz"]


def test_an_interrupt_during_a_save_leaves_the_old_file(saved, tmp_path):
    def half(f):
        f.write(b"half")
        raise KeyboardInterrupt
    before = Path(saved).read_bytes()
    with pytest.raises(KeyboardInterrupt):
        checkpoint.atomic_write(saved, half)
    assert Path(saved).read_bytes() == before and os.listdir(tmp_path) == ["one.npz"]


def test_the_last_two_are_kept_and_the_newest_is_loaded(tmp_path):
    folder = str(tmp_path)
    (tmp_path / "step-notes.npz").write_text("not one of ours")
    for step in (5, 90, 100, 1000):
        checkpoint.save_step(folder, step, {"a": np.full(3, step)}, {})
    assert [step for step, _ in checkpoint.steps(folder)] == [100, 1000]
    path, arrays, meta = checkpoint.latest(folder)
    assert os.path.basename(path) == "step-00001000.npz"
    assert arrays["a"][0] == meta["step"] == 1000
    assert (tmp_path / "step-notes.npz").exists()


def test_if_the_newest_is_damaged_the_previous_one_is_loaded_with_a_warning(tmp_path, capsys):
    folder = str(tmp_path)
    paths = [checkpoint.save_step(folder, n, {"a": np.full(300, n)}, {}) for n in (1, 2)]
    os.truncate(paths[1], os.path.getsize(paths[1]) // 2)
    assert checkpoint.latest(folder)[2]["step"] == 1
    out = capsys.readouterr().out
    assert out.startswith("warning: ") and paths[1] in out and out.count("\n") == 1
    os.truncate(paths[0], 0)
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged: delete"):
        checkpoint.latest(folder)


def test_no_checkpoint_is_none(tmp_path):
    assert checkpoint.latest(str(tmp_path)) is None
    assert checkpoint.latest(str(tmp_path / "absent")) is None


def test_a_damaged_newer_checkpoint_costs_none_that_is_saved_now(tmp_path):
    folder = str(tmp_path)
    for step in (400, 800):
        checkpoint.save_step(folder, step, {"a": np.full(300, step)}, {}, keep=2)
    os.truncate(tmp_path / "step-00000800.npz", 100)
    for step in (500, 600):
        checkpoint.save_step(folder, step, {"a": np.full(300, step)}, {}, keep=1, keep_every=400)
        assert [n for n, _ in checkpoint.steps(folder)] == [400, step, 800]
        assert checkpoint.latest(folder)[2]["step"] == step


def test_the_file_reaches_the_disk_before_its_name_and_then_its_folder(tmp_path, monkeypatch):
    synced, fsync, path = [], os.fsync, tmp_path / "a"

    def record(fd):
        synced.append((stat.S_ISDIR(os.fstat(fd).st_mode), path.exists()))
        fsync(fd)
    monkeypatch.setattr(os, "fsync", record)
    checkpoint.write_text(str(path), "x")
    assert synced == [(False, False), (True, True)]

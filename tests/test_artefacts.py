"""Files that an earlier version wrote stay usable: runs are continued and evaluated, encoders and exports are loaded.
tests/artefacts/README.md says how they were made."""
import json
import os
import shutil
import subprocess
import sys
import zlib

import jax
import ml_dtypes
import numpy as np
import pytest

import decoder
import evaluate
import vit
from interop import layouts
from interop.encoder import Encoder, load_encoder
from runtime import checkpoint, plots

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SAVED = os.path.join(ROOT, "tests", "artefacts")
NAMES = {  # of figures: in the saved files, and in today's
    "loss": "loss", "grad_norm": "grad_norm", "lr": "lr",
    "val_loss": "val_loss", "shuffled_loss": "val_loss_shuffled", "floor_loss": "val_loss_blind",
    "images_seen": "images_seen", "parameters": "parameters", "held_out_pictures": "num_val_images",
    "bad_samples": "bad_samples", "exact_match": "exact_match", "word_accuracy": "word_accuracy",
    "colour_accuracy": "color_accuracy", "shape_accuracy": "shape_accuracy", "size_accuracy": "size_accuracy",
    "place_accuracy": "place_accuracy", "object_accuracy": "object_accuracy", "count_accuracy": "count_accuracy",
    "background_accuracy": "background_accuracy",
}
EXACT = ("loss", "grad_norm", "val_loss", "shuffled_loss")


@pytest.fixture(scope="module")
def expected() -> dict:
    with open(os.path.join(SAVED, "expected.json"), encoding="utf-8") as f:
        return json.load(f)


@pytest.fixture
def nano(monkeypatch):
    for family in (vit.ENCODER_SIZES, decoder.DECODER_SIZES):
        monkeypatch.setitem(family, "nano", (1, 16, 2, 32))  # as artefacts/nano.py does in a process of its own


def cpu() -> int:
    """The kind of this machine's CPU, as a number."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            lines = {line for line in f if line.startswith(("model name", "flags", "Features"))}
    except OSError:
        return 0
    return zlib.crc32("".join(sorted(lines)).encode())


def compare(old: dict, new: dict, exact: bool = False) -> None:
    """Every figure of the old row is in the new one, equal to 1e-6 (or to the last bit, where a step computed it)."""
    figures = {name: value for name, value in old.items() if name in NAMES}
    assert figures
    for name, value in figures.items():
        found = new[NAMES[name]]
        if exact and name in EXACT:
            assert found == value, name
        assert found == pytest.approx(value, rel=1e-6, abs=1e-9), name


def image(resolution: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (resolution, resolution, 3), np.uint8)


def read_safetensors(path: str) -> dict[str, np.ndarray]:
    """The arrays of a file, without the library: 8 bytes of length, a JSON header, and the numbers."""
    with open(path, "rb") as f:
        whole = f.read()
    start = 8 + int.from_bytes(whole[:8], "little")
    arrays = {}
    for name, about in json.loads(whole[8:start]).items():
        if name != "__metadata__":
            assert about["dtype"] == "F32"
            first, last = about["data_offsets"]
            numbers = np.frombuffer(whole[start + first:start + last], np.float32)
            arrays[name] = numbers.reshape(about["shape"])
    return arrays


def test_a_stopped_run_goes_on_to_the_same_end(cache, expected, tmp_path):
    """Bit for bit where jax and the CPU are those of the saved figures: other ones round sums otherwise."""
    folder = str(tmp_path / "run")
    shutil.copytree(os.path.join(SAVED, "stopped"), folder)
    command = [sys.executable, os.path.join(SAVED, "nano.py"), "resume", folder]
    ended = subprocess.run(command, env=cache, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "from step 5 of 12" in ended.stdout
    rows = plots.read_metrics(os.path.join(folder, "metrics.jsonl"))
    assert [row["step"] for row in rows] == [row["step"] for row in expected["continued"]]
    exact = expected["jax"] == jax.__version__ and expected["cpu"] == cpu()
    for old, new in zip(expected["continued"], rows, strict=True):
        if old["step"] > 5:  # the rows before are those that the file had
            compare(old, new, exact)
    with open(os.path.join(folder, "summary.json"), encoding="utf-8") as f:
        compare(expected["summary"], json.load(f), exact)
    ours = checkpoint.read_encoder(os.path.join(folder, "encoder.npz"))[0]
    theirs = checkpoint.read_encoder(os.path.join(SAVED, "finished", "encoder.npz"))[0]
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["stopped", "clip"])
def test_a_saved_run_is_evaluated_without_a_flag(expected, nano, tmp_path, name):
    out = str(tmp_path / "found.json")
    assert evaluate.main([os.path.join(SAVED, name), "--json", out]) == 0
    with open(out, encoding="utf-8") as f:
        compare(expected["evaluated"][name], json.load(f)["caption"])


@pytest.mark.parametrize("name, resolution", [("finished", 24), ("clip", 8)])
def test_a_saved_encoder_gives_the_same_features(expected, nano, name, resolution):
    encoder = load_encoder(os.path.join(SAVED, name))
    assert encoder.resolution == resolution
    found = encoder(image(resolution)).pooled[0]
    np.testing.assert_allclose(found, expected["pooled"][name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name, resolution, cls", [("vit", 24, True), ("siglip", 8, False)])
def test_an_exported_folder_gives_the_same_features(expected, nano, name, resolution, cls):
    arrays = read_safetensors(os.path.join(SAVED, name, "model.safetensors"))
    params, cfg, found, _ = layouts.detect(arrays)
    assert (found, cfg.cls_token) == (resolution, cls)
    pooled = Encoder(params, cfg, found)(image(found)).pooled[0]
    np.testing.assert_allclose(pooled, expected["pooled"][name], rtol=1e-5, atol=1e-5)


def test_a_saved_checkpoint_holds_the_optimizer_state(nano):
    """Both moments, one of them in bfloat16, which numpy does not know."""
    _, arrays, meta = checkpoint.latest(os.path.join(SAVED, "stopped"))
    moments = [x for name, x in arrays.items() if name.startswith("opt/") and x.ndim]
    assert meta["step"] == 5 and {x.dtype for x in moments} == {np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)}

"""Files that an earlier version wrote stay usable: runs are continued and evaluated, encoders and
exports are loaded. tests/artefacts/README.md says how they were made. Figures agree to 1e-6, not to
the last bit: the layers have been rewritten since and round differently."""
import json
import os
import shutil
import subprocess
import sys

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
NAMES = {  # of the metrics that are compared: in the saved files, and in new ones
    **{name: name for name in (
        "loss", "grad_norm", "lr", "val_loss", "images_seen", "parameters", "bad_samples",
        "exact_match", "word_accuracy", "shape_accuracy", "size_accuracy", "place_accuracy",
        "object_accuracy", "count_accuracy", "background_accuracy")},
    **plots.OLD_METRICS}


@pytest.fixture(scope="module")
def expected() -> dict:
    with open(os.path.join(SAVED, "expected.json"), encoding="utf-8") as f:
        return json.load(f)


@pytest.fixture
def nano(monkeypatch):
    for family in (vit.ENCODER_SIZES, decoder.DECODER_SIZES):
        monkeypatch.setitem(family, "nano", (1, 16, 2, 32))  # as artefacts/nano.py does


def compare(old: dict, new: dict) -> None:
    """Every metric of the old row is in the new one."""
    metrics = {name: value for name, value in old.items() if name in NAMES}
    assert metrics
    for name, value in metrics.items():
        assert new[NAMES[name]] == pytest.approx(value, rel=1e-6, abs=1e-9), name


def image(resolution: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (resolution, resolution, 3), np.uint8)


def read_safetensors(path: str) -> dict[str, np.ndarray]:
    """The arrays of a file: 8 bytes of length, a JSON header, and the numbers."""
    with open(path, "rb") as f:
        content = f.read()
    start = 8 + int.from_bytes(content[:8], "little")
    arrays = {}
    for name, entry in json.loads(content[8:start]).items():
        if name != "__metadata__":
            assert entry["dtype"] == "F32"
            first, last = entry["data_offsets"]
            numbers = np.frombuffer(content[start + first:start + last], np.float32)
            arrays[name] = numbers.reshape(entry["shape"])
    return arrays


def test_a_stopped_run_continues_to_the_same_end(cache, expected, tmp_path):
    folder = str(tmp_path / "run")
    shutil.copytree(os.path.join(SAVED, "stopped"), folder)
    command = [sys.executable, os.path.join(SAVED, "nano.py"), "resume", folder]
    ended = subprocess.run(command, env=cache, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "from step 5 of 12" in ended.stdout
    rows = plots.read_metrics(os.path.join(folder, "metrics.jsonl"))
    assert [row["step"] for row in rows] == [row["step"] for row in expected["continued"]]
    for old, new in zip(expected["continued"], rows, strict=True):
        compare(old, new)
    with open(os.path.join(folder, "summary.json"), encoding="utf-8") as f:
        compare(expected["summary"], json.load(f))
    new = checkpoint.read_encoder(os.path.join(folder, "encoder.npz"))[0]
    old = checkpoint.read_encoder(os.path.join(SAVED, "finished", "encoder.npz"))[0]
    for x, y in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=5e-5)  # a step of AdamW moves by 1e-3


@pytest.mark.parametrize("name", ["stopped", "clip"])
def test_a_saved_run_is_evaluated_without_a_flag(expected, nano, tmp_path, name):
    out = str(tmp_path / "metrics.json")
    assert evaluate.main([os.path.join(SAVED, name), "--json", out]) == 0
    with open(out, encoding="utf-8") as f:
        compare(expected["evaluated"][name], json.load(f)["caption"])


@pytest.mark.parametrize("name, resolution", [("finished", 24), ("clip", 8)])
def test_a_saved_encoder_gives_the_same_features(expected, nano, name, resolution):
    encoder = load_encoder(os.path.join(SAVED, name))
    assert encoder.resolution == resolution
    pooled = encoder(image(resolution)).pooled[0]
    np.testing.assert_allclose(pooled, expected["pooled"][name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name, resolution, cls_token", [("vit", 24, True), ("siglip", 8, False)])
def test_an_exported_folder_gives_the_same_features(expected, nano, name, resolution, cls_token):
    arrays = read_safetensors(os.path.join(SAVED, name, "model.safetensors"))
    params, cfg, trained_resolution, _ = layouts.detect(arrays)
    assert (trained_resolution, cfg.cls_token) == (resolution, cls_token)
    pooled = Encoder(params, cfg, resolution)(image(resolution)).pooled[0]
    np.testing.assert_allclose(pooled, expected["pooled"][name], rtol=1e-5, atol=1e-5)


def test_a_saved_checkpoint_holds_the_optimizer_state(nano):
    """Both moments, one of them in bfloat16, which numpy does not know."""
    _, arrays, meta = checkpoint.latest(os.path.join(SAVED, "stopped"))
    moments = [x for name, x in arrays.items() if name.startswith("opt/") and x.ndim]
    assert meta["step"] == 5
    assert {x.dtype for x in moments} == {np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)}

"""Training end to end: the step on any number of devices, stages, interruption, and what a run
leaves behind."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

import config
import layers
import train
from objectives import registry
from runtime import checkpoint, curriculum, plots
from runtime.devices import DataParallel
from runtime.run_folder import Run
from runtime.validation import ValidationSet
from tests.helpers.compiling import several_devices
from tests.helpers.paths import ROOT
from tests.helpers.runs import SMALL_RUN, arrays, assert_equal_runs, rows, start_training

FLAGS = [*SMALL_RUN, "--log-every", "4", "--eval-every", "8", "--save-every", "6",
         "--workers", "2"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, cache):
    """A run of 24 steps, in a process of its own: in this one JAX has started, with other devices
    than a run would have."""
    folder = tmp_path_factory.mktemp("runs") / "uninterrupted"
    process = start_training(cache, *FLAGS, "--workdir", str(folder))
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return folder


def test_run_leaves_its_files_and_its_summary(uninterrupted):
    names = set(os.listdir(uninterrupted))
    assert {"config.json", "vocab.txt", "metrics.jsonl", "curve.png", "samples.png", "summary.json",
            "report.html", "samples.json", "environment.json",
            "encoder.npz", "step-00000024.npz"} <= names
    assert not [name for name in names if name.endswith((".part", ".new"))]
    summary = json.load(open(uninterrupted / "summary.json"))
    assert {"val_loss", "val_loss_blind", "seconds", "images_per_second", "object_accuracy",
            "exact_match", "word_accuracy", "shape_accuracy", "size_accuracy",
            "place_accuracy"} <= summary.keys()
    assert summary["images_seen"] == 24 * 8 and summary["num_val_images"] == 16
    assert 0 < summary["val_loss_blind"] < 2 and summary["parameters"] > 500_000
    for name in ("curve.png", "samples.png"):
        assert min(Image.open(uninterrupted / name).size) > 300


def test_metrics_have_rows_of_both_stages(uninterrupted):
    metrics = rows(uninterrupted)
    steps = [row for row in metrics if "loss" in row]
    assert [(row["step"], row["stage"], row["images"]) for row in steps] == [
        (4, 1, 32), (8, 1, 64), (12, 1, 96), (16, 2, 128), (20, 2, 160), (24, 2, 192)]
    assert [row["step"] for row in metrics if "val_loss" in row] == [8, 12, 16, 24]
    assert all(np.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in steps)


def test_new_stage_keeps_parameters_and_starts_a_new_optimizer(uninterrupted):
    saved = arrays(uninterrupted)
    counts = [int(value) for name, value in saved.items()
              if name.startswith("opt/") and name.endswith("count")]
    assert counts and set(counts) == {12}  # steps of the second stage only
    assert any(name.startswith("params/decoder/") for name in saved)


def test_encoder_file_is_the_encoder(uninterrupted):
    encoder, meta = checkpoint.load(str(uninterrupted / "encoder.npz"))
    saved = arrays(uninterrupted)
    assert encoder
    for name, array in encoder.items():
        assert np.array_equal(array, saved[f"params/encoder/{name}"])
    assert meta["encoder"]["patch_size"] == 8 and meta["resolution"] == 24


def test_checkpoint_says_its_encoder_and_resolution(uninterrupted):
    """So that an encoder can be read from it without parsing the settings."""
    encoder = checkpoint.read_header(str(uninterrupted / "encoder.npz"))[1]["encoder"]
    for step, path in checkpoint.steps(str(uninterrupted)):
        _, meta = checkpoint.read_header(path)
        assert meta["encoder"] == encoder and meta["resolution"] == (16 if step <= 12 else 24)


def test_finished_run_is_left_alone(uninterrupted, capsys):
    before = os.stat(uninterrupted / "summary.json").st_mtime_ns
    assert train.main([*FLAGS, "--workdir", str(uninterrupted)]) == 0
    assert "is finished" in capsys.readouterr().out
    assert os.stat(uninterrupted / "summary.json").st_mtime_ns == before


def test_other_settings_in_the_same_folder_are_refused(uninterrupted, capsys):
    command = [*FLAGS, "--workdir", str(uninterrupted), "--keep-ratio", "0.5", "--seed", "3"]
    assert train.main(command) == 1
    errors = capsys.readouterr().err
    assert "--keep-ratio is 0.5, was 0.35" in errors and "--seed is 3, was 0" in errors
    assert json.load(open(uninterrupted / "config.json"))["keep_ratio"] == 0.35


def interrupt(env: dict, folder: Path, number: int, num_rows: int) -> tuple[int, str]:
    """Starts the run, and sends it a signal when metrics.jsonl has this many rows: its exit status
    and output."""
    process = start_training(env, *FLAGS, "--workdir", str(folder))
    while process.poll() is None:
        if (folder / "metrics.jsonl").exists() and len(rows(folder)) >= num_rows:
            break
        time.sleep(0.02)
    process.send_signal(number)
    output, _ = process.communicate()
    return process.returncode, output


def test_interrupted_run_equals_the_uninterrupted(uninterrupted, cache, tmp_path):
    """A signal in the first stage and two in the second, each time followed by the same command:
    the same parameters, optimizer and metrics, bit for bit."""
    folder = tmp_path / "run"
    for number, status, num_rows in ((signal.SIGTERM, 143, 1), (signal.SIGINT, 130, 5)):
        ended, output = interrupt(cache, folder, number, num_rows)
        assert ended == status and "saved at step" in output
    assert interrupt(cache, folder, signal.SIGKILL, 6)[0] == -9
    again = start_training(cache, *FLAGS, "--workdir", str(folder))
    output, errors = again.communicate()
    assert again.returncode == 0 and "continuing" in output, errors
    assert_equal_runs(folder, uninterrupted)
    seconds = [row["seconds"] for row in plots.read_metrics(folder / "metrics.jsonl")]
    assert seconds == sorted(seconds) and seconds[0] > 0  # the clock goes on after a pause


def test_evaluate_reproduces_the_summary(uninterrupted, cache):
    result = subprocess.run([sys.executable, "evaluate.py", str(uninterrupted)], cwd=ROOT,
                            env=cache, capture_output=True, text=True)
    metrics = json.loads(result.stdout[result.stdout.index("{"):])
    summary = json.load(open(uninterrupted / "summary.json"))
    assert metrics["val_loss"] == pytest.approx(summary["val_loss"], rel=1e-6)
    assert metrics["object_accuracy"] == summary["object_accuracy"]


DEVICES = """
import dataclasses, sys
import jax, numpy as np, optax
import config, data, train
from inputs import images, opening, sources
from objectives import registry
from runtime.devices import DataParallel

cfg = dataclasses.replace(config.RECIPES["toy"], encoder="micro/8", scan_unroll=1)
source = sources.SceneSource(0, "train")
loader = data.Loader(source, opening.open_tokenizer(cfg, source), 28, 0, images.Augment(1.0), 2)
model = registry.model_spec(cfg)
initial, results = registry.init_params(cfg, model), {}
for name, count, accum in (("one", 1, 1), ("eight", 8, 1), ("pieces", 1, 4), ("both", 2, 4)):
    parallel, sgd = DataParallel(count), optax.sgd(0.05)
    step = train.make_step(model, sgd, 0, accum, parallel.pmap_devices)
    params, state = parallel.replicate(initial), parallel.replicate(sgd.init(initial))
    for s in range(8):
        batch = parallel.shard_batch(loader.batch(range(16 * s, 16 * s + 16), 16))
        params, state, metrics = step(params, state, batch)
        results[f"{name} loss {s}"] = parallel.unreplicate(metrics["loss"])
        results[f"{name} norm {s}"] = parallel.unreplicate(metrics["grad_norm"])
        if s == 0:  # with plain SGD the first change is the gradient
            for i, (x, y) in enumerate(zip(jax.tree.leaves(params), jax.tree.leaves(initial))):
                x = np.asarray(x)
                results[f"{name} gradient {i}"] = (np.asarray(y) - x[0]) / 0.05
                assert (x == x[:1]).all()  # every device holds the same parameters
np.savez(sys.argv[1], **results)
"""


def test_devices_and_gradient_accumulation_change_no_number(tmp_path, cache):
    """1 device, 8 simulated devices, 4 pieces, 2 devices x 4 pieces: one loss curve, and the same
    gradient in every leaf."""
    path = str(tmp_path / "results.npz")
    result = subprocess.run([sys.executable, "-c", DEVICES, path], cwd=ROOT, capture_output=True,
                            env=several_devices(8, cache) | {"PYTHONPATH": ROOT}, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    results = np.load(path)
    keys = [key.removeprefix("one ") for key in results.files if key.startswith("one ")]
    assert len(keys) > 16 + 20
    assert float(results["one loss 7"]) < float(results["one loss 0"])
    for name in ("eight", "pieces", "both"):
        for key in keys:
            a, b = results[f"{name} {key}"], results[f"one {key}"]
            difference = np.linalg.norm(a - b)
            assert difference <= 1e-4 * np.linalg.norm(b) + 1e-5, (name, key)


def test_only_matrices_decay():
    cfg, stage = config.RECIPES["toy"], curriculum.Stage(1, 16, 8, 1e-2, 10, 0, 0, 0)
    params = {"linear": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones((2, 3))},
              "embed": {"embedding": jnp.ones((4, 2))}, "norm": {"scale": jnp.ones((2, 3))}}
    optimizer = train.make_optimizer(cfg, stage)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    decayed = updates["linear"].pop("kernel")
    np.testing.assert_allclose(decayed, -1e-2 * cfg.weight_decay, rtol=1e-5)
    assert all((update == 0).all() for update in jax.tree.leaves(updates))


def test_learning_rate_warms_up_and_falls_to_zero():
    schedule = curriculum.lr_schedule(curriculum.Stage(1, 16, 8, 3e-3, 100, 10, 0, 0))
    rates = [float(schedule(step)) for step in range(101)]
    assert rates[0] == 0 and rates[10] == pytest.approx(3e-3)
    assert rates[5] == pytest.approx(1.5e-3) and rates[55] == pytest.approx(1.5e-3, rel=1e-3)
    assert rates[100] == pytest.approx(0, abs=1e-9)


def test_loss_that_is_not_finite_stops_the_run(tmp_path, capsys):
    command = [*FLAGS, "--stages", "resolution=16 steps=40 batch=8 lr=1e30 warmup=0", "--grad-clip",
               "0", "--workdir", str(tmp_path / "run")]
    assert train.main(command) == 1
    errors = capsys.readouterr().err
    assert "no longer finite" in errors and "lower lr" in errors and "Traceback" not in errors


@pytest.mark.parametrize("recipe", list(config.RECIPES))
def test_dry_run_describes_every_recipe(recipe, capsys):
    assert train.main([recipe, "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert "encoder" in output and "patch tokens" in output and "FLOPs" in output
    if recipe == "l14":
        for figure in ("encoder 302.9 M", "256 patch tokens, 89 kept", "36 patch tokens, 12 kept",
                       "206.16 GFLOPs", "390,981 steps"):
            assert figure in output, output


def test_shuffled_loss_gives_every_image_the_caption_of_another(tmp_path, monkeypatch):
    flags = [*FLAGS, "--val-samples", "20", "--workdir", str(tmp_path / "run")]
    cfg = config.parse_args(flags)[0]
    run = Run(cfg, DataParallel())
    validation_set = ValidationSet(cfg, run.val_loader, 16, 8, run.model, run.parallel,
                                   train.openvision2_loss)
    captions = [tuple(run.tokenizer.encode(run.val_source.caption(i), cfg.max_text_len))
                for i in range(20)]
    batches = []

    def spied_loss(params, batch):
        texts = np.asarray(batch["text"]).reshape(-1, cfg.max_text_len)
        batches.append([tuple(text) for text in texts if any(text)])
        return jnp.ones(1), jnp.ones(1)
    validation_set.loss = spied_loss
    monkeypatch.setattr(DataParallel, "unreplicate", staticmethod(lambda x: x[0]))
    validation_set.losses({})
    half = len(batches) // 2
    own = [text for batch in batches[:half] for text in batch]
    shuffled = [text for batch in batches[half:] for text in batch]
    assert own == captions and sorted(shuffled) == sorted(captions)
    assert all(a != b for a, b in zip(own, shuffled))
    assert validation_set.count == 20 and validation_set.blind_loss() > 0


def test_initial_parameters_and_masks_have_different_keys(monkeypatch):
    """No key of initial parameters is also the key of a sample's mask, whatever its position."""
    cfg, used = config.RECIPES["toy"], []
    init_params = layers.init_params

    def spied_init(key, specs):
        used.append(tuple(np.asarray(jax.random.key_data(key))))
        return init_params(key, specs)
    monkeypatch.setattr(layers, "init_params", spied_init)
    registry.init_params(cfg, registry.model_spec(cfg))
    root = jax.random.key(cfg.seed)
    positions = np.concatenate([np.arange(2000), [0x7FFFFFFE, 0x7FFFFFFF]]).astype(np.int32)
    mask_keys = jax.vmap(lambda position: jax.random.fold_in(root, position))(positions)
    mask_keys = {tuple(key) for key in np.asarray(jax.random.key_data(mask_keys))}
    assert len(set(used)) == 2 and not mask_keys & set(used)


def test_mask_is_drawn_from_the_seed_and_the_position(monkeypatch):
    """A run folder of an earlier version continues with the masks that it would have had."""
    def loss(params, batch, keys, model):
        draws = jax.vmap(jax.random.uniform)(keys)
        return draws.sum() + 0 * params["w"].sum(), jnp.int32(1)
    monkeypatch.setattr(train, "openvision2_loss", loss)
    sgd, model = optax.sgd(0.1), registry.model_spec(config.RECIPES["toy"])
    params = {"w": np.zeros((1, 3), np.float32)}
    step = train.make_step(model, sgd, 7, devices=jax.local_devices()[:1])
    positions = np.array([[0, 1, 5000]], np.int32)
    state = jax.tree.map(lambda x: x[None], sgd.init(params))
    _, _, metrics = step(params, state, {"position": positions})
    root = jax.random.key(7)
    expected = sum(float(jax.random.uniform(jax.random.fold_in(root, n))) for n in positions[0])
    assert float(metrics["loss"][0]) == pytest.approx(expected, rel=1e-5)


def test_out_of_memory_says_what_to_do(monkeypatch, capsys):
    def run_out(cfg):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\ndetails")
    monkeypatch.setattr(train, "train", run_out)
    assert train.main(["toy"]) == 1
    assert capsys.readouterr().err == (
        "error: out of memory: try --zero1 (for several devices), --grad-accum 4, --remat dots or "
        "block, --loss-chunk 16, then a smaller batch in --stages "
        "(RESOURCE_EXHAUSTED: Out of memory)\n")

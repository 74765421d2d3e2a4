"""The run as a whole: the step on any number of devices, stages, interruption, and what a run leaves behind."""
import json
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

import config
import train
import vit
from objectives import registry
from runtime import checkpoint, curriculum, validation
from tests.helpers.paths import ROOT
from tests.helpers.runs import arrays, rows, same

TINY = ["--stages", "resolution=16 steps=6 batch=8 lr=1e-3 warmup=1, resolution=24 steps=5 batch=8 lr=1e-3 warmup=1",
        "--val-samples", "20", "--log-every", "2", "--eval-every", "4", "--save-every", "3", "--workers", "2"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    """An uninterrupted tiny run, in a process of its own: in this one jax has started, with other devices than a run asks for."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    done = subprocess.run([sys.executable, "train.py", *TINY, "--workdir", str(folder)], cwd=ROOT, env=cache, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_a_run_leaves_what_it_should(whole):
    names = set(os.listdir(whole))
    assert {"config.json", "vocab.txt", "metrics.jsonl", "curve.png", "samples.png", "summary.json", "encoder.npz", "step-00000011.npz"} <= names
    assert not [n for n in names if n.endswith((".part", ".new"))]
    summary = json.load(open(whole / "summary.json"))
    assert {"val_loss", "val_loss_blind", "images_seen", "seconds", "images_per_second", "parameters", "object_accuracy", "exact_match", "word_accuracy",
            "color_accuracy", "shape_accuracy", "size_accuracy", "place_accuracy"} <= summary.keys()
    assert summary["images_seen"] == 11 * 8 and 0 < summary["val_loss_blind"] < 2 and summary["parameters"] > 500_000
    for name in ("curve.png", "samples.png"):
        assert min(Image.open(whole / name).size) > 300


def test_metrics_tell_of_both_stages(whole):
    steps = [r for r in rows(whole) if "loss" in r]
    assert [(r["step"], r["stage"], r["images"]) for r in steps] == [(2, 1, 16), (4, 1, 32), (6, 1, 48), (8, 2, 64), (10, 2, 80), (11, 2, 88)]
    assert [r["step"] for r in rows(whole) if "val_loss" in r] == [4, 6, 8, 11]
    assert all(np.isfinite(r["loss"]) and r["grad_norm"] > 0 for r in steps)


def test_the_switch_carries_parameters_and_starts_a_new_optimizer(whole):
    found = arrays(whole)
    counts = [v for k, v in found.items() if k.startswith("opt/") and k.endswith("count")]
    assert counts and all(int(c) == 5 for c in counts)  # steps of the second stage alone
    assert any(k.startswith("params/decoder/") for k in found)


def test_encoder_file_is_the_encoder(whole):
    encoder, meta = checkpoint.load(str(whole / "encoder.npz"))
    full = arrays(whole)
    assert encoder and all(np.array_equal(v, full[f"params/encoder/{k}"]) for k, v in encoder.items())
    assert meta["encoder"]["patch_size"] == 8 and meta["resolution"] == 24


def test_finished_run_is_left_alone(whole, capsys):
    before = os.stat(whole / "summary.json").st_mtime_ns
    assert train.main([*TINY, "--workdir", str(whole)]) == 0
    assert "is finished" in capsys.readouterr().out and os.stat(whole / "summary.json").st_mtime_ns == before


def test_other_settings_in_the_same_folder_are_refused(whole, capsys):
    assert train.main([*TINY, "--workdir", str(whole), "--keep-ratio", "0.5", "--seed", "3"]) == 1
    said = capsys.readouterr().err
    assert "--keep-ratio is 0.5, was 0.35" in said and "--seed is 3, was 0" in said
    assert json.load(open(whole / "config.json"))["keep_ratio"] == 0.35


@pytest.mark.parametrize("number,status", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_interrupted_equals_uninterrupted(whole, cache, tmp_path, number, status):
    """A signal in the first or second stage, then the same command: the same parameters, optimizer and metrics, bit for bit."""
    command = [sys.executable, "train.py", *TINY, "--workdir", str(tmp_path / "run")]
    process = subprocess.Popen(command, cwd=ROOT, env=cache, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    metrics, wanted = tmp_path / "run" / "metrics.jsonl", {signal.SIGTERM: 1, signal.SIGINT: 5, signal.SIGKILL: 6}[number]
    while process.poll() is None and not (metrics.exists() and len(rows(tmp_path / "run")) >= wanted):
        time.sleep(0.02)
    process.send_signal(number)
    said, _ = process.communicate()
    assert process.returncode == status
    if number != signal.SIGKILL:
        assert "saved at step" in said
    again = subprocess.run(command, cwd=ROOT, env=cache, capture_output=True, text=True)
    assert again.returncode == 0 and "continuing" in again.stdout
    assert same(arrays(tmp_path / "run"), arrays(whole))
    assert rows(tmp_path / "run") == rows(whole)


def test_evaluate_measures_a_run_again(whole, cache):
    done = subprocess.run([sys.executable, "evaluate.py", str(whole)], cwd=ROOT, env=cache, capture_output=True, text=True)
    again = json.loads(done.stdout[done.stdout.index("{"):])
    summary = json.load(open(whole / "summary.json"))
    assert again["val_loss"] == pytest.approx(summary["val_loss"], rel=1e-6) and again["object_accuracy"] == summary["object_accuracy"]


DEVICES = """
import sys, jax, numpy as np, optax, config, data, scenes, sources, tokenizer, train
from devices import Place
cfg = config.PRESETS["toy"]
tok = tokenizer.build([scenes.caption(scenes.record(0, "train", i)) for i in range(500)], 192)
model = train.Model(*config.models(cfg, 192), 0.35)
reader = data.Reader(sources.Scenes(0, "train"), tok, 28, 0, data.Augment(1.0), 2)
start, out = train.init(cfg, model), {}
for name, count, accum in (("one", 1, 1), ("eight", 8, 1), ("pieces", 1, 4), ("both", 2, 4)):
    place, sgd = Place(count), optax.sgd(0.05)
    step, params, state = train.make_step(model, sgd, 0, accum, place.local), place.copies(start), place.copies(sgd.init(start))
    for s in range(8):
        params, state, metrics = step(params, state, place.put(reader.batch(range(16 * s, 16 * s + 16), 16)))
        out[f"{name} loss {s}"], out[f"{name} norm {s}"] = place.get(metrics["loss"]), place.get(metrics["grad_norm"])
        if s == 0:  # with plain SGD the first change is the gradient
            for i, (x, y) in enumerate(zip(jax.tree.leaves(params), jax.tree.leaves(start))):
                out[f"{name} gradient {i}"] = (np.asarray(y) - np.asarray(x)[0]) / 0.05
                assert (np.asarray(x) == np.asarray(x)[:1]).all()  # every device holds the same parameters
np.savez(sys.argv[1], **out)
"""


def test_devices_and_pieces_change_no_number(tmp_path, cache):
    """1 device, 8 pretend devices, 4 pieces, 2 devices x 4 pieces: one loss curve, and the same gradient in every leaf."""
    env = cache | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "PYTHONPATH": ROOT}
    done = subprocess.run([sys.executable, "-c", DEVICES, str(tmp_path / "out.npz")], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    out = np.load(tmp_path / "out.npz")
    ones = [k.removeprefix("one ") for k in out.files if k.startswith("one ")]
    assert len(ones) > 16 + 20 and float(out["one loss 7"]) < float(out["one loss 0"])
    for name in ("eight", "pieces", "both"):
        for key in ones:
            a, b = out[f"{name} {key}"], out[f"one {key}"]
            assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b) + 1e-5, (name, key)


def test_decay_is_on_matrices_alone():
    cfg, stage = config.RECIPES["toy"], curriculum.Stage(1, 16, 8, 1e-2, 10, 0, 0, 0)
    params = {"a": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones((2, 3))}, "embed": {"embedding": jnp.ones((4, 2))}, "norm": {"scale": jnp.ones((2, 3))}}
    optimizer = train.make_optimizer(cfg, stage)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(updates["a"]["kernel"], -1e-2 * cfg.weight_decay, rtol=1e-5)
    assert all((updates[a][b] == 0).all() for a, b in (("a", "bias"), ("embed", "embedding"), ("norm", "scale")))


def test_schedule_warms_up_and_falls_to_zero():
    rate = curriculum.lr_schedule(curriculum.Stage(1, 16, 8, 3e-3, 100, 10, 0, 0))
    values = [float(rate(s)) for s in range(101)]
    assert values[0] == 0 and values[10] == pytest.approx(3e-3) and values[100] == pytest.approx(0, abs=1e-9)
    assert values[55] == pytest.approx(1.5e-3, rel=1e-3) and values[5] == pytest.approx(1.5e-3)
    assert optax.tree.norm(jnp.diff(jnp.array(values[:11]))) > 0


def test_a_loss_that_is_no_number_stops_the_run(tmp_path, capsys):
    argv = ["--stages", "resolution=16 steps=40 batch=8 lr=1e30 warmup=0", "--grad-clip", "0", "--val-samples", "8", "--workdir", str(tmp_path / "run")]
    assert train.main(argv) == 1
    said = capsys.readouterr().err
    assert "no longer finite" in said and "lower lr" in said and "Traceback" not in said


@pytest.mark.parametrize("recipe", list(config.RECIPES))
def test_every_recipe_says_what_it_would_be(recipe, capsys):
    assert train.main([recipe, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "encoder" in said and "patch tokens" in said and "FLOPs" in said
    if recipe == "l14":
        for figure in ("encoder 302.9 M", "256 patch tokens, 89 kept", "36 patch tokens, 12 kept", "206.16 GFLOPs", "390,981 steps"):
            assert figure in said, said


def test_shuffled_pictures_cost_a_model_that_looks(tmp_path):
    """A decoder that copies what the picture says: its loss is low on its own pictures and high on shuffled ones."""
    from runtime.devices import DataParallel
    from runtime.run_folder import Run
    cfg = config.parse_args([*TINY, "--workdir", str(tmp_path / "run")])[0]
    run = Run(cfg, DataParallel())
    run.enter(run.plan[0])
    run.bar.close()
    params = run.parallel.replicate(registry.init_params(cfg, run.model))
    captions = [tuple(run.tok.encode(run.val_source.caption(i), cfg.max_text_len)) for i in range(20)]
    seen = []

    def spy(params, batch):
        seen.append([tuple(t) for t in np.asarray(batch["text"]).reshape(-1, cfg.max_text_len)])
        return [np.ones((1,)), np.ones((1,))]
    run.held.loss, run.parallel = spy, run.parallel
    run.held.parallel.unreplicate = lambda x: x[0]
    run.held.losses(params)
    n = len(seen) // 2
    straight, moved = ([t for batch in part for t in batch if any(t)] for part in (seen[:n], seen[n:]))
    assert straight == captions and sorted(moved) == sorted(captions)
    assert all(a != b for a, b in zip(straight, moved))
    assert run.held.blind_loss() == pytest.approx(run.floor)
    assert validation.ValidationSet(cfg, run.val_reader, 16, 8, run.model, run.parallel).count == 20


def test_initial_parameters_and_masks_have_keys_of_their_own(monkeypatch):
    """No key of initial parameters is also the key of a sample's mask, whatever its position."""
    cfg, used = config.RECIPES["toy"], []
    real = vit.initialise

    def spied(key, declared):
        used.append(key)
        return real(key, declared)
    monkeypatch.setattr(vit, "initialise", spied)
    registry.init_params(cfg, registry.model_spec(cfg))
    root = jax.random.key(cfg.seed)
    positions = np.concatenate([np.arange(2000), [0x7FFFFFFE, 0x7FFFFFFF]]).astype(np.int32)
    masks = jax.vmap(lambda row: jax.random.fold_in(root, row))(positions)
    masks = {tuple(k) for k in np.asarray(jax.random.key_data(masks))}
    initial = [tuple(np.asarray(jax.random.key_data(key))) for key in used]
    assert len(set(initial)) == 2 and not masks & set(initial)


def test_a_mask_is_drawn_from_the_seed_and_the_position(monkeypatch):
    """A run folder of an earlier version goes on with the masks that it would have had."""
    def objective(params, batch, keys, model):
        draws = jax.vmap(jax.random.uniform)(keys)
        return draws.sum() + 0 * params["w"].sum(), jnp.int32(1)
    monkeypatch.setitem(train.OBJECTIVES, "openvision2", objective)
    sgd, model = optax.sgd(0.1), registry.model_spec(config.RECIPES["toy"])
    params = {"w": np.zeros((1, 3), np.float32)}
    step = train.make_step(model, sgd, 7, devices=jax.local_devices()[:1])
    rows = np.array([[0, 1, 5000]], np.int32)
    state = jax.tree.map(lambda x: x[None], sgd.init(params))
    _, _, metrics = step(params, state, {"sample_index": rows})
    root = jax.random.key(7)
    wanted = sum(float(jax.random.uniform(jax.random.fold_in(root, row))) for row in rows[0])
    assert float(metrics["loss"][0]) == pytest.approx(wanted, rel=1e-5)

"""The bench tells what it claims to tell: its formulas are XLA's counts, its tables hold the figures, its refusals are sentences."""
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

import bench
import train
from benchmarks import step_time, tpu_memory
from config import Config
from objectives import registry
from runtime import devices
from runtime.tables import format_table

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SMALL = Config(encoder="micro/8", decoder="micro", vocab_size=512, max_text_len=24, keep_ratio=0.5, scan_unroll=4,
               stages="resolution=48 steps=9 batch=4 lr=1e-3")


def counted(cfg: Config, backward: bool) -> float:
    """FLOPs an image by XLA's own count, which sees every layer of an unrolled model."""
    model, batch = registry.model_spec(cfg), step_time.make_batch(cfg, 48, 4)
    params = jax.eval_shape(lambda: registry.init_params(cfg, model))
    run = jax.value_and_grad(train.openvision2_loss, has_aux=True) if backward else train.openvision2_loss
    keys = jax.random.split(jax.random.key(0), 4)
    return jax.jit(run, static_argnums=3).lower(params, batch, keys, model).cost_analysis()["flops"] / 4


@pytest.fixture(scope="module")
def kept_all() -> float:
    return counted(SMALL, backward=True)


def test_flops_are_xlas(kept_all):
    """Matmuls are nearly all there is; what stands between them makes XLA's figure a little larger."""
    formula = step_time.model_flops(SMALL, 48)
    assert formula < kept_all < 1.12 * formula
    assert formula / 3 < counted(SMALL, backward=False) < 1.12 * formula / 3


@pytest.mark.parametrize("how", [{"remat": "block"}, {"remat": "dots"}, {"loss_chunk": 8}])
def test_what_is_computed_again_is_xlas(how, kept_all):
    cfg = dataclasses.replace(SMALL, **how)
    if cfg.loss_chunk:  # its loop over pieces is counted once
        assert tpu_memory.recomputed(cfg, 48) == pytest.approx(2 * 23 * 96 * 512 / step_time.model_flops(cfg, 48))
        return
    again = counted(cfg, backward=True) / kept_all - 1
    assert again == pytest.approx(tpu_memory.recomputed(cfg, 48), abs=0.05)
    assert tpu_memory.recomputed(SMALL, 48) == 0


def test_flops_table(tmp_path, capsys):
    assert bench.main(["flops", "--json", str(tmp_path / "f.json")]) == 0
    found = json.load(open(tmp_path / "f.json"))
    paper = [r for r in found["rows"] if r["paper, G"]]
    assert paper[0]["encoder"] == "L/14" and paper[0]["in all, G"] == pytest.approx(208.9, rel=0.02)
    assert found["asked"]["command"] == "flops" and "jax" in found["machine"]
    assert "So400m/14" in capsys.readouterr().out


@pytest.mark.parametrize("argv, encoder, length", [("step", "micro/8", 28), ("step --encoder Ti/16", None, 128), ("flops pictures", "micro/8", 48),
                                                   ("clipa", "L/14", 128), ("memory g14", "g/14", 128)])
def test_help_has_the_defaults_of_the_settings_that_are_taken(argv, encoder, length, capsys):
    with pytest.raises(SystemExit):
        bench.parse([*argv.split(), "-h"])
    said = " ".join(capsys.readouterr().out.split())
    assert f"are cut (default: {length})" in said and (encoder is None or f"a smaller one (default: {encoder})" in said)


def test_flops_of_flags_are_the_toys(capsys):
    assert bench.main(["flops", "--keep-ratio", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:5] == ["micro/8", "micro", "24", "9", "9"]


def test_step(tmp_path, capsys):
    file = tmp_path / "s.json"
    assert bench.main(["step", "--encoder", "micro/8", "--resolution", "16", "--batch", "2", "--vocab-size", "64", "--max-text-len", "8",
                       "--repeats", "2", "--json", str(file)]) == 0
    ours, matmul = json.load(open(file))["rows"]
    assert ours["what"] == "ours" and matmul["what"] == "matmul"
    assert ours["images/s"] == pytest.approx(2e3 / ours["ms"])
    assert ours["GFLOP/s"] > 0 and ours["compile s"] > 0 and 0 < ours["peak GiB"] < 1 and 1 < ours["loss"] < 8
    assert "images/s" in capsys.readouterr().out


def test_a_step_with_shard_divides_the_optimizers_state(cache, tmp_path):
    """On two pretend devices: the same loss, and one copy of AdamW's moments less."""
    env = cache | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command = [sys.executable, "bench.py", "step", "--encoder", "micro/8", "--resolution", "16", "--batch", "2",
               "--vocab-size", "64", "--max-text-len", "8", "--repeats", "1", "--json"]
    rows = {}
    for name, flags in (("whole", []), ("shard", ["--zero1"])):
        file = tmp_path / f"{name}.json"
        done = subprocess.run([*command, str(file), *flags], cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        rows[name] = json.load(open(file))["rows"][0]
    assert rows["shard"]["loss"] == pytest.approx(rows["whole"]["loss"], rel=1e-5)
    cfg = Config(encoder="micro/8", decoder="micro", vocab_size=64, max_text_len=8)
    moments = 2 * 4 * sum(registry.param_counts(cfg).values())
    saved = (rows["whole"]["peak GiB"] - rows["shard"]["peak GiB"]) * 2**30
    assert saved > 0.9 * moments


def test_a_step_learns_its_one_batch():
    """What is timed is training: the loss of the batch falls."""
    run = step_time.JaxStep(dataclasses.replace(SMALL, scan_unroll=1, stages="resolution=16 steps=1000 batch=2 lr=1e-3 warmup=1"), 16, 2, devices.DataParallel(1))
    losses = [run() for _ in range(8)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)  # the warm-up's first rate is 0
    assert losses[-1] < losses[0] - 0.5


def test_table5_shares_the_steps_out(monkeypatch):
    """Step times of 1 s at low and 4 s (6 s unmasked) at high resolution, of batches of 2, for 10 and 1 images."""
    class Fake:
        def __init__(self, cfg, resolution, batch, place, state):
            self.state, self.seconds = "state", (1, 1) if resolution == 16 else (4, 6)
            self.took = self.seconds[cfg.keep_ratio == 1]

        def __call__(self):
            return 0.0
    monkeypatch.setattr(step_time, "JaxStep", Fake)
    monkeypatch.setattr(step_time, "time_interleaved", lambda runs, repeats, title: {kind: [run.took] for kind, run in runs.items()})
    rows = step_time.table5((SMALL, 16, 2, 10), (SMALL, 48, 2, 1), 3)
    assert [r["faster"] for r in rows] == pytest.approx([1, 33 / 22, 33 / 8, 33 / 7])
    assert [r["paper"] for r in rows] == pytest.approx([1, 217 / 190, 217 / 67, 217 / 55])
    assert rows[0]["by FLOPs"] == 1 < rows[1]["by FLOPs"] < rows[3]["by FLOPs"]


@pytest.mark.parametrize(("base", "each", "room", "start", "true"), [
    (4.0, 0.001, 31.0, 2048, 26880), (1.0, 0.05, 15.0, 2048, 256), (30.9, 0.001, 31.0, 2048, 0), (1.0, 0.002, 31.0, 256, 14848)])
def test_largest_batch(base, each, room, start, true):
    """Bytes that grow not quite evenly; an answer within a sixteenth below the truth, and few plans."""
    asked = []

    def fits(batch):
        asked.append(batch)
        need = base + each * batch + (0.3 if batch % 1024 == 0 else 0)
        return need if need <= room else None
    found = tpu_memory.find_max_batch(fits, start, 256, room)
    assert true * 15 / 16 - 512 <= found <= true and len(asked) <= 9
    assert found % 256 == 0 and (found == 0 or base + each * found <= room)


@pytest.fixture
def pretend(monkeypatch):
    """A compiler that refuses above 4,096 images."""
    def plan(cfg, resolution, batch, topology):
        if batch > 4096:
            raise tpu_memory.DoesNotFit("needs 40G of 31G a chip has")
        return dict.fromkeys(tpu_memory.KINDS, tpu_memory.GIB * batch / 4096)
    monkeypatch.setattr(tpu_memory, "compiled_memory", plan)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())


def test_memory_tables(pretend, tmp_path, capsys):
    file = tmp_path / "m.json"
    assert bench.main(["memory", "l14", "--resolution", "224", "--batch", "2048", "--zero1", "--json", str(file)]) == 0
    (row,) = json.load(open(file))["rows"]
    assert row["GiB a chip"] == 2.5 and row["parameters"] == 0.5 and row["shard"] == "yes" and row["pod"] == "v4:4x4x2"
    assert bench.main(["memory", "l14", "--resolution", "224", "--batch", "1024", "--find-max-batch", "--json", str(file)]) == 0
    rows = json.load(open(file))["rows"]
    assert 3840 <= rows[-1]["batch"] <= 4096 and rows[-1]["recipe"] == "largest that fits"
    assert "needs 40G of 31G" in capsys.readouterr().out


def test_data(tmp_path):
    file = tmp_path / "d.json"
    assert bench.main(["data", "--alone", "--pictures", "3", "--batch", "2", "--repeats", "1", "--resolution", "16", "24", "--json", str(file)]) == 0
    rows = json.load(open(file))["rows"]
    assert [r["px"] for r in rows] == [16, 24] and all(r["ours/s"] > 0 and 40 < r["kB per JPEG"] < 120 for r in rows)


@pytest.mark.parametrize(("argv", "says"), [
    (["step", "--encoder", "L/14", "--resolution", "13"], "--resolution 13"),
    (["step", "--encoder", "XXL/14"], "unknown encoder 'XXL/14'"),
    (["step", "toy", "--compare", "torch", "--grad-accum", "2"], "--grad-accum"),
    (["step", "toy", "--compare", "torch", "--zero1"], "--zero1"),
    (["step", "toy", "--zero1", "--batch", "3"], "--zero1 divides the optimizer's state over several devices"),
    (["flops", "toy", "--keep-ratio", "0"], "--keep-ratio 0.0"),
    (["flops", "--json", "/nowhere/at/all.json"], "--json /nowhere/at/all.json"),
    (["memory", "l14", "--batch", "33"], "--batch 33"),
])
def test_what_cannot_be_is_told_in_a_sentence(argv, says, capsys):
    assert bench.main(argv) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and says in said and said.count("\n") == 1


@pytest.mark.parametrize("argv", [["step", "--batch", "0"], ["memory", "--topology", "v9:2x2"], ["memory", "--topology", "v4:2x2x"], ["data", "l14"],
                                  ["stepp"], ["step", "--batc", "4"], ["step", "--compare", "jax"], []])
def test_what_cannot_be_read_gives_a_usage_line(argv, capsys):
    with pytest.raises(SystemExit) as end:
        bench.main(argv)
    assert end.value.code == 2 and "usage: bench.py" in capsys.readouterr().err


@pytest.mark.parametrize(("argv", "needs"), [(["step", "--compare", "torch"], "'.[bench]'"), (["data"], "'.[bench]'"), (["memory", "l14"], "'.[plan]'")])
def test_a_missing_extra_is_named(argv, needs, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert bench.main(argv) == 1
    assert f"pip install -e {needs}" in capsys.readouterr().err


def test_tables_line_up():
    lines = format_table([{"a": "x", "b": 1.0}, {"a": "longer", "c": 12345}]).splitlines()
    assert lines[0].split() == ["a", "b", "c"] and lines[2].split() == ["longer", "–", "12,345"]
    assert np.ptp([len(line) for line in lines[::2]]) == 0

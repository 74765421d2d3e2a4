"""The bench: its FLOPs are XLA's counts, its tables have the figures, its errors are one line."""
import dataclasses
import importlib.util
import json
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest

import bench
import layers
import train
from benchmarks import step_time, tpu_memory
from config import Config
from objectives import registry
from runtime import devices
from runtime.tables import format_table
from tests.helpers.compiling import several_devices
from tests.helpers.models import matmul_flops
from tests.helpers.paths import ROOT

SMALL = Config(encoder="micro/8", decoder="micro", vocab_size=512, max_text_len=24, keep_ratio=0.5,
               scan_unroll=4, stages="resolution=48 steps=9 batch=4 lr=1e-3")
TINY_STEP = ["step", "--encoder", "micro/8", "--resolution", "16", "--batch", "2",
             "--vocab-size", "64", "--max-text-len", "8", "--scan-unroll", "1"]


def read_table(path) -> dict:
    return json.loads(path.read_text())


def traced_loss(cfg: Config, backward: bool) -> tuple:
    """(the loss or its gradient, its arguments: parameters, batch, keys, model)."""
    model, batch = registry.model_spec(cfg), step_time.make_batch(cfg, 48, 4)
    params = jax.eval_shape(lambda: registry.init_params(cfg, model))
    function = train.openvision2_loss
    if backward:
        function = jax.value_and_grad(function, has_aux=True)
    return function, (params, batch, jax.random.split(jax.random.key(0), 4), model)


def xla_flops(cfg: Config, backward: bool) -> float:
    """FLOPs per image as XLA counts them, which sees every layer of an unrolled model."""
    function, args = traced_loss(cfg, backward)
    lowered = jax.jit(function, static_argnums=3).lower(*args)
    return lowered.cost_analysis()["flops"] / 4


def gradient_matmul_flops(cfg: Config) -> float:
    """FLOPs of the matmuls of a step, of all layers of a loop."""
    function, (*args, model) = traced_loss(dataclasses.replace(cfg, scan_unroll=1), True)
    return matmul_flops(lambda *args: function(*args, model), *args)


@pytest.fixture(scope="module")
def small_flops() -> float:
    return xla_flops(SMALL, backward=True)


def test_flops_formula_agrees_with_xla(small_flops):
    """Nearly all FLOPs are matmuls. The operations between them make XLA's figure a bit larger. The
    last blocks compute neither the dropped tokens' outputs nor the decoder's image tokens'."""
    D, M, N, K, T = 96, 384, 36, 18, SMALL.max_text_len - 1
    left_out = (N - K) * (2 * D * D + 4 * D * M + 4 * N * D)
    left_out += K * (2 * D * D + 4 * D * M + 4 * (K + T) * D)
    computed = step_time.model_flops(SMALL, 48) - 3 * left_out
    assert computed < small_flops < 1.12 * computed
    assert computed / 3 < xla_flops(SMALL, backward=False) < 1.12 * computed / 3


@pytest.mark.parametrize("changes", [{"remat": "block"}, {"remat": "dots"}, {"loss_chunk": 8}])
def test_recompute_fraction_agrees_with_the_traced_matmuls(changes):
    cfg = dataclasses.replace(SMALL, **changes)
    fraction = tpu_memory.recompute_fraction(cfg, 48)
    if cfg.loss_chunk:  # XLA counts the body of the loop over pieces once only
        assert fraction == pytest.approx(2 * 23 * 96 * 512 / step_time.model_flops(cfg, 48))
        return
    more = gradient_matmul_flops(cfg) / gradient_matmul_flops(SMALL) - 1
    assert more == pytest.approx(fraction, abs=0.02)
    assert tpu_memory.recompute_fraction(SMALL, 48) == 0


def test_attention_in_chunks_computes_its_scores_again(monkeypatch):
    """The encoder's: it has 576 tokens here."""
    cfg = dataclasses.replace(SMALL, encoder="micro/2")
    fraction, chunked = tpu_memory.recompute_fraction(cfg, 48), gradient_matmul_flops(cfg)
    monkeypatch.setattr(layers, "CHUNKED_QUERIES", 1000)
    assert tpu_memory.recompute_fraction(cfg, 48) == 0
    assert fraction == pytest.approx(chunked / gradient_matmul_flops(cfg) - 1, rel=0.02)


def test_flops_table(tmp_path, capsys):
    file = tmp_path / "flops.json"
    assert bench.main(["flops", "--json", str(file)]) == 0
    table = read_table(file)
    paper = [row for row in table["rows"] if row["paper GFLOPs"]]
    assert paper[0]["encoder"] == "L/14"
    assert paper[0]["total GFLOPs"] == pytest.approx(208.9, rel=0.02)
    assert table["arguments"]["command"] == "flops" and "jax" in table["machine"]
    assert "So400m/14" in capsys.readouterr().out


def test_flops_with_a_flag_are_those_of_the_toy(capsys):
    assert bench.main(["flops", "--keep-ratio", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:5] == [
        "micro/4", "micro", "24", "36", "36"]


@pytest.mark.parametrize(("argv", "encoder", "text_len"), [
    ("step", "micro/4", 28), ("step --encoder Ti/16", None, 128), ("flops images", "micro/8", 48),
    ("clipa", "L/14", 128), ("memory g14", "g/14", 128)])
def test_help_shows_the_defaults_of_the_chosen_settings(argv, encoder, text_len, capsys):
    with pytest.raises(SystemExit):
        bench.parse([*argv.split(), "-h"])
    text = " ".join(capsys.readouterr().out.split())
    assert f"(default: {text_len})" in text.partition("--max-text-len MAX")[2]
    assert encoder is None or f"(default: {encoder})" in text


def test_step_table(tmp_path, capsys):
    file = tmp_path / "step.json"
    assert bench.main([*TINY_STEP, "--repeats", "2", "--json", str(file)]) == 0
    step, matmul = read_table(file)["rows"]
    assert step["step"] == "jax" and matmul["step"] == "matmul"
    assert step["images/s"] == pytest.approx(2e3 / step["ms"]) and step["min ms"] <= step["ms"]
    assert step["GFLOP/s"] > 0 and step["compile s"] > 0 and 0 < step["% of matmul rate"] < 100
    assert 0 < step["peak GiB"] < 1 and 1 < step["loss"] < 8
    assert "images/s" in capsys.readouterr().out


@pytest.mark.parametrize("objective", registry.OBJECTIVES)
def test_every_objective_can_be_timed(objective):
    args = bench.parse(["step", "toy", "--objective", objective])
    assert bench.settings(args)[0].objective == objective


def test_zero1_divides_the_optimizer_state(cache, tmp_path):
    """On two simulated devices: the same loss, and one copy of AdamW's moments less."""
    env = several_devices(2, cache)
    steps = {}
    for name, flags in (("replicated", []), ("zero1", ["--zero1"])):
        file = tmp_path / f"{name}.json"
        command = [sys.executable, "bench.py", *TINY_STEP, "--repeats", "1", "--json", str(file)]
        process = subprocess.run([*command, *flags], cwd=ROOT, env=env, capture_output=True,
                                 text=True)
        assert process.returncode == 0, process.stderr
        steps[name] = read_table(file)["rows"][0]
    assert steps["zero1"]["loss"] == pytest.approx(steps["replicated"]["loss"], rel=1e-5)
    cfg = Config(encoder="micro/8", decoder="micro", vocab_size=64, max_text_len=8)
    moments = 2 * 4 * sum(registry.param_counts(cfg).values())
    saved_bytes = (steps["replicated"]["peak GiB"] - steps["zero1"]["peak GiB"]) * 2**30
    assert saved_bytes > 0.9 * moments


def test_the_timed_step_trains():
    """The loss of its one batch falls."""
    cfg = dataclasses.replace(SMALL, scan_unroll=1,
                              stages="resolution=16 steps=1000 batch=2 lr=1e-3 warmup=1")
    run = step_time.JaxStep(cfg, 16, 2, devices.DataParallel(1))
    losses = [run() for _ in range(8)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)  # the warm-up begins at rate 0
    assert losses[-1] < losses[0] - 0.5


def test_a_speedup_is_the_other_librarys_time_divided_by_ours(monkeypatch):
    """By medians: one slow step of three does not count."""
    run = SimpleNamespace(peak_bytes=lambda: 2**30, compile_seconds=1.0,
                          parallel=SimpleNamespace(num_devices=2))
    seconds = {"matmul": [0.5, 0.5, 9], "jax": [2, 2, 9], "torch": [3, 9, 3]}
    monkeypatch.setattr(step_time, "make_steps", lambda *_: ({"jax": run, "torch": run}, {
        "jax": [1.0] * 3, "torch": [1.0] * 3}))
    monkeypatch.setattr(step_time, "large_matmul", lambda: (lambda: None, 1e9))
    monkeypatch.setattr(step_time, "time_interleaved", lambda runs, repeats: seconds)
    ours, theirs, _ = step_time.rows(SMALL, 16, 4, "torch", 3)
    assert ours["speedup"] == 1.5 and theirs["speedup"] == 1
    assert ours["images/s"] == 2 and ours["ms"] == ours["min ms"] == 2000
    flops = step_time.model_flops(SMALL, 16) * 4 / 2  # per second
    assert ours["% of matmul rate"] == pytest.approx(100 * flops / 2e9)


def test_table5_weights_step_times_by_the_images_of_the_stages(monkeypatch):
    """Steps of 1 s at low and 4 s (6 s without the mask) at high resolution, of 2 images each; the
    stages have 10 images and 1."""
    class FakeStep:
        def __init__(self, cfg, resolution, batch, parallel, state):
            self.state = ["state"]
            masked, unmasked = (1, 1) if resolution == 16 else (4, 6)
            self.seconds = unmasked if cfg.keep_ratio == 1 else masked

        def __call__(self):
            return 0.0

    def fake_timer(runs, repeats):
        return {name: [run.seconds] * repeats for name, run in runs.items()}
    monkeypatch.setattr(step_time, "JaxStep", FakeStep)
    monkeypatch.setattr(step_time, "time_interleaved", fake_timer)
    table = step_time.table5((SMALL, 16, 2, 10), (SMALL, 48, 2, 1), 3)
    assert [row["speedup"] for row in table] == pytest.approx([1, 33 / 22, 33 / 8, 33 / 7])
    assert [row["paper"] for row in table] == pytest.approx([1, 217 / 190, 217 / 67, 217 / 55])
    assert table[0]["by FLOPs"] == 1 < table[1]["by FLOPs"] < table[3]["by FLOPs"]


@pytest.mark.parametrize(("base", "per_image", "capacity", "start", "largest"), [
    (4.0, 0.001, 31.0, 2048, 26880), (1.0, 0.05, 15.0, 2048, 256), (30.9, 0.001, 31.0, 2048, 0),
    (1.0, 0.002, 31.0, 256, 14848)])
def test_find_max_batch(base, per_image, capacity, start, largest):
    """For memory that grows a little unevenly: at most a sixteenth below the largest, in few
    compilations."""
    tried = []

    def needed_bytes(batch):
        tried.append(batch)
        need = base + per_image * batch + (0.3 if batch % 1024 == 0 else 0)
        return need if need <= capacity else None
    batch = tpu_memory.find_max_batch(needed_bytes, start, 256, capacity)
    assert largest * 15 / 16 - 512 <= batch <= largest and len(tried) <= 9
    assert batch % 256 == 0 and (batch == 0 or base + per_image * batch <= capacity)


@pytest.fixture
def fake_compiler(monkeypatch):
    """It refuses more than 4,096 images."""
    def compiled_memory(cfg, resolution, batch, topology):
        if batch > 4096:
            raise tpu_memory.DoesNotFit("needs 40G of 31G per chip")
        return dict.fromkeys(tpu_memory.KINDS, tpu_memory.GIB * batch / 4096)
    monkeypatch.setattr(tpu_memory, "compiled_memory", compiled_memory)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())


def test_memory_tables(fake_compiler, tmp_path, capsys):
    file = tmp_path / "memory.json"
    command = ["memory", "l14", "--resolution", "224", "--json", str(file)]
    assert bench.main([*command, "--batch", "2048", "--zero1"]) == 0
    (row,) = read_table(file)["rows"]
    assert row["GiB per chip"] == 2.5 and row["parameters"] == 0.5
    assert row["zero1"] == "yes" and row["topology"] == "v4:4x4x2" and row["recompute"] == "23%"
    assert bench.main([*command, "--batch", "1024", "--find-max-batch"]) == 0
    table = read_table(file)["rows"]
    assert 3840 <= table[-1]["batch"] <= 4096 and table[-1]["model"] == "largest that fits"
    assert "needs 40G of 31G" in capsys.readouterr().out


def test_data_table(tmp_path):
    file = tmp_path / "data.json"
    assert bench.main(["data", "--alone", "--images", "3", "--batch", "2", "--repeats", "1",
                       "--resolution", "16", "24", "--json", str(file)]) == 0
    table = read_table(file)["rows"]
    assert [row["px"] for row in table] == [16, 24]
    assert all(row["ours/s"] > 0 and 40 < row["kB per JPEG"] < 120 for row in table)
    assert bench.main(["data", "--worker-processes", "1", "--images", "3", "--batch", "2",
                       "--repeats", "1", "--resolution", "16", "--json", str(file)]) == 0
    [row] = read_table(file)["rows"]
    assert row["workers"] == 1 and row["threads/s"] > 0 and row["processes/s"] > 0
    assert row["limit/s"] == pytest.approx(1e3 / row["main process, CPU ms"])


@pytest.mark.parametrize(("argv", "message"), [
    (["step", "--encoder", "L/14", "--resolution", "13"], "--resolution 13"),
    (["step", "--encoder", "XXL/14"], "unknown encoder 'XXL/14'"),
    (["step", "toy", "--compare", "torch", "--grad-accum", "2"], "--grad-accum"),
    (["step", "toy", "--compare", "torch", "--zero1"], "--zero1"),
    (["step", "toy", "--compare", "torch", "--objective", "clip"], "--objective clip"),
    (["step", "toy", "--zero1", "--batch", "3"], "--zero1 divides the optimizer's state"),
    (["flops", "toy", "--keep-ratio", "0"], "--keep-ratio 0.0"),
    (["flops", "--json", "/nowhere/at/all.json"], "--json /nowhere/at/all.json"),
    (["memory", "l14", "--batch", "33"], "--batch 33"),
])
def test_impossible_settings_are_reported_in_one_line(argv, message, capsys):
    assert bench.main(argv) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize("argv", [
    ["step", "--batch", "0"], ["memory", "--topology", "v9:2x2"],
    ["memory", "--topology", "v4:2x2x"], ["data", "l14"], ["stepp"], ["step", "--batc", "4"],
    ["step", "--compare", "jax"], []])
def test_a_command_line_that_cannot_be_parsed_gets_one_line(argv, capsys):
    with pytest.raises(SystemExit) as end:
        bench.main(argv)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert "(bench.py" in error and "-h lists" in error


@pytest.mark.parametrize(("argv", "new"), [
    (["step", "--peer", "torch"], "--peer is now --compare"),
    (["memory", "--largest"], "--largest is now --find-max-batch"),
    (["data", "--pictures=9"], "--pictures is now --images"),
    (["flops", "--text-length", "9"], "--text-length is now --max-text-len")])
def test_an_old_flag_gets_its_new_name(argv, new, capsys):
    with pytest.raises(SystemExit):
        bench.main(argv)
    assert new in capsys.readouterr().err


@pytest.mark.parametrize(("argv", "extra"), [
    (["step", "--compare", "torch"], "'.[bench]'"), (["data"], "'.[bench]'"),
    (["memory", "l14"], "'.[tpu]'")])
def test_a_missing_extra_is_named(argv, extra, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert bench.main(argv) == 1
    assert f"pip install -e {extra}" in capsys.readouterr().err


def test_table_columns_are_aligned():
    table = [{"a": "x", "b": 1.0}, {"a": "longer", "c": 12345}]
    lines = format_table(table).splitlines()
    assert lines[0].split() == ["a", "b", "c"] and lines[2].split() == ["longer", "–", "12,345"]
    assert len(lines[0]) == len(lines[2])

"""Several processes, as on several hosts: one run, whoever shares it, and what happens when one of them goes."""
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from runtime import checkpoint, plots
from tests.helpers.paths import ROOT

STAGES = "resolution=16 steps=25 batch=8 lr=1e-3 warmup=5, resolution=24 steps=25 batch=8 lr=1e-3 warmup=5"
COMMAND = [sys.executable, "train.py", "--stages", STAGES, "--val-samples", "20", "--log-every", "1", "--eval-every", "25", "--save-every", "10"]


def launch(env: dict, command: list[str], processes: int, devices: int) -> list[subprocess.Popen]:
    """Processes of so many pretend devices each, which can meet if there are several."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    env = env | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    met = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(processes)} if processes > 1 else {}
    return [subprocess.Popen(command, cwd=ROOT, env=env | met | {"JAX_PROCESS_ID": str(i)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for i in range(processes)]


def start(env: dict, folder, processes: int, devices: int, *flags: str) -> list[subprocess.Popen]:
    """A run in `folder` by processes of so many pretend devices each."""
    return launch(env, [*COMMAND, "--workdir", str(folder), *flags, *["--distributed"] * (processes > 1)], processes, devices)


def end(run: list[subprocess.Popen], seconds: float = 300) -> list[tuple[int, str, str]]:
    """(exit status, output, errors) of each process."""
    until, found = time.time() + seconds, []
    try:
        for process in run:
            said = process.communicate(timeout=max(1, until - time.time()))
            found.append((process.returncode, *said))
    finally:
        for process in run:
            process.kill()
    return found


def whole(env: dict, folder, processes: int, devices: int, *flags: str) -> dict[tuple[int, str], float]:
    """All losses of a whole run, by step and kind."""
    for status, _, errors in end(start(env, folder, processes, devices, *flags)):
        assert status == 0, errors
    return losses(folder)


def losses(folder) -> dict[tuple[int, str], float]:
    return {(r["step"], k): r[k] for r in plots.read_metrics(str(folder / "metrics.jsonl")) for k in ("loss", "val_loss", "val_loss_shuffled") if k in r}


def until(run: list[subprocess.Popen], folder, step: int) -> None:
    while all(p.poll() is None for p in run) and step not in {s for s, _ in (losses(folder) if (folder / "metrics.jsonl").exists() else {})}:
        time.sleep(0.05)


def near(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(abs(a[k] / b[k] - 1) < 1e-5 for k in a)


@pytest.fixture(scope="module")
def causal(cache, tmp_path_factory) -> dict[tuple[int, str], float]:
    """One process, one device, a batch in four pieces."""
    return whole(cache, tmp_path_factory.mktemp("runs") / "pieces", 1, 1, "--grad-accum", "4")


@pytest.mark.parametrize("prefix", ["causal", "bidirectional"])
def test_processes_devices_and_pieces_are_one_run(cache, causal, tmp_path, prefix):
    """2 processes x 2 devices (also with the optimizer's state in slices) = 4 devices = 1 device in 4 pieces, over 50 steps and two stages."""
    pieces = causal if prefix == "causal" else whole(cache, tmp_path / "pieces", 1, 1, "--grad-accum", "4", "--prefix-attention", prefix)
    assert len({s for s, _ in pieces}) == 50 and pieces[50, "loss"] < pieces[1, "loss"]
    assert near(whole(cache, tmp_path / "devices", 1, 4, "--prefix-attention", prefix), pieces)
    assert near(whole(cache, tmp_path / "hosts", 2, 2, "--prefix-attention", prefix, *["--zero1"] * (prefix == "causal")), pieces)


def test_a_lost_process_ends_the_others_and_the_run_goes_on_with_any_number(cache, causal, tmp_path):
    """SIGKILL to the second, then to the first; SIGTERM to one reaches both at the same step; one process finishes what two began."""
    folder = tmp_path / "run"
    for victim, number, step in ((1, signal.SIGKILL, 11), (0, signal.SIGKILL, 21), (1, signal.SIGTERM, 32)):
        run = start(cache, folder, 2, 2)
        until(run, folder, step)
        run[victim].send_signal(number)
        began, found = time.time(), end(run, 60)
        assert time.time() - began < 60
        if number == signal.SIGKILL:
            status, _, errors = found[1 - victim]
            assert found[victim][0] == -9 and status != 0
            assert "another process has ended" in errors and "start all of them again" in errors and "Check failure stack" not in errors
            file = re.search(r"What jax said is in (.*)", errors)[1]
            assert os.path.dirname(file) == str(folder) and "coordination service" in open(file, encoding="utf-8", errors="replace").read()
        else:
            assert [status for status, _, _ in found] == [143, 143] and "SIGTERM: saved at step" in found[0][1]
        saved = [s for s, _ in checkpoint.steps(str(folder))]
        assert saved and saved[-1] >= step // 10 * 10
    [(status, said, errors)] = end(start(cache, folder, 1, 1))
    assert status == 0 and "continuing" in said, errors
    assert near(losses(folder), causal)


def test_an_error_in_one_process_is_an_error_in_all(cache, tmp_path):
    """The first finds another run in the folder: the second says so too, and none waits for ever."""
    assert end(start(cache, tmp_path / "run", 1, 1, "--stages", "resolution=16 steps=2 batch=8 lr=1e-3"))[0][0] == 0
    found = end(start(cache, tmp_path / "run", 2, 1, "--keep-ratio", "0.5"), 60)
    assert [status for status, _, _ in found] == [1, 1] and all("--keep-ratio is 0.5, was 0.35" in errors for _, _, errors in found)


def test_processes_that_do_not_meet(cache, tmp_path):
    done = subprocess.run([*COMMAND, "--distributed", "--workdir", str(tmp_path / "run")], cwd=ROOT, env=cache, capture_output=True, text=True)
    assert done.returncode == 1 and "JAX_COORDINATOR_ADDRESS" in done.stderr and "Traceback" not in done.stderr


SLICES = """
import sys, jax, numpy as np, checkpoint, config, data, run, scenes, sources, tokenizer, train, zero
from devices import Place
cfg = config.PRESETS["toy"]
tok = tokenizer.build([scenes.caption(scenes.record(0, "train", i)) for i in range(500)], 192)
model = run.Model(*config.models(cfg, 192), 0.35)
reader = data.Reader(sources.Scenes(0, "train"), tok, 28, 0, data.Augment(1.0), 2)
start, place = run.init(cfg, model), Place(8)
optimizer = train.make_optimizer(cfg, config.stages(cfg)[0])
like, out = jax.eval_shape(optimizer.init, start), {}
for shard in (False, True):
    params = place.copies(start)
    state = jax.pmap(lambda p: optimizer.init(jax.tree.map(zero.own, p) if shard else p), "devices")(params)
    step = train.make_step(model, optimizer, 0, 1, place.pmap, shard, 1.0)
    for s in range(50):
        params, state, metrics = step(params, state, place.put(reader.batch(range(16 * s, 16 * s + 16), 16)))
        out[f"{shard} loss {s}"], out[f"{shard} norm {s}"] = place.get(metrics["loss"]), place.get(metrics["grad_norm"])
    out[f"{shard} bytes"] = sum(x.addressable_shards[3].data.nbytes for x in jax.tree.leaves(state))
    out |= {f"{shard} params/{k}": v for k, v in checkpoint.flatten(place.get(params)).items()}
    whole = place.whole(state, like)
    out |= {f"{shard} state/{k}": v for k, v in checkpoint.flatten(whole).items()}
    cut = place.whole(place.slices(whole), like)
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(cut), jax.tree.leaves(whole)))  # to slices and back
np.savez(sys.argv[1], **out)
"""


def test_an_optimizer_in_slices_makes_the_same_updates(cache, tmp_path):
    """8 pretend devices, 50 AdamW steps with clipping: losses and norms to 1e-6 relative, and 1/8 of the state on a device."""
    env = cache | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "PYTHONPATH": ROOT}
    subprocess.run([sys.executable, "-c", SLICES, str(tmp_path / "out.npz")], cwd=ROOT, env=env, check=True)
    out = np.load(tmp_path / "out.npz")
    for s in range(50):
        assert abs(out[f"True loss {s}"] / out[f"False loss {s}"] - 1) < 1e-6
        assert abs(out[f"True norm {s}"] / out[f"False norm {s}"] - 1) < 1e-5
    counts = sum(out[k].nbytes for k in out.files if k.startswith("True state/") and k.endswith("count"))
    assert (out["True bytes"] - counts) * 8 == out["False bytes"] - counts
    def gap(name: str, keep=lambda x: x) -> float:
        a, b = (keep(out[f"{kind} {name}"]).astype(np.float64) for kind in ("True", "False"))
        return np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)
    names = [k.removeprefix("True ") for k in out.files if k.startswith("True params/")]
    assert len(names) > 20
    for name in names:  # but for keys' biases: softmax does not feel them, so their gradients are rounding, which AdamW scales up
        assert gap(name, (lambda x: x.reshape(len(x), 3, -1)[:, [0, 2]]) if name.endswith("qkv/bias") else lambda x: x) < 1e-6, name
    assert max(gap(k.removeprefix("True ")) for k in out.files if k.startswith("True state/")) < 1e-5


SUMS = """
import json, os, jax, numpy as np, devices, zero
devices.join("JAX_NUM_PROCESSES" in os.environ)
n, local, first = jax.device_count(), jax.local_device_count(), jax.process_index() * jax.local_device_count()
ours = jax.pmap(zero.sum_slice, "devices")
direct = jax.pmap(lambda x: jax.lax.psum_scatter(x, "devices", scatter_dimension=0, tiled=True), "devices")
rng, wrong = np.random.default_rng(0), {"ours": 0, "direct": 0}
for _ in range(5):
    x = rng.integers(-1000, 1000, (n, 4 << 20)).astype(np.float32)  # 16 MiB a device, of whole numbers: their sums are exact
    truth, mine = x.sum(0).reshape(n, -1)[first:first + local], x[first:first + local]
    for name, total in (("ours", ours), ("direct", direct)):
        found = sorted(total(mine).addressable_shards, key=lambda shard: shard.index[0].start)
        wrong[name] += not np.array_equal(np.concatenate([np.asarray(shard.data) for shard in found]), truth)
scatters = {name: "reduce-scatter(" in total.lower(mine).compile().as_text() for name, total in (("ours", ours), ("direct", direct))}
print(json.dumps([wrong, scatters]))
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_sums_in_slices_of_large_arrays(cache, processes):
    """16 MiB a device, four devices: ours is exact and equals a reduce-scatter, which several CPU processes do not use: it is
    reported to race in gloo, through which they communicate."""
    for status, said, errors in end(launch(cache | {"PYTHONPATH": ROOT}, [sys.executable, "-c", SUMS], processes, 4 // processes)):
        assert status == 0, errors
        wrong, scatters = json.loads(said.splitlines()[-1])
        assert wrong == {"ours": 0, "direct": 0}
        assert scatters == {"ours": processes == 1, "direct": True}

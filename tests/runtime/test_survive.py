"""A run loses nothing: killed at any moment, interrupted while it measures or decodes, out of disk, or fed bad samples, it goes on and
ends as the uninterrupted one does, bit for bit. KILLS=20 kills more often."""
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from PIL import Image

import train
from runtime import checkpoint, plots
from runtime.devices import DataParallel
from runtime.distributed import Preempted, PreemptionHandler
from tests.helpers.paths import ROOT

KILLS = int(os.environ.get("KILLS", "6"))
STEPS = 60
FLAGS = ["--stages", f"resolution=16 steps={STEPS // 2} batch=8 lr=1e-3 warmup=1, resolution=24 steps={STEPS // 2} batch=8 lr=1e-3 warmup=1",
         "--val-samples", "20", "--log-every", "1", "--eval-every", "10", "--save-every", "2"]


def rows(folder) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    timed = ("images_per_second", "data_wait_fraction", "seconds")
    return [{k: v for k, v in r.items() if k not in timed} for r in plots.read_metrics(str(folder / "metrics.jsonl"))]


def last(folder) -> int:
    return max([r["step"] for r in rows(folder)] or [0]) if (folder / "metrics.jsonl").exists() else 0


def begin(env: dict, folder, *flags: str, before: tuple[str, ...] = ()) -> subprocess.Popen:
    return subprocess.Popen([*before, sys.executable, "train.py", *FLAGS, "--workdir", str(folder), *flags], cwd=ROOT, env=env, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def until(process: subprocess.Popen, condition) -> None:
    while process.poll() is None and not condition():
        time.sleep(0.001)


def equal(folder, other) -> None:
    """The same parameters, optimizer state and metrics, bit for bit."""
    a, b = (checkpoint.latest(str(f))[1] for f in (folder, other))
    assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)
    assert rows(folder) == rows(other)


@pytest.fixture(scope="module")
def uninterrupted(cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    process = begin(cache, folder)
    assert process.communicate()[1] is not None and process.returncode == 0
    return folder


def test_killed_at_random_moments(cache, uninterrupted, tmp_path):
    """SIGKILL: while starting, between steps, across the switch of stages, and while a checkpoint is being written; no checkpoint is ever lost."""
    rng, folder, halves, newest = random.Random(0), tmp_path / "run", 0, 0
    moments = sorted(rng.uniform(0, STEPS - 4) for _ in range(KILLS - KILLS // 3 - 1)) + [STEPS // 2 - 0.5]
    moments = sorted([("step", m) for m in moments] + [("save", m * STEPS / (KILLS // 3)) for m in range(KILLS // 3)], key=lambda m: m[1])
    for n, (kind, moment) in enumerate(moments):
        process = begin(cache, folder)
        if n == 0:
            time.sleep(rng.uniform(0.2, 3))  # most likely before anything is written
        elif kind == "step":
            until(process, lambda: last(folder) >= moment)
            time.sleep(rng.uniform(0, 0.1))
        else:
            until(process, lambda: last(folder) >= moment and any(f.endswith(".npz.part") for f in os.listdir(folder)))
        process.kill()
        process.communicate()
        assert process.returncode == -9, "it ended before it was killed"
        if folder.exists():
            halves += any(f.endswith(".part") for f in os.listdir(folder))
            steps = checkpoint.steps(str(folder))
            for _, path in steps:
                checkpoint.load(path)  # each one that stands under its name is whole
            assert (steps[-1][0] if steps else 0) >= newest
            newest = steps[-1][0] if steps else 0
    process = begin(cache, folder)
    assert "continuing" in process.communicate()[0] and process.returncode == 0
    assert halves > 0 and not [f for f in os.listdir(folder) if f.endswith(".part")]
    equal(folder, uninterrupted)
    assert json.load(open(folder / "summary.json"))["val_loss"] == json.load(open(uninterrupted / "summary.json"))["val_loss"]


def test_interrupted_while_it_measures_and_while_it_decodes(cache, tmp_path):
    """SIGTERM right after the step that an evaluation follows, then while the last captions are written: it ends without finishing either."""
    flags = ["--stages", "resolution=16 steps=6 batch=8 lr=1e-3 warmup=1", "--val-samples", "600", "--eval-every", "4"]
    assert begin(cache, tmp_path / "whole", *flags).wait() == 0
    folder = tmp_path / "run"
    process = begin(cache, folder, *flags)
    until(process, lambda: last(folder) >= 4)
    process.send_signal(signal.SIGTERM)
    assert "SIGTERM: saved at step 4;" in process.communicate()[0] and process.returncode == 143
    assert not [r for r in rows(folder) if "val_loss" in r] and checkpoint.steps(str(folder))[-1][0] == 4
    process = begin(cache, folder, *flags)
    until(process, lambda: (folder / "encoder.npz").exists())
    process.send_signal(signal.SIGINT)
    assert "SIGINT: saved at step 6;" in process.communicate()[0] and process.returncode == 130
    assert not (folder / "summary.json").exists()
    assert begin(cache, folder, *flags).wait() == 0 and (folder / "summary.json").exists()
    equal(folder, tmp_path / "whole")


def test_a_second_signal_ends_it_at_once_and_harms_nothing(cache, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    process = begin(cache, folder)
    until(process, lambda: last(folder) >= 5)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode in (-2, -15, 143, 130)  # killed by one of them, unless they came as one or a step apart
    assert begin(cache, folder).wait() == 0
    equal(folder, uninterrupted)


def test_after_the_first_signal_a_second_is_not_caught():
    before = signal.getsignal(signal.SIGINT)
    with PreemptionHandler(DataParallel()) as interrupt:
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.signal == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGINT) == signal.SIG_DFL
        with pytest.raises(Preempted):
            interrupt.check()
    assert signal.getsignal(signal.SIGINT) == before


def test_a_full_disk_costs_no_checkpoint(cache, uninterrupted, tmp_path):
    """A limit on file sizes stands for a full disk: the save fails with one sentence, and with more room the run goes on."""
    folder = tmp_path / "run"
    process = begin(cache, folder)
    until(process, lambda: last(folder) >= 7)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    before = checkpoint.steps(str(folder))
    limit = "import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, -1)); os.execv(sys.argv[1], sys.argv[1:])"
    process = begin(cache, folder, before=(sys.executable, "-c", limit))
    _, errors = process.communicate()
    said = errors.strip().splitlines()[-1]
    assert process.returncode == 1 and said.startswith("error:") and "go on from the last checkpoint" in said and "Traceback" not in errors
    assert checkpoint.steps(str(folder)) == before and all(checkpoint.load(path) for _, path in before)
    assert not [f for f in os.listdir(folder) if f.endswith(".part")]
    assert begin(cache, folder).wait() == 0
    equal(folder, uninterrupted)


def test_a_folder_that_cannot_be_written_to(capsys):
    assert train.main([*FLAGS, "--workdir", "/proc/self/run"]) == 1
    assert "--workdir /proc/self/run cannot be written to" in capsys.readouterr().err


def test_the_last_few_and_milestones_are_kept(uninterrupted, cache, tmp_path):
    assert [s for s, _ in checkpoint.steps(str(uninterrupted))] == [STEPS - 2, STEPS]
    flags = ["--stages", "resolution=16 steps=20 batch=8 lr=1e-3", "--keep-checkpoints", "3", "--keep-every", "6"]
    assert begin(cache, tmp_path / "run", *flags).wait() == 0
    assert [s for s, _ in checkpoint.steps(str(tmp_path / "run"))] == [6, 12, 16, 18, 20]


def shard(path, count: int, broken: set[int]) -> None:
    """A tar of small pictures, some of which are no pictures."""
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (24, 24, 3), np.uint8)).save(file, "PNG")
            picture = file.getvalue()[:200] if i in broken else file.getvalue()
            for suffix, content in (("png", picture), ("txt", f"a picture, number {i}".encode())):
                info = tarfile.TarInfo(f"{i:05}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def test_bad_samples_are_replaced_counted_and_listed_once(cache, tmp_path):
    """Also in a run that was killed: the same list, the same numbers."""
    shard(tmp_path / "a.tar", 100, {3, 40, 41, 77})
    shard(tmp_path / "val.tar", 20, set())
    flags = ["images", "--data", str(tmp_path / "a.tar"), "--val", str(tmp_path / "val.tar"), "--val-samples", "16",
             "--vocab-size", "200", "--stages", "resolution=16 steps=20 batch=8 lr=1e-3"]
    assert begin(cache, tmp_path / "whole", *flags).wait() == 0
    listed = (tmp_path / "whole" / "bad-samples.txt").read_text()
    assert len(listed.splitlines()) == 4 and all("image cannot be decoded" in line and "a.tar" in line for line in listed.splitlines())
    assert json.load(open(tmp_path / "whole" / "summary.json"))["bad_samples"] == 4
    folder = tmp_path / "run"
    for step in (3, 9):
        process = begin(cache, folder, *flags)
        until(process, lambda: last(folder) >= step)
        process.kill()
        process.communicate()
    assert begin(cache, folder, *flags).wait() == 0
    assert (folder / "bad-samples.txt").read_text() == listed
    equal(folder, tmp_path / "whole")


def test_too_many_bad_samples_stop_a_run(cache, tmp_path):
    shard(tmp_path / "a.tar", 60, set(range(0, 60, 3)))
    flags = ["images", "--data", str(tmp_path / "a.tar"), "--val-samples", "4", "--max-bad-fraction", "0.2"]
    process = begin(cache, tmp_path / "run", *flags)
    _, errors = process.communicate()
    assert process.returncode == 1 and "--max-bad-fraction 0.2" in errors and "bad-samples.txt" in errors and "Traceback" not in errors
    assert len((tmp_path / "run" / "bad-samples.txt").read_text().splitlines()) > 10

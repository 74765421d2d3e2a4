"""A run loses nothing. Killed at any moment, interrupted as it evaluates or captions, out of disk
space, or given bad samples, it continues and ends as the uninterrupted one does, bit for bit.
KILLS=20 kills more often."""
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
from runtime import checkpoint
from runtime.devices import DataParallel
from runtime.distributed import Preempted, PreemptionHandler
from tests.helpers.runs import assert_equal_runs, rows, start_training

KILLS = int(os.environ.get("KILLS", "6"))
STEPS = 60
STAGES = (f"resolution=16 steps={STEPS // 2} batch=8 lr=1e-3 warmup=1, "
          f"resolution=24 steps={STEPS // 2} batch=8 lr=1e-3 warmup=1")
FLAGS = ["--encoder", "micro/8", "--stages", STAGES, "--val-samples", "20", "--log-every", "1",
         "--eval-every", "10", "--save-every", "2"]


def last_step(folder) -> int:
    """That of the last line in metrics.jsonl, 0 if there is none."""
    if not (folder / "metrics.jsonl").exists():
        return 0
    return max((row["step"] for row in rows(folder)), default=0)


def start(env: dict, folder, *flags: str, before: tuple[str, ...] = ()) -> subprocess.Popen:
    return start_training(env, *FLAGS, "--workdir", str(folder), *flags, before=before)


def wait_until(process: subprocess.Popen, condition) -> None:
    while process.poll() is None and not condition():
        time.sleep(0.001)


def unfinished_files(folder) -> list[str]:
    return [name for name in os.listdir(folder) if name.endswith(".part")]


@pytest.fixture(scope="module")
def uninterrupted(cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "uninterrupted"
    process = start(cache, folder)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return folder


def kill_moments(rng: random.Random) -> list[tuple[str, float]]:
    """("step" or "save", step), in order. One is at the switch of stages."""
    num_saves = KILLS // 3
    steps = [rng.uniform(0, STEPS - 4) for _ in range(KILLS - num_saves - 1)] + [STEPS // 2 - 0.5]
    moments = [("step", step) for step in sorted(steps)]
    moments += [("save", n * STEPS / num_saves) for n in range(num_saves)]
    return sorted(moments, key=lambda moment: moment[1])


def test_killed_at_random_moments(cache, uninterrupted, tmp_path):
    """SIGKILL while starting, between steps, across the switch of stages, and while a checkpoint is
    being written. No checkpoint is ever lost."""
    rng, folder = random.Random(0), tmp_path / "run"
    num_unfinished = newest = 0
    for n, (kind, moment) in enumerate(kill_moments(rng)):
        process = start(cache, folder)
        if n == 0:
            time.sleep(rng.uniform(0.2, 3))  # most likely before anything is written
        elif kind == "step":
            wait_until(process, lambda: last_step(folder) >= moment)
            time.sleep(rng.uniform(0, 0.1))
        else:
            wait_until(process, lambda: last_step(folder) >= moment and any(
                name.endswith(".npz.part") for name in os.listdir(folder)))
        process.kill()
        process.communicate()
        assert process.returncode == -9, "it ended before it was killed"
        if folder.exists():
            num_unfinished += bool(unfinished_files(folder))
            steps = checkpoint.steps(str(folder))
            for _, path in steps:
                checkpoint.load(path)  # each file that has its name is complete
            last = steps[-1][0] if steps else 0
            assert last >= newest
            newest = last
    process = start(cache, folder)
    assert "continuing" in process.communicate()[0] and process.returncode == 0
    assert num_unfinished > 0 and not unfinished_files(folder)
    assert_equal_runs(folder, uninterrupted)
    summary, expected = (json.load(open(f / "summary.json")) for f in (folder, uninterrupted))
    assert summary["val_loss"] == expected["val_loss"]


def test_interrupted_during_an_evaluation_and_during_the_last_captions(cache, tmp_path):
    """SIGTERM right after the step before an evaluation, then SIGINT while the last captions are
    generated: it ends without finishing either."""
    flags = ["--stages", "resolution=16 steps=6 batch=8 lr=1e-3 warmup=1", "--val-samples", "600",
             "--eval-every", "4"]
    assert start(cache, tmp_path / "uninterrupted", *flags).wait() == 0
    folder = tmp_path / "run"
    process = start(cache, folder, *flags)
    wait_until(process, lambda: last_step(folder) >= 4)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate()
    assert "SIGTERM: saved at step 4;" in output and process.returncode == 143
    assert not [row for row in rows(folder) if "val_loss" in row]
    assert checkpoint.steps(str(folder))[-1][0] == 4
    process = start(cache, folder, *flags)
    wait_until(process, lambda: (folder / "encoder.npz").exists())
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate()
    assert "SIGINT: saved at step 6;" in output and process.returncode == 130
    assert not (folder / "summary.json").exists()
    assert start(cache, folder, *flags).wait() == 0 and (folder / "summary.json").exists()
    assert_equal_runs(folder, tmp_path / "uninterrupted")


def test_second_signal_ends_a_run_at_once_and_harms_nothing(cache, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    process = start(cache, folder)
    wait_until(process, lambda: last_step(folder) >= 5)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    process.communicate()
    # One of them killed it, unless both came as one or a step apart.
    assert process.returncode in (-2, -15, 143, 130)
    assert start(cache, folder).wait() == 0
    assert_equal_runs(folder, uninterrupted)


def test_second_signal_is_not_caught():
    before = signal.getsignal(signal.SIGINT)
    with PreemptionHandler(DataParallel()) as preemption:
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.signal == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
        with pytest.raises(Preempted):
            preemption.check()
    assert signal.getsignal(signal.SIGINT) == before


def test_full_disk_costs_no_checkpoint(cache, uninterrupted, tmp_path):
    """A limit on file sizes stands for a full disk: the save fails with one sentence, and with more
    room the run continues."""
    folder = tmp_path / "run"
    process = start(cache, folder)
    wait_until(process, lambda: last_step(folder) >= 7)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    before = checkpoint.steps(str(folder))
    limited = ("import os, resource, sys; "
               "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, -1)); "
               "os.execv(sys.argv[1], sys.argv[1:])")
    process = start(cache, folder, before=(sys.executable, "-c", limited))
    _, errors = process.communicate()
    last_line = errors.strip().splitlines()[-1]
    assert process.returncode == 1 and "Traceback" not in errors
    assert last_line.startswith(f"error: {folder}")
    assert "continues from the last checkpoint" in last_line
    assert checkpoint.steps(str(folder)) == before
    for _, path in before:
        checkpoint.load(path)
    assert not unfinished_files(folder)
    assert start(cache, folder).wait() == 0
    assert_equal_runs(folder, uninterrupted)


def test_folder_that_cannot_be_written_to_is_refused(capsys):
    assert train.main([*FLAGS, "--workdir", "/proc/self/run"]) == 1
    assert "--workdir /proc/self/run cannot be written to" in capsys.readouterr().err


def test_last_checkpoints_and_milestones_are_kept(uninterrupted, cache, tmp_path):
    assert [step for step, _ in checkpoint.steps(str(uninterrupted))] == [STEPS - 2, STEPS]
    flags = ["--stages", "resolution=16 steps=20 batch=8 lr=1e-3", "--keep-checkpoints", "3",
             "--keep-every", "6"]
    assert start(cache, tmp_path / "run", *flags).wait() == 0
    steps = [step for step, _ in checkpoint.steps(str(tmp_path / "run"))]
    assert steps == [6, 12, 16, 18, 20]


def write_tar(path, count: int, broken: set[int]) -> None:
    """A tar of small captioned images, some of which cannot be decoded."""
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (24, 24, 3), np.uint8)).save(file, "PNG")
            image = file.getvalue()[:200] if i in broken else file.getvalue()
            caption = f"an image, number {i}".encode()
            for suffix, content in (("png", image), ("txt", caption)):
                member = tarfile.TarInfo(f"{i:05}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def test_bad_samples_are_replaced_counted_and_listed_once(cache, tmp_path):
    """Also in a run that was killed: the same list, the same numbers."""
    write_tar(tmp_path / "a.tar", 100, {3, 40, 41, 77})
    write_tar(tmp_path / "val.tar", 20, set())
    flags = ["images", "--data", str(tmp_path / "a.tar"), "--val", str(tmp_path / "val.tar"),
             "--val-samples", "16", "--vocab-size", "200",
             "--stages", "resolution=16 steps=20 batch=8 lr=1e-3"]
    assert start(cache, tmp_path / "uninterrupted", *flags).wait() == 0
    listed = (tmp_path / "uninterrupted" / "bad-samples.txt").read_text()
    assert len(listed.splitlines()) == 4
    for line in listed.splitlines():
        assert "image cannot be decoded" in line and "a.tar" in line
    summary = json.load(open(tmp_path / "uninterrupted" / "summary.json"))
    assert summary["bad_samples"] == 4
    folder = tmp_path / "run"
    for step in (3, 9):
        process = start(cache, folder, *flags)
        wait_until(process, lambda: last_step(folder) >= step)
        process.kill()
        process.communicate()
    assert start(cache, folder, *flags).wait() == 0
    assert (folder / "bad-samples.txt").read_text() == listed
    assert_equal_runs(folder, tmp_path / "uninterrupted")


def test_too_many_bad_samples_stop_a_run(cache, tmp_path):
    write_tar(tmp_path / "a.tar", 60, set(range(0, 60, 3)))
    flags = ["images", "--data", str(tmp_path / "a.tar"), "--val-samples", "4",
             "--max-bad-fraction", "0.2"]
    process = start(cache, tmp_path / "run", *flags)
    _, errors = process.communicate()
    assert process.returncode == 1 and "Traceback" not in errors
    assert "--max-bad-fraction 0.2" in errors and "bad-samples.txt" in errors
    assert len((tmp_path / "run" / "bad-samples.txt").read_text().splitlines()) > 10

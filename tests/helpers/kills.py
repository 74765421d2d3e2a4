"""Training processes that are killed at chosen moments."""
import json
import os
import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from runtime import checkpoint
from tests.helpers.runs import SMALL_RUN, assert_equal_runs, rows, start_training

FLAGS = [*SMALL_RUN, "--log-every", "1", "--eval-every", "8", "--save-every", "2"]


def start(env: dict, folder: Path, *flags: str, before: tuple[str, ...] = ()) -> subprocess.Popen:
    return start_training(env, *FLAGS, *flags, "--workdir", str(folder), before=before)


def complete_run(env: dict, folder: Path, *flags: str) -> None:
    process = start(env, folder, *flags)
    _, errors = process.communicate()
    assert process.returncode == 0, errors


def last_step(folder: Path) -> int:
    """That of the last line in metrics.jsonl, 0 if there is none."""
    if not (folder / "metrics.jsonl").exists():
        return 0
    return max((row["step"] for row in rows(folder)), default=0)


def wait_until(process: subprocess.Popen, condition: Callable[[], bool]) -> None:
    while process.poll() is None and not condition():
        time.sleep(0.001)


def unfinished_files(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.endswith(".part")]


def kill_moments(rng: random.Random, num_kills: int, num_steps: int) -> list[tuple[str, float]]:
    """("step" or "save", step) of four or more, in order. One is at the switch of equal stages."""
    num_saves = max(2, num_kills // 3)
    steps = [rng.uniform(0, num_steps - 4) for _ in range(num_kills - num_saves - 1)]
    steps.append(num_steps // 2 - 0.5)
    moments = [("step", step) for step in sorted(steps)]
    moments += [("save", n * num_steps / num_saves) for n in range(num_saves)]
    return sorted(moments, key=lambda moment: moment[1])


def check_kills(env: dict, folder: Path, uninterrupted: Path, num_kills: int, num_steps: int,
                *flags: str) -> None:
    """SIGKILL while starting, between steps, across the switch of stages, and while a checkpoint is
    being written. No checkpoint is ever lost, and the end is that of the uninterrupted run."""
    rng = random.Random(0)
    num_unfinished = newest = 0
    for n, (kind, moment) in enumerate(kill_moments(rng, num_kills, num_steps)):
        process = start(env, folder, *flags)
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
    process = start(env, folder, *flags)
    assert "continuing" in process.communicate()[0] and process.returncode == 0
    assert num_unfinished > 0 and not unfinished_files(folder)
    assert_equal_runs(folder, uninterrupted)
    summary, expected = (json.load(open(f / "summary.json")) for f in (folder, uninterrupted))
    assert summary["val_loss"] == expected["val_loss"]

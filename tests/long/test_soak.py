"""A run of many steps, evaluations and checkpoints: what it holds of the machine stays the same."""
import json
import os

import numpy as np

from tests.helpers.kills import last_step, wait_until
from tests.helpers.runs import SMALL_RUN, rows, start_training

NUM_STEPS = 1500
FLAGS = (*SMALL_RUN, "--stages", f"resolution=16 steps={NUM_STEPS} batch=8 lr=1e-3 warmup=50",
         "--log-every", "10", "--eval-every", "100", "--save-every", "50")


def resources(pid: int) -> dict[str, int]:
    """Open files, threads, and resident memory in MiB of a process."""
    with open(f"/proc/{pid}/status") as f:
        fields = dict(line.split(":", 1) for line in f)
    return {"files": len(os.listdir(f"/proc/{pid}/fd")), "threads": int(fields["Threads"]),
            "MiB": int(fields["VmRSS"].split()[0]) // 1024}


def test_a_long_run_leaks_nothing_and_learns(cache, tmp_path):
    """From a seventh of its steps on."""
    folder = tmp_path / "run"
    process = start_training(cache, *FLAGS, "--workdir", str(folder))
    seen = []
    for step in (200, 800, 1400):
        wait_until(process, lambda step=step: last_step(folder) >= step)
        assert process.poll() is None, process.communicate()[1]
        seen.append(resources(process.pid))
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    for later in seen[1:]:
        assert later["MiB"] <= 1.1 * seen[0]["MiB"] + 20, seen
        assert later["files"] <= seen[0]["files"] + 3, seen  # one may be open for a save
        assert later["threads"] <= seen[0]["threads"] + 2, seen
    losses = [row["loss"] for row in rows(folder) if "loss" in row]
    assert len(losses) == NUM_STEPS // 10 and np.isfinite(losses).all()
    with open(folder / "summary.json", encoding="utf-8") as f:
        summary = json.load(f)
    assert summary["val_loss"] < 0.8 * losses[0]
    assert len([name for name in os.listdir(folder) if name.startswith("step-")]) == 2

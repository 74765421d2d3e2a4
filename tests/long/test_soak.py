"""A run of many steps, evaluations and checkpoints: what it holds of the machine stays the same."""
import json
import os
import time

import numpy as np

from tests.helpers.kills import last_step
from tests.helpers.runs import SMALL_RUN, rows, start_training

NUM_STEPS = 3000
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
    folder, output = tmp_path / "run", tmp_path / "output.txt"
    with open(output, "w", encoding="utf-8") as file:
        process = start_training(cache, *FLAGS, "--workdir", str(folder), output=file)
    seen = []
    for step in (NUM_STEPS // 7, NUM_STEPS // 2, NUM_STEPS - 100):
        while process.poll() is None and last_step(folder) < step:
            time.sleep(0.2)
        assert process.poll() is None, output.read_text()
        seen.append(resources(process.pid))
    assert process.wait() == 0, output.read_text()
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

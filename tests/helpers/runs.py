"""What tests compare of a run's folder, and a run in a process of its own."""
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from runtime import checkpoint, plots
from tests.helpers.paths import ROOT

# Settings that the runs of many tests share, so that their programs are compiled once.
STAGE = "resolution=16 steps=12 batch=8 lr=1e-3 warmup=1"
STAGES = f"{STAGE}, resolution=24 steps=12 batch=8 lr=1e-3 warmup=1"
SMALL_RUN = ("--encoder", "micro/8", "--scan-unroll", "1", "--val-samples", "16",
             "--stages", STAGES)
TIMED = ("images_per_second", "data_wait_fraction", "seconds")


def rows(folder: str | Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    metrics = plots.read_metrics(os.path.join(folder, "metrics.jsonl"))
    return [{name: value for name, value in row.items() if name not in TIMED} for row in metrics]


def arrays(folder: str | Path) -> dict:
    """Those of the newest checkpoint."""
    return checkpoint.latest(str(folder))[1]


def same(a: dict, b: dict) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def assert_equal_runs(folder: str | Path, other: str | Path) -> None:
    """The same parameters, optimizer state, loss without the image and metrics, bit for bit."""
    assert same(arrays(folder), arrays(other))
    states = [checkpoint.latest(str(path))[2] for path in (folder, other)]
    for name in ("best_shuffled", "evaluation_pending"):
        assert states[0][name] == states[1][name], name
    assert rows(folder) == rows(other)


def start_training(env: dict, *flags: str, before: tuple[str, ...] = (),
                   output: Any = subprocess.PIPE) -> subprocess.Popen:
    """train.py with these flags in a process of its own, started by the command `before`. A long
    run needs a file as `output`: it would wait without end at a pipe that is full."""
    return subprocess.Popen([*before, sys.executable, "train.py", *flags], cwd=ROOT, env=env,
                            stdout=output, stderr=output, text=True)

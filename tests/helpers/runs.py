"""TODO."""
import os

import numpy as np

from runtime import checkpoint, plots


def rows(folder) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    timed = ("images_per_second", "data_wait_fraction", "seconds")
    return [{k: v for k, v in r.items() if k not in timed} for r in plots.read_metrics(os.path.join(folder, "metrics.jsonl"))]


def arrays(folder) -> dict:
    return checkpoint.latest(str(folder))[1]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)

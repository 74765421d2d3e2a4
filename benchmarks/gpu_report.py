"""All GPU measurements by one command: training steps against torch.compile, and the toy's run.

`python bench.py gpu-report` runs each as a command of its own, so that each has all of the memory
and a failure is a line of the report. It writes one JSON file with all tables.
"""
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from runtime.errors import ConfigError

# recipe:resolution:batch, and :remat:scan-unroll where those are not dots and 1
CELLS = ("b16:84:256", "b16:224:128", "l14:84:128", "l14:224:64", "l14:224:64:none:24",
         "l14:224:64:none:1")
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16, as the vendor says
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def parse_cell(cell: str) -> list[str]:
    """The arguments of `bench.py step` for RECIPE:RESOLUTION:BATCH[:REMAT[:UNROLL]]."""
    parts = cell.split(":")
    if not 3 <= len(parts) <= 5:
        raise ConfigError(f"--cells: {cell!r} is not RECIPE:RESOLUTION:BATCH[:REMAT[:UNROLL]], as "
                          "l14:224:128 or l14:224:128:none:24")
    recipe, resolution, batch, remat, unroll = parts + ["dots", "1"][len(parts) - 3:]
    return [recipe, "--resolution", resolution, "--batch", batch, "--remat", remat, "--scan-unroll",
            unroll]


def run_python(arguments: list[str]) -> tuple[float, str]:
    """Runs a Python command of this clone: its seconds, and its last line if it failed, else ""."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    lines = (done.stdout + done.stderr).strip().split("\n")
    error = (lines[-1] or f"ended with status {done.returncode}") if done.returncode else ""
    return time.perf_counter() - start, error


def read_json(path: str) -> dict:
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def measure_cell(cell: str, dtype: str, compare: str, repeats: int, path: str) -> list[dict]:
    """The table of a step; in bf16 with "% of peak": its FLOPs per second by the device's peak."""
    seconds, error = run_python(
        ["bench.py", "step", *parse_cell(cell), "--dtype", dtype, "--compare", compare, "--repeats",
         str(repeats), "--json", path])
    if error:
        return [{"cell": cell, "seconds": seconds, "error": error}]
    table = read_json(path)
    peaks = [peak for name, peak in PEAK_FLOPS.items() if name in table["machine"]]
    rows = []
    for row in table["rows"]:
        if peaks and dtype == "bfloat16":
            row["% of peak"] = 100e9 * row["GFLOP/s"] / peaks[0]
        rows.append({"cell": cell, **row, "seconds": seconds})
    return rows


def rows(cells: Sequence[str], dtype: str, compare: str, repeats: int,
         toy_flags: Sequence[str] = ()) -> list[dict]:
    """The report: the rows of every cell, then the toy's. toy_flags: of `train.py toy`."""
    for cell in cells:
        parse_cell(cell)
    report = []
    with tempfile.TemporaryDirectory() as folder:
        for cell in cells:
            path = os.path.join(folder, "step.json")
            report += measure_cell(cell, dtype, compare, repeats, path)
        workdir = os.path.join(folder, "toy")
        seconds, error = run_python(["train.py", "toy", "--workdir", workdir, *toy_flags])
        row = {"cell": "toy", "step": "train.py", "seconds": seconds, "error": error or None}
        if not error:
            row |= read_json(os.path.join(workdir, "summary.json"))
        report.append(row)
    return report

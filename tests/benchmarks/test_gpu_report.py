"""The report of a GPU: every command's rows, and what failed in a row of its own."""
import json

import bench
from benchmarks import gpu_report

TINY = ("--toy-flags=--stages 'resolution=16 steps=2 batch=2 lr=1e-3' --val-samples 4 "
        "--scan-unroll 1")


def test_the_report_has_all_tables_and_the_reason_of_what_failed(tmp_path, capsys):
    path = tmp_path / "report.json"
    argv = ["gpu-report", "--cells", "toy:24:3", "toy:2:8", "--dtype", "float32", "--repeats", "1",
            "--compare", "torch", "--json", str(path), TINY]
    assert bench.main(argv) == 0
    rows = json.loads(path.read_text())["rows"]
    impossible = next(row for row in rows if row["cell"] == "toy:2:8")
    assert "below the patch size" in impossible["error"] or "PyTorch" in impossible["error"]
    assert any(row["cell"] == "toy:24:3" for row in rows)
    toy = rows[-1]
    assert toy["cell"] == "toy" and toy["val_loss"] > 0 and toy["error"] is None
    assert "toy:2:8" in capsys.readouterr().out


def test_a_cell_that_is_none_is_refused(capsys):
    assert bench.main(["gpu-report", "--cells", "l14:224"]) == 1
    assert "is not RECIPE:RESOLUTION:BATCH" in capsys.readouterr().err


def test_a_cell_can_name_rematerialization_and_unrolling():
    short, long = (gpu_report.parse_cell(cell) for cell in ("l14:84:8", "l14:84:8:none:24"))
    assert short[-4:] == ["--remat", "dots", "--scan-unroll", "1"]
    assert long[-4:] == ["--remat", "none", "--scan-unroll", "24"]


def test_a_command_that_is_killed_is_a_line_of_the_report():
    killed = gpu_report.run_python(["-c", "import os; os.kill(os.getpid(), 9)"])
    assert "ended with status -9" in killed[1]

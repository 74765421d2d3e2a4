"""Monitoring changes nothing in a run and shows what is there: a profile that names the concepts,
event files without a point twice, curves."""
import glob
import gzip
import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import train
from runtime import monitoring, plots
from runtime.monitoring import Monitor
from tests.helpers.paths import ROOT
from tests.helpers.runs import SMALL_RUN, arrays, rows, same

FLAGS = [*SMALL_RUN, "--log-every", "4", "--eval-every", "12", "--save-every", "12"]


class FakeWriter:
    """The part of tensorboardX's SummaryWriter that is used. It writes each point as a line of JSON
    at once."""

    def __init__(self, folder, purge_step):
        assert purge_step == 0
        number = len(glob.glob(os.path.join(folder, "events*")))
        self.path = os.path.join(folder, f"events.out.tfevents.{number}")

    def write(self, *parts):
        with open(self.path, "a") as file:
            file.write(json.dumps(parts) + "\n")

    def add_scalar(self, tag, value, step, walltime):
        assert walltime > 1.6e9
        self.write(tag, step, value)

    def add_image(self, tag, image, step, dataformats):
        assert dataformats == "HWC" and image.shape[-1] == 3
        self.write(tag, step, image.shape)

    def flush(self):
        pass

    close = flush


def event_points(folder):
    """{(tag, step): value} of all event files; no point may be there twice."""
    lines = []
    for path in glob.glob(os.path.join(folder, "events.out.tfevents.*")):
        with open(path) as file:
            lines += [json.loads(line) for line in file]
    points = {(tag, step): value for tag, step, value in lines}
    assert len(points) == len(lines)
    return points


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three runs of the same settings: without monitoring; with it; and with it from the middle on,
    where a crash stopped the run."""
    folder = tmp_path_factory.mktemp("runs")
    assert train.main([*FLAGS, "--workdir", str(folder / "bare")]) == 0
    with pytest.MonkeyPatch.context() as patch:
        module = SimpleNamespace(SummaryWriter=FakeWriter, __spec__=object())
        patch.setitem(sys.modules, "tensorboardX", module)
        watched = [*FLAGS, "--workdir", str(folder / "watched"), "--tensorboard", "--profile"]
        assert train.main(watched) == 0
        (folder / "cut").mkdir()
        for name in ("step-00000012.npz", "metrics.jsonl", "vocab.txt"):
            (folder / "cut" / name).write_bytes((folder / "bare" / name).read_bytes())
        (folder / "cut" / "events.out.tfevents.9").write_text(
            '["loss", 12, 1.0]\n["loss", 16, 1.0]\n["loss", 19, 1.0]\n')
        assert train.main([*FLAGS, "--workdir", str(folder / "cut"), "--tensorboard"]) == 0
    return folder


def test_monitoring_changes_no_number(runs):
    for name in ("watched", "cut"):
        assert same(arrays(runs / name), arrays(runs / "bare"))
        assert rows(runs / name) == rows(runs / "bare")
    assert not glob.glob(str(runs / "bare" / "events*"))
    assert not (runs / "bare" / "profile").exists()


def test_event_files_hold_the_metrics_and_the_images(runs):
    for name in ("watched", "cut"):
        points, metrics = event_points(runs / name), {}
        for row in plots.read_metrics(runs / name / "metrics.jsonl"):
            metrics |= {(tag, row["step"]): value for tag, value in row.items()
                        if tag not in ("step", "seconds")}
        assert metrics.items() <= points.items()
        assert {("samples", 24), ("curve", 24)} <= points.keys()
        assert {tag for tag, _ in points} == {tag for tag, _ in metrics} | {"samples", "curve"}


def test_trace_names_the_concepts(runs):
    [folder] = glob.glob(str(runs / "watched" / "profile" / "plugins" / "profile" / "*"))
    [path] = glob.glob(os.path.join(folder, "*.xplane.pb"))
    with open(path, "rb") as file:
        content = file.read()
    for scope in (b"encoder", b"keep", b"decoder", b"loss", b"optimizer"):
        assert any(form % scope in content for form in (b"/%s/", b"jvp(%s)/")), scope
    with gzip.open(os.path.join(folder, "perfetto_trace.json.gz"), "rt") as file:
        events = json.load(file)["traceEvents"]
    steps = {int(event["args"]["step_num"]) for event in events
             if event.get("name") == "train" and "step_num" in event.get("args", {})}
    assert steps == set(range(monitoring.FIRST_TRACED, monitoring.LAST_TRACED + 1))


@pytest.mark.parametrize("num_steps, message", [(3, "fewer than 10 steps"),
                                                (11, "perfetto_trace.json.gz")])
def test_start_that_ends_early_says_so_or_saves_its_trace(tmp_path, capsys, num_steps, message):
    profiler = monitoring.StepProfiler(str(tmp_path))
    outputs = [profiler.run_step(n, lambda a, b: a + b, n, 1) for n in range(num_steps)]
    assert outputs == list(range(1, num_steps + 1))
    profiler.close()
    profiler.close()
    assert message in capsys.readouterr().out
    assert bool(glob.glob(str(tmp_path / "plugins/profile/*/*"))) == (num_steps > 9)


def test_tensorboard_without_its_package_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.setattr(monitoring.importlib.util, "find_spec", lambda name: None)
    assert train.main([*FLAGS, "--workdir", str(tmp_path / "run"), "--tensorboard"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith(
        "error: --tensorboard needs the package tensorboardX: pip install -e '.[tensorboard]'")
    assert not (tmp_path / "run").exists()


def compare_runs(folder, *names: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "runtime.plots", *names], cwd=folder,
                          env=os.environ | {"PYTHONPATH": ROOT}, capture_output=True, text=True)


def test_curves_of_several_runs(tmp_path):
    """The same losses, after twice the images and half the seconds: the curves end in different
    places in both charts, each in its own color."""
    for n in (1, 2):
        metrics = [{"step": 20, "images": 20 * n, "loss": 1.0}]
        metrics += [{"step": step, "val_loss": 3 - step / 10, "seconds": 100.0 * step / n}
                    for step in (10, 20)]
        (tmp_path / str(n)).mkdir()
        (tmp_path / str(n) / "metrics.jsonl").write_text("\n".join(map(json.dumps, metrics)))
    result = compare_runs(tmp_path, "1", "2/")
    assert result.returncode == 0 and "curves.png" in result.stdout, result.stderr

    def end(chart: np.ndarray, color: tuple) -> int:
        """The last column with this color, below the legend."""
        return int(np.flatnonzero((chart[120:] == color).all(-1).any(0)).max())
    by_images, by_seconds = np.array_split(np.asarray(Image.open(tmp_path / "curves.png")), 2)
    first, second = plots.COLORS[:2]
    assert end(by_images, first) < end(by_images, second) - 300
    assert end(by_seconds, first) > end(by_seconds, second) + 300

    result = compare_runs(tmp_path, "1", "absent")
    assert result.returncode == 1 and "Trace" not in result.stderr
    assert result.stderr.startswith("error: absent/metrics.jsonl cannot be read (No such file")


def test_a_high_start_is_cut_off_and_a_peak_is_not():
    x, falling = list(range(100)), [20.0, 10.0] + [1 - n / 200 for n in range(98)]
    assert 1 < plots.y_limits([plots.Line(x, falling, False)], [])[1] < 1.1
    rate = [1.0] * 99 + [1.5]
    assert plots.y_limits([plots.Line(x, rate, False)], [])[1] > 1.5


def test_metrics_of_an_earlier_version_get_todays_names(tmp_path):
    row = {"step": 3, "val_loss": 4.0, "shuffled_loss": 5.0, "floor_loss": 1.0, "data_wait": 0.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n" + '{"step": 4, "val_l')
    assert plots.read_metrics(str(tmp_path / "metrics.jsonl")) == [
        {"step": 3, "val_loss": 4.0, "val_loss_shuffled": 5.0, "val_loss_blind": 1.0,
         "data_wait_fraction": 0.5}]


def test_the_rate_of_a_continued_window_counts_the_steps_since_the_start(monkeypatch):
    """15 losses of a window of 20 steps are from before the stop, and their time is not known. The
    clock is set back meanwhile, which changes nothing."""
    monitor, row = Monitor.__new__(Monitor), {}
    state = {"window": [1.0] * 15, "bad_samples": 0, "train_seconds": 0, "train_images": 0}
    monitor.run = SimpleNamespace(step=415, state=state)
    monitor.stage, monitor.first_step = SimpleNamespace(batch=8, number=1), 415
    monitor.postfix, monitor.last_plot = {}, float("inf")
    monitor.log = lambda **figures: row.update(figures)
    monitor.start_window()
    monitor.run.step = 420
    monitor.window_start -= 10
    monkeypatch.setattr(time, "time", lambda: 0.0)
    state["window"] += [2.0] * 5
    monitor.log_window(SimpleNamespace(step=420, lr=0.0), 420 * 8, 1.0)
    assert row["images_per_second"] == pytest.approx(5 * 8 / 10, rel=0.1)
    assert row["loss"] == 1.25


def test_the_total_speed_leaves_out_the_first_window_which_compiles():
    monitor = Monitor.__new__(Monitor)
    state = {"window": [1.0] * 5, "bad_samples": 0, "train_seconds": 0, "train_images": 0}
    monitor.run = SimpleNamespace(step=5, state=state)
    monitor.stage, monitor.first_step = SimpleNamespace(batch=8, number=1), 0
    monitor.postfix, monitor.last_plot, monitor.data_wait = {}, float("inf"), 0.0
    monitor.log = lambda **figures: None
    monitor.window_start, monitor.window_step = time.monotonic() - 100, 0
    monitor.log_window(SimpleNamespace(step=5, lr=0.0), 40, 1.0)
    assert state["train_images"] == 0
    state["window"], monitor.run.step, monitor.window_start = [1.0] * 5, 10, time.monotonic() - 10
    monitor.log_window(SimpleNamespace(step=10, lr=0.0), 80, 1.0)
    assert state["train_images"] == 40

"""Watching a run changes nothing in it, and shows what is there: a profile that names the concepts, event files without a point twice."""
import glob
import gzip
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import train
from runtime import monitoring, plots
from tests.helpers.paths import ROOT
from tests.helpers.runs import arrays, rows, same

SHORT = ["--stages", "resolution=16 steps=16 batch=4 lr=1e-3", "--val-samples", "4", "--log-every", "4", "--eval-every", "8", "--save-every", "8",
         "--encoder", "micro/8"]


class Writer:
    """What the tests need of tensorboardX's: it writes each point as a line of JSON, as soon as it comes."""

    def __init__(self, folder, purge_step):
        assert purge_step == 0
        self.path = os.path.join(folder, f"events.out.tfevents.{len(glob.glob(os.path.join(folder, 'events*')))}")

    def line(self, *parts):
        with open(self.path, "a") as f:
            f.write(json.dumps(parts) + "\n")

    def add_scalar(self, tag, value, step, walltime):
        assert walltime > 1.6e9
        self.line(tag, step, value)

    def add_image(self, tag, image, step, dataformats):
        assert dataformats == "HWC" and image.shape[-1] == 3
        self.line(tag, step, image.shape)

    def flush(self):
        pass

    close = flush


def points(folder):
    """{(tag, step): value} of all event files; no point may be there twice."""
    found = [json.loads(line) for path in glob.glob(os.path.join(folder, "events.out.tfevents.*")) for line in open(path)]
    assert len({(tag, step) for tag, step, _ in found}) == len(found)
    return {(tag, step): value for tag, step, value in found}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three runs of the same settings: bare; watched; and watched from its middle on, where a crash cut it."""
    folder = tmp_path_factory.mktemp("runs")
    assert train.main([*SHORT, "--workdir", str(folder / "bare")]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tensorboardX", SimpleNamespace(SummaryWriter=Writer, __spec__=object()))
        assert train.main([*SHORT, "--workdir", str(folder / "watched"), "--tensorboard", "--profile"]) == 0
        (folder / "cut").mkdir()
        for name in ("step-00000008.npz", "metrics.jsonl", "vocab.txt"):
            (folder / "cut" / name).write_bytes((folder / "bare" / name).read_bytes())
        (folder / "cut" / "events.out.tfevents.9").write_text('["loss", 8, 1.0]\n["loss", 12, 1.0]\n["loss", 15, 1.0]\n')
        assert train.main([*SHORT, "--workdir", str(folder / "cut"), "--tensorboard"]) == 0
    return folder


def test_watching_changes_no_number(runs):
    for name in ("watched", "cut"):
        assert same(arrays(runs / name), arrays(runs / "bare")) and rows(runs / name) == rows(runs / "bare")
    assert not glob.glob(str(runs / "bare" / "events*")) and not (runs / "bare" / "profile").exists()


def test_event_files_hold_what_metrics_and_pictures_do(runs):
    for name in ("watched", "cut"):
        found = points(runs / name)
        wanted = {(k, r["step"]): v for r in plots.read_metrics(runs / name / "metrics.jsonl") for k, v in r.items() if k not in ("step", "seconds")}
        assert wanted.items() <= found.items() and {("samples", 16), ("curve", 16)} <= found.keys()
        assert {tag for tag, _ in found} == {tag for tag, _ in wanted} | {"samples", "curve"}


def test_the_trace_names_the_concepts(runs):
    (folder,) = glob.glob(str(runs / "watched" / "profile" / "plugins" / "profile" / "*"))
    (space,) = glob.glob(os.path.join(folder, "*.xplane.pb"))
    with open(space, "rb") as f:
        content = f.read()
    for scope in (b"encoder", b"keep", b"decoder", b"loss", b"optimizer"):
        assert any(mark % scope in content for mark in (b"/%s/", b"jvp(%s)/")), scope
    with gzip.open(os.path.join(folder, "perfetto_trace.json.gz"), "rt") as f:
        events = json.load(f)["traceEvents"]
    steps = {int(e["args"]["step_num"]) for e in events if e.get("name") == "train" and "step_num" in e.get("args", {})}
    assert steps == set(range(monitoring.FIRST, monitoring.LAST + 1))


def test_a_start_that_ends_early_says_or_saves_its_trace(tmp_path, capsys):
    for calls, says in ((3, "fewer than 10 steps"), (11, "perfetto_trace.json.gz")):
        profile = monitoring.Profile(str(tmp_path / str(calls)))
        assert [profile(n, lambda a, b: a + b, n, 1) for n in range(calls)] == list(range(1, calls + 1))
        profile.close()
        profile.close()
        assert says in capsys.readouterr().out and bool(glob.glob(str(tmp_path / str(calls) / "plugins/profile/*/*"))) == (calls > 9)


def test_without_the_extra_a_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.setattr(monitoring.importlib.util, "find_spec", lambda name: None)
    assert train.main([*SHORT, "--workdir", str(tmp_path / "run"), "--tensorboard"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: --tensorboard needs the package tensorboardX: pip install -e '.[tensorboard]'")
    assert not (tmp_path / "run").exists()


def test_curves_of_several_runs(tmp_path):
    """The same losses, seen over twice the images and half the seconds: the curves lie apart in both panels, each in its own ink."""
    for n in (1, 2):
        (tmp_path / str(n)).mkdir()
        held = [{"step": s, "val_loss": 3 - s / 10, "seconds": 100.0 * s / n} for s in (10, 20)]
        (tmp_path / str(n) / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [{"step": 20, "images": 20 * n, "loss": 1.0}, *held]))
    done = subprocess.run([sys.executable, "-m", "runtime.plots", "1", "2/"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "curves.png" in done.stdout, done.stderr
    panels = np.array_split(np.asarray(Image.open(tmp_path / "curves.png")), 2)
    ends = [[int(np.flatnonzero((panel[120:] == ink).all(-1).any(0)).max()) for ink in plots.INKS[:2]] for panel in panels]
    assert ends[0][0] < ends[0][1] - 300 and ends[1][0] > ends[1][1] + 300  # images, seconds: where each curve ends, below the legend
    done = subprocess.run([sys.executable, "-m", "runtime.plots", "1", "absent"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: absent/metrics.jsonl cannot be read (No such file") and "Trace" not in done.stderr

"""When a run stops because of bad samples, and which folders it refuses."""
from types import SimpleNamespace

import numpy as np
import pytest

import config
from runtime import plots, run_folder
from runtime.devices import DataParallel
from runtime.errors import ConfigError, TrainingError
from runtime.monitoring import Monitor, PendingStep
from tests.helpers.runs import SMALL_RUN


def test_too_many_bad_samples_end_the_run_in_a_step_without_a_new_one():
    state = {"step": 0, "window": [], "bad_samples": 30}
    parallel = SimpleNamespace(unreplicate=lambda x: x[0])
    run = SimpleNamespace(state=state, source=range(100), parallel=parallel,
                          cfg=SimpleNamespace(max_bad_fraction=0.1, log_every=50), path=str)
    monitor = Monitor.__new__(Monitor)
    monitor.run, monitor.postfix = run, {}
    monitor.bar = SimpleNamespace(set_postfix=lambda *_, **__: None, update=lambda _: None)
    monitor.stage = SimpleNamespace(batch=32, first_image=0, start=0, end=9)
    metrics = {"loss": np.ones(1), "grad_norm": np.ones(1)}
    for step in (1, 2, 3):  # 96 of 100 samples: the first pass is not over
        monitor.finish_step(PendingStep(step, 0.1, metrics, np.zeros((1, 2), np.int32), {}))
    with pytest.raises(TrainingError, match="30 of the first 100 samples are bad"):
        monitor.finish_step(PendingStep(4, 0.1, metrics, np.zeros((1, 2), np.int32), {}))


@pytest.mark.parametrize("name", ["summary.json", "encoder.npz"])
def test_a_folder_with_results_and_no_checkpoint_is_left_as_it_is(tmp_path, name):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / name).write_text("{}")
    cfg = config.parse_args([*SMALL_RUN, "--workdir", str(folder)])[0]
    with pytest.raises(ConfigError, match=f"has {name} and no checkpoint"):
        run_folder.Run(cfg, DataParallel(1))
    assert (folder / name).read_text() == "{}"


def test_metrics_with_damaged_bytes_are_read_up_to_them(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\xfe')
    assert plots.read_metrics(str(path)) == [{"step": 1}]

"""Runs that are interrupted as they evaluate or caption, or that lose a worker process."""
import os
import signal

from runtime import checkpoint
from tests.helpers.kills import complete_run, last_step, start, wait_until
from tests.helpers.runs import STAGE, assert_equal_runs, rows
from tests.helpers.workers import wait_for_end, workers_of


def test_interrupted_during_an_evaluation_and_during_the_last_captions(cache, tmp_path):
    """SIGTERM right after the step before an evaluation, then SIGINT while the last captions are
    generated: it ends without finishing either."""
    flags = ["--stages", STAGE, "--val-samples", "200"]
    complete_run(cache, tmp_path / "uninterrupted", *flags)
    folder = tmp_path / "run"
    process = start(cache, folder, *flags)
    wait_until(process, lambda: last_step(folder) >= 8)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate()
    assert "SIGTERM: saved at step 8;" in output and process.returncode == 143
    assert not [row for row in rows(folder) if "val_loss" in row]
    assert checkpoint.steps(str(folder))[-1][0] == 8
    process = start(cache, folder, *flags)
    wait_until(process, lambda: (folder / "encoder.npz").exists())
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate()
    assert "SIGINT: saved at step 12;" in output and process.returncode == 130
    assert not (folder / "summary.json").exists()
    complete_run(cache, folder, *flags)
    assert (folder / "summary.json").exists()
    assert_equal_runs(folder, tmp_path / "uninterrupted")


def test_a_killed_worker_and_signals_to_all_processes(cache, tmp_path):
    """With --worker-processes: a killed worker ends the run with one sentence, SIGTERM to the
    training process and its worker saves, and threads finish what the worker began."""
    folder, flags = tmp_path / "run", ("--worker-processes", "2")
    process = start(cache, folder, *flags)
    wait_until(process, lambda: last_step(folder) >= 4)
    [worker] = workers_of(process.pid)  # the second one has nothing to do
    os.kill(worker, signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == 1 and "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("error: a worker process ended by SIGKILL")
    process, first = start(cache, folder, *flags), last_step(folder)
    wait_until(process, lambda: last_step(folder) >= first + 4)
    [worker] = workers_of(process.pid)
    for pid in (worker, process.pid):
        os.kill(pid, signal.SIGTERM)
    output, errors = process.communicate()
    assert process.returncode == 143 and "SIGTERM: saved at step" in output, errors
    wait_for_end({worker})
    complete_run(cache, folder)
    complete_run(cache, tmp_path / "uninterrupted")
    assert_equal_runs(folder, tmp_path / "uninterrupted")

"""A run loses nothing. Killed at any moment, out of disk space, or given bad samples, it continues
and ends as the uninterrupted one does, bit for bit. tests/long kills more often, and also
interrupts evaluations."""
import io
import json
import os
import signal
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

import train
from runtime import checkpoint, plots
from runtime.devices import DataParallel
from runtime.distributed import Preempted, PreemptionHandler
from tests.helpers.kills import (
    FLAGS,
    check_kills,
    complete_run,
    last_step,
    start,
    unfinished_files,
    wait_until,
)
from tests.helpers.runs import STAGE, assert_equal_runs

NUM_STEPS = 24


@pytest.fixture(scope="module")
def uninterrupted(cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "uninterrupted"
    complete_run(cache, folder)
    return folder


def test_killed_at_random_moments(cache, uninterrupted, tmp_path):
    check_kills(cache, tmp_path / "run", uninterrupted, 4, NUM_STEPS)


def test_second_signal_is_not_caught():
    before = signal.getsignal(signal.SIGINT)
    with PreemptionHandler(DataParallel()) as preemption:
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.signal == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
        with pytest.raises(Preempted):
            preemption.check()
    assert signal.getsignal(signal.SIGINT) == before


def test_a_second_signal_and_a_full_disk_cost_no_checkpoint(cache, uninterrupted, tmp_path):
    """The second signal ends the run at once. A limit on file sizes stands for a full disk: the
    save fails with one sentence. With more room the run continues, and ends as if nothing were."""
    folder = tmp_path / "run"
    process = start(cache, folder)
    wait_until(process, lambda: last_step(folder) >= 5)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    process.communicate()
    # One of them killed it, unless both came as one or a step apart.
    assert process.returncode in (-2, -15, 143, 130)
    before = checkpoint.steps(str(folder))
    assert before
    limited = ("import os, resource, sys; "
               "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, -1)); "
               "os.execv(sys.argv[1], sys.argv[1:])")
    process = start(cache, folder, before=(sys.executable, "-c", limited))
    _, errors = process.communicate()
    last_line = errors.strip().splitlines()[-1]
    assert process.returncode == 1 and "Traceback" not in errors
    assert last_line.startswith(f"error: {folder}")
    assert "continues from the last checkpoint" in last_line
    assert checkpoint.steps(str(folder)) == before
    for _, path in before:
        checkpoint.load(path)
    assert not unfinished_files(folder)
    complete_run(cache, folder)
    assert_equal_runs(folder, uninterrupted)


def test_folder_that_cannot_be_written_to_is_refused(capsys):
    assert train.main([*FLAGS, "--workdir", "/proc/self/run"]) == 1
    assert "--workdir /proc/self/run cannot be written to" in capsys.readouterr().err


def test_last_checkpoints_and_milestones_are_kept(uninterrupted, tmp_path):
    assert [step for step, _ in checkpoint.steps(str(uninterrupted))] == [NUM_STEPS - 2, NUM_STEPS]
    flags = ["--stages", STAGE, "--save-every", "1", "--keep-checkpoints", "3", "--keep-every", "4"]
    assert train.main([*FLAGS, *flags, "--workdir", str(tmp_path / "run")]) == 0
    steps = [step for step, _ in checkpoint.steps(str(tmp_path / "run"))]
    assert steps == [4, 8, 10, 11, 12]


def write_tar(path, count: int, broken: set[int]) -> None:
    """A tar of small captioned images, some of which cannot be decoded."""
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (24, 24, 3), np.uint8)).save(file, "PNG")
            image = file.getvalue()[:200] if i in broken else file.getvalue()
            caption = f"an image, number {i}".encode()
            for suffix, content in (("png", image), ("txt", caption)):
                member = tarfile.TarInfo(f"{i:05}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def test_bad_samples_are_replaced_counted_and_listed_once(cache, tmp_path):
    """Also in a run that was killed: the same list, the same numbers."""
    write_tar(tmp_path / "a.tar", 90, {3, 40, 41, 77})  # all are read: 12 steps read 96
    write_tar(tmp_path / "val.tar", 20, set())
    flags = ["--data", str(tmp_path / "a.tar"), "--val", str(tmp_path / "val.tar"),
             "--stages", STAGE]
    complete_run(cache, tmp_path / "uninterrupted", *flags)
    listed = (tmp_path / "uninterrupted" / "bad-samples.txt").read_text()
    assert len(listed.splitlines()) == 4
    for line in listed.splitlines():
        assert "image cannot be decoded" in line and "a.tar" in line
    summary = json.load(open(tmp_path / "uninterrupted" / "summary.json"))
    assert summary["bad_samples"] == 4
    folder = tmp_path / "run"
    process = start(cache, folder, *flags)
    wait_until(process, lambda: last_step(folder) >= 7)
    process.kill()
    process.communicate()
    complete_run(cache, folder, *flags)
    assert (folder / "bad-samples.txt").read_text() == listed
    assert_equal_runs(folder, tmp_path / "uninterrupted")


def test_too_many_bad_samples_stop_a_run(tmp_path, capsys):
    write_tar(tmp_path / "a.tar", 60, set(range(0, 60, 3)))
    flags = ["--data", str(tmp_path / "a.tar"), "--val-samples", "4", "--stages", STAGE,
             "--max-bad-fraction", "0.2", "--workdir", str(tmp_path / "run")]
    assert train.main([*FLAGS, *flags]) == 1
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    assert "--max-bad-fraction 0.2" in errors and "bad-samples.txt" in errors
    assert len((tmp_path / "run" / "bad-samples.txt").read_text().splitlines()) > 10


def test_a_line_that_a_full_disk_cut_in_a_letter_is_read(tmp_path):
    path = tmp_path / "bad-samples.txt"
    path.write_bytes("3\ta.tar/1: cut\n5\tb.tar/é".encode()[:-1])
    lines = plots.read_bad_samples(str(path))
    assert [line.split("\t")[0] for line in lines] == ["3", "5"]

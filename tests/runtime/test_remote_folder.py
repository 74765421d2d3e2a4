"""A run's folder in a bucket: what is there is complete at any moment, and one process writes.

file:// stands for a bucket here; tests/remote has S3 and GCS."""
import json
import os
import subprocess
import time

import numpy as np
import pytest

import train
from config import Config
from inputs import remote
from runtime import checkpoint, remote_folder
from runtime.errors import ConfigError, DataError
from runtime.remote_folder import open_remote_folder
from runtime.run_folder import LOCK_NAME, Locked
from tests.helpers.runs import SMALL_RUN, STAGE, assert_equal_runs, rows, start_training

FLAGS = [*SMALL_RUN, "--stages", STAGE, "--log-every", "1", "--eval-every", "8",
         "--save-every", "4"]


@pytest.fixture(autouse=True)
def settings(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "WAITS", ())
    monkeypatch.setattr(remote_folder, "DEAD_SECONDS", 1)


@pytest.fixture
def bucket(tmp_path):
    (tmp_path / "bucket").mkdir()
    return tmp_path / "bucket" / "run"


def open_folder(bucket, machine="a", **settings):
    cfg = Config(workdir=f"file://{bucket}/", cache_dir=str(bucket.parent.parent / machine),
                 **settings)
    return open_remote_folder(cfg)[1]


def write_step(folder, step):
    """What a run writes at a step: a line of metrics, then a checkpoint."""
    with open(os.path.join(folder, "metrics.jsonl"), "a") as file:
        file.writelines(json.dumps({"step": n, "loss": 1.0}) + "\n" for n in (step - 1, step))
    checkpoint.save_step(folder, step, {"x": np.arange(step)}, {}, 2)


def check(bucket):
    """The step of the newest checkpoint, which is complete and has its metrics beside it."""
    newest = checkpoint.latest(str(bucket))
    if newest is None:
        return 0
    step = newest[2]["step"]
    assert step in [row["step"] for row in rows(bucket)]
    return step


def test_a_kill_at_any_request_leaves_a_complete_checkpoint_and_its_metrics(bucket, monkeypatch):
    """The process is stopped before each of its requests in turn. The next one goes on, on another
    machine, and loses no checkpoint."""
    plain, newest, next_step = remote.call, 0, 2
    for limit in range(3, 40):
        folder = open_folder(bucket, f"machine{limit}")
        calls = [0]

        def call(*args, limit=limit, calls=calls, **options):
            calls[0] += 1
            if calls[0] > limit:
                raise KeyboardInterrupt
            return plain(*args, **options)
        monkeypatch.setattr(remote, "call", call)
        try:
            folder.acquire()
            assert check(folder.folder) == newest
            for more in (2, 4):
                write_step(folder.folder, newest + more)
                folder.sync()
        except KeyboardInterrupt:
            next_step = limit
        monkeypatch.setattr(remote, "call", plain)
        folder.stop.set()
        assert check(bucket) >= newest
        newest = check(bucket)
        if os.path.exists(bucket / LOCK_NAME):
            os.remove(bucket / LOCK_NAME)
    assert newest >= 20 and next_step > 12


def test_old_checkpoints_go_also_those_that_a_kill_left_and_milestones_stay(bucket):
    folder = open_folder(bucket)
    folder.acquire()
    for step in (2, 4, 6):
        write_step(folder.folder, step)
        folder.sync()
    folder.close()
    assert [step for step, _ in checkpoint.steps(str(bucket))] == [4, 6]
    assert not os.path.exists(bucket / LOCK_NAME)
    for name in ("step-00000001.npz", "step-00000003.npz"):
        (bucket / name).write_bytes((bucket / "step-00000004.npz").read_bytes())
    (bucket / "step-00000009.npz.part").write_text("half")
    (bucket / "other").mkdir()
    (bucket / "other" / "step-00000099.npz").write_text("of another run")
    again = open_folder(bucket, "b", keep_every=3)
    again.acquire()
    assert [step for step, _ in checkpoint.steps(again.folder)] == [4, 6]  # 1, 3 are not copied
    write_step(again.folder, 8)
    again.close()
    assert [step for step, _ in checkpoint.steps(str(bucket))] == [3, 6, 8]
    assert not [name for name in os.listdir(bucket) if name.endswith(".part")]


def test_an_older_checkpoint_is_copied_if_the_newest_are_damaged(bucket):
    folder = open_folder(bucket, keep_every=2)
    folder.acquire()
    for step in (2, 4, 6, 8):
        checkpoint.save_step(folder.folder, step, {"x": np.arange(step)}, {}, 2, 2)
    folder.close()
    (bucket / "step-00000008.npz").write_text("cut")
    for name in ("step-00000006.npz", "step-00000004.npz"):
        content = (bucket / name).read_bytes().replace(np.int64(3).tobytes(), bytes(8))
        (bucket / name).write_bytes(content)
    again = open_folder(bucket, "b", keep_every=2)
    again.acquire()
    assert checkpoint.latest(again.folder)[2]["step"] == 2
    again.close()
    assert [step for step, _ in checkpoint.steps(str(bucket))] == [2, 4, 6, 8]


@pytest.mark.parametrize("name, message", [
    ("step-00000002.npz", "every checkpoint in {} is damaged: delete the folder"),
    ("summary.json", "--workdir {} has summary.json and no checkpoint")])
def test_a_bucket_is_named_where_its_folder_must_be_deleted(bucket, capsys, name, message):
    bucket.mkdir()
    (bucket / name).write_text("{}")
    url = f"file://{bucket}"
    assert train.main([*FLAGS, "--workdir", url]) == 1
    assert message.format(url) in capsys.readouterr().err


def test_one_process_writes(bucket, monkeypatch, capsys):
    first = open_folder(bucket)
    first.acquire()
    first.owner["host"] = "elsewhere"  # as seen from another machine
    monkeypatch.setattr(remote_folder, "BEAT_SECONDS", 0.05)
    first.stop.set()
    first.beat.join(30)
    with pytest.raises(Locked, match="is in use by"):
        open_folder(bucket).acquire()  # by the lock of the local copy
    first.write_owner()
    first.stop.clear()
    beating = remote_folder.threading.Thread(target=first.keep_beating, daemon=True)
    beating.start()
    with pytest.raises(Locked, match="in use by process"):  # or by None, in the middle of a write
        open_folder(bucket, "b").acquire()
    first.stop.set()
    beating.join()
    second = open_folder(bucket, "c")  # the first gives no sign of life
    second.acquire()
    write_step(second.folder, 2)
    second.sync()
    with pytest.raises(ConfigError, match="was taken over by another process"):
        first.sync()
    assert "waiting" in capsys.readouterr().out
    first.close()
    assert os.path.exists(bucket / LOCK_NAME)
    second.close()
    assert check(bucket) == 2 and not os.path.exists(bucket / LOCK_NAME)


@pytest.mark.parametrize("name, other", [("host", "b"), ("pid_namespace", 1), ("boot", "b")])
def test_a_lock_of_another_container_is_not_taken_for_that_of_an_ended_process(bucket, name, other):
    """There the same number may be a living process, also if the host's name is the same."""
    folder = open_folder(bucket)
    process = subprocess.Popen(["true"])
    process.wait()
    ended = folder.owner | {"pid": process.pid}
    assert folder.is_dead(ended)
    assert not folder.is_dead(ended | {name: other})
    del ended[name]  # as an earlier version wrote it
    assert not folder.is_dead(ended)


def test_a_half_filled_copy_never_reaches_the_bucket(bucket, monkeypatch):
    folder = open_folder(bucket)
    folder.acquire()
    write_step(folder.folder, 2)
    folder.close()
    before = {name: (bucket / name).read_bytes() for name in os.listdir(bucket)}

    def fail(url, *_):
        raise DataError(f"{url} cannot be read")
    monkeypatch.setattr(remote, "fetch", fail)
    again = open_folder(bucket, "b")
    with pytest.raises(DataError):
        again.acquire()
    again.close()
    assert {name: (bucket / name).read_bytes() for name in os.listdir(bucket)} == before


def test_wrong_places_are_one_sentence(bucket, tmp_path, capsys):
    with pytest.raises(ConfigError, match="a web server stores nothing"):
        open_remote_folder(Config(workdir="https://example.org/run"))
    (tmp_path / "file").write_text("")
    folder = open_folder(tmp_path / "file" / "run")
    with pytest.raises(DataError, match="cannot be used as --workdir"):
        folder.acquire()
    folder.close()
    flags = ["--workdir", f"file://{bucket}", "--cache-dir", str(tmp_path / "file" / "cache")]
    assert train.main([*FLAGS, *flags]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: --cache-dir: the local copy ") and error.count("\n") == 1


def test_a_killed_run_ends_as_the_undisturbed_one(cache, bucket, tmp_path):
    """SIGKILL while it trains; it goes on where there is no local copy."""
    def start(n):
        return start_training(cache, *FLAGS, "--workdir", f"file://{bucket}", "--cache-dir",
                              str(tmp_path / f"machine{n}"))
    process = start(0)
    while process.poll() is None and newest_step(bucket) < 4:
        time.sleep(0.005)
    process.kill()
    process.communicate()
    process = start(1)
    output, errors = process.communicate()
    assert process.returncode == 0 and f"continuing file://{bucket} from" in output, errors
    undisturbed = start_training(cache, *FLAGS, "--workdir", str(tmp_path / "plain"))
    assert undisturbed.wait() == 0
    assert_equal_runs(bucket, tmp_path / "plain")
    assert set(os.listdir(bucket)) == set(os.listdir(tmp_path / "plain"))


def newest_step(bucket):
    return max((step for step, _ in checkpoint.steps(str(bucket))), default=0)


def test_a_checkpoint_that_could_not_be_uploaded_is_kept(bucket, capsys):
    first = open_folder(bucket)
    first.acquire()
    write_step(first.folder, 4)
    first.sync()
    write_step(first.folder, 8)  # then the bucket is gone, and the run ends
    first.sync = lambda urgent=True: None
    first.close()

    again = open_folder(bucket)
    again.acquire()
    assert os.listdir(f"{again.folder}-not-uploaded") == ["step-00000008.npz"]
    assert "to continue from it, upload it" in capsys.readouterr().out
    assert [step for step, _ in checkpoint.steps(again.folder)] == [4]
    again.close()


def test_metrics_are_uploaded_first_and_the_summary_last():
    names = ["summary.json", "step-00000002.npz", "samples.png", "metrics.jsonl"]
    assert sorted(names, key=remote_folder.upload_order) == [
        "metrics.jsonl", "samples.png", "step-00000002.npz", "summary.json"]


def test_what_is_not_urgent_is_uploaded_once_a_minute(bucket):
    folder = open_folder(bucket)
    folder.acquire()
    local = os.path.join(folder.folder, "metrics.jsonl")
    with open(local, "w") as file:
        file.write("1")
    folder.sync()
    with open(local, "a") as file:
        file.write("2")
    folder.sync(urgent=False)
    assert (bucket / "metrics.jsonl").read_text() == "1"
    folder.last_sync -= 61
    folder.sync(urgent=False)
    assert (bucket / "metrics.jsonl").read_text() == "12"
    folder.close()


def test_a_lock_that_another_process_took_is_not_written_again(bucket, monkeypatch):
    folder = open_folder(bucket)
    folder.acquire()
    folder.stop.set()
    folder.beat.join()
    (bucket / LOCK_NAME).write_text('{"id": "another"}')
    waits = iter([False, True])
    monkeypatch.setattr(folder.stop, "wait", lambda seconds: next(waits))
    folder.keep_beating()
    assert (bucket / LOCK_NAME).read_text() == '{"id": "another"}'
    folder.close()

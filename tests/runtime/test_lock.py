"""One training process per folder, and a start deletes nothing that is not the run's own."""
import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys

import pytest

import caption
import config
import train
from runtime import checkpoint, run_folder
from runtime.devices import DataParallel
from runtime.run_folder import FolderLock, Locked, Run
from tests.helpers.paths import ROOT
from tests.helpers.runs import SMALL_RUN, STAGE

FLAGS = [*SMALL_RUN, "--stages", STAGE, "--log-every", "1"]
HOLD = """
import sys, time
from runtime import run_folder
lock = run_folder.FolderLock(sys.argv[1])
lock.acquire()
print("locked", flush=True)
time.sleep(600)
"""


def open_run(folder) -> Run:
    return Run(config.parse_args([*FLAGS, "--workdir", str(folder)])[0], DataParallel())


@pytest.fixture
def holder(tmp_path):
    """Another process, which has the lock of the folder "run"."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.communicate()


def test_second_process_is_refused_until_the_first_is_killed(holder, tmp_path, capsys):
    folder = tmp_path / "run"
    (folder / "step-00000001.npz.part").write_bytes(b"the other process is writing this")
    assert train.main([*FLAGS, "--workdir", str(folder)]) == 1
    errors = capsys.readouterr().err.strip().splitlines()
    host = socket.gethostname()
    assert errors == [f"error: --workdir {folder} is in use by process {holder.pid} on {host}: "
                      "wait until it ends, stop it, or name another --workdir"]
    assert sorted(os.listdir(folder)) == ["step-00000001.npz.part", "train.lock"]
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    lock = FolderLock(str(folder))
    lock.acquire()
    assert (folder / "train.lock").read_text() == f"process {os.getpid()} on {host}\n"
    lock.close()
    assert os.listdir(folder) == ["step-00000001.npz.part"]


def test_run_holds_the_lock_to_its_end_and_can_be_read_meanwhile(tmp_path, monkeypatch):
    """At each save a second process is refused, and the checkpoint can be read."""
    folder, refused, read, save = tmp_path / "run", [], [], Run.save

    def spied_save(run, tree):
        save(run, tree)
        with pytest.raises(Locked, match=f"in use by process {os.getpid()} on "):
            FolderLock(str(folder)).acquire()
        refused.append(run.step)
        read.append(caption.load_run_checkpoint(str(folder))[2]["step"])
    monkeypatch.setattr(Run, "save", spied_save)
    command = [*FLAGS, "--save-every", "6", "--workdir", str(folder)]
    assert train.main(command) == 0
    assert refused == read == [6, 12]
    assert not (folder / "train.lock").exists()
    assert train.main(command) == 0  # it is finished, and says so
    assert not (folder / "train.lock").exists()


def test_start_deletes_its_own_unfinished_files_and_no_other(tmp_path):
    own = ["step-00000400.npz.part", "encoder.npz.part", "metrics.jsonl.part", "config.json.part",
           "summary.json.part", "bad-samples.txt.part", "samples.json.part",
           "environment.json.part", "report.html.part"]
    foreign = ["film.mp4.part", "encoder.safetensors.part", "step-notes.npz.part",
               "step-00000400.npz.part.gz", ".part", "probe"]
    for name in own + foreign:
        (tmp_path / name).write_text(name)
    (tmp_path / "step-00000001.npz.parts").mkdir()
    open_run(tmp_path)
    names = set(os.listdir(tmp_path))
    assert names >= {*foreign, "step-00000001.npz.parts"} and not names & set(own)
    assert all((tmp_path / name).read_text() == name for name in foreign)


def test_every_name_that_a_run_saves_under_is_known_as_its_own(tmp_path, monkeypatch):
    """What any save of a run would leave if it were killed is deleted by the next start."""
    written, atomic_write = set(), checkpoint.atomic_write

    def spied_write(path, fill):
        written.add(os.path.basename(path))
        atomic_write(path, fill)
    monkeypatch.setattr(checkpoint, "atomic_write", spied_write)
    assert train.main([*FLAGS, "--workdir", str(tmp_path / "run")]) == 0
    assert {"encoder.npz", "step-00000012.npz", "summary.json", "config.json"} <= written
    (tmp_path / "again").mkdir()
    for name in {*written, "bad-samples.txt"}:
        (tmp_path / "again" / f"{name}.part").write_text("half")
    open_run(tmp_path / "again")
    assert not [name for name in os.listdir(tmp_path / "again") if name.endswith(".part")]


def test_start_that_fails_leaves_no_folder_and_no_lock(tmp_path, capsys):
    command = ["images", "--data", str(tmp_path / "none"), "--workdir"]
    assert train.main([*command, str(tmp_path / "run")]) == 1
    assert not (tmp_path / "run").exists()
    (tmp_path / "there").mkdir()
    assert train.main([*command, str(tmp_path / "there")]) == 1
    assert os.listdir(tmp_path / "there") == []
    assert "Traceback" not in capsys.readouterr().err


def test_only_the_first_process_locks(tmp_path):
    class SecondProcess(DataParallel):
        def __init__(self):
            super().__init__()
            self.is_main = False
    Run(config.parse_args([*FLAGS, "--workdir", str(tmp_path / "run")])[0], SecondProcess())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_file_system_without_locks_gives_a_warning(tmp_path, monkeypatch, capsys, number):
    def flock(file, operation):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(fcntl, "flock", flock)
    open_run(tmp_path / "run")
    errors = capsys.readouterr().err
    assert errors.startswith(f"warning: {tmp_path}/run cannot be locked")
    assert errors.count("\n") == 1 and "make sure that no other process" in errors


def test_lock_file_that_its_former_holder_deletes_is_made_again(tmp_path, monkeypatch):
    """Its former holder deletes it after the next one has opened it: a lock on the deleted file
    would keep nobody out."""
    flock, path = fcntl.flock, tmp_path / run_folder.LOCK_NAME
    calls = []

    def spied_flock(file, operation):
        if not calls:
            path.unlink()
        calls.append(operation)
        flock(file, operation)
    monkeypatch.setattr(fcntl, "flock", spied_flock)
    lock = FolderLock(str(tmp_path))
    lock.acquire()
    assert path.exists() and len(calls) == 2
    with pytest.raises(Locked):
        FolderLock(str(tmp_path)).acquire()
    lock.close()


def test_closing_a_lock_whose_file_was_replaced_leaves_the_new_one(tmp_path):
    path = tmp_path / run_folder.LOCK_NAME
    first, second = FolderLock(str(tmp_path)), FolderLock(str(tmp_path))
    first.acquire()
    path.unlink()
    second.acquire()
    first.close()
    assert path.exists()
    second.close()

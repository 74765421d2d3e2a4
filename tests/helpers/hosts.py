"""Runs of several processes, as on several hosts."""
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from runtime import checkpoint, plots
from tests.helpers.compiling import several_devices
from tests.helpers.paths import ROOT
from tests.helpers.runs import SMALL_RUN

COMMAND = [sys.executable, "train.py", *SMALL_RUN, "--log-every", "1"]
Losses = dict[tuple[int, str], float]  # by step and kind


def launch(env: dict, command: list[str], processes: int, devices: int) -> list[subprocess.Popen]:
    """Processes with so many CPU devices each, which can connect if there are several."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    env = several_devices(devices, env)
    if processes > 1:
        env |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(processes)}
    started = []
    for i in range(processes):
        started.append(subprocess.Popen(
            command, cwd=ROOT, env=env | {"JAX_PROCESS_ID": str(i)}, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True))
    return started


def start(env: dict, folder: Path, processes: int, devices: int,
          *flags: str) -> list[subprocess.Popen]:
    """A run in `folder` by processes with so many CPU devices each."""
    command = [*COMMAND, *flags, "--workdir", str(folder)]
    if processes > 1:
        command.append("--distributed")
    return launch(env, command, processes, devices)


def wait(run: list[subprocess.Popen], seconds: float = 600) -> list[tuple[int, str, str]]:
    """(exit status, output, errors) of each process."""
    deadline, results = time.time() + seconds, []
    try:
        for process in run:
            out, errors = process.communicate(timeout=max(1, deadline - time.time()))
            results.append((process.returncode, out, errors))
    finally:
        for process in run:
            process.kill()
    return results


def complete_run(env: dict, folder: Path, processes: int, devices: int, *flags: str) -> Losses:
    for status, _, errors in wait(start(env, folder, processes, devices, *flags)):
        assert status == 0, errors
    return read_losses(folder)


def read_losses(folder: Path) -> Losses:
    losses = {}
    if (folder / "metrics.jsonl").exists():
        for row in plots.read_metrics(str(folder / "metrics.jsonl")):
            for kind in ("loss", "val_loss", "val_loss_shuffled"):
                if kind in row:
                    losses[row["step"], kind] = row[kind]
    return losses


def wait_for_step(run: list[subprocess.Popen], folder: Path, step: int) -> None:
    while all(process.poll() is None for process in run):
        if (step, "loss") in read_losses(folder):
            return
        time.sleep(0.01)


def close(a: Losses, b: Losses) -> bool:
    return a.keys() == b.keys() and all(abs(a[k] / b[k] - 1) < 1e-5 for k in a)


def interrupt(env: dict, folder: Path, victim: int, number: int, step: int, *flags: str) -> None:
    """A signal to one of two processes when this step is logged. SIGKILL: the other one ends with a
    sentence. SIGTERM: both stop at the same step. The last checkpoint before that step is left."""
    run = start(env, folder, 2, 2, *flags)
    wait_for_step(run, folder, step)
    run[victim].send_signal(number)
    sent = time.time()
    results = wait(run, 60)
    assert time.time() - sent < 60
    if number == signal.SIGKILL:
        check_lost_process(results, victim, folder)
    else:
        assert [status for status, _, _ in results] == [143, 143]
        assert "SIGTERM: saved at step" in results[0][1]
    saved = [s for s, _ in checkpoint.steps(str(folder))]
    save_every = int(flags[flags.index("--save-every") + 1])
    assert saved and saved[-1] >= step // save_every * save_every


def check_lost_process(results: list, lost: int, folder: Path) -> None:
    """The other process ends with one sentence and no trace. Which of the two notices first is a
    matter of milliseconds: the all-reduce, whose error Python prints, or JAX's own service, whose
    report goes to a file."""
    status, _, errors = results[1 - lost]
    assert results[lost][0] == -signal.SIGKILL and status != 0
    assert "another process has ended" in errors and "start all of them again" in errors
    assert "Check failure stack" not in errors and "Traceback" not in errors
    report = re.search(r"What jax said is in (.*)", errors)
    if report is None:
        assert re.search(r"last checkpoint \(.*(Gloo|connection|reset).*\)", errors, re.I), errors
        return
    assert os.path.dirname(report[1]) == str(folder)
    assert "coordination service" in Path(report[1]).read_text(encoding="utf-8", errors="replace")

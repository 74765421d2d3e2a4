"""The worker processes of --worker-processes, as the system lists them."""
import contextlib
import os
import subprocess
import time
from pathlib import Path


def process_rows() -> list[tuple[str, str, str, str]]:
    """(pid, parent, state, command line) of every process."""
    if not os.path.exists("/proc/self/stat"):
        listing = ["ps", "-A", "-o", "pid=,ppid=,stat=,args="]
        lines = subprocess.run(listing, capture_output=True, text=True).stdout.splitlines()
        return [tuple(line.split(None, 3)) for line in lines]
    rows = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it has ended
            state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
            command = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
            rows.append((pid, parent, state, command))
    return rows


def running_workers() -> dict[int, int]:
    """{pid: parent}."""
    return {int(pid): int(parent) for pid, parent, state, command in process_rows()
            if state[0] != "Z" and "runtime.worker_processes" in command}


def workers_of(parent: int) -> set[int]:
    return {pid for pid, started_by in running_workers().items() if started_by == parent}


def wait_for_end(pids: set[int], seconds: float = 60) -> None:
    """AssertionError if one of them still runs after that time."""
    end = time.monotonic() + seconds
    while pids & running_workers().keys():
        assert time.monotonic() < end
        time.sleep(0.02)

"""Several processes: setup across hosts, a lost process, and graceful shutdown at the same step.

A signal only stores its number. The training loop and other long loops all-reduce that number
(DataParallel.all_reduce_status), so all processes learn of it at the same point, save, and end
together, and none waits for one that has left.
"""
import contextlib
import glob
import importlib.util
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax

from runtime.devices import DataParallel
from runtime.errors import DistributedError

HEARTBEAT_SECONDS = 20  # a process that is silent for longer counts as lost, and the others end
PEER_LOST = ("another process has ended, or cannot be reached: start all of them again, and the "
             "run goes on from its last checkpoint")


# ------------------------------------------------------------------------------------ setup
def is_tpu_host() -> bool:
    """Whether this machine has TPU chips that JAX may use. If no platforms are set, JAX sets them
    itself when it finds such chips."""
    platforms = jax.config.jax_platforms
    if platforms is None or (platforms and "tpu" not in platforms.split(",")):
        return False
    chips = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def is_single_host() -> bool:
    """Whether the environment proves that this TPU host is alone: it names one process, or one host
    (JAX reads the first variable before the second), or bounds of one process, and no other slices
    and no coordinator."""
    env = {name: value.strip() for name, value in os.environ.items() if value.strip()}
    if "JAX_NUM_PROCESSES" in env:
        return env["JAX_NUM_PROCESSES"] == "1"
    if "JAX_COORDINATOR_ADDRESS" in env or "MEGASCALE_COORDINATOR_ADDRESS" in env:
        return False
    if env.get("MEGASCALE_NUM_SLICES", "1") != "1":
        return False
    hosts = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES")
    if hosts:
        return "," not in hosts
    bounds = env.get("TPU_PROCESS_BOUNDS") or env.get("TPU_HOST_BOUNDS", "")
    return bounds.replace(" ", "") == "1,1,1"


def initialize_distributed(distributed: bool, folder: str = "") -> None:
    """Connects to the other processes; must come before any use of devices. TPU pods, SLURM and
    Open MPI say where they are; elsewhere three environment variables do. TPU hosts connect without
    --distributed, unless the environment proves that there is only one. DistributedError if the
    processes do not meet: hosts that went on alone would all train into one folder.
    folder: for JAX's report if a process is lost."""
    if not distributed and (not is_tpu_host() or is_single_host()):
        return
    try:
        numbers = {}
        for name in ("num_processes", "process_id"):
            if f"JAX_{name.upper()}" in os.environ:
                numbers[name] = int(os.environ[f"JAX_{name.upper()}"])
        filter_stderr(folder)
        jax.distributed.initialize(**numbers, heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
                                   shutdown_timeout_seconds=HEARTBEAT_SECONDS)
    except (ValueError, RuntimeError, OSError, ImportError) as problem:
        reason = (str(problem) or type(problem).__name__).splitlines()[0]
        if distributed:
            raise DistributedError(
                f"--distributed: the processes did not find each other ({reason}). Outside of a "
                "TPU pod, SLURM or Open MPI, set JAX_COORDINATOR_ADDRESS=HOST:PORT (of process 0), "
                "JAX_NUM_PROCESSES and JAX_PROCESS_ID for each") from None
        raise DistributedError(
            f"this TPU host did not find the other hosts ({reason}). On a pod, start the same "
            "command on every host, at the same time; on a machine that is one host alone, set "
            "JAX_NUM_PROCESSES=1") from None


# --------------------------------------------------------------------------- a lost process
def filter_stderr(folder: str = "") -> None:
    """If a process is lost, JAX aborts the others from C++ with a stack trace. So what C++ writes
    to the error stream goes through stderr_filter.py, which prints one sentence instead and keeps
    the rest in a file: in `folder`, or a temporary one if that is missing. Python still writes to
    the terminal."""
    sys.stderr.flush()
    sys.stderr = os.fdopen(os.dup(2), "w", 1)
    name = f"stderr-{platform.node()}-{os.getpid()}.txt"  # processes of several hosts may share it
    is_local = bool(folder) and "://" not in folder
    path = os.path.join(os.path.abspath(folder), name) if is_local else ""
    code = os.path.join(os.path.dirname(os.path.abspath(__file__)), "stderr_filter.py")
    reader = subprocess.Popen([sys.executable, code, PEER_LOST, path], stdin=subprocess.PIPE,
                              start_new_session=True)
    os.dup2(reader.stdin.fileno(), 2)


def abort_process() -> None:
    """After an error in one of several processes: ends it at once, so that the others notice, and
    without waiting for them."""
    if jax.process_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


@contextlib.contextmanager
def leave_together(parallel: DataParallel) -> Iterator[None]:
    """Unless an error ends the block, all processes wait at its end for what the first one does in
    it, such as to save or upload: HEARTBEAT_SECONDS after the first process that leaves, JAX aborts
    those that have not."""
    yield
    parallel.broadcast_from_main(lambda: None)


# ----------------------------------------------------------------------------- preemption
class Preempted(Exception):
    """A signal asks for the end, and all processes know."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.signal = number


class PreemptionHandler:
    """SIGTERM (also a cloud's preemption notice) and SIGINT request a save at the next step,
    whichever process receives them. A second signal ends that process at once."""

    def __init__(self, parallel: DataParallel):
        self.parallel, self.signal = parallel, 0

    def __enter__(self) -> "PreemptionHandler":
        # First all former handlers, then the new ones: a signal may come in between.
        self.former = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
        for s in self.former:
            signal.signal(s, self.receive)
        if self.signal:  # it came before the last handler was installed
            self.restore_defaults()
        return self

    def receive(self, number: int, frame: Any) -> None:
        self.signal = number
        self.restore_defaults()

    def restore_defaults(self) -> None:
        """The next signal ends the process."""
        for s in self.former:
            signal.signal(s, signal.SIG_DFL)

    def check(self) -> None:
        """Preempted, in all processes, if any of them received a signal. For long work other than
        training steps."""
        number, _ = self.parallel.unreplicate(self.parallel.all_reduce_status(self.signal, 0))
        if number:
            raise Preempted(int(number))

    def __exit__(self, *problem: Any) -> None:
        for s, handler in self.former.items():
            signal.signal(s, handler)

"""Signals that ask a run to end: saved first, by all processes, at the same step.

A signal only sets a number here. The training loop, and what is long beside it (evaluations, captions at the end), ask the devices what
the largest such number of all processes is (Place.vote), so that all of them learn of it at the same point and none waits for one that has left.
"""
import glob
import importlib.util
import os
import platform
import signal
import subprocess
import sys
from typing import Any

import jax

from runtime.devices import DataParallel
from runtime.errors import DistributedError

HEARTBEAT_SECONDS = 20  # seconds without a sign of life after which a process counts as dead, and the others end too
PEER_LOST = "another process has ended, or cannot be reached: start all of them again, and the run goes on from its last checkpoint"


def is_tpu_host() -> bool:
    """Is this a machine with TPU chips that jax may use? Where nobody names platforms, jax itself names them if it finds such chips."""
    platforms = jax.config.jax_platforms
    if platforms is None or (platforms and "tpu" not in platforms.split(",")):
        return False
    return importlib.util.find_spec("libtpu") is not None and bool(glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*"))


def is_single_host() -> bool:
    """Does the environment prove that this TPU host has no others beside it? It names one process, or one host (as jax reads it, the
    first variable before the second), or bounds that hold one process; and nothing tells of other slices or of a coordinator."""
    env = {name: value.strip() for name, value in os.environ.items() if value.strip()}
    if "JAX_NUM_PROCESSES" in env:
        return env["JAX_NUM_PROCESSES"] == "1"
    if {"JAX_COORDINATOR_ADDRESS", "MEGASCALE_COORDINATOR_ADDRESS"} & env.keys() or env.get("MEGASCALE_NUM_SLICES", "1") != "1":
        return False
    if hosts := env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES"):
        return "," not in hosts
    bounds = env.get("TPU_PROCESS_BOUNDS") or env.get("TPU_HOST_BOUNDS", "")
    return bounds.replace(" ", "") == "1,1,1"


def initialize_distributed(distributed: bool, folder: str = "") -> None:
    """Before anything else asks for a device: meet the other processes. On a TPU pod, under SLURM and Open MPI they find each
    other; elsewhere three environment variables tell. On TPU machines this happens without being asked for, unless the environment
    proves that there is one host alone. A failure is an error: hosts that went on alone would all train into one folder.
    folder: where jax's diagnosis goes if a process is lost."""
    if not distributed and (not is_tpu_host() or is_single_host()):
        return
    told = {name: os.environ.get(f"JAX_{name.upper()}") for name in ("num_processes", "process_id")}
    try:
        numbers = {name: int(value) for name, value in told.items() if value is not None}
        filter_stderr(folder)
        jax.distributed.initialize(**numbers, heartbeat_timeout_seconds=HEARTBEAT_SECONDS, shutdown_timeout_seconds=HEARTBEAT_SECONDS)
    except (ValueError, RuntimeError, OSError, ImportError) as problem:
        said = (str(problem) or type(problem).__name__).splitlines()[0]
        if distributed:
            raise DistributedError(f"--distributed: the processes did not find each other ({said}). Outside of a TPU pod, SLURM or "
                             "Open MPI, set JAX_COORDINATOR_ADDRESS=HOST:PORT (of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID for each") from None
        raise DistributedError(f"this TPU host did not find the other hosts ({said}). On a pod, start the same command on every host, at the same "
                         "time; on a machine that is one host alone, set JAX_NUM_PROCESSES=1") from None


def filter_stderr(folder: str = "") -> None:
    """When a process is lost, jax aborts the others from C++, with a trace of its functions. So what C++ writes to the error stream (and
    Python does not: it keeps the terminal) goes through a little process, stderr_filter.py, which says it in a sentence instead, and
    leaves all of it in a file: in `folder`, or a temporary one where that is not there."""
    sys.stderr.flush()
    sys.stderr = os.fdopen(os.dup(2), "w", 1)
    name = f"stderr-{platform.node()}-{os.getpid()}.txt"  # processes of several hosts may share the folder
    path = os.path.join(os.path.abspath(folder), name) if folder else ""
    code = os.path.join(os.path.dirname(os.path.abspath(__file__)), "stderr_filter.py")
    scribe = subprocess.Popen([sys.executable, code, PEER_LOST, path], stdin=subprocess.PIPE, start_new_session=True)
    os.dup2(scribe.stdin.fileno(), 2)


def abort_process() -> None:
    """After an error in one of several processes: end at once, so that the others notice, and do not wait for this one at the end."""
    if jax.process_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


class Preempted(Exception):
    """A signal asked for an end, and all processes know."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.signal = number


class PreemptionHandler:
    """SIGTERM (which is also a cloud's notice of preemption) and SIGINT ask for a save at the next step, whichever process they reach;
    a second one ends that process at once."""

    def __init__(self, parallel: DataParallel):
        self.parallel, self.signal = parallel, 0

    def __enter__(self) -> "PreemptionHandler":
        # All of the table first, and then the handlers: a signal may come between the two.
        self.before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
        for s in self.before:
            signal.signal(s, self.note)
        if self.signal:  # it came before the last handler was installed
            self.let_go()
        return self

    def note(self, number: int, frame: Any) -> None:
        self.signal = number
        self.let_go()

    def let_go(self) -> None:
        """The next signal ends the process."""
        for s in self.before:
            signal.signal(s, signal.SIG_DFL)

    def check(self) -> None:
        """Interrupted in all processes if one was signalled: for what is long, and not made of training steps."""
        most, _ = self.parallel.unreplicate(self.parallel.all_reduce_status(self.signal, 0))
        if most:
            raise Preempted(int(most))

    def __exit__(self, *problem: Any) -> None:
        for s, handler in self.before.items():
            signal.signal(s, handler)

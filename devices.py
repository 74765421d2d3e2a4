"""Where arrays lie: this process's devices, and all that share a batch. The same for one CPU, eight pretend devices, GPUs
or the chips of a TPU pod with a process a host; nothing else in the project asks what it runs on.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python devices.py        lists them: here eight pretend ones
"""
import contextlib
import ctypes
import glob
import importlib.util
import json
import os
import platform
import subprocess
import sys
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

import zero

HEARTBEAT = 20  # seconds without a sign of life after which a process counts as dead, and the others end too
MANY = 100_000_000  # parameters: 1.6 GB with gradients and AdamW's moments

ENDED = "another process has ended, or cannot be reached: start all of them again, and the run goes on from its last checkpoint"


class PlaceError(Exception):
    """The processes cannot work together, or one of them failed; the message says what to do."""


def tpu_host() -> bool:
    """Is this a machine with TPU chips that jax may use? Where nobody names platforms, jax itself names them if it finds such chips."""
    platforms = jax.config.jax_platforms
    if platforms is None or (platforms and "tpu" not in platforms.split(",")):
        return False
    return importlib.util.find_spec("libtpu") is not None and bool(glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*"))


def single_host() -> bool:
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


def join(distributed: bool, folder: str = "") -> None:
    """Before anything else asks for a device: meet the other processes. On a TPU pod, under SLURM and Open MPI they find each
    other; elsewhere three environment variables tell. On TPU machines this happens without being asked for, unless the environment
    proves that there is one host alone. A failure is an error: hosts that went on alone would all train into one folder.
    folder: where jax's diagnosis goes if a process is lost."""
    if not distributed and (not tpu_host() or single_host()):
        return
    told = {name: os.environ.get(f"JAX_{name.upper()}") for name in ("num_processes", "process_id")}
    try:
        numbers = {name: int(value) for name, value in told.items() if value is not None}
        plainly(folder)
        jax.distributed.initialize(**numbers, heartbeat_timeout_seconds=HEARTBEAT, shutdown_timeout_seconds=HEARTBEAT)
    except (ValueError, RuntimeError, OSError, ImportError) as problem:
        said = (str(problem) or type(problem).__name__).splitlines()[0]
        if distributed:
            raise PlaceError(f"--distributed: the processes did not find each other ({said}). Outside of a TPU pod, SLURM or "
                             "Open MPI, set JAX_COORDINATOR_ADDRESS=HOST:PORT (of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID for each") from None
        raise PlaceError(f"this TPU host did not find the other hosts ({said}). On a pod, start the same command on every host, at the same "
                         "time; on a machine that is one host alone, set JAX_NUM_PROCESSES=1") from None


def plainly(folder: str = "") -> None:
    """When a process is lost, jax aborts the others from C++, with a trace of its functions. So what C++ writes to the error stream (and
    Python does not: it keeps the terminal) goes through a little process, stderr_filter.py, which says it in a sentence instead, and
    leaves all of it in a file: in `folder`, or a temporary one where that is not there."""
    sys.stderr.flush()
    sys.stderr = os.fdopen(os.dup(2), "w", 1)
    name = f"stderr-{platform.node()}-{os.getpid()}.txt"  # processes of several hosts may share the folder
    path = os.path.join(os.path.abspath(folder), name) if folder else ""
    code = os.path.join(os.path.dirname(os.path.abspath(__file__)), "stderr_filter.py")
    scribe = subprocess.Popen([sys.executable, code, ENDED, path], stdin=subprocess.PIPE, start_new_session=True)
    os.dup2(scribe.stdin.fileno(), 2)


def keep_memory() -> None:
    """On Linux without an accelerator, before jax starts its threads: memory that is freed stays with the process. XLA asks for a step's
    temporaries anew each step, and glibc would give so much back to the system in between: its pages, emptied and mapped again, are a
    tenth of a step's time. Nothing is taken in advance; but pieces of many sizes fill what stays less well, so that it comes to up to twice as much."""
    accelerators = [path for kind in ("accel[0-9]*", "vfio/[0-9]*", "nvidia[0-9]*", "kfd") for path in glob.glob(f"/dev/{kind}")]
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if accelerators or not hasattr(libc, "mallopt"):  # musl has none
        return
    trim_threshold, mmap_max, arena_max = -1, -4, -8  # as malloc.h numbers them; one arena, for others than the first take no large pieces
    for setting, value in ((mmap_max, 0), (trim_threshold, -1), (arena_max, 1)):
        libc.mallopt(setting, value)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def split_cpu(count: int) -> None:
    """Before jax starts: a CPU is `count` devices, but no more than it has cores, and not where XLA_FLAGS or jax_num_cpu_devices
    says how many. Other devices than CPUs stay as they are."""
    told = jax.config.jax_num_cpu_devices > 0 or "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not told:
        with contextlib.suppress(RuntimeError):  # jax has started already
            jax.config.update("jax_num_cpu_devices", min(count, cores()))


def pair_up(batches: Sequence[int]) -> None:
    """Before jax starts: a CPU of several cores shall be two devices, each with half of a batch. Parts of a step do not spread over cores, and
    two halves fill each other's gaps: the toy's step takes an eighth less time on two cores. Not where a batch cannot be halved."""
    if not any(batch % 2 for batch in batches):
        split_cpu(2)


def hasten(parameters: int, batches: Sequence[int] = (), count: int = 0) -> None:
    """Before jax starts: what makes a step faster on a CPU. Vectors of AVX-512's whole width, where there is that (XLA by itself takes half
    of it, and 5% longer); and for up to twice the memory, which a small model can have and a large one cannot, the two things above.
    batches: those that two devices may share. count: devices that a CPU shall be, whatever the model; 0 if nobody asks for a number."""
    if "xla_cpu_prefer_vector_width" not in (flags := os.environ.get("XLA_FLAGS", "")):
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_prefer_vector_width=512"
    if parameters < MANY:
        keep_memory()
    if count:
        split_cpu(count)
    elif batches and parameters < MANY:
        pair_up(batches)


def remember_programs() -> None:
    """Compiled programs are kept in .compiled/ beside this file (a folder for each kind of CPU, whose instructions they use), unless
    JAX_COMPILATION_CACHE_DIR names another place: so a command compiles once, and not again when it is repeated or continued. jax
    compiles anew, with a warning, what is damaged there. A folder that cannot be written to is not used; one that a stranger can write to
    must not be, for its programs are run."""
    if jax.config.jax_compilation_cache_dir:
        return
    kind = platform.processor()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as f:
        kind += "".join(sorted({line for line in f if line.startswith(("model name", "flags", "Features"))}))
    here = os.path.dirname(os.path.abspath(__file__))
    folder = os.path.join(here, ".compiled", f"{zlib.crc32(kind.encode()):08x}")
    if os.access(folder if os.path.exists(folder) else here, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def leave() -> None:
    """After an error in one of several processes: end at once, so that the others notice, and do not wait for this one at the end."""
    if jax.process_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


class Place:
    """Global batches are cut in rows: each process takes its share, and spreads it over its devices."""

    def __init__(self, count: int = 0):
        """count: local devices to use, 0 for all. ValueError if there are fewer."""
        if count > jax.local_device_count():
            raise ValueError(f"{count} devices asked for, and there are {jax.local_device_count()}")
        if count and jax.process_count() > 1:
            raise ValueError("several processes use all of their devices: leave it out")
        self.local = jax.local_devices()[:count or None]
        self.processes = jax.process_count()
        self.pmap = self.local if self.processes == 1 else None       # what pmap is told; None means all, everywhere
        self.total = len(self.local) * self.processes
        self.first = jax.process_index() == 0                         # the process that reads and writes the run's folder and shows bars
        mesh = jax.sharding.Mesh(np.array(self.local), ("devices",))
        self.rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("devices"))
        self.tally = jax.pmap(lambda most, count: (jax.lax.pmax(most, "devices"), jax.lax.psum(count, "devices")), "devices", devices=self.pmap)

    # ---------------------------------------------------------------------------------------------------------- batches
    def share(self, batch: int) -> range:
        """This process's rows of a global batch."""
        mine = batch // self.processes
        return range(jax.process_index() * mine, (jax.process_index() + 1) * mine)

    def put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """A process's rows to its devices: (B, ...) becomes (devices, B/devices, ...). Only what the step reads goes."""
        wanted = {k: batch[k].reshape(len(self.local), -1, *batch[k].shape[1:]) for k in ("images", "text", "alt", "row") if k in batch}
        return jax.device_put(wanted, self.rows)

    # ------------------------------------------------------------------------------------------------------- parameters
    def copies(self, tree: Any) -> Any:
        """The same arrays on every device, with a leading axis of local devices. The axis has the name that the training step gives it, or
        the step would be compiled twice: for these, and for what it returns itself."""
        return jax.pmap(lambda _, x: x, "devices", in_axes=(0, None), devices=self.pmap)(np.zeros(len(self.local)), tree)

    def slices(self, tree: Any) -> Any:
        """Each array cut over all devices, one slice a device (zero.py). One array at a time, for a device need not hold all."""
        cut = jax.pmap(lambda _, x: zero.own(x), "devices", in_axes=(0, None), devices=self.pmap)
        return jax.tree.map(lambda x: cut(np.zeros(len(self.local)), x), tree)

    @staticmethod
    def get(tree: Any) -> Any:
        """What the first local device holds, as numpy arrays: of things that are the same on all."""
        return jax.tree.map(lambda x: np.asarray(x.addressable_shards[0].data)[0], tree)

    def whole(self, tree: Any, like: Any) -> Any:
        """numpy arrays of what may lie in slices; `like` has the whole shapes."""
        gather = jax.pmap(lambda x, shape: zero.join(x, shape), "devices", static_broadcasted_argnums=1, devices=self.pmap)
        return jax.tree.map(lambda x, l: self.get(x if x.shape[1:] == l.shape else gather(x, l.shape)), tree, like)

    # -------------------------------------------------------------------------------------------------------- processes
    def vote(self, most: int, count: int) -> Any:
        """(the largest of the processes' first numbers, the sum of their second), as arrays on the devices: not waited for."""
        n = len(self.local)
        mine = np.full(n, most, np.int32), np.array([count] + [0] * (n - 1), np.int32)
        return self.tally(*jax.device_put(mine, self.rows))

    def told(self, make: Callable[[], Any]) -> Any:
        """What make() gives in the first process (JSON values), in all; an error there is an error in all."""
        if self.processes == 1:
            return make()
        problem, text = None, b""
        if self.first:
            try:
                text = json.dumps([make()]).encode()
            except Exception as found:
                problem, text = found, json.dumps(f"process 0: {found}").encode()
        size = int(multihost_utils.broadcast_one_to_all(np.int64(len(text))))
        padded = np.frombuffer(text or bytes(size), np.uint8)
        answer = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())
        if problem:
            raise problem
        if isinstance(answer, str):
            raise PlaceError(answer)
        return answer[0]

    def arrays(self, tree: Any) -> Any:
        """The first process's numpy arrays in all; the others give arrays of the same shapes."""
        return tree if self.processes == 1 else jax.tree.map(lambda x: np.asarray(multihost_utils.broadcast_one_to_all(x)), tree)

    def everyones(self, x: np.ndarray) -> np.ndarray:
        """(processes, ...) of an array that each has one of, of the same shape."""
        return x[None] if self.processes == 1 else np.asarray(multihost_utils.process_allgather(x))

    def lines(self, mine: Sequence[str]) -> list[str]:
        """Every process's lines, in the order of the processes."""
        text = "\n".join(mine).encode()
        size = int(self.everyones(np.array(len(text))).max())
        found = self.everyones(np.frombuffer(text.ljust(size), np.uint8))
        return [line for row in found for line in row.tobytes().decode().strip(" ").split("\n") if line]


if __name__ == "__main__":
    place = Place()
    print(f"{place.total} device(s) of {place.processes} process(es), here: {', '.join(map(str, place.local))}")

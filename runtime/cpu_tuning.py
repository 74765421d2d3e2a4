"""TODO."""
import contextlib
import ctypes
import glob
import os
import platform
import sys
import zlib
from collections.abc import Sequence

import jax

SMALL_MODEL_PARAMS = 100_000_000  # parameters: 1.6 GB with gradients and AdamW's moments


def keep_freed_memory() -> None:
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


def num_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_cpu_devices(count: int) -> None:
    """Before jax starts: a CPU is `count` devices, but no more than it has cores, and not where XLA_FLAGS or jax_num_cpu_devices
    says how many. Other devices than CPUs stay as they are."""
    told = jax.config.jax_num_cpu_devices > 0 or "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not told:
        with contextlib.suppress(RuntimeError):  # jax has started already
            jax.config.update("jax_num_cpu_devices", min(count, num_cores()))


def split_cpu_devices(batches: Sequence[int]) -> None:
    """Before jax starts: a CPU of several cores shall be two devices, each with half of a batch. Parts of a step do not spread over cores, and
    two halves fill each other's gaps: the toy's step takes an eighth less time on two cores. Not where a batch cannot be halved."""
    if not any(batch % 2 for batch in batches):
        set_cpu_devices(2)


def tune_cpu(parameters: int, batches: Sequence[int] = (), count: int = 0) -> None:
    """Before jax starts: what makes a step faster on a CPU. Vectors of AVX-512's whole width, where there is that (XLA by itself takes half
    of it, and 5% longer); and for up to twice the memory, which a small model can have and a large one cannot, the two things above.
    batches: those that two devices may share. count: devices that a CPU shall be, whatever the model; 0 if nobody asks for a number."""
    if "xla_cpu_prefer_vector_width" not in (flags := os.environ.get("XLA_FLAGS", "")):
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_prefer_vector_width=512"
    if parameters < SMALL_MODEL_PARAMS:
        keep_freed_memory()
    if count:
        set_cpu_devices(count)
    elif batches and parameters < SMALL_MODEL_PARAMS:
        split_cpu_devices(batches)


def enable_compilation_cache() -> None:
    """Compiled programs are kept in .compiled/ beside this file (a folder for each kind of CPU, whose instructions they use), unless
    JAX_COMPILATION_CACHE_DIR names another place: so a command compiles once, and not again when it is repeated or continued. jax
    compiles anew, with a warning, what is damaged there. A folder that cannot be written to is not used; one that a stranger can write to
    must not be, for its programs are run."""
    if jax.config.jax_compilation_cache_dir:
        return
    kind = platform.processor()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as f:
        kind += "".join(sorted({line for line in f if line.startswith(("model name", "flags", "Features"))}))
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    folder = os.path.join(here, ".compiled", f"{zlib.crc32(kind.encode()):08x}")
    if os.access(folder if os.path.exists(folder) else here, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

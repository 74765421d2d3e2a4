"""Process-wide settings that make a CPU faster, and the cache of compiled programs. Only commands
call them, before JAX starts its devices.

Why: on two cores, two CPU devices save an eighth of the toy's step, keeping freed memory a tenth
(with an arena per thread a third), and full AVX-512 vectors 5%. The first two cost up to twice the
memory, so large models do without.
"""
import contextlib
import math
import os
import platform
import sys
import zlib
from collections.abc import Sequence

import jax

from runtime.heap import keep_freed_memory

SMALL_MODEL_PARAMS = 100_000_000  # 1.6 GB with gradients and AdamW's moments
SMALL_STEP_FLOPS = 3e9  # forward; up to here, half a batch needs no block of memory above 64 MB
DEVICE_FLAG = "xla_force_host_platform_device_count"


def tune_cpu(num_params: int, batches: Sequence[int] = (), num_devices: int = 0,
             step_flops: float = math.inf) -> None:
    """Makes training steps faster on a CPU; nothing else changes. batches: the sizes of those that
    two devices may share. num_devices: CPU devices that the user wants, whatever the model's size;
    0: no number. step_flops: forward FLOPs of the largest batch."""
    sys.setswitchinterval(0.0005)  # seconds: threads that make batches delay the loop less
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_cpu_prefer_vector_width" not in flags:  # XLA's default is half of AVX-512's width
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_prefer_vector_width=512"
    is_small = num_params < SMALL_MODEL_PARAMS
    shares_batches = bool(batches) and is_small and not num_devices and DEVICE_FLAG not in flags
    if is_small:
        keep_freed_memory(shares_batches and step_flops < SMALL_STEP_FLOPS)
    if num_devices:
        set_cpu_devices(num_devices)
    elif shares_batches:
        split_cpu_devices(batches)


def num_cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def set_cpu_devices(count: int) -> None:
    """JAX splits the CPU into `count` devices, at most one per core, unless XLA_FLAGS or
    jax_num_cpu_devices already sets a number. Other kinds of device stay as they are."""
    in_flags = DEVICE_FLAG in os.environ.get("XLA_FLAGS", "")
    if not in_flags and jax.config.jax_num_cpu_devices <= 0:
        with contextlib.suppress(RuntimeError):  # JAX has already started
            jax.config.update("jax_num_cpu_devices", min(count, num_cores()))


def split_cpu_devices(batches: Sequence[int]) -> None:
    """Two CPU devices, each with half of a batch, if all batches are even. Many operations of a
    step use one core only; with two halves, both cores are busy."""
    if all(batch % 2 == 0 for batch in batches):
        set_cpu_devices(2)


def enable_compilation_cache() -> None:
    """Compiled programs are kept in .compiled/ of the clone, in a folder per kind of CPU (they use
    its instructions), unless JAX_COMPILATION_CACHE_DIR names another place. So a command that is
    repeated or continued compiles nothing. JAX compiles damaged entries again, with a warning. A
    folder that is not writable is not used. Others must not be able to write to it: its programs
    are run."""
    if jax.config.jax_compilation_cache_dir:
        return
    kind = platform.processor()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as f:
        marks = ("model name", "flags", "Features")
        kind += "".join(sorted({line for line in f if line.startswith(marks)}))
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    folder = os.path.join(root, ".compiled", f"{zlib.crc32(kind.encode()):08x}")
    if os.access(folder if os.path.exists(folder) else root, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

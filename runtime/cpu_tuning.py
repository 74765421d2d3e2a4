"""Process-wide settings that make a CPU faster, and the cache of compiled programs. Only commands
call them, before JAX starts its devices.

Why: on two cores, two CPU devices save an eighth of the toy's step, keeping freed memory a tenth
(with an arena per thread more than a quarter), and full AVX-512 vectors 5%. The first two cost up
to twice the memory, so large models do without. docs/performance.md has measurements of the arenas
and of fragments.
"""
import contextlib
import ctypes
import glob
import math
import os
import platform
import sys
import zlib
from collections.abc import Sequence

import jax

SMALL_MODEL_PARAMS = 100_000_000  # 1.6 GB with gradients and AdamW's moments
SMALL_STEP_FLOPS = 3e9  # forward; up to here, half a batch needs no block of memory above 64 MB
DEVICE_FLAG = "xla_force_host_platform_device_count"
ACCELERATORS = ("accel[0-9]*", "vfio/[0-9]*", "nvidia[0-9]*", "kfd")  # their files in /dev
MALLOPT = ((-4, 0), (-1, -1))        # malloc.h: M_MMAP_MAX 0, M_TRIM_THRESHOLD -1
ONE_ARENA = ((-8, 1),)               # M_ARENA_MAX
KEEP_FREED_ARENAS = ((-2, 64 << 20),)  # M_TOP_PAD
COMPILED = "/jax/core/compile/backend_compile_duration"  # JAX's event after a compilation
LONG_COMPILATION = 0.5  # seconds
BLOCK_SIZES = [1 << n for n in range(28, 9, -1)]  # bytes: 256 MB to 1 KB; below, none are searched
FRAGMENT_SIZE = 1 << 20  # bytes; larger free blocks are few, and a step needs them


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


def keep_freed_memory(arena_per_thread: bool = False) -> None:
    """Freed memory stays with the process, on Linux without an accelerator. XLA allocates a step's
    temporaries again each step. By default, glibc returns much of that memory to the system in
    between, and mapping its pages again takes a tenth of the step. Fragmentation up to doubles the
    memory.

    glibc allocates from arenas. If all threads share one, they wait for each other: the toy's step
    takes 86 ms, and 62 with an arena per thread. But only the shared one keeps blocks above 64 MB:
    without it, a step of Ti/16 takes 2,035 ms, not 1,814. In it, fragments are hidden."""
    has_accelerator = any(glob.glob(f"/dev/{pattern}") for pattern in ACCELERATORS)
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if has_accelerator or not hasattr(libc, "malloc_trim"):  # only glibc has it
        return
    for option, value in MALLOPT + (KEEP_FREED_ARENAS if arena_per_thread else ONE_ARENA):
        libc.mallopt(option, value)
    if arena_per_thread:
        return

    def after_compilation(event: str, seconds: float, **details: object) -> None:
        if event == COMPILED and seconds > LONG_COMPILATION:
            hide_fragments(libc)
    jax.monitoring.register_event_duration_secs_listener(after_compilation)


def hide_fragments(libc: ctypes.CDLL) -> None:
    """Compilation leaves thousands of fragments of free memory in the heap, among which each
    allocation searches: a tenth of Ti/16's step or more, a fifth of that of `emoji`. This allocates
    the fragments and never frees them, so that nothing finds them. Their pages are returned to the
    system first, and nothing is written to them."""
    libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
    libc.malloc_usable_size.restype = ctypes.c_size_t
    libc.malloc.argtypes = [ctypes.c_size_t]
    libc.free.argtypes = libc.malloc_usable_size.argtypes = [ctypes.c_void_p]
    libc.sbrk.argtypes = [ctypes.c_ssize_t]
    libc.malloc_trim(0)

    pieces: list[int] = []  # addresses: all free memory, cut into pieces of BLOCK_SIZES
    for size in BLOCK_SIZES:
        end_of_heap = libc.sbrk(0)
        while libc.sbrk(0) == end_of_heap:  # else no free block was large enough any more
            piece = libc.malloc(size)
            if piece is None:
                break
            pieces.append(piece)
            if piece > libc.sbrk(0):  # from elsewhere, as another malloc does (LD_PRELOAD)
                break

    # Pieces side by side were one free block. Large blocks are freed again.
    blocks: list[list[int]] = []
    end = 0
    for piece in sorted(pieces):
        if piece == end:
            blocks[-1].append(piece)
        else:
            blocks.append([piece])
        end = piece + libc.malloc_usable_size(piece) + ctypes.sizeof(ctypes.c_size_t)
    for block in blocks:
        if block[-1] + libc.malloc_usable_size(block[-1]) - block[0] >= FRAGMENT_SIZE:
            for piece in block:
                libc.free(piece)


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

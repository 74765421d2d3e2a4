"""Settings of glibc's malloc that make a step on a CPU faster.

XLA allocates a step's temporaries again each step. By default, glibc returns much of that memory to
the system in between, and mapping its pages again takes a tenth of a step. And compilation leaves
thousands of fragments of free memory, among which each allocation searches: a tenth of Ti/16's
step, a fifth of that of `emoji`. docs/performance.md has the measurements.
"""
import ctypes
import glob
import sys

import jax

ACCELERATORS = ("accel[0-9]*", "vfio/[0-9]*", "nvidia[0-9]*", "kfd")  # their files in /dev
MALLOPT = ((-4, 0), (-1, -1))        # malloc.h: M_MMAP_MAX 0, M_TRIM_THRESHOLD -1
ONE_ARENA = ((-8, 1),)               # M_ARENA_MAX
KEEP_FREED_ARENAS = ((-2, 64 << 20),)  # M_TOP_PAD
COMPILED = "/jax/core/compile/backend_compile_duration"  # JAX's event after a compilation
LONG_COMPILATION = 0.5  # seconds
BLOCK_SIZES = [1 << n for n in range(28, 9, -1)]  # bytes: 256 MB to 1 KB; below, none are searched
FRAGMENT_SIZE = 1 << 20  # bytes; larger free blocks are few, and a step needs them


def keep_freed_memory(arena_per_thread: bool = False) -> None:
    """Freed memory stays with the process, on Linux without an accelerator. Nothing is reserved,
    but fragmentation up to doubles the memory.

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
    """Allocates the fragments in the heap and never frees them, so that no allocation finds them.
    Their pages are returned to the system first. Nothing is written to them."""
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

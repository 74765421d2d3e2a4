"""How benchmarks take times: runs in turn, and the most that this device can do."""
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm


def time_interleaved(runs: dict[Any, Callable], repeats: int,
                     clock: Callable = time.perf_counter) -> dict[Any, list[float]]:
    """Seconds of each call. The runs take turns, so that disturbances of the machine affect all."""
    seconds: dict[Any, list[float]] = {name: [] for name in runs}
    for _ in tqdm(range(repeats), desc="steps", leave=False, disable=not sys.stderr.isatty()):
        for name, run in runs.items():
            start = clock()
            run()
            seconds[name].append(clock() - start)
    return seconds


def large_matmul() -> tuple[Callable, float]:
    """A large matmul to be timed, and its FLOPs: the most that this device can do. fp32 on a CPU,
    bf16 elsewhere."""
    on_cpu = jax.default_backend() == "cpu"
    n = 2048 if on_cpu else 8192
    a, matmul = jnp.ones((n, n), "float32" if on_cpu else "bfloat16"), jax.jit(jnp.matmul)
    return lambda: jax.block_until_ready(matmul(a, a)), 2.0 * n**3


def memory_pass() -> tuple[Callable, float]:
    """A pass over more memory than caches hold, to be timed, and the bytes that it moves."""
    x = [jnp.ones(2**26)]
    negate = jax.jit(jnp.negative, donate_argnums=0)  # in place

    def run() -> None:
        x[0] = jax.block_until_ready(negate(x[0]))
    return run, 2 * 4 * 2**26

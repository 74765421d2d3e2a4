"""Where the time of a training step goes: milliseconds per part, here and in PyTorch, and at best.

`python bench.py parts -h` is the command line. Each part runs alone, forward and backward, on
inputs of the shapes that it has in the step. Its floor is its FLOPs over the measured matmul rate,
or its bytes over the measured memory bandwidth, whichever takes longer. The bytes are those of its
inputs, weights, outputs and their gradients, each read or written once per pass.
"""
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import train
from benchmarks.step_parts import Part, step_parts
from benchmarks.timing import large_matmul, memory_pass, time_interleaved
from config import Config
from objectives import registry
from runtime.cpu_tuning import num_cores
from runtime.curriculum import parse_stages
from runtime.errors import ConfigError

PLAIN = {"objective": registry.METHOD, "grad_accum": 1, "remat": "none", "zero1": False,
         "gated_attention": False}  # the settings of a step that consists of these parts


# ------------------------------------------------------------------------------------ runs
def forward_backward(part: Part, step: Any, dtype: str) -> tuple[Callable, float]:
    """A call that computes the part's outputs and, from random gradients of these, those of its
    weights and inputs. Also how many bytes that must read and write. step: a step_time.JaxStep."""
    parallel, n = step.parallel, step.parallel.num_devices

    def outputs(w: dict, inputs: list, batch: dict) -> list:
        return jax.tree.leaves(part.jax(w, inputs, batch))

    def run(w: dict, inputs: list, batch: dict, grads: list) -> tuple:
        out, pullback = jax.vjp(lambda w, inputs: outputs(w, inputs, batch), w, inputs)
        return out, pullback(grads)  # without `out`, XLA would leave matmuls of the forward out

    def draw(shapes: list) -> list:  # one array for all its gradients: their values are no matter
        def normal(seed: jax.Array) -> list:
            return [jax.random.normal(jax.random.key(seed), s.shape, s.dtype) for s in shapes]
        return parallel.pmap(normal)(jnp.arange(n))
    inputs = draw([jax.ShapeDtypeStruct((B // n, *rest), dtype) for B, *rest in part.inputs])
    w = parallel.replicate(part.weights)
    local = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype),
                         (w, inputs, step.batch))
    shapes = jax.eval_shape(outputs, *local)
    arguments = w, inputs, step.batch, draw(shapes)
    compiled = parallel.pmap(run).lower(*arguments).compile()

    def num_bytes(tree: Any) -> int:
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    # Forward: reads weights and inputs, writes outputs. Backward: reads weights, inputs and the
    # outputs' gradients, writes the others.
    total = 3 * num_bytes(local[0]) + n * (3 * num_bytes(local[1]) + 2 * num_bytes(shapes))
    return lambda: jax.block_until_ready(compiled(*arguments)), total


def adamw(step: Any) -> tuple[Callable, float]:
    """A call that updates the parameters of `step` as it does itself, and the bytes of that."""
    cfg = step.cfg
    optimizer = train.make_optimizer(cfg, parse_stages(cfg.stages)[0])

    def update(params: dict, opt_state: Any, grads: dict) -> tuple:
        grads = jax.lax.psum(grads, "devices")
        grad_norm = optax.tree.norm(grads)
        if cfg.grad_clip:
            grads = jax.tree.map(lambda g: g * jnp.minimum(1, cfg.grad_clip / grad_norm), grads)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, grad_norm
    compiled = step.parallel.pmap(update, donate_argnums=(0, 1))
    grads = jax.tree.map(jnp.copy, step.state[0])

    def run() -> None:
        params, opt_state, grad_norm = compiled(*step.state, grads)
        step.state[:] = params, opt_state
        jax.block_until_ready(grad_norm)
    num_params = sum(registry.param_counts(cfg).values())
    # Reads weights, gradients and both moments, and writes all but the gradients.
    return run, (5 * 4 + 2 * jnp.dtype(cfg.mu_dtype).itemsize) * num_params


# ----------------------------------------------------------------------------------- table
def check_settings(cfg: Config) -> None:
    """ConfigError for a step that consists of other parts."""
    for name, value in PLAIN.items():
        if getattr(cfg, name) != value:
            raise ConfigError(f"parts are those of a plain step: leave "
                              f"--{name.replace('_', '-')} out, or take its value {value}")


def rows(cfg: Config, resolution: int, batch: int, steps: dict, repeats: int) -> list[dict]:
    """The table of `bench.py parts`. steps: those of step_time.make_steps."""
    step, torch_step = steps["jax"], steps.get("torch")
    params = step.parallel.unreplicate(step.state[0])
    params = train.cast_block_params(params, registry.model_spec(cfg))
    matmul, matmul_flops = large_matmul()
    negate, negate_bytes = memory_pass()
    runs: dict[Any, Callable] = {"matmul": matmul, "memory": negate}
    costs = {}
    library = (torch_step.reference, torch_step.device) if torch_step else ()
    for part in step_parts(cfg, params, resolution, batch, *library):
        runs[part.name, "jax"], num_bytes = forward_backward(part, step, cfg.dtype)
        if torch_step:
            runs[part.name, "torch"] = torch_step.forward_backward(part, cfg.dtype)
        costs[part.name] = part.count, part.flops, num_bytes
    runs["AdamW", "jax"], num_bytes = adamw(step)
    if torch_step:
        runs["AdamW", "torch"] = torch_step.update
    costs["AdamW"] = 1, 0.0, num_bytes
    runs |= {("whole step", name): run for name, run in steps.items()}
    for run in [*runs.values()] * 2:
        run()
    clock: Callable = time.perf_counter
    if jax.default_backend() == "cpu" and num_cores() == 1:
        clock = time.process_time  # without the time that other processes had the core
    ms = {}
    for name, seconds in time_interleaved(runs, repeats, clock).items():
        ms[name] = 1e3 * statistics.median(seconds)

    table, sums = [], np.zeros(3)
    for name, (count, flops, num_bytes) in costs.items():
        floor = max(flops / matmul_flops * ms["matmul"], num_bytes / negate_bytes * ms["memory"])
        times = count * np.array([ms[name, "jax"], ms.get((name, "torch"), math.nan), floor])
        table.append(table_row(name, count, *times))
        sums += times
    table.append(table_row("sum of parts", None, *sums))
    table.append(table_row("whole step", None, ms["whole step", "jax"],
                           ms.get(("whole step", "torch"), math.nan), sums[2]))
    table.append({"part": "matmul", "ms": ms["matmul"],
                  "rate": f"{matmul_flops / ms['matmul'] / 1e6:.0f} GFLOP/s"})
    table.append({"part": "memory", "ms": ms["memory"],
                  "rate": f"{negate_bytes / ms['memory'] / 1e6:.1f} GB/s"})
    return table


def table_row(part: str, count: int | None, ms: float, torch_ms: float, floor_ms: float) -> dict:
    return {"part": part, "count": count, "ms": float(ms), "torch ms": float(torch_ms),
            "floor ms": float(floor_ms), "ms / floor": ms / floor_ms, "ms / torch": ms / torch_ms}

"""Time of a training step: this project's and PyTorch's, and what the mask and the curriculum save.

`python bench.py step -h` and `python bench.py clipa -h` are the command lines.
"""
import dataclasses
import importlib.util
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

import decoder
import train
from benchmarks.timing import large_matmul, time_interleaved
from config import Config
from objectives import registry
from runtime.cpu_tuning import tune_cpu
from runtime.curriculum import parse_stages
from runtime.devices import DataParallel, local_shard
from runtime.errors import ConfigError

# Two implementations must compute the same losses. They can differ by more than rounding, because
# an Adam step turns the rounding of a small gradient into its sign.
LOSS_TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}


def machine() -> str:
    """What a benchmark ran on."""
    device = jax.local_devices()[0]
    return (f"{platform.machine()}, {os.cpu_count()} cores, {device.platform} "
            f"{device.device_kind}, jax {jax.__version__}, Python {platform.python_version()}")


def make_batch(cfg: Config, resolution: int, batch: int) -> dict[str, np.ndarray]:
    """Random images (B,R,R,3) uint8, captions without padding "text" (B,T) int32, "position"
    (B,), and with --alt-field a second caption "alt" (B,T)."""
    rng = np.random.default_rng(cfg.seed)
    text = rng.integers(3, cfg.vocab_size, (batch, cfg.max_text_len), dtype=np.int32)
    text[:, 0] = decoder.BOS
    text[:, -1] = decoder.EOS
    images = rng.integers(0, 256, (batch, resolution, resolution, 3), np.uint8)
    arrays = {"images": images, "text": text, "position": np.arange(batch, dtype=np.int32)}
    if cfg.alt_field:
        arrays["alt"] = np.roll(text, 1, axis=0)
    return arrays


def model_flops(cfg: Config, resolution: int) -> float:
    """FLOPs of one image in the step that is timed, whose batch always has pixels."""
    return registry.training_flops(cfg, resolution, from_pixels=True)


def benchmark_devices(cfgs: list[Config], batches: list[int],
                      resolutions: list[int]) -> DataParallel:
    """The devices that all these steps run on: one accelerator, or the CPU as in training. With
    --zero1 all devices of this machine. ConfigError if there is only one to shard over."""
    step_flops = []
    for cfg, batch, resolution in zip(cfgs, batches, resolutions):
        parts = registry.flops(registry.model_spec(cfg), resolution, cfg.max_text_len)
        step_flops.append(sum(parts.values()) * batch / cfg.grad_accum)
    num_params = max(sum(registry.param_counts(cfg).values()) for cfg in cfgs)
    pieces = [batch // cfg.grad_accum for cfg, batch in zip(cfgs, batches)]
    tune_cpu(num_params, pieces, step_flops=max(step_flops))
    zero1 = any(cfg.zero1 for cfg in cfgs)
    num_devices = 1
    if zero1 or jax.default_backend() == "cpu":
        num_devices = jax.local_device_count()
    if any(batch % (num_devices * cfg.grad_accum) for cfg, batch in zip(cfgs, batches)):
        num_devices = 1
    if zero1 and num_devices == 1:
        raise ConfigError("--zero1 divides the optimizer's state over several devices, but here "
                          "one would get the complete batch: leave it out, or take a --batch that "
                          "all devices share evenly (simulated devices on a CPU: "
                          "XLA_FLAGS=--xla_force_host_platform_device_count=2)")
    return DataParallel(num_devices)


class JaxStep:
    """train.make_step, compiled and called on one batch again and again."""

    def __init__(self, cfg: Config, resolution: int, batch: int, parallel: DataParallel,
                 state: list | None = None):
        """state: [params, opt_state] of another JaxStep on these devices, to share its memory."""
        self.cfg, model = cfg, registry.model_spec(cfg)
        optimizer = train.make_optimizer(cfg, parse_stages(cfg.stages)[0])

        def init_optimizer(params: Any) -> Any:
            return optimizer.init(jax.tree.map(local_shard, params) if cfg.zero1 else params)
        if state is None:
            params = parallel.replicate(jax.jit(lambda: registry.init_params(cfg, model))())
            state = [params, parallel.pmap(init_optimizer)(params)]
        self.parallel, self.state = parallel, state
        self.batch = parallel.shard_batch(make_batch(cfg, resolution, batch))
        start = time.perf_counter()
        step = train.make_step(model, optimizer, cfg.seed, cfg.grad_accum, parallel.pmap_devices,
                               cfg.zero1, cfg.grad_clip)
        self.compiled = step.lower(*state, self.batch).compile()
        self.compile_seconds = time.perf_counter() - start

    def __call__(self) -> float:
        """Runs one step to its end and returns its mean loss."""
        params, opt_state, metrics = self.compiled(*self.state, self.batch)
        self.state[:] = params, opt_state
        return float(jax.block_until_ready(metrics["loss"])[0])

    def planned_bytes(self) -> float:
        """Memory of the step as the compiler planned it."""
        plan = self.compiled.memory_analysis()
        planned = (plan.argument_size_in_bytes + plan.output_size_in_bytes
                   - plan.alias_size_in_bytes + plan.temp_size_in_bytes)
        return planned * self.parallel.num_devices

    def peak_bytes(self) -> float:
        """Peak memory of the process as the device counted it, or on a CPU as planned."""
        counted = jax.local_devices()[0].memory_stats() or {}
        return counted.get("peak_bytes_in_use") or self.planned_bytes()


# ----------------------------------------------------------------------------- bench.py step
def check_compare(cfg: Config, compare: str | None) -> None:
    """ConfigError for settings that the PyTorch step does not have."""
    if not compare:
        return
    if cfg.grad_accum > 1:
        raise ConfigError("--compare takes the batch in one piece: leave --grad-accum at 1")
    if cfg.objective != registry.METHOD:
        raise ConfigError(f"--compare has only the method: leave --objective {cfg.objective} out")
    if cfg.gated_attention:
        raise ConfigError("--compare has no gated attention: leave --gated-attention out")
    if cfg.zero1:
        raise ConfigError("--compare runs on one device, which holds all of the optimizer's state: "
                          "leave --zero1 out")
    if importlib.util.find_spec("torch") is None:
        raise ConfigError("--compare needs PyTorch: pip install -e '.[bench]'")


def make_steps(cfg: Config, resolution: int, batch: int,
               compare: str | None) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """{"jax": JaxStep, compare: TorchStep} and the losses of their five steps so far. compare:
    "torch", "torch-compile" or None. ConfigError if the two do not compute the same."""
    check_compare(cfg, compare)
    if compare:  # JAX must leave a part of a GPU's memory to PyTorch
        cfg = dataclasses.replace(cfg, mu_dtype="float32")  # PyTorch's AdamW has no other
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    jax_step = JaxStep(cfg, resolution, batch,
                       benchmark_devices([cfg], [batch], [resolution]))
    steps: dict[str, Any] = {"jax": jax_step}
    if compare:
        from benchmarks.torch_step import TorchStep
        params = jax_step.parallel.unreplicate(jax_step.state[0])
        steps[compare] = TorchStep(cfg, make_batch(cfg, resolution, batch), params,
                                   compare == "torch-compile")
    losses = {}
    for name, step in steps.items():  # a warm-up: after five steps all memory has been touched
        losses[name] = [step() for _ in range(5)]
    if compare:  # the third loss is the first one after an update
        first, second = losses["jax"][:3], losses[compare][:3]
        if not np.allclose(first, second, rtol=LOSS_TOLERANCE[cfg.dtype], atol=0):
            raise ConfigError(f"--compare {compare} does not compute the same: losses {losses}")
    return steps, losses


def rows(cfg: Config, resolution: int, batch: int, compare: str | None,
         repeats: int) -> list[dict]:
    """The table of `bench.py step`."""
    runs, losses = make_steps(cfg, resolution, batch, compare)
    matmul, matmul_flops = large_matmul()
    matmul()
    seconds = time_interleaved({"matmul": matmul, **runs}, repeats)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    matmul_rate = matmul_flops / median["matmul"]
    # One matmul occupies all cores of a CPU, but only one of several accelerators.
    units = 1 if jax.default_backend() == "cpu" else runs["jax"].parallel.num_devices
    table = []
    for name, run in runs.items():
        rate = model_flops(cfg, resolution) * batch / median[name]
        row = {"step": name, "images/s": batch / median[name], "ms": median[name] * 1e3,
               "min ms": min(seconds[name]) * 1e3, "GFLOP/s": rate / 1e9,
               "% of matmul rate": 100 * rate / matmul_rate / units,
               "peak GiB": run.peak_bytes() / 2**30, "compile s": run.compile_seconds,
               "loss": losses[name][2]}
        if compare:
            row["speedup"] = median[compare] / median[name]
        table.append(row)
    table.append({"step": "matmul", "ms": median["matmul"] * 1e3,
                  "min ms": min(seconds["matmul"]) * 1e3, "GFLOP/s": matmul_rate / 1e9,
                  "% of matmul rate": 100.0})
    return table


# ---------------------------------------------------------------------------- bench.py clipa
class Cell(NamedTuple):
    """A stage of the curriculum whose step is timed."""
    cfg: Config
    resolution: int
    batch: int
    images: int  # that the stage trains on


# Method, curriculum, mask, and the paper's hours of L/14 to 224 px.
TABLE5 = (("neither (CapPa)", False, False, 217), ("mask", False, True, 190),
          ("curriculum", True, False, 67), ("both", True, True, 55))


def table5(low: tuple, high: tuple, repeats: int) -> list[dict]:
    """The paper's Table 5 from four step times: with and without the mask, at two resolutions.
    Without the curriculum all images are seen at the high one. low, high: the fields of Cell."""
    cells = {"low": Cell(*low), "high": Cell(*high)}
    parallel = benchmark_devices([cell.cfg for cell in cells.values()],
                                 [cell.batch for cell in cells.values()],
                                 [cell.resolution for cell in cells.values()])
    runs: dict[tuple[str, bool], Callable] = {}
    flops: dict[tuple[str, bool], float] = {}
    state = None
    for name, cell in cells.items():
        for mask in (True, False):
            cfg = cell.cfg if mask else dataclasses.replace(cell.cfg, keep_ratio=1.0)
            run = JaxStep(cfg, cell.resolution, cell.batch, parallel, state)
            run()
            state, runs[name, mask] = run.state, run
            flops[name, mask] = model_flops(cfg, cell.resolution)
    seconds = {}
    for (name, mask), times in time_interleaved(runs, repeats).items():
        seconds[name, mask] = statistics.median(times) / cells[name].batch

    def total(per_image: dict, curriculum: bool, mask: bool) -> float:
        low_cost = per_image["low" if curriculum else "high", mask]
        return cells["low"].images * low_cost + cells["high"].images * per_image["high", mask]
    table = []
    for method, curriculum, mask, hours in TABLE5:
        table.append({
            "method": method,
            "low, ms per image": seconds["low", mask] * 1e3 if curriculum else None,
            "high, ms per image": seconds["high", mask] * 1e3,
            "speedup": total(seconds, False, False) / total(seconds, curriculum, mask),
            "by FLOPs": total(flops, False, False) / total(flops, curriculum, mask),
            "paper": TABLE5[0][3] / hours, "paper hours": hours})
    return table


# --------------------------------------------------------------------------- bench.py ablate
def measure_costs(cfgs: dict[str, Config], repeats: int = 15) -> dict:
    """{"machine": what ran it, "costs": {name: {"seconds": of the training, by the median step;
    "GFLOPs": of one image in a step; "MiB"}}}, the last two at the last stage. All steps take
    turns."""
    stages = {}
    for name, cfg in cfgs.items():
        for stage in parse_stages(cfg.stages):
            stages[name, stage.number] = stage
    parallel = benchmark_devices([cfgs[name] for name, _ in stages],
                                 [stage.batch for stage in stages.values()],
                                 [stage.resolution for stage in stages.values()])
    runs = {}
    for (name, number), stage in tqdm(stages.items(), desc="compiling steps", leave=False,
                                      disable=not sys.stderr.isatty()):
        text = f"resolution={stage.resolution} steps=9 batch={stage.batch} lr=1e-3"
        cfg = dataclasses.replace(cfgs[name], stages=text)
        run = JaxStep(cfg, stage.resolution, stage.batch, parallel)
        run()
        runs[name, number] = run
    costs: dict[str, dict[str, float]] = {name: {"seconds": 0.0} for name in cfgs}
    for (name, number), seconds in time_interleaved(runs, repeats).items():
        stage = stages[name, number]
        costs[name]["seconds"] += stage.steps * statistics.median(seconds)
        costs[name]["GFLOPs"] = model_flops(cfgs[name], stage.resolution) / 1e9
        costs[name]["MiB"] = runs[name, number].planned_bytes() / 2**20  # all share one process
    return {"machine": machine(), "costs": costs}

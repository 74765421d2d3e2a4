"""The time of a training step: this project's own, and the same in PyTorch; and what mask and curriculum save by it.

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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import decoder
import masking
import train
from config import Config
from objectives import registry
from objectives.registry import init_params
from runtime import curriculum
from runtime.cpu_tuning import tune_cpu
from runtime.devices import DataParallel, local_shard
from runtime.errors import ConfigError

# The paper's Table 5: hours of L/14 to 224 px. Method, curriculum, mask, hours.
TABLE5 = (("neither (CapPa)", False, False, 217), ("mask", False, True, 190), ("CLIPA", True, False, 67), ("both", True, True, 55))
TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}  # of losses that must agree; an Adam step turns rounding of small gradients into whole signs


def machine() -> str:
    """What was measured on, in words."""
    device = jax.local_devices()[0]
    return f"{platform.machine()}, {os.cpu_count()} cores, {device.platform} {device.device_kind}, jax {jax.__version__}, Python {platform.python_version()}"


def make_batch(cfg: Config, resolution: int, batch: int) -> dict[str, np.ndarray]:
    """Random pixels, and captions that fill their rows: {"images" (B,R,R,3) uint8, "text" (B,T) int32, "sample_index" (B,)}, and with --alt-field
    a second caption "alt" (B,T)."""
    rng = np.random.default_rng(cfg.seed)
    text = rng.integers(3, cfg.vocab_size, (batch, cfg.max_text_len), dtype=np.int32)
    text[:, 0], text[:, -1] = decoder.BOS, decoder.EOS
    found = {"images": rng.integers(0, 256, (batch, resolution, resolution, 3), np.uint8), "text": text, "sample_index": np.arange(batch, dtype=np.int32)}
    return found | ({"alt": np.roll(text, 1, axis=0)} if cfg.alt_field else {})


def model_flops(cfg: Config, resolution: int) -> float:
    """Of one image through one training step: the backward pass costs twice the forward. What remat computes again does not count."""
    return 3 * sum(registry.flops(registry.model_spec(cfg), resolution, cfg.max_text_len).values())


def one_machine(cfgs: list[Config], batches: list[int]) -> DataParallel:
    """What steps are timed on: one accelerator, or the CPU as training would use it; with --zero1 all devices of this machine,
    because one alone has no part of the optimizer's state to leave to others. ConfigError if there is only one."""
    tune_cpu(max(sum(registry.param_counts(cfg).values()) for cfg in cfgs), [batch // cfg.grad_accum for cfg, batch in zip(cfgs, batches)])
    shard = any(cfg.zero1 for cfg in cfgs)
    n = jax.local_device_count() if shard or jax.default_backend() == "cpu" else 1
    if any(batch % (n * cfg.grad_accum) for cfg, batch in zip(cfgs, batches)):
        n = 1
    if shard and n == 1:
        raise ConfigError("--zero1 divides the optimizer's state over several devices, and here one would take the whole "
                          "batch: leave it out, or take a --batch that all devices share evenly (pretend devices of a CPU: "
                          "XLA_FLAGS=--xla_force_host_platform_device_count=2)")
    return DataParallel(n)


class JaxStep:
    """train.make_step, called again and again on one batch. `state` may be that of another such step in the same place."""

    def __init__(self, cfg: Config, resolution: int, batch: int, parallel: DataParallel, state: list | None = None):
        model, self.parallel = registry.model_spec(cfg), parallel
        optimizer = train.make_optimizer(cfg, curriculum.parse_stages(cfg.stages)[0])
        if state is None:
            params = parallel.replicate(jax.jit(lambda: init_params(cfg, model))())
            mine = (lambda p: jax.tree.map(local_shard, p)) if cfg.zero1 else (lambda p: p)
            state = [params, jax.pmap(lambda p: optimizer.init(mine(p)), "devices", devices=parallel.pmap_devices)(params)]
        self.state = state
        self.batch = parallel.shard_batch(make_batch(cfg, resolution, batch))
        asked = time.perf_counter()
        step = train.make_step(model, optimizer, cfg.seed, cfg.grad_accum, parallel.pmap_devices, cfg.zero1, cfg.grad_clip)
        self.call = step.lower(*state, self.batch).compile()
        self.compile_seconds = time.perf_counter() - asked

    def __call__(self) -> float:
        """One step, to its end; returns its mean loss."""
        *self.state[:], metrics = self.call(*self.state, self.batch)
        return float(jax.block_until_ready(metrics["loss"])[0])

    def memory(self) -> float:
        """Peak bytes: as the device counted them, or where it does not (a CPU), as the compiler planned them."""
        counted = jax.local_devices()[0].memory_stats() or {}
        m = self.call.memory_analysis()
        planned = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes
        return counted.get("peak_bytes_in_use") or planned * self.parallel.num_devices
class TorchStep:
    """The same weights, batch, mask and update in PyTorch, written as one would there: a parameter per layer, fused
    kernels for layer norm, gelu, attention and AdamW."""
    compile_seconds = float("nan")

    def __init__(self, cfg: Config, resolution: int, batch: int, params: dict, compiled: bool):
        import torch
        sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "tests", "parity"))
        from benchmarks import torch_reference
        self.torch, model, data = torch, registry.model_spec(cfg), make_batch(cfg, resolution, batch)
        device = self.device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        tree = torch_reference.from_jax(params, device)
        for part in tree.values():
            part["blocks"] = [jax.tree.map(lambda w: w.detach().clone().requires_grad_(), layer) for layer in torch_reference.layers(part["blocks"])]
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        groups = [{"params": [w for path, w in leaves if (path[-1].key == "kernel") == decays], "weight_decay": cfg.weight_decay * decays}
                  for decays in (True, False)]
        self.leaves, self.clip = [w for _, w in leaves], cfg.grad_clip
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, cfg.adam_b2), fused=True)
        self.rates = iter([0.0] + [curriculum.parse_stages(cfg.stages)[0].lr] * 1_000_000)  # a warm-up of one step, as ours
        n = (resolution // model.encoder.patch_size) ** 2
        keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(cfg.seed), row))(data["sample_index"])
        chosen = masking.sample_keep_indices(keys, n, masking.num_kept_tokens(n, cfg.keep_ratio))
        images, text, chosen = (torch_reference.tensor(x, device) for x in (data["images"], data["text"], chosen))
        loss = torch.compile(torch_reference.mean_loss) if compiled else torch_reference.mean_loss
        self.loss = lambda: loss(tree["encoder"], tree["decoder"], images, chosen, text, model.encoder, model.decoder)

    def __call__(self) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        if self.clip:
            self.torch.nn.utils.clip_grad_norm_(self.leaves, self.clip)
        rate = next(self.rates)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        value = float(loss.detach())
        if self.device == "cuda":
            self.torch.cuda.synchronize()
        return value

    def memory(self) -> float:
        return self.torch.cuda.max_memory_allocated() if self.device == "cuda" else float("nan")


def matmul_rate(dtype: str) -> tuple[Callable, float]:
    """A plain large matmul, to be timed, and its FLOPs: what this device can do at most."""
    n = 2048 if jax.default_backend() == "cpu" else 8192
    a, product = jnp.ones((n, n), dtype), jax.jit(jnp.matmul)
    return lambda: jax.block_until_ready(product(a, a)), 2.0 * n**3


def time_interleaved(runs: dict[str, Callable], repeats: int, title: str) -> dict[str, list[float]]:
    """Seconds of each call, `repeats` times one after the other: what disturbs the machine meets all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in tqdm(range(repeats), desc=title, leave=False, disable=not sys.stderr.isatty()):
        for name, run in runs.items():
            asked = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - asked)
    return seconds


def rows(cfg: Config, resolution: int, batch: int, peer: str | None, repeats: int) -> list[dict]:
    """The table of `step`: a row for each that ran. peer: "torch", "torch-compile" or None."""
    if peer and cfg.grad_accum > 1:
        raise ConfigError("--compare takes the batch in one piece: leave --grad-accum at 1")
    if peer and cfg.objective != "openvision2":
        raise ConfigError(f"--compare knows the method alone: leave --objective {cfg.objective} out")
    if peer and cfg.zero1:
        raise ConfigError("--compare runs on one device and keeps its optimizer's state whole: leave --zero1 out")
    if peer and importlib.util.find_spec("torch") is None:
        raise ConfigError("--compare needs PyTorch: pip install -e '.[bench]'")
    if peer:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves the peer its share of a GPU's memory
    ours = JaxStep(cfg, resolution, batch, one_machine([cfg], [batch]))
    runs: dict[str, Any] = {"ours": ours}
    if peer:
        runs[peer] = TorchStep(cfg, resolution, batch, jax.tree.map(lambda x: np.asarray(x[0]), ours.state[0]), peer == "torch-compile")
    product, work = matmul_rate("float32" if jax.default_backend() == "cpu" else "bfloat16")
    product()
    losses = {name: [run() for _ in range(5)] for name, run in runs.items()}  # warms up: by then all memory has been touched
    compared = [each[:3] for each in losses.values()]  # the third tells of the first true update
    if peer and not np.allclose(*compared, rtol=TOLERANCE[cfg.dtype], atol=0):
        raise ConfigError(f"--compare {peer} does not compute the same: losses {losses}")
    seconds = time_interleaved({"matmul": product, **runs}, repeats, "steps")
    middle = {name: statistics.median(s) for name, s in seconds.items()}
    rate = work / middle["matmul"]
    units = 1 if jax.default_backend() == "cpu" else ours.parallel.total  # all cores of a CPU take part in one matmul
    table = []
    for name, run in runs.items():
        done = model_flops(cfg, resolution) * batch / middle[name]
        table.append({"what": name, "images/s": batch / middle[name], "ms": middle[name] * 1e3, "least ms": min(seconds[name]) * 1e3,
                      "GFLOP/s": done / 1e9, "of matmul": f"{done / rate / units:.0%}", "peak GiB": run.memory() / 2**30,
                      "compile s": run.compile_seconds, "loss": losses[name][2]}
                     | ({"speed": middle[peer] / middle[name]} if peer else {}))
    return [*table, {"what": "matmul", "ms": middle["matmul"] * 1e3, "least ms": min(seconds["matmul"]) * 1e3, "GFLOP/s": rate / 1e9, "of matmul": "100%"}]


def table5(low: tuple[Config, int, int, int], high: tuple[Config, int, int, int], repeats: int) -> list[dict]:
    """Four step times, with and without the mask at two resolutions, shared out over the images of two stages. Without the
    curriculum all are seen at the high resolution. low, high: (config, resolution, batch, images of the stage)."""
    runs: dict[tuple[bool, bool], Callable] = {}
    flops: dict[tuple[bool, bool], float] = {}
    state, parallel = None, one_machine([low[0], high[0]], [low[2], high[2]])
    for is_low, (cfg, resolution, batch, _) in ((True, low), (False, high)):
        for mask in (True, False):
            cfg = cfg if mask else dataclasses.replace(cfg, keep_ratio=1.0)
            runs[is_low, mask] = run = JaxStep(cfg, resolution, batch, parallel, state)
            state = run.state
            run()
            flops[is_low, mask] = model_flops(cfg, resolution)
    took = time_interleaved(runs, repeats, "steps")
    seconds = {kind: statistics.median(times) / (low if kind[0] else high)[2] for kind, times in took.items()}

    def total(cost: dict, curriculum: bool, mask: bool) -> float:
        return low[3] * cost[curriculum, mask] + high[3] * cost[False, mask]
    return [{"what": name, "low, ms an image": seconds[True, mask] * 1e3 if curriculum else float("nan"), "high, ms an image": seconds[False, mask] * 1e3,
             "faster": total(seconds, False, False) / total(seconds, curriculum, mask),
             "by FLOPs": total(flops, False, False) / total(flops, curriculum, mask), "paper": 217 / hours, "paper, hours": hours}
            for name, curriculum, mask, hours in TABLE5]

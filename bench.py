"""What it costs, measured on the machine at hand: time, FLOPs, memory, data. Every claim of the paper's section 3.2 has a command.

    python bench.py step --encoder Ti/16 --resolution 160 --batch 32     a training step: images/s, share of the matmul rate
    python bench.py clipa --encoder L/14                                 what mask and curriculum save (Table 5)
    python bench.py flops                                                FLOPs an image, by formula (Table 3)
    python bench.py memory l14 --resolution 224 --batch 2048             GiB a chip on a TPU pod, without a TPU (Table 4)
    python bench.py data                                                 pictures/s that one core decodes

Each takes a recipe's name (python train.py -h) and flags that change it, prints a table, and writes it with --json FILE.
"""
import argparse
import dataclasses
import json
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

import config
import decoder
import masking
import train
import vit
from config import PRESETS, Config, ConfigError
from run import Model, init

MODEL_FLAGS = ("encoder", "decoder", "keep_ratio", "prefix", "cls", "text_length", "vocab_size", "mu_dtype", "dtype", "remat", "loss_chunk",
               "unroll", "accum", "seed")
DECODERS = {"So400m": "L", "g": "H"}  # as the recipes have it; elsewhere the decoder of the encoder's name
TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}  # of losses that must agree; an Adam step turns rounding of small gradients into whole signs


# -------------------------------------------------------------------------------------------------------- what is measured
def settings(args: argparse.Namespace, stage: int = 0) -> tuple[Config, int, int]:
    """(config, resolution, batch) as the recipe and flags say; what is not said is that of the recipe's stage. ConfigError
    for what cannot be."""
    given = {k: v for k, v in vars(args).items() if k in MODEL_FLAGS}
    if args.recipe is None and "encoder" in given:
        size = given["encoder"].partition("/")[0]
        given.setdefault("decoder", DECODERS.get(size, size if size in decoder.FAMILY else "L"))
        cfg = dataclasses.replace(Config(stages="resolution=224 steps=1 batch=8 lr=1e-3"), **given)
    else:
        cfg = dataclasses.replace(PRESETS[args.recipe or "toy"], **given)
    plan = config.stages(cfg)[stage]
    resolution, batch = args.resolution or plan.resolution, args.batch or plan.batch
    cfg = dataclasses.replace(cfg, stages=f"resolution={resolution} steps=1000000 batch={batch} lr={plan.lr} warmup=1")
    try:
        config.check(cfg)
    except ConfigError as problem:
        raise ConfigError(str(problem).replace("--stages: resolution", "--resolution").replace("--stages: batch", "--batch")) from None
    return cfg, resolution, batch


def make_model(cfg: Config) -> Model:
    return Model(*config.models(cfg, cfg.vocab_size), cfg.keep_ratio)


def make_batch(cfg: Config, resolution: int, batch: int) -> dict[str, np.ndarray]:
    """Random pixels, and captions that fill their rows: {"images" (B,R,R,3) uint8, "text" (B,T) int32, "row" (B,)}."""
    rng = np.random.default_rng(cfg.seed)
    text = rng.integers(3, cfg.vocab_size, (batch, cfg.text_length), dtype=np.int32)
    text[:, 0], text[:, -1] = decoder.BOS, decoder.EOS
    return {"images": rng.integers(0, 256, (batch, resolution, resolution, 3), np.uint8), "text": text, "row": np.arange(batch, dtype=np.int32)}


def model_flops(cfg: Config, resolution: int) -> float:
    """Of one image through one training step: the backward pass costs twice the forward. What remat computes again does not count."""
    model = make_model(cfg)
    kept = masking.kept_count((resolution // model.encoder.patch) ** 2, cfg.keep_ratio)
    return 3 * (vit.flops(model.encoder, resolution) + decoder.flops(model.decoder, kept, cfg.text_length - 1))


class Ours:
    """train.make_step on one device, called again and again on one batch. `state` may be that of another such step."""

    def __init__(self, cfg: Config, resolution: int, batch: int, state: list | None = None):
        model = make_model(cfg)
        optimizer = train.make_optimizer(cfg, config.stages(cfg)[0])
        if state is None:
            params = jax.jit(lambda: init(cfg, model))()
            state = [jax.tree.map(lambda x: x[None], part) for part in (params, jax.jit(optimizer.init)(params))]
        self.state = state
        self.batch = jax.device_put(jax.tree.map(lambda x: x[None], make_batch(cfg, resolution, batch)))
        asked = time.perf_counter()
        self.call = train.make_step(model, optimizer, cfg.seed, cfg.accum, jax.local_devices()[:1], clip=cfg.clip).lower(*state, self.batch).compile()
        self.compile_seconds = time.perf_counter() - asked

    def __call__(self) -> float:
        """One step, to its end; returns its mean loss."""
        *self.state[:], metrics = self.call(*self.state, self.batch)
        return float(jax.block_until_ready(metrics["loss"])[0])

    def memory(self) -> float:
        """Peak bytes: as the device counted them, or where it does not (a CPU), as the compiler planned them."""
        counted = jax.local_devices()[0].memory_stats() or {}
        m = self.call.memory_analysis()
        return counted.get("peak_bytes_in_use") or m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes


class Torch:
    """The same weights, batch, mask and update in PyTorch, written as one would there: a parameter per layer, fused
    kernels for layer norm, gelu, attention and AdamW. SystemExit if torch is not there."""

    def __init__(self, cfg: Config, resolution: int, batch: int, params: dict, compiled: bool):
        try:
            import torch
        except ImportError:
            sys.exit("error: --peer torch needs PyTorch: pip install -e '.[bench]'")
        sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "tests", "parity"))
        import reference
        self.torch, model, data = torch, make_model(cfg), make_batch(cfg, resolution, batch)
        device = self.device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        tree = reference.from_jax(params, device)
        for part in tree.values():
            part["blocks"] = [jax.tree.map(lambda w: w.detach().clone().requires_grad_(), layer) for layer in reference.layers(part["blocks"])]
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        groups = [{"params": [w for path, w in leaves if (path[-1].key == "kernel") == decays], "weight_decay": cfg.weight_decay * decays}
                  for decays in (True, False)]
        self.leaves, self.clip = [w for _, w in leaves], cfg.clip
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, cfg.b2), fused=True)
        self.rates = iter([0.0] + [config.stages(cfg)[0].lr] * 1_000_000)  # a warm-up of one step, as ours
        n = (resolution // model.encoder.patch) ** 2
        keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(cfg.seed), row))(data["row"])
        chosen = masking.keep_indices(keys, n, masking.kept_count(n, cfg.keep_ratio))
        images, text, chosen = (reference.tensor(x, device) for x in (data["images"], data["text"], chosen))
        loss = torch.compile(reference.mean_loss) if compiled else reference.mean_loss
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


def matmul(dtype: str) -> tuple[Callable, float]:
    """A plain large matmul, to be timed, and its FLOPs: what this device can do at most."""
    n = 2048 if jax.default_backend() == "cpu" else 8192
    a, product = jnp.ones((n, n), dtype), jax.jit(jnp.matmul)
    return lambda: jax.block_until_ready(product(a, a)), 2.0 * n**3


def in_turns(runs: dict[str, Callable], repeats: int, title: str) -> dict[str, list[float]]:
    """Seconds of each call, `repeats` times one after the other: what disturbs the machine meets all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in tqdm(range(repeats), desc=title, leave=False, disable=not sys.stderr.isatty()):
        for name, run in runs.items():
            asked = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - asked)
    return seconds


# ------------------------------------------------------------------------------------------------------------ sub-commands
def step(args: argparse.Namespace) -> list[dict]:
    cfg, resolution, batch = settings(args)
    if args.peer and cfg.accum > 1:
        raise ConfigError("--peer takes the batch in one piece: leave --accum at 1")
    if args.peer:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves the peer its share of a GPU's memory
    ours = Ours(cfg, resolution, batch)
    runs: dict[str, Any] = {"ours": ours}
    if args.peer:
        runs[args.peer] = Torch(cfg, resolution, batch, jax.tree.map(lambda x: np.asarray(x[0]), ours.state[0]), args.peer == "torch-compile")
    product, work = matmul("float32" if jax.default_backend() == "cpu" else "bfloat16")
    product()
    losses = {name: [run() for _ in range(3)] for name, run in runs.items()}  # warms up, and the third tells of the first true update
    if args.peer and not np.allclose(losses["ours"], losses[args.peer], rtol=TOLERANCE[cfg.dtype], atol=0):
        raise ConfigError(f"the two do not compute the same: losses {losses}")
    seconds = in_turns({"matmul": product, **runs}, args.repeats, "steps")
    rate = work / statistics.median(seconds["matmul"])
    rows = []
    for name, run in runs.items():
        middle = statistics.median(seconds[name])
        done = model_flops(cfg, resolution) * batch / middle
        rows.append({"what": name, "images/s": batch / middle, "ms": middle * 1e3, "least ms": min(seconds[name]) * 1e3, "GFLOP/s": done / 1e9,
                     "of matmul": f"{done / rate:.0%}", "peak GiB": run.memory() / 2**30, "compile s": getattr(run, "compile_seconds", float("nan")),
                     "loss": losses[name][-1], "speed": statistics.median(seconds[args.peer or "ours"]) / middle})
    rows.append({"what": "matmul", "ms": statistics.median(seconds["matmul"]) * 1e3, "GFLOP/s": rate / 1e9, "of matmul": "100%"})
    return rows


def clipa(args: argparse.Namespace) -> list[dict]:
    """Four step times, shared out over the recipe's images: at the high resolution alone, or at both."""
    name = {"L/14": "l14"}.get(getattr(args, "encoder", "")) if args.recipe is None else args.recipe
    low, high = config.stages(PRESETS[name or "l14"])
    resolution, batch = args.resolution or high.resolution, args.batch or 2
    per_image, work, state = {}, {}, None
    runs = {}
    for side, many in ((low.resolution, batch * round((resolution / low.resolution) ** 2)), (resolution, batch)):
        for masked in (True, False):
            args.resolution, args.batch = side, many
            cfg, _, _ = settings(args)
            cfg = cfg if masked else dataclasses.replace(cfg, keep_ratio=1.0)
            run = Ours(cfg, side, many, state)
            state = run.state
            run()
            runs[side, masked], work[side, masked] = run, model_flops(cfg, side)
    seconds = in_turns(runs, args.repeats, "steps")
    for (side, masked), times in seconds.items():
        per_image[side, masked] = statistics.median(times) / runs[side, masked].batch["row"].size
    images = low.steps * low.batch, high.steps * high.batch

    def total(cost: dict, curriculum: bool, masked: bool) -> float:
        return (images[0] * cost[low.resolution if curriculum else resolution, masked] + images[1] * cost[resolution, masked])
    rows = []
    for text, curriculum, masked, paper in (("neither (CapPa)", False, False, 217), ("mask", False, True, 190), ("CLIPA", True, False, 67), ("both", True, True, 55)):
        rows.append({"what": text, "ms an image, low": per_image[low.resolution, masked] * 1e3 if curriculum else float("nan"),
                     "ms an image, high": per_image[resolution, masked] * 1e3,
                     "saved": total(per_image, False, False) / total(per_image, curriculum, masked),
                     "saved, by FLOPs": total(work, False, False) / total(work, curriculum, masked), "saved, paper": 217 / paper, "paper's hours": paper})
    return rows


def flops(args: argparse.Namespace) -> list[dict]:
    """Forward GFLOPs an image, 2 a multiply-add, matmuls alone; and the two figures that the paper gives."""
    rows = []
    for name in PRESETS if args.recipe is None and "encoder" not in args else [args.recipe]:
        for number in range(2):
            args.recipe = name
            cfg, resolution, _ = settings(args, number)
            rows.append(flops_row(cfg, resolution, float("nan")))
    if not args.recipe or "encoder" not in args:
        for name, side, paper in (("l14", 224, 208.9), ("so400m14", 378, 1017.7)):  # 384 px hold 27 x 27 patches of 14, as 378 do
            rows.append(flops_row(PRESETS[name], side, paper))
    return rows


def flops_row(cfg: Config, resolution: int, paper: float) -> dict:
    model = make_model(cfg)
    n = (resolution // model.encoder.patch) ** 2
    kept = masking.kept_count(n, cfg.keep_ratio)
    parts = vit.flops(model.encoder, resolution), decoder.flops(model.decoder, kept, cfg.text_length - 1)
    return {"encoder": cfg.encoder, "decoder": cfg.decoder, "px": resolution, "patches": n, "kept": kept, "text": cfg.text_length,
            "encoder G": parts[0] / 1e9, "decoder G": parts[1] / 1e9, "in all G": sum(parts) / 1e9, "paper G": paper}


# ------------------------------------------------------------------------------------------------------------------ tables
def shown(value: Any) -> str:
    if isinstance(value, float):
        return "–" if value != value else f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 100 else f"{value:.1f}"
    return f"{value:,}" if isinstance(value, int) else "–" if value is None else str(value)


def table(rows: list[dict]) -> str:
    """Rows as text, a column for each key that any row has."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names] + [[shown(row.get(name)) for name in names] for row in rows]
    wide = [max(len(line[i]) for line in cells) for i in range(len(names))]
    return "\n".join("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, wide))).rstrip() for line in cells)


def machine() -> str:
    device = jax.local_devices()[0]
    return f"{platform.machine()}, {os.cpu_count()} cores, {device.platform} {device.device_kind}, jax {jax.__version__}, Python {platform.python_version()}"


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; what cannot be read ends the program with a usage line."""
    parser = argparse.ArgumentParser(prog="bench.py", allow_abbrev=False, description=__doc__.split("\n\n")[0],
                                     epilog="Each has its own -h.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{step,clipa,flops}")

    def command(run: Callable, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(run.__name__, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
        sub.set_defaults(run=run)
        sub.add_argument("--json", metavar="FILE", help="write the table there too, with the machine and what was asked")
        return sub

    def model(sub: argparse.ArgumentParser) -> argparse.ArgumentParser:
        sub.add_argument("recipe", nargs="?", choices=tuple(PRESETS), help="the settings that flags change (default: toy, or plain ones for an --encoder)")
        config.add_flags(sub, *MODEL_FLAGS)
        sub.add_argument("--resolution", type=positive, help="pixels a side (default: the recipe's)")
        sub.add_argument("--batch", type=positive, help="images a step (default: the recipe's; out of memory or patience: lower it)")
        return sub

    sub = model(command(step, "time, FLOP/s and memory of a training step, on the first device"))
    sub.add_argument("--peer", choices=("torch", "torch-compile"), help="the same model, weights and batch in PyTorch, in turns with ours")
    sub.add_argument("--repeats", type=positive, default=7, help="timed steps; the median counts (default: 7)")
    sub = model(command(clipa, "what mask and curriculum save, from measured steps"))
    sub.add_argument("--repeats", type=positive, default=2, help="timed steps of each of the four kinds (default: 2)")
    model(command(flops, "FLOPs an image, forward, by formula"))
    return parser.parse_args(argv)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def main(argv: list[str]) -> int:
    args = parse(argv)
    asked = {k: v for k, v in vars(args).items() if k not in ("run", "json") and v is not None}
    try:
        rows = args.run(args)
        print(table(rows))
        if args.json:
            with open(args.json, "w", encoding="utf-8") as f:
                json.dump({"asked": asked, "machine": machine(), "rows": [{k: None if v != v else v for k, v in r.items()} for r in rows]}, f, indent=1)
        return 0
    except ConfigError as problem:
        print(f"error: {problem}", file=sys.stderr)
    except OSError as problem:
        print(f"error: {problem.filename}: {problem.strerror}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

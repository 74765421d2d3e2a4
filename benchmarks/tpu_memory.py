"""Memory of a training step on a TPU pod, without a TPU: the TPU compiler plans every byte.

It compiles train.make_step itself for a described topology, and refuses a step that does not fit,
as it would on the pod. Each compilation takes about a minute. It has its own process, because the
compiler keeps its memory, and a process that has loaded the TPU library searches for TPUs.

    python bench.py memory l14 --resolution 224 --batch 2048 --zero1
"""
import dataclasses
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

import decoder
import layers
import train
import vit
from config import Config
from objectives import registry
from runtime.curriculum import parse_stages
from runtime.devices import shard_axis
from runtime.errors import ConfigError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
GIB = 2**30
CHIP_GIB = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}
USABLE = 0.97  # share of a chip's memory that a program may use
KINDS = ("parameters", "optimizer", "temporaries", "other", "program")


class DoesNotFit(Exception):
    """The step does not fit. The message says how much it needs."""


def num_chips(topology: str) -> int:
    """32 for "v4:4x4x2". ValueError for text that is no topology."""
    match = re.fullmatch(rf"({'|'.join(CHIP_GIB)}):(\d+(?:x\d+){{1,2}})", topology)
    if not match:
        raise ValueError(f"{topology!r} is no topology: write v4:4x4x2 (a v4-64), v5p:2x2x2, "
                         "v5e:4x4 or v6e:2x2")
    return math.prod(int(side) for side in match[2].split("x"))


# ------------------------------------------------------------------------------ compilation
def compiled_memory(cfg: Config, resolution: int, batch: int, topology: str) -> dict[str, float]:
    """Bytes per chip by kind, of the step compiled for that pod in another process. DoesNotFit if
    it does not fit, ConfigError if the compiler fails for another reason."""
    import libtpu
    request = json.dumps({"cfg": dataclasses.asdict(cfg), "resolution": resolution,
                          "batch": batch, "topology": topology})
    # No TPU is used, so other processes may have loaded the library too.
    env = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1",
                        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
                        "TPU_LIBRARY_PATH": libtpu.get_library_path()}
    child = subprocess.run([sys.executable, "-m", "benchmarks.tpu_memory"], input=request,
                           cwd=ROOT, env=env, capture_output=True, text=True)
    match = re.search(r"^RESULT (.*)$", child.stdout, re.M)
    if child.returncode or not match:
        lines = [line for line in child.stderr.splitlines() if line.strip()]
        last_line = lines[-1][:300] if lines else f"exit status {child.returncode}"
        raise ConfigError(f"the TPU compiler ended without an answer: {last_line}")
    result = json.loads(match[1])
    if "does_not_fit" in result:
        raise DoesNotFit(result["does_not_fit"])
    return result


def step_arguments(cfg: Config, optimizer: Any, resolution: int, batch: int,
                   num_devices: int) -> tuple:
    """Shapes and dtypes of one device's (params, opt_state, batch)."""
    def local_shape(x: Any) -> Any:
        axis = shard_axis(x.shape, num_devices) if cfg.zero1 else None
        if axis is None:
            return x
        shape = list(x.shape)
        shape[axis] //= num_devices
        return jax.ShapeDtypeStruct(shape, x.dtype)
    params = jax.eval_shape(lambda: registry.init_params(cfg, registry.model_spec(cfg)))
    opt_state = jax.eval_shape(optimizer.init, jax.tree.map(local_shape, params))
    B = batch // num_devices
    text = jax.ShapeDtypeStruct((B, cfg.max_text_len), np.int32)
    arrays = {"images": jax.ShapeDtypeStruct((B, resolution, resolution, 3), np.uint8),
              "text": text, "position": jax.ShapeDtypeStruct((B,), np.int32)}
    if cfg.alt_field:
        arrays["alt"] = text
    return params, opt_state, arrays


def compile_step(cfg: Config, resolution: int, batch: int, topology: str) -> dict[str, Any]:
    """What `compiled_memory` has another process do: bytes by kind, or {"does_not_fit": why}."""
    from jax.experimental import topologies
    options = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
    pod = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
    devices = list(pod.devices)
    optimizer = train.make_optimizer(cfg, parse_stages(cfg.stages)[0])
    step = train.make_step(registry.model_spec(cfg), optimizer, cfg.seed, cfg.grad_accum, devices,
                           cfg.zero1, cfg.grad_clip)
    local = step_arguments(cfg, optimizer, resolution, batch, len(devices))
    replicated = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((len(devices), *x.shape), x.dtype), local)
    try:
        plan = step.lower(*replicated).compile().memory_analysis()
    except Exception as problem:  # the compiler's errors have no class of their own
        match = (re.search(r"[Uu]sed (\S+) of (\S+) hbm", str(problem))
                 or re.search(r"\((\S+)\) exceeds available HBM \((\S+)\)", str(problem)))
        if not match:
            raise
        return {"does_not_fit": f"needs {match[1]} of {match[2]} per chip"}
    params_bytes, opt_bytes = tree_bytes(local[0]), tree_bytes(local[1])
    arguments = (plan.argument_size_in_bytes + plan.output_size_in_bytes
                 - plan.alias_size_in_bytes)
    return {"parameters": params_bytes, "optimizer": opt_bytes,
            "temporaries": temporaries(plan),
            "other": arguments - params_bytes - opt_bytes,  # the batch, padding, scalars
            "program": plan.generated_code_size_in_bytes}


def temporaries(plan: Any) -> int:
    """HBM that the step takes beside its arguments. Where jax reports it (from 0.12 on), this is
    what the plan allocates less what lives for all of the step. temp_size_in_bytes, which older
    versions have alone, counts more than HBM with some compilers: 22.4 GiB for a step that takes
    14.7."""
    if hasattr(plan, "total_allocation_bytes"):
        return plan.total_allocation_bytes - plan.indefinite_allocations
    return plan.temp_size_in_bytes


def tree_bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


# ---------------------------------------------------------------------------- largest batch
def find_max_batch(needed_bytes: Callable[[int], float | None], batch: int, multiple: int,
                   capacity: float) -> int:
    """The largest batch that fits, to within a sixteenth, as a multiple of `multiple`; 0 if none
    fits. needed_bytes(batch) is None if the batch does not fit. The bytes grow about linearly, so
    two batches that fit predict where `capacity` is reached."""
    def round_down(value: float) -> int:
        return max(multiple, int(value) // multiple * multiple)

    best = round_down(batch)
    best_bytes = needed_bytes(best)
    while best_bytes is None:
        if best == multiple:
            return 0
        best = round_down(best / 2)
        best_bytes = needed_bytes(best)
    too_large = math.inf  # the smallest batch that is known not to fit
    guess = round_down(2 * best)
    while best < guess < too_large:
        guess_bytes = needed_bytes(guess)
        if guess_bytes is None:
            too_large = guess
        else:
            slope = max(guess_bytes - best_bytes, 1) / (guess - best)
            best, best_bytes = guess, guess_bytes
        if too_large - best <= max(multiple, best / 16):
            break
        if too_large < math.inf:
            guess = round_down((best + too_large) / 2)
        else:
            predicted = best + (capacity - best_bytes) / slope
            if predicted < best * 17 / 16:
                break
            guess = round_down(predicted)
    return best


# ------------------------------------------------------------------------------------ table
def recompute_fraction(cfg: Config, resolution: int) -> float:
    """FLOPs that the backward pass computes again (--remat, --loss-chunk, and attention in chunks),
    as a share of the FLOPs of a step that keeps all."""
    enc, dec = registry.model_spec(cfg)[:2]
    num_patches, T = (resolution // enc.patch_size) ** 2, cfg.max_text_len - 1
    num_kept = registry.num_decoder_tokens(registry.model_spec(cfg), num_patches)
    recomputed = 0.0
    parts = (enc, num_patches + enc.cls_token, enc.gated_attention), (dec, num_kept + T, False)
    for part, S, gated in parts:
        attention = part.depth * 4 * S * S * part.width
        fc2 = part.depth * 2 * S * part.width * part.mlp_dim  # no gradient reads its output
        blocks = vit.block_flops(S, part.width, part.mlp_dim, part.depth, gated)
        recomputed += {"none": 0, "dots": attention, "block": blocks - fc2}[cfg.remat]
        if layers.query_chunk_size(S) < S:  # its scores, whatever --remat computes again
            recomputed += attention / 2
    if 0 < cfg.loss_chunk < T:
        recomputed += 2 * T * dec.width * dec.vocab_size
    forward = vit.flops(enc, resolution) + decoder.flops(dec, num_kept, T)
    return recomputed / (3 * forward)


def table_row(cfg: Config, resolution: int, batch: int, topology: str,
              result: dict[str, float] | str) -> dict:
    """result: bytes by kind, or why the step does not fit."""
    row: dict[str, Any] = {
        "model": f"{cfg.encoder}+{cfg.decoder} {resolution} px", "topology": topology,
        "batch": batch, "remat": cfg.remat, "grad accum": cfg.grad_accum,
        "zero1": "yes" if cfg.zero1 else "no"}
    if cfg.objective == registry.METHOD:
        row["recompute"] = f"{recompute_fraction(cfg, resolution):.0%}"
    else:
        row["objective"] = cfg.objective
    if isinstance(result, str):
        return row | {"GiB per chip": result}
    row |= {kind: result[kind] / GIB for kind in KINDS}
    return row | {"GiB per chip": sum(result.values()) / GIB}


def rows(cfg: Config, resolution: int, batch: int, topology: str, search: bool) -> list[dict]:
    """The table of `bench.py memory`: one row, or with `search` a row per batch that was tried, and
    the largest that fits."""
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError("memory needs the TPU compiler: pip install -e '.[tpu]'")
    jax.config.update("jax_platforms", "cpu")  # with libtpu installed, JAX would search for TPUs
    tried: dict[int, dict] = {}
    bar = tqdm(desc="compiling", unit="plan", leave=False, disable=not sys.stderr.isatty())

    def needed_bytes(candidate: int) -> float | None:
        result: dict[str, float] | str
        try:
            result = compiled_memory(cfg, resolution, candidate, topology)
        except DoesNotFit as problem:
            result = str(problem)
        bar.update()
        tried[candidate] = table_row(cfg, resolution, candidate, topology, result)
        return None if isinstance(result, str) else sum(result.values())
    with bar:
        if not search:
            needed_bytes(batch)
            return list(tried.values())
        capacity = CHIP_GIB[topology.partition(":")[0]] * GIB * USABLE
        multiple = 8 * num_chips(topology) * cfg.grad_accum
        best = find_max_batch(needed_bytes, batch, multiple, capacity)
    table = [tried[candidate] for candidate in sorted(tried)]
    return [*table, {"model": "largest that fits", "batch": best}]


if __name__ == "__main__":
    request = json.loads(sys.stdin.read())
    answer = compile_step(Config(**request.pop("cfg")), **request)
    print("\nRESULT " + json.dumps(answer))

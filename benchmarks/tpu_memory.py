"""The memory of a training step on a TPU pod, without a TPU: its compiler plans every byte of a chip, and runs anywhere.

What is compiled is train.make_step itself, for a described topology; a step that does not fit is refused by the compiler,
as it would be there. Each compilation has a process of its own (the compiler keeps what it took, and an interpreter that
has met the TPU library looks for TPUs), and takes about a minute. `python bench.py memory -h` is its command line.

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
import masking
import train
import vit
from config import Config
from objectives import registry
from objectives.registry import init_params
from runtime import curriculum
from runtime.devices import shard_axis
from runtime.errors import ConfigError

GIB = 2**30
CHIPS = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}  # GiB each; a little less is a program's to use
KINDS = ("parameters", "optimizer", "temporaries", "other", "program")


class DoesNotFit(Exception):
    """The step does not fit; the message says what it needs."""


def num_chips(topology: str) -> int:
    """How many chips "v4:4x4x2" has. ValueError for what is no topology."""
    found = re.fullmatch(rf"({'|'.join(CHIPS)}):(\d+(?:x\d+){{1,2}})", topology)
    if not found:
        raise ValueError(f"{topology!r} is no topology: write v4:4x4x2 (a v4-64), v5p:2x2x2, v5e:4x4 or v6e:2x2")
    return math.prod(map(int, found[2].split("x")))


def compiled_memory(cfg: Config, resolution: int, batch: int, topology: str) -> dict[str, float]:
    """Bytes a chip by kind, of the step compiled for that pod, in a process of its own. Refused if it does not fit,
    ConfigError if the compiler fails otherwise."""
    import libtpu
    asked = json.dumps({"cfg": dataclasses.asdict(cfg), "resolution": resolution, "batch": batch, "topology": topology})
    env = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no TPU is touched, so none need be alone
                        "TPU_LIBRARY_PATH": libtpu.get_library_path()}
    child = subprocess.run([sys.executable, "-m", "benchmarks.tpu_memory"], input=asked, cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))), env=env, capture_output=True, text=True)
    found = re.search(r"^RESULT (.*)$", child.stdout, re.M)
    if child.returncode or not found:
        said = [line for line in child.stderr.splitlines() if line.strip()] or [f"exit status {child.returncode}"]
        raise ConfigError(f"the TPU compiler ended without an answer: {said[-1][:300]}")
    result = json.loads(found[1])
    if "refused" in result:
        raise DoesNotFit(result["refused"])
    return result


def compile_here(cfg: Config, resolution: int, batch: int, topology: str) -> dict[str, float]:
    """What `plan` asks a process of its own to do."""
    from jax.experimental import topologies
    kind = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
    devices = list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **kind).devices)
    n = len(devices)
    model = registry.model_spec(cfg)
    optimizer = train.make_optimizer(cfg, curriculum.parse_stages(cfg.stages)[0])
    step = train.make_step(model, optimizer, cfg.seed, cfg.grad_accum, devices, cfg.zero1, cfg.grad_clip)

    def own(x: Any) -> Any:
        at = shard_axis(x.shape, n) if cfg.zero1 else None
        return x if at is None else jax.ShapeDtypeStruct((*x.shape[:at], x.shape[at] // n, *x.shape[at + 1:]), x.dtype)
    params = jax.eval_shape(lambda: init_params(cfg, model))
    state = jax.eval_shape(optimizer.init, jax.tree.map(own, params))
    rows = {"images": ((batch // n, resolution, resolution, 3), np.uint8), "text": ((batch // n, cfg.max_text_len), np.int32),
            "sample_index": ((batch // n,), np.int32)} | ({"alt": ((batch // n, cfg.max_text_len), np.int32)} if cfg.alt_field else {})
    every = jax.tree.map(lambda x: jax.ShapeDtypeStruct((n, *x.shape), x.dtype),
                         (params, state, {k: jax.ShapeDtypeStruct(*v) for k, v in rows.items()}))
    try:
        m = step.lower(*every).compile().memory_analysis()
    except Exception as problem:  # the compiler's own errors have no class of their own
        text = str(problem)
        if not (found := re.search(r"[Uu]sed (\S+) of (\S+) hbm", text)):
            raise
        return {"refused": f"needs {found[1]} of {found[2]} a chip has"}
    held = [sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) for tree in (params, state)]
    other = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes - sum(held)  # the batch, padding, scalars
    return dict(zip(KINDS, (*held, m.temp_size_in_bytes, other, m.generated_code_size_in_bytes)))


def find_max_batch(fits: Callable[[int], float | None], batch: int, grain: int, room: float) -> int:
    """The largest batch that fits, to within a sixteenth, in multiples of grain; 0 if not even one fits. fits(batch) gives the
    bytes it takes, or None if it is refused; they grow about linearly, so two plans tell where `room` ends."""
    def whole(b: float) -> int:
        return max(grain, int(b) // grain * grain)

    low = whole(batch)
    while (at_low := fits(low)) is None:
        if low == grain:
            return 0
        low = whole(low / 2)
    best, at_best, refused = low, at_low, math.inf
    guess = 2 * low
    while (guess := whole(guess)) > best and guess < refused:
        if (need := fits(guess)) is None:
            refused = guess
        else:
            low, at_low, best, at_best = best, at_best, guess, need
        if refused - best <= max(grain, best / 16):
            break
        guess = best + (room - at_best) * (best - low) / max(at_best - at_low, 1) if best > low else 2 * best
        if refused < math.inf:
            guess = (best + refused) / 2
        elif guess < best * 17 / 16:
            break
    return best


def recomputed(cfg: Config, resolution: int) -> float:
    """Forward FLOPs that the backward pass does again, as a share of those of a step that keeps all."""
    enc, dec = registry.model_spec(cfg)[:2]
    N, T = (resolution // enc.patch_size) ** 2, cfg.max_text_len - 1
    K = masking.num_kept_tokens(N, cfg.keep_ratio)
    again = 0.0
    for c, S in ((enc, N + enc.cls_token), (dec, K + T)):
        attention = c.depth * 4 * S * S * c.width
        last = c.depth * 2 * S * c.width * c.mlp_dim  # fc2's output is read by no gradient
        again += {"none": 0, "dots": attention, "block": vit.block_flops(S, c.width, c.mlp_dim, c.depth) - last}[cfg.remat]
    if 0 < cfg.loss_chunk < T:
        again += 2 * T * dec.width * dec.vocab_size
    return again / (3 * (vit.flops(enc, resolution) + decoder.flops(dec, K, T)))


def row(cfg: Config, resolution: int, batch: int, topology: str, found: dict | str) -> dict:
    what = {"recipe": f"{cfg.encoder}+{cfg.decoder} {resolution} px", "pod": topology, "batch": batch, "remat": cfg.remat, "accum": cfg.grad_accum,
            "shard": "yes" if cfg.zero1 else "no"} | ({"computed again": f"{recomputed(cfg, resolution):.0%}"} if cfg.objective == "openvision2" else
                                                      {"objective": cfg.objective})
    if isinstance(found, str):
        return what | {"GiB a chip": found}
    return what | {kind: found[kind] / GIB for kind in KINDS} | {"GiB a chip": sum(found.values()) / GIB}


def rows(cfg: Config, resolution: int, batch: int, topology: str, search: bool) -> list[dict]:
    """The table: one row, or with `search` a row for each batch that was tried and the largest that fits."""
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError("memory needs the TPU compiler: pip install -e '.[plan]'")
    jax.config.update("jax_platforms", "cpu")  # with the TPU library installed this process too would look for TPUs
    tried: dict[int, dict] = {}
    with tqdm(desc="compiling", unit="plan", leave=False, disable=not sys.stderr.isatty()) as bar:
        def fits(b: int) -> float | None:
            try:
                found: dict | str = compiled_memory(cfg, resolution, b, topology)
            except DoesNotFit as problem:
                found = str(problem)
            bar.update()
            tried[b] = row(cfg, resolution, b, topology, found)
            return None if isinstance(found, str) else sum(found.values())
        if not search:
            fits(batch)
            return [*tried.values()]
        room = CHIPS[topology.partition(":")[0]] * GIB * 0.97
        best = find_max_batch(fits, batch, 8 * num_chips(topology) * cfg.grad_accum, room)
    return [*(tried[b] for b in sorted(tried)), {"recipe": "largest that fits", "batch": best}]


if __name__ == "__main__":
    given = json.loads(sys.stdin.read())
    answer = compile_here(Config(**given.pop("cfg")), **given)
    print("\nRESULT " + json.dumps(answer))

"""The paper's ablations on the toy: the effect of each choice on what the encoder's features hold.

A cell of a table is one training of the toy with one thing changed. Its frozen encoder is then
evaluated as by evaluate.py: by linear probes, and by questions that a small language model answers.
Figures go to results/ablations.json as each cell ends. So an interrupted command resumes, and the
tables of docs/results.md are made from that file alone (benchmarks/ablation_tables.py).

`python bench.py ablate -h` is the command line.
"""
import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from benchmarks import ablation_tables
from benchmarks.ablation_tables import BASELINES, LENGTHS, ROOT, TABLES, load, store
from config import RECIPES, Config, flag
from evaluation import labels, probe, vqa
from interop.encoder import Encoder, load_encoder, random_encoder, raw_pixel_encoder
from objectives import registry
from runtime.cpu_tuning import keep_freed_memory
from runtime.curriculum import parse_stages
from runtime.errors import ConfigError

BASE = dataclasses.replace(  # as released: without text positions, so that it takes longer
    RECIPES["toy"], text_pos_embed=False,
    stages="resolution=24 steps=300 batch=32 lr=2e-3 warmup=100, "
           "resolution=32 steps=2200 batch=32 lr=2.5e-3 warmup=20")
READER_STEPS = 800  # training steps of the small language model
RECIPE = f"{BASE.stages}; a reader of {READER_STEPS} steps"  # all figures of a file share it
ONE_STAGE = "resolution=32 steps=2500 batch=32 lr=2.5e-3 warmup=100"  # as many images, all at 32 px
RIVALS = {"clip": {"objective": "clip"}, "siglip": {"objective": "siglip"},
          "openvision": {"objective": "openvision", "alt_field": "web"},
          "cappa": {"objective": "cappa"}, "aimv2": {"objective": "aimv2"},
          "genlip": {"objective": "genlip", "gated_attention": True},
          "genlip-ungated": {"objective": "genlip"}}
KEEP = {"base": {}, **{f"keep-{percent}": {"keep_ratio": percent / 100}
                       for percent in (100, 50, 25, 10)}}
CELLS: dict[str, dict[str, Any]] = {  # the settings in which a cell differs from BASE
    **KEEP,
    **{f"captions-{kind}": {"caption_field": kind} for kind in ("web", "conditioned")},
    "one-stage": {"stages": ONE_STAGE},
    "one-stage-all": {"stages": ONE_STAGE, "keep_ratio": 1.0},
    "openvision": RIVALS["openvision"],
    **{f"{name}-time": changes for name, changes in RIVALS.items()},  # trained as long as base
    "prefix-both": {"prefix_attention": "bidirectional"},
    "shuffled": {"shuffle_kept": True},
    "positions": {"text_pos_embed": True},
}
TIMED = [*RIVALS, *(cell for cell in CELLS if not cell.endswith("-time"))]
CELLS |= {f"{cell}-{length}": CELLS[cell] for cell in (*KEEP, "captions-conditioned")
          for length in LENGTHS}


def settings(cell: str, costs: dict) -> Config:
    """The Config of a cell. A LENGTH or, for equal time, the measured costs scale its steps and
    warm-ups."""
    cfg = dataclasses.replace(BASE, eval_every=10**6, **(RIVALS | CELLS)[cell])
    name, _, ending = cell.rpartition("-")
    if ending == "time":
        scale = costs["base"]["seconds"] / costs[name]["seconds"]
    elif ending in LENGTHS:
        scale = LENGTHS[ending]
    else:
        return cfg

    def scaled(match: re.Match) -> str:
        return f"{match[1]}={round(int(match[2]) * scale)}"
    return dataclasses.replace(cfg, stages=re.sub(r"(steps|warmup)=(\d+)", scaled, cfg.stages))


# --------------------------------------------------------------------------- train, evaluate
def flags(cfg: Config) -> list[str]:
    """The command line that makes this Config from the toy."""
    words = []
    for field in dataclasses.fields(Config):
        value = getattr(cfg, field.name)
        if value == getattr(RECIPES["toy"], field.name):
            continue
        if isinstance(value, bool):
            words.append(flag(field.name if value else f"no_{field.name}"))
        else:
            words += [flag(field.name), str(value)]
    return words


def train(cfg: Config, log: str) -> None:
    """Trains in another process, whose output goes to `log`. ConfigError with its last line if it
    fails. A finished run is left as it is; a folder with other settings is refused."""
    command = [sys.executable, os.path.join(ROOT, "train.py"), *flags(cfg)]
    with open(log, "ab") as f:
        status = subprocess.run(command, stdout=f, stderr=f).returncode
    if status:
        with open(log, encoding="utf-8", errors="replace") as f:
            lines = f.read().strip().splitlines()
        last_line = lines[-1][:300] if lines else ""
        raise ConfigError(f"{' '.join(command)} ended with status {status} ({last_line}); its "
                          f"output is in {log}")


def evaluate(encoder: Encoder, seed: int) -> dict[str, float]:
    """Accuracy on questions, by kind and as a mean, and of attention-pooled linear probes."""
    answers = vqa.measure(encoder, seed, READER_STEPS, name="questions")
    train_set = labels.scene_images(seed, "train", 4000)
    val_set = labels.scene_images(seed, "val", 1000)
    probes = probe.measure(encoder, train_set, val_set, ("attended",), baselines=False,
                           seed=seed)["attended"]
    figures = {"answers": answers.pop("all"), **answers}
    figures |= {f"probe {label}": accuracy for label, accuracy in probes.items()}
    return figures | {"probe": statistics.mean(probes.values())}


def train_and_evaluate(cell: str, seed: int, folder: str, costs: dict) -> dict[str, float]:
    """Figures of one cell and seed, from its run, which is trained or finished first."""
    if cell in BASELINES:
        resolution = parse_stages(BASE.stages)[-1].resolution
        shape = Encoder({}, registry.model_spec(BASE).encoder, resolution)
        if cell == "pixels":
            return evaluate(raw_pixel_encoder(shape), seed)
        return evaluate(random_encoder(shape, seed), seed)
    workdir = os.path.join(folder, f"{cell}-{seed}")
    cfg = dataclasses.replace(settings(cell, costs), seed=seed, workdir=workdir)
    train(cfg, f"{workdir}.log")
    with open(os.path.join(workdir, "summary.json"), encoding="utf-8") as f:
        summary = json.load(f)
    figures = evaluate(load_encoder(workdir), seed) | {"images": summary["images_seen"]}
    for name in ("object_accuracy", "val_loss", "val_loss_blind"):
        if name in summary:
            figures[name] = summary[name]
    return figures


def rows(names: list[str], seeds: int, folder: str, show: bool,
         measure_costs: Callable) -> list[dict]:
    """Runs what the tables of these names lack, updates docs/results.md and its plot, and returns
    the tables. With `show` only the last. measure_costs: that of step_time."""
    names = names or list(TABLES)
    if not show:
        run_missing(names, seeds, folder, measure_costs)
    results, table = load(), []
    for name in names:
        for cell, title in (TABLES[name].rows | BASELINES).items():
            row = {"table": name, "cell": title, "seeds": len(results["cells"].get(cell, {}))}
            for column in TABLES[name].columns:
                values = ablation_tables.figures_of(results, cell, column)
                row[column] = statistics.mean(values) if values else None
            table.append(row)
    return table


def run_missing(names: list[str], seeds: int, folder: str, measure_costs: Callable) -> None:
    results = load()
    if results.setdefault("recipe", RECIPE) != RECIPE:
        raise ConfigError(f"{ablation_tables.RESULTS} was made with another recipe "
                          f"({results['recipe']}): move it and the runs in {folder} away to start "
                          "again")
    if any(cell not in results["costs"] for cell in TIMED):
        results |= measure_costs({cell: settings(cell, {}) for cell in TIMED})
        store(results)
    os.makedirs(folder, exist_ok=True)
    keep_freed_memory()
    ablation_tables.write(results)  # there may be new costs, or a run stopped before this
    wanted = {"base", *BASELINES}
    for name in names:
        wanted.update(TABLES[name].rows)
    order = ["base", *BASELINES, *CELLS]
    for seed in range(seeds):
        missing = [cell for cell in dict.fromkeys(order)
                   if cell in wanted and str(seed) not in results["cells"].get(cell, {})]
        for cell in tqdm(missing, desc=f"seed {seed}", unit="cells", dynamic_ncols=True):
            figures = train_and_evaluate(cell, seed, folder, results["costs"])
            results = load()
            results["cells"].setdefault(cell, {})[str(seed)] = figures
            store(results)
            ablation_tables.write(results)

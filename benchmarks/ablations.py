"""The paper's ablations, at a size that anyone can rerun: what each choice does to what others can read from the encoder.

A cell is one training of the toy with one thing changed, and one seed; it is a run like any other, in a folder of its own. Its frozen
encoder is then read as evaluate.py does: by linear probes, and by questions that a small language model answers. Figures go to
results/ablations.json as each cell ends: so what is stopped goes on, and the tables in docs/results.md are made from that file alone.

`python bench.py ablate -h` is the command line.
"""
import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
from typing import Any, NamedTuple

from tqdm import tqdm

from benchmarks import step_time
from config import RECIPES, Config
from evaluation import labels, probe, vqa
from interop.encoder import Encoder, load_encoder, random_encoder, raw_pixel_encoder
from runtime import checkpoint, curriculum, plots
from runtime.errors import ConfigError

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RESULTS, TEXT, PLOT = (os.path.join(HERE, *x) for x in (("results", "ablations.json"), ("docs", "results.md"), ("docs", "ablations.png")))
# Two thirds of the toy's steps: by then what learns faster is ahead, and what learns slower has not caught up; and the night is short.
# The recipe of the committed figures: 8-pixel patches.
TOY = dataclasses.replace(RECIPES["toy"], encoder="micro/8", stages="resolution=24 steps=250 batch=64 lr=2e-3 warmup=100, resolution=32 steps=550 batch=64 lr=2e-3 warmup=20")
READER_STEPS = 800  # of the small language model that is asked
RECIPE = f"{TOY.stages}; a reader of {READER_STEPS} steps"  # figures of another one do not go into the same table
ONE_STAGE = f"resolution=32 steps={sum(s.steps for s in curriculum.parse_stages(TOY.stages))} batch=64 lr=2e-3 warmup=100"  # as many images, all at 32 px
RIVALS = {"clip": {"objective": "clip"}, "openvision": {"objective": "openvision", "alt_field": "web"},
          "cappa": {"objective": "cappa"}, "aimv2": {"objective": "aimv2"}}
CELLS: dict[str, dict[str, Any]] = {  # name: what differs from the toy
    "base": {},
    **{f"keep-{share}": {"keep_ratio": share / 100} for share in (100, 90, 75, 50, 25, 10)},
    **{f"captions-{kind}": {"caption_field": kind} for kind in ("web", "conditioned")},
    "one-stage": {"stages": ONE_STAGE}, "one-stage-all": {"stages": ONE_STAGE, "keep_ratio": 1.0},
    **RIVALS, **{f"{name}-time": changes for name, changes in RIVALS.items()},  # the latter as long as the base takes
    "prefix-both": {"prefix_attention": "bidirectional"}, "shuffled": {"shuffle_kept": True}, "positions": {"text_pos_embed": True},
}
BASELINES = {"pixels": "raw pixels", "random": "encoder with random parameters"}  # what any encoder must beat
COSTS = ("seconds", "GFLOPs", "MiB")  # measured once for each cell, not once a seed


class Table(NamedTuple):
    title: str
    rows: dict[str, str]  # cell: how the table calls it
    columns: tuple[str, ...]


READ = ("all", "color", "shape", "size", "place", "relation", "count", "word", "presence")  # kinds of question, and their mean
QUALITY = (*READ, "probe")
OLD_NAMES = {"colour": "color", "probe colour": "probe color", "probe tone": "probe background_color"}  # of figures, in earlier results
TABLES = {
    "keep": Table("Share of patch tokens kept (the paper's Table 7), equal images",
                  {"keep-100": "100%", "keep-90": "90%", "keep-75": "75%", "keep-50": "50%", "base": "35%", "keep-25": "25%", "keep-10": "10%"},
                  (*QUALITY, "told", "seconds")),
    "captions": Table("Kind of caption (Table 6), equal images",
                      {"captions-web": "alt text", "base": "dense", "captions-conditioned": "dense, conditioned on alt text"}, QUALITY),
    "curriculum": Table("Mask and curriculum (Table 5), equal images",
                        {"one-stage-all": "neither", "one-stage": "mask", "keep-100": "curriculum", "base": "both"}, (*QUALITY, "told", "seconds")),
    "predecessor": Table("OpenVision and OpenVision 2 (Tables 3 and 4), equal images",
                         {"openvision": "OpenVision", "base": "OpenVision 2"}, (*QUALITY, "seconds", "GFLOPs", "MiB")),
    "objectives": Table("Objectives, equal images",
                        {"base": "OpenVision 2", "openvision": "OpenVision", "clip": "CLIP", "cappa": "CapPa", "aimv2": "AIMv2"}, (*QUALITY, "seconds")),
    "time": Table("Objectives, equal time",
                  {"base": "OpenVision 2", "openvision-time": "OpenVision", "clip-time": "CLIP", "cappa-time": "CapPa", "aimv2-time": "AIMv2"},
                  (*QUALITY, "images")),
    "open": Table("What the paper leaves open, equal images",
                  {"base": "causal prefix, kept tokens in order, no positions for words", "prefix-both": "bidirectional prefix",
                   "shuffled": "kept tokens shuffled", "positions": "words with sin-cos positions"}, (*QUALITY, "told")),
}


def load(path: str = RESULTS) -> dict:
    """{"cells": {cell: {seed: figures}}, "costs": {cell: figures}, "machine": ...} as far as there is any. ConfigError for a damaged file."""
    try:
        with open(path, encoding="utf-8") as f:
            found = json.load(f)
        if not isinstance(found, dict) or not all(isinstance(found.get(k), dict) for k in ("cells", "costs")):
            raise ValueError("it is no table of cells")
        for seeds in found["cells"].values():
            for seed, figures in seeds.items():
                seeds[seed] = {OLD_NAMES.get(name, name): value for name, value in figures.items()}
        return found
    except FileNotFoundError:
        return {"machine": "", "costs": {}, "cells": {}}
    except (OSError, ValueError) as problem:
        raise ConfigError(f"{path} cannot be read ({problem}): mend it, or move it away to start anew") from None


def store(found: dict, path: str = RESULTS) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    checkpoint.atomic_write(path, lambda f: f.write((checkpoint.to_json(found, indent=1, sort_keys=True) + "\n").encode()))


def settings(cell: str, costs: dict) -> Config:
    """The run of a cell. One of equal time has its stages' steps and warm-ups scaled by what its step costs, as measured."""
    cfg = dataclasses.replace(TOY, eval_every=10**6, **CELLS[cell])
    if cell.endswith("-time"):
        scale = costs["base"]["seconds"] / costs[cell.removesuffix("-time")]["seconds"]
        cfg = dataclasses.replace(cfg, stages=re.sub(r"(steps|warmup)=(\d+)", lambda m: f"{m[1]}={round(int(m[2]) * scale)}", cfg.stages))
    return cfg


def measure_costs(cells: list[str], repeats: int = 15) -> dict[str, dict[str, float]]:
    """{cell: {seconds of its whole training by the median step, GFLOPs of a step's image, MiB}}, all cells' steps in turns."""
    costs: dict[str, dict[str, float]] = {}
    stages = {(cell, s.number): s for cell in cells for s in curriculum.parse_stages(settings(cell, {}).stages)}
    runs, parallel = {}, step_time.one_machine([settings(cell, {}) for cell, _ in stages], [s.batch for s in stages.values()])
    for cell, number in tqdm(stages, desc="compiling steps", leave=False, disable=not sys.stderr.isatty()):
        s = stages[cell, number]
        runs[cell, number] = step_time.JaxStep(dataclasses.replace(settings(cell, {}), stages=f"resolution={s.resolution} steps=9 batch={s.batch} lr=1e-3"),
                                             s.resolution, s.batch, parallel)
    for run in runs.values():
        run()
    for (cell, number), seconds in step_time.time_interleaved(runs, repeats, "steps").items():
        s, run = stages[cell, number], runs[cell, number]
        cost = costs.setdefault(cell, {"seconds": 0.0})
        cost["seconds"] += s.steps * statistics.median(seconds)
        cost |= {"GFLOPs": step_time.model_flops(settings(cell, {}), s.resolution) / 1e9, "MiB": run.memory() / 2**20}  # of the last stage
    return costs


def flags(cfg: Config) -> list[str]:
    """The command line that makes this config of the toy."""
    toy = RECIPES["toy"]
    changed = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(Config) if getattr(cfg, f.name) != getattr(toy, f.name)}
    return [x for name, value in changed.items() for x in
            ([f"--{name.replace('_', '-')}"] if value is True else [f"--{name.replace('_', '-')}", str(value)])]


def train(cfg: Config, log: str) -> None:
    """A run in a process of its own, its words in a log. ConfigError with the last of them where it fails."""
    command = [sys.executable, os.path.join(HERE, "train.py"), *flags(cfg)]
    with open(log, "ab") as f:
        code = subprocess.run(command, stdout=f, stderr=f).returncode
    if code:
        with open(log, encoding="utf-8", errors="replace") as f:
            last = (f.read().strip().splitlines() or [""])[-1]
        raise ConfigError(f"{' '.join(command)} ended with status {code} ({last[:300]}); {log} has its words")


def read(encoder: Encoder, seed: int) -> dict[str, float]:
    """What others can read from an encoder: answers right by kind of question, and the mean of what linear probes find."""
    asked = vqa.measure(encoder, seed, READER_STEPS, name="questions")
    train, test = (labels.scene_images(seed, *part) for part in (("train", 4000), ("val", 1000)))
    probed = probe.measure(encoder, train, test, ("attended",), baselines=False, seed=seed)["attended"]
    return asked | {"probe": statistics.mean(probed.values())} | {f"probe {k}": v for k, v in probed.items()}


def train_and_read(cell: str, seed: int, folder: str, costs: dict) -> dict[str, float]:
    """Figures of one cell and seed, from its run (made or finished first, if need be) and from reading its encoder."""
    if cell in BASELINES:  # of the base's shape
        like = load_encoder(os.path.join(folder, f"base-{seed}"))
        return read(raw_pixel_encoder(like) if cell == "pixels" else random_encoder(like, seed), seed)
    out = os.path.join(folder, f"{cell}-{seed}")
    train(dataclasses.replace(settings(cell, costs), seed=seed, workdir=out), f"{out}.log")  # which refuses a folder of other settings, and leaves a finished run
    with open(os.path.join(out, "summary.json"), encoding="utf-8") as f:
        summary = json.load(f)
    told = {"told": summary["object_accuracy"]} if "object_accuracy" in summary else {}
    return read(load_encoder(out), seed) | told | {"images": summary["images_seen"], "held-out loss": summary["val_loss"], "floor": summary["val_loss_blind"]}


def figure(found: dict, cell: str, column: str) -> list[float]:
    """A column's figures of a cell, one per seed, as far as they are there and known (null in the file: not known)."""
    seeds = {"": found["costs"].get(cell, {})} if column in COSTS else found["cells"].get(cell, {})
    return [figures[column] for _, figures in sorted(seeds.items()) if figures.get(column) is not None]


def cell_text(values: list[float], column: str) -> str:
    """Mean and spread (standard deviation over seeds) as a table shows them."""
    if not values:
        return "–"
    if column in COSTS or column == "images":
        return f"{values[0]:,.0f}" if values[0] >= 100 else f"{values[0]:.2f}"
    return f"{100 * statistics.mean(values):.1f}" + (f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else "")


def markdown(found: dict, name: str) -> str:
    """A table in Markdown, with the baselines at its end; "–" where there is no figure yet."""
    table = TABLES[name]
    rows = table.rows | BASELINES
    seeds = [len(found["cells"].get(cell, {})) for cell in table.rows]
    lines = [f"| {table.title} | " + " | ".join(table.columns) + " |", "|---" * (len(table.columns) + 1) + "|"]
    lines += [f"| {title} | " + " | ".join(cell_text(figure(found, cell, c), c) for c in table.columns) + " |" for cell, title in rows.items()]
    return "\n".join(lines) + f"\n\nSeeds a cell: {min(seeds)}" + (f" to {max(seeds)}" if max(seeds) > min(seeds) else "") + ".\n"


def rewritten(text: str, found: dict) -> str:
    """docs/results.md with each table between its marks made anew. ConfigError where a mark is missing."""
    for name in TABLES:
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        if begin not in text or end not in text:
            raise ConfigError(f"{TEXT} lacks the mark {begin.strip()} or {end}: put both back where the table belongs")
        text = text[:text.index(begin) + len(begin)] + markdown(found, name) + text[text.index(end):]
    return text


def draw(found: dict, path: str) -> None:
    """Answers right against the share of patch tokens kept, a line a kind of question."""
    by_share = sorted((CELLS[cell].get("keep_ratio", TOY.keep_ratio), cell) for cell in TABLES["keep"].rows if found["cells"].get(cell))
    lines = {}
    for kind in ("all", "word", "count", "shape", "presence", "probe"):
        known = [(100 * share, values) for share, cell in by_share if (values := figure(found, cell, kind))]
        lines[kind] = [share for share, _ in known], [100 * statistics.mean(values) for _, values in known], True
    if by_share:
        plots.line_chart(lines, {}, {}, "patch tokens kept (%)", "right (%)", names_below=True).save(path)


def rows(names: list[str], seeds: int, folder: str, show: bool) -> list[dict]:
    """Fills the tables of these names, or shows them as they are, and returns them; docs/results.md and its plot follow."""
    names = names or list(TABLES)
    found = load()
    if not show:
        if found.setdefault("recipe", RECIPE) != RECIPE:
            raise ConfigError(f"{RESULTS} was made by another recipe ({found['recipe']}): move it away, and the runs in {folder}, to start anew")
        wanted = [cell for cell in CELLS if any(cell in TABLES[name].rows for name in names)]
        plain = [cell for cell in CELLS if not cell.endswith("-time")]
        if any(cell not in found["costs"] for cell in plain):
            found["costs"], found["machine"] = measure_costs(plain), step_time.machine()
            store(found)
        todo = [(cell, seed) for seed in range(seeds) for cell in dict.fromkeys(["base", *BASELINES, *wanted]) if str(seed) not in found["cells"].get(cell, {})]
        os.makedirs(folder, exist_ok=True)
        write(found)  # of new costs, or where a former start ended between figures and tables
        for cell, seed in (bar := tqdm(todo, unit="cells", dynamic_ncols=True)):
            bar.set_description(f"{cell}, seed {seed}")
            figures = train_and_read(cell, seed, folder, found["costs"])
            found = load()
            found["cells"].setdefault(cell, {})[str(seed)] = figures
            store(found)
            write(found)
    return [{"table": name, "what": title, "seeds": len(found["cells"].get(cell, {}))}
            | {c: statistics.mean(figure(found, cell, c)) if figure(found, cell, c) else None for c in TABLES[name].columns}
            for name in names for cell, title in (TABLES[name].rows | BASELINES).items()]


def write(found: dict) -> None:
    with open(TEXT, encoding="utf-8") as f:
        text = f.read()
    checkpoint.atomic_write(TEXT, lambda f: f.write(rewritten(text, found).encode()))
    draw(found, PLOT)

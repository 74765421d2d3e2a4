"""The tables and the plot of docs/results.md, from results/ablations.json.

That file holds {"cells": {cell: {seed: figures}}, "costs": {cell: figures}, "machine", "recipe"}.
The cells are described in benchmarks/ablations.py.
"""
import json
import os
import statistics
from typing import NamedTuple

from runtime import checkpoint, plots
from runtime.errors import ConfigError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RESULTS = os.path.join(ROOT, "results", "ablations.json")
TEXT = os.path.join(ROOT, "docs", "results.md")
PLOT = os.path.join(ROOT, "docs", "ablations.png")
COSTS = ("seconds", "GFLOPs", "MiB")  # measured per cell, not per seed
LENGTH_PLOT = os.path.join(ROOT, "docs", "ablations-length.png")
LENGTHS = {"third": 1 / 3, "double": 2.0, "sixfold": 6.0}  # endings of cells: times the toy's steps
BASELINES = {"pixels": "raw pixels", "random": "encoder with random parameters"}


class Table(NamedTuple):
    title: str
    rows: dict[str, str]      # cell: its title
    columns: tuple[str, ...]


ACCURACY = ("answers", "color", "shape", "size", "place", "relation", "count", "word", "presence",
            "probe")
SHARES = {"keep-100": "100%", "keep-50": "50%", "base": "35%", "keep-25": "25%", "keep-10": "10%"}


ENDINGS = {  # of cells at all lengths, the shortest first: what their titles add
    "-third": ", a third as long", "": "", "-double": ", twice as long",
    "-sixfold": ", six times as long"}


def at_all_lengths(rows: dict[str, str]) -> dict[str, str]:
    """The rows of a table for each length of training."""
    table = {}
    for ending, words in ENDINGS.items():
        table |= {cell + ending: title + words for cell, title in rows.items()}
    return table


TABLES = {
    "keep": Table("Share of patch tokens kept (Table 7), equal images", SHARES,
                  (*ACCURACY, "object_accuracy", "seconds")),
    "length": Table("Share of patch tokens kept, and how long it trains", at_all_lengths(SHARES),
                    ("answers", "shape", "relation", "word", "presence", "probe",
                     "object_accuracy", "images", "seconds")),
    "captions": Table(
        "Kind of caption (Table 6), equal images",
        {"captions-web": "alt text", "base": "dense",
         "captions-conditioned": "dense, conditioned on alt text"}, ACCURACY),
    "conditioned": Table(
        "Kind of caption, and how long it trains",
        at_all_lengths({"base": "dense", "captions-conditioned": "conditioned"}),
        (*ACCURACY, "images")),
    "curriculum": Table(
        "Mask and curriculum (Table 5), equal images",
        {"one-stage-all": "neither", "one-stage": "mask", "keep-100": "curriculum",
         "base": "both"}, (*ACCURACY, "object_accuracy", "seconds")),
    "predecessor": Table(
        "OpenVision and OpenVision 2 (Tables 3 and 4), equal images",
        {"openvision": "OpenVision", "base": "OpenVision 2"}, (*ACCURACY, *COSTS)),
    "time": Table(
        "Objectives, equal time",
        {"base": "OpenVision 2", "openvision-time": "OpenVision", "clip-time": "CLIP",
         "siglip-time": "SigLIP", "cappa-time": "CapPa", "aimv2-time": "AIMv2",
         "genlip-time": "GenLIP", "genlip-ungated-time": "GenLIP without its gate"},
        (*ACCURACY, "images")),
    "open": Table(
        "What the paper leaves open, equal images",
        {"base": "causal prefix, kept tokens in order, no text positions",
         "prefix-both": "bidirectional prefix", "shuffled": "kept tokens shuffled",
         "positions": "sin-cos text positions"}, (*ACCURACY, "object_accuracy")),
}


# ------------------------------------------------------------------------------- the figures
def load(path: str = "") -> dict:
    """What the file (RESULTS) holds; no cells if there is none. ConfigError if it is damaged."""
    path = path or RESULTS
    try:
        with open(path, encoding="utf-8") as f:
            results = json.load(f)
        if not isinstance(results, dict):
            raise ValueError("it is no table of cells")
        if not isinstance(results.get("cells"), dict) or not isinstance(results.get("costs"), dict):
            raise ValueError("it is no table of cells")
    except FileNotFoundError:
        return {"machine": "", "costs": {}, "cells": {}}
    except (OSError, ValueError) as problem:
        raise ConfigError(f"{path} cannot be read ({problem}): repair it, or move it away to start "
                          "again") from None
    return results


def store(results: dict) -> None:
    text = checkpoint.to_json(results, indent=1, sort_keys=True) + "\n"
    os.makedirs(os.path.dirname(RESULTS), exist_ok=True)
    checkpoint.atomic_write(RESULTS, lambda f: f.write(text.encode()))


def figures_of(results: dict, cell: str, column: str) -> list[float]:
    """A column's figures of a cell, one per seed that has it (null in the file: not known)."""
    if column in COSTS:
        name, _, ending = cell.rpartition("-")
        if column == "seconds" and ending in LENGTHS and name in results["costs"]:
            return [LENGTHS[ending] * results["costs"][name][column]]
        by_seed = {"": results["costs"].get(cell, {})}
    else:
        by_seed = results["cells"].get(cell, {})
    values = [figures.get(column) for _, figures in sorted(by_seed.items())]
    return [value for value in values if value is not None]


# ------------------------------------------------------------------------------ the document
def cell_text(values: list[float], column: str) -> str:
    """Mean ± standard deviation over the seeds, in percent; a cost or a count as it is."""
    if not values:
        return "–"
    if column in COSTS or column == "images":
        return f"{values[0]:,.0f}" if values[0] >= 100 else f"{values[0]:.2f}"
    mean = f"{100 * statistics.mean(values):.1f}"
    return f"{mean} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else mean


def markdown(results: dict, name: str) -> str:
    """A table in Markdown, the baselines last; "–" where there is no figure. A row without any
    cell is left out, and so is a table with nothing to compare."""
    table = TABLES[name]
    header = [table.title, *(column.replace("_", " ") for column in table.columns)]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    rows = {cell: title for cell, title in (table.rows | BASELINES).items()
            if cell in results["cells"]}
    if len(rows.keys() & table.rows.keys()) < 2:
        return f"Not measured yet: `python bench.py ablate {name}`.\n"
    for cell, title in rows.items():
        texts = [cell_text(figures_of(results, cell, column), column) for column in table.columns]
        lines.append("| " + " | ".join([title, *texts]) + " |")
    seeds = [len(results["cells"][cell]) for cell in rows]
    count = f"{min(seeds)}" if min(seeds) == max(seeds) else f"{min(seeds)} to {max(seeds)}"
    return "\n".join(lines) + f"\n\nSeeds per cell: {count}.\n"


def update_text(text: str, results: dict) -> str:
    """docs/results.md with each table between its marks made again. ConfigError if a mark is
    missing."""
    for name in TABLES:
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, _, rest = text.partition(begin)
        _, end_mark, after = rest.partition(end)
        if not end_mark:
            raise ConfigError(f"{TEXT} lacks the mark {begin.strip()} or {end}: put both back "
                              "where the table belongs")
        text = before + begin + markdown(results, name) + end + after
    return text


def draw(results: dict, path: str) -> None:
    """Accuracy against the share of patch tokens kept, one line per kind of question."""
    percent_of = {cell: float(title.rstrip("%")) for cell, title in SHARES.items()}
    lines = {}
    for kind in ("answers", "word", "count", "shape", "presence", "probe"):
        percents, accuracies = [], []
        for cell, percent in sorted(percent_of.items(), key=lambda item: item[1]):
            values = figures_of(results, cell, kind)
            if values:
                percents.append(percent)
                accuracies.append(100 * statistics.mean(values))
        lines[kind] = percents, accuracies, True
    if any(percents for percents, _, _ in lines.values()):
        chart = plots.line_chart(lines, {}, {}, "patch tokens kept (%)", "accuracy (%)",
                                 names_below=True)
        chart.save(path)


def draw_lengths(results: dict, path: str) -> None:
    """Answers against images and, below, against seconds of training, one line per share kept."""
    charts = []
    for column, label in (("images", "images seen"), ("seconds", "seconds of training")):
        lines = {}
        for share, title in SHARES.items():
            points = []
            for ending in ENDINGS:
                answers = figures_of(results, share + ending, "answers")
                amounts = figures_of(results, share + ending, column)
                if answers and amounts:
                    points.append((amounts[0], 100 * statistics.mean(answers)))
            lines[f"{title} kept"] = [x for x, _ in points], [y for _, y in points], True
        charts.append(plots.line_chart(lines, {}, {}, label, "answers (%)", names_below=True))
    if results["cells"]:
        plots.stack_vertically(charts).save(path)


def write(results: dict) -> None:
    """Updates docs/results.md and its plots."""
    with open(TEXT, encoding="utf-8") as f:
        text = update_text(f.read(), results)
    checkpoint.atomic_write(TEXT, lambda f: f.write(text.encode()))
    draw(results, PLOT)
    draw_lengths(results, LENGTH_PLOT)

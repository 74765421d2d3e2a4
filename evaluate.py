"""Does it see? Held-out loss, the loss without the picture, and captions graded against what is there.

A captioner lowers its loss a good way without looking, by knowing how captions go. So each figure stands beside a
floor, the loss that can be had without the picture: for `scenes` the exact entropy of the captions (scenes.surprise),
for other data the lowest loss that the run has reached on pictures that were shuffled among the captions. "It sees"
means a held-out loss clearly below the floor.

Letters: B images, K kept patches, T text positions.

    python evaluate.py RUN                                        measures the last checkpoint of a run again, on its held-out pictures
    python evaluate.py ENCODER probe knn vqa zeroshot pictures    what can be read from its features (evaluation/probe.py, evaluation/vqa.py), said (evaluation/zeroshot.py) and seen (evaluation/visualize.py)
"""
import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

import train
from evaluation import probe, vqa, zeroshot
from evaluation.captioning import evaluate_captions
from evaluation.context import EvalContext
from evaluation.visualize import draw_all
from inputs import images, sources
from runtime import checkpoint
from runtime.cpu_tuning import enable_compilation_cache, tune_cpu
from runtime.errors import (
    BadSample,
    CheckpointError,
    ConfigError,
    ConvertError,
    DataError,
    LayoutError,
)


def probes(readers: tuple[str, ...]) -> Callable[[EvalContext], dict]:
    return lambda asked: probe.measure(asked.encoder, *asked.pictures, readers, seed=asked.given.seed)


def zero_shot(asked: EvalContext) -> dict[str, Any]:
    captioner, (_, held) = asked.captioner, asked.pictures
    rows = np.sort(sources.draw_indices(len(held), asked.given.num_samples or 200))
    sentences, truth = zeroshot.classes(held, rows, asked.given.classnames, asked.given.template)
    known = truth >= 0
    return zeroshot.measure(captioner, held.features(asked.encoder).tokens[rows[known]], sentences, truth[known], seed=asked.given.seed)


def draw_images(asked: EvalContext) -> dict[str, str]:
    path, (_, held) = asked.given.encoder, asked.pictures
    folder = asked.given.out or (path if os.path.isdir(path) else os.path.dirname(path) or ".")
    try:
        captioner = asked.captioner
    except CheckpointError as problem:
        print(f"words.png is left out: {problem}")
        captioner = None
    return {os.path.basename(p): p for p in draw_all(asked.encoder, held.pixels(asked.encoder.resolution)[:12], folder, captioner)}


MEASURES: dict[str, tuple[Callable[[EvalContext], dict], str]] = {
    "caption": (lambda asked: evaluate_captions(asked.given.encoder, asked.changes, asked.given.num_samples, train.openvision2_loss),
                "held-out loss, floor and graded captions of a run (if nothing is named)"),
    "probe": (probes(("pooled", "grid", "attended")), "linear and attention-pooled probes of the features, beside a random encoder and raw pixels"),
    "knn": (probes(("neighbours", "whitened")), "nearest neighbours by features, likewise"),
    "zeroshot": (zero_shot, "classes told by the likelihood of their sentences; needs a run"),
    "vqa": (lambda asked: vqa.table(asked.encoder, asked.given.seed), "questions about scenes, answered by a small language model that reads the features"),
    "pictures": (draw_images, "pca.png, attention.png and, of a run, words.png"),
}


def format_result(name: str, found: dict[str, Any]) -> str:
    """Rows as a table of percentages, or as json what has none."""
    if not all(isinstance(row, dict) for row in found.values()):
        return checkpoint.to_json(found if name == "caption" else {name: found}, indent=1)
    columns = list(dict.fromkeys(column for row in found.values() for column in row))
    rows = {f"{name}, % right": {c: c for c in columns}} | {row: {c: f"{100 * share:.1f}" for c, share in cells.items()} for row, cells in found.items()}
    return "\n".join(f"{row:20}" + "".join(f"{cells.get(c, '–'):>{max(len(c), 5) + 2}}" for c in columns) for row, cells in rows.items())


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="evaluate.py", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     description="Does it see?\n\nmeasures:\n" + "\n".join(f"  {name:10} {text}" for name, (_, text) in MEASURES.items()))
    parser.add_argument("encoder", metavar="ENCODER", help="a run's folder, a checkpoint, an encoder's .npz, or what convert.py exported")
    parser.add_argument("measures", nargs="*", metavar="MEASURE", help="any of the above (default: caption)")
    parser.add_argument("--data", help="pictures to train probes on: scenes, a folder or tars (default: those of the run)")
    parser.add_argument("--val", help="held-out pictures (default: those of the run, or, if --data is given, a part of that)")
    parser.add_argument("--caption-field", help="where captions are: txt, or a field of KEY.json (default: as in the run)")
    parser.add_argument("--label-fields", type=lambda text: tuple(text.split(",")), default=(), metavar="FIELD,...",
                        help="the classes: fields of KEY.json, such as caption,category, or txt (default: all that scenes have)")
    parser.add_argument("--classnames", metavar="FILE", help="for zeroshot: the classes, one a line; or all, for every label of the held-out pictures "
                                                        "(default: the labels of the pictures that are measured)")
    parser.add_argument("--template", default="{}", help="for zeroshot: the sentence of a class, with {} for its name (default: {})")
    parser.add_argument("--num-samples", type=int, default=0, help="held-out pictures at most; probes train on four times as many (default: of probe and knn 1,000 "
                                                             "scenes or 2,000 others, of zeroshot 200, of pictures 12, of caption as in the run)")
    parser.add_argument("--resolution", type=int, default=0, help="pixels a side, for all but caption (default: what it was trained at last)")
    parser.add_argument("--seed", type=int, default=0, help="of all draws (default: 0)")
    parser.add_argument("--out", metavar="FOLDER", help="where pictures go (default: the run's folder)")
    parser.add_argument("--json", metavar="FILE", help="also write all figures there (null: no right answer could be known)")
    given = parser.parse_intermixed_args(argv)
    if unknown := [name for name in given.measures if name not in MEASURES]:
        parser.error(f"unknown measure {unknown[0]!r}: take any of {', '.join(MEASURES)}")
    if given.num_samples < 0 or given.num_samples == 1 or given.resolution < 0 or given.seed < 0:
        parser.error("--num-samples takes two or more, --resolution and --seed no negative numbers")
    if "{}" not in given.template:
        parser.error("--template needs {} where the name goes")
    tune_cpu(checkpoint.model_size(given.encoder))
    enable_compilation_cache()
    asked, found = EvalContext(given), {}
    try:
        for name in given.measures or ["caption"]:
            found[name] = MEASURES[name][0](asked)
            print(format_result(name, found[name]), flush=True)
        if given.json:
            checkpoint.atomic_write(given.json, lambda f: f.write(checkpoint.to_json(found, indent=1).encode()))
        return 0
    except (ConfigError, DataError, BadSample, CheckpointError, ConvertError, LayoutError) as problem:
        print(f"error: {problem}", file=sys.stderr)
    except ValueError as problem:
        print(f"error: {given.encoder}: {problem}", file=sys.stderr)
    except OSError as problem:
        print(f"error: {problem.filename or given.encoder}: {problem.strerror or problem}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    images.silence_pillow()
    sys.exit(main(sys.argv[1:]))

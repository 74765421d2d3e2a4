"""Evaluation of a run, a checkpoint, an encoder or an export. Nothing imports this file.

    python evaluate.py RUN                                      losses and graded captions
    python evaluate.py ENCODER probe knn vqa zeroshot images    the measures that are named
    python evaluate.py RUN search "a red bird" --data DIR       the nearest images, search.png

Each measure is a file of evaluation/: captioning, caption_metrics, probe (and knn), zeroshot (by
vectors: pair), retrieval, search, vqa, visualize.
"""
import argparse
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from config import MAX_SEED
from evaluation import pair, probe, retrieval, search, visualize, vqa, zeroshot
from evaluation.captioning import compare_with_references, evaluate_captions
from evaluation.context import EvalContext
from evaluation.run_data import check_split, override_config
from evaluation.templates import read_templates
from inputs import images, opening, sources
from runtime import checkpoint
from runtime.cpu_tuning import enable_compilation_cache, tune_cpu
from runtime.errors import (
    CheckpointError,
    CommandParser,
    ConfigError,
    check_output_file,
    run_command,
)
from runtime.tables import format_table
from train import openvision2_loss

OLD_FLAGS = {"--caption": "--caption-field", "--label": "--label-fields",
             "--names": "--classnames", "--count": "--num-samples"}
OLD_MEASURES = {"pictures": "images"}


def measure_captions(context: EvalContext) -> dict[str, Any]:
    args = context.args
    return evaluate_captions(args.encoder, context.changes, args.num_samples, openvision2_loss)


def measure_metrics(context: EvalContext) -> dict[str, Any]:
    args = context.args
    return compare_with_references(args.encoder, context.changes, args.num_samples,
                                   openvision2_loss)


def measure_probes(context: EvalContext) -> dict[str, Any]:
    return probe.measure(context.encoder, *context.probe_images, probe.LINEAR,
                         seed=context.args.seed)


def measure_neighbors(context: EvalContext) -> dict[str, Any]:
    return probe.measure(context.encoder, *context.probe_images, probe.NEIGHBORS,
                         seed=context.args.seed)


def measure_zeroshot(context: EvalContext) -> dict[str, Any]:
    """By vectors, if the run has a text encoder, else by caption likelihood."""
    args, templates = context.args, read_templates(context.args.template)
    if context.of_scenes and args.label_fields:
        raise ConfigError("--label-fields: the classes of zeroshot are the captions of scenes, so "
                          "leave it out, or name other data")
    if context.has_text_encoder:
        return measure_zeroshot_vectors(context, templates)
    if len(templates) > 1:
        raise ConfigError(f"--template {args.template} has {len(templates)} sentences: caption "
                          "likelihood takes one; a run of --objective lit averages them")
    captioner, val_images = context.captioner, context.val_images(200)
    rows = np.sort(sources.draw_indices(len(val_images), args.num_samples or 200))
    sentences, truth = zeroshot.make_classes(val_images, rows, args.classnames, templates[0])
    known = truth >= 0
    tokens = val_images.subset(rows[known]).features(context.encoder).tokens
    return zeroshot.measure(captioner, tokens, sentences, truth[known])


def measure_zeroshot_vectors(context: EvalContext, templates: list[str]) -> dict[str, Any]:
    args, val_images = context.args, context.val_images(200)
    rows = np.sort(sources.draw_indices(len(val_images), args.num_samples or 200))
    names, truth = zeroshot.make_classes(val_images, rows, args.classnames, "{}")
    known = truth >= 0
    pixels = val_images.subset(rows[known]).pixels(context.pair.resolution)
    return pair.classify(pair.embed_images(context.pair, pixels),
                         pair.embed_classes(context.pair, names, templates), truth[known],
                         zeroshot.groups_of_classes(val_images, names))


def measure_retrieval(context: EvalContext) -> dict[str, Any]:
    count = context.args.num_samples or 1000
    cfg = override_config(context.run_config, context.changes, count)
    check_split(context.run_config, cfg)
    pool = retrieval.Pool(opening.open_validation_data(cfg), count)
    if context.has_text_encoder:
        return retrieval.measure_vectors(context.pair, pool)
    return retrieval.measure_likelihood(context.captioner, context.encoder, pool)


def search_images(context: EvalContext) -> dict[str, Any]:
    args, cfg = context.args, override_config(context.run_config, context.changes, 0)
    if context.has_text_encoder:
        resolution, text = context.pair.resolution, pair.embed_texts(context.pair, [args.text])[0]

        def score(pixels: np.ndarray) -> np.ndarray:
            return pair.embed_images(context.pair, pixels) @ text
    else:
        resolution = context.encoder.resolution

        def score(pixels: np.ndarray) -> np.ndarray:
            tokens = context.encoder(pixels).tokens
            return zeroshot.likelihood(context.captioner, tokens, [args.text])[:, 0]
    candidates = search.readable_images(cfg, args.seed, args.num_samples or 1000, resolution)
    best = search.nearest(candidates, score)
    os.makedirs(context.out_folder, exist_ok=True)
    path = os.path.join(context.out_folder, "search.png")
    search.draw(path, args.text, best)
    return {"text": args.text, "image": path, "nearest": [name for _, name, _ in best]}


def measure_vqa(context: EvalContext) -> dict[str, Any]:
    return vqa.measure_all(context.encoder, context.args.seed, context.args.steps)


def draw_images(context: EvalContext) -> dict[str, str]:
    val_images = context.val_images(12)
    try:
        captioner = context.captioner
    except CheckpointError as problem:
        print(f"words.png is left out: {problem}")
        captioner = None
    pixels = val_images.pixels(context.encoder.resolution)[:12]
    paths = visualize.draw_all(context.encoder, pixels, context.out_folder, captioner)
    return {os.path.basename(path): path for path in paths}


class Measure(NamedTuple):
    run: Callable[[EvalContext], dict[str, Any]]
    help: str


MEASURES = {
    "caption": Measure(measure_captions, "validation loss, blind loss, graded captions of a run"),
    "metrics": Measure(measure_metrics, "CIDEr-D, BLEU-4 and ROUGE-L of generated captions against "
                                        "the true ones; their length and repetition"),
    "probe": Measure(measure_probes, "linear and attention-pooled probes of the features, of "
                                     "random features and of raw pixels"),
    "knn": Measure(measure_neighbors, "nearest neighbors by the same features"),
    "zeroshot": Measure(measure_zeroshot, "classification by the vectors of a run with a text "
                                          "encoder (lit), or by caption likelihood"),
    "retrieval": Measure(measure_retrieval, "the caption of an image among many, and the image of "
                                            "a caption; by vectors or by likelihood"),
    "search": Measure(search_images, "search TEXT: the images nearest to a text, search.png"),
    "vqa": Measure(measure_vqa, "questions about scenes, answered by a small language model that "
                                "reads the features"),
    "images": Measure(draw_images, "pca.png, attention.png and, of a run, words.png"),
}


def format_result(name: str, result: dict[str, Any]) -> str:
    """A table of percentages if the result has rows, else JSON."""
    if not all(isinstance(row, dict) for row in result.values()):
        return checkpoint.to_json(result if name == "caption" else {name: result}, indent=1)
    rows = []
    for title, shares in result.items():
        percentages = {label: percent(share) for label, share in shares.items()}
        rows.append({f"{name}, % right": title} | percentages)
    return format_table(rows)


def percent(share: float) -> str:
    return f"{100 * share:.1f}" if share == share else "–"  # NaN: no training image has the label


def parse_args(argv: list[str]) -> argparse.Namespace:
    lines = [f"  {name:10} {measure.help}" for name, measure in MEASURES.items()]
    parser = CommandParser(
        prog="evaluate.py",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Evaluate a run, a checkpoint or an encoder.\n\nmeasures:\n" + "\n".join(lines))
    parser.add_argument("encoder", metavar="ENCODER", help="a run's folder, a checkpoint, an "
                        "encoder's .npz, or what convert.py exported")
    parser.add_argument("measures", nargs="*", metavar="MEASURE",
                        help="any of the above (default: caption)")
    parser.add_argument("--data", help="images to train probes on: scenes, a folder or tars "
                        "(default: those of the run)")
    parser.add_argument("--val", help="validation images (default: those of the run or, with "
                        "--data, a part of that)")
    parser.add_argument("--caption-field", help="where captions are: txt, or a field of KEY.json "
                        "(default: as in the run)")
    parser.add_argument("--label-fields", type=split_names, default=(), metavar="FIELD,...",
                        help="the classes: fields of KEY.json, such as caption,category, or txt "
                        "(default: all labels of scenes)")
    parser.add_argument("--classnames", metavar="FILE", help="zeroshot: the classes, one per line; "
                        "or all, for every label of the validation images (default: the labels of "
                        "the images that are measured)")
    parser.add_argument("--template", default="{}", help="zeroshot: the sentence of a class, with "
                        "{} for its name; with a text encoder also a file with one per line, or "
                        "photo for CLIP's 80 (default: {})")
    parser.add_argument("--num-samples", type=int, default=0, help="validation images at most; "
                        "probes train on four times as many (default: probe and knn 1,000 scenes "
                        "or 2,000 others, zeroshot 200, images 12, retrieval and search 1,000, "
                        "caption and metrics as in the run)")
    parser.add_argument("--resolution", type=int, default=0, help="pixels per side, for all but "
                        "caption and metrics (default: the last of training)")
    parser.add_argument("--steps", type=int, default=1500, help="vqa: training steps of a reader; "
                        "fewer are faster and read less (default: 1500)")
    parser.add_argument("--seed", type=int, default=0, help="of the probes, the vqa reader "
                        "and the random encoder (default: 0)")
    parser.add_argument("--out", metavar="FOLDER", help="where images are written (default: the "
                        "run's folder)")
    parser.add_argument("--json", metavar="FILE", help="also write all figures to a file")
    for word in argv:
        flag = word.partition("=")[0]
        if flag in OLD_FLAGS:
            parser.error(f"{flag} is now {OLD_FLAGS[flag]}")
    args = parser.parse_intermixed_args(argv)
    args.measures = args.measures or ["caption"]
    if "search" in args.measures:
        after = args.measures.index("search") + 1
        if after == len(args.measures):
            parser.error('search needs a text, as in: search "a red bird"')
        args.text = args.measures.pop(after).strip()
        if not args.text:
            parser.error('search needs a text, as in: search "a red bird"')
    for name in args.measures:
        if name in OLD_MEASURES:
            parser.error(f"measure {name} is now {OLD_MEASURES[name]}")
        if name not in MEASURES:
            parser.error(f"unknown measure {name!r}: take any of {', '.join(MEASURES)}")
    if args.num_samples < 0 or args.num_samples == 1:
        parser.error("--num-samples must be 2 or more")
    if "{}" not in args.template and args.template != "photo" and not os.path.isfile(args.template):
        parser.error("--template needs {} where the name goes; or name a file of such sentences")
    if args.resolution < 0 or args.steps < 1 or not 0 <= args.seed <= MAX_SEED:
        parser.error("--resolution must not be negative, --steps must be 1 or more, --seed from 0 "
                     f"to {MAX_SEED}")
    return args


def split_names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def evaluate(args: argparse.Namespace) -> int:
    check_output_file("--json", args.json)
    tune_cpu(checkpoint.model_size(args.encoder))
    enable_compilation_cache()
    context, results = EvalContext(args), {}
    for name in args.measures:
        results[name] = MEASURES[name].run(context)
        print(format_result(name, results[name]), flush=True)
    if args.json:
        text = checkpoint.to_json(results, indent=1)
        checkpoint.atomic_write(args.json, lambda file: file.write(text.encode()))
    return 0


def main(argv: list[str]) -> int:
    return run_command(evaluate, parse_args(argv))


if __name__ == "__main__":
    images.silence_pillow()
    sys.exit(main(sys.argv[1:]))

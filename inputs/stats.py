"""Statistics of a data set before training: caption lengths, duplicates, image sizes, bad samples.

    python -m inputs.stats DATA [--caption-field FIELD] [--max-text-len N]

DATA is what --data of train.py takes. It prints the figures and draws stats.png. At most
--num-samples samples are read, drawn at random; the draw is fixed.
"""
import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from inputs import tokenizer
from inputs.files import DEFAULT_OPTIONS, caption_weights, choose_first
from inputs.images import decode_and_augment, read_image, silence_pillow
from inputs.sources import draw_indices, open_source
from runtime.errors import BadSample, CommandParser, ConfigError, DataError, run_command
from runtime.plots import BLUE, GRAY, RED, Axes
from runtime.tables import format_table

PERCENTILES = (0, 5, 25, 50, 75, 95, 99, 100)
NUM_BARS = 50
SMALL_SIDE = 32     # pixels at which images are decoded, to see whether they can be
DECODED_AT = 16384  # a caption of more tokens counts as this long


class Sample(NamedTuple):
    captions: list[str]       # of each field, "" where the sample has none
    size: tuple[int, int]     # width, height
    thumbnail: bytes          # to find duplicates


def read_samples(source: Any, fields: list[str], indices: np.ndarray,
                 bad: Counter) -> Iterator[Sample]:
    """The usable samples. The others are counted in `bad` by their reason."""
    for i in tqdm(indices.tolist(), desc="reading", unit=" samples", leave=False, disable=None):
        try:
            (_, *captions), image = read_fields(source, i, fields)
            size = image.size
            yield Sample(captions, size, decode_and_augment(image, SMALL_SIDE).tobytes())
        except BadSample as problem:
            bad[str(problem)] += 1


def read_fields(source: Any, i: int, fields: list[str]) -> tuple[list[str], Image.Image]:
    """(the caption that training would use, then that of each field), and the image."""
    captions, image = source.sample(i, [",".join(fields)], choose_first)
    opened = read_image(image)
    for field in fields:
        try:
            captions.append(source.caption(i, field) if len(fields) > 1 else captions[0])
        except BadSample:
            captions.append("")
    return captions, opened


def percentiles(values: list[int]) -> dict[str, int]:
    points = np.percentile(values, PERCENTILES, method="nearest").astype(int).tolist()
    names = [f"{p}%" for p in PERCENTILES]
    names[0], names[-1] = "least", "most"
    return dict(zip(names, points))


def num_repeated(values: list[Any]) -> int:
    """How many come after an equal one."""
    return len(values) - len(set(values))


def token_counts(words: tokenizer.WordPiece, captions: list[str]) -> list[int]:
    """Text positions of each caption, with start and end."""
    return [min(len(words.encode_pieces(text)) + 2, DECODED_AT) for text in captions if text]


def histogram(values: list[int], label: str, line: float | None = None) -> Image.Image:
    """A bar chart of the values up to their 99th percentile, with a red line at `line`."""
    high = max(float(np.percentile(values, 99)), line or 1.0) * 1.05
    counts, edges = np.histogram(values, NUM_BARS, (0, high))
    axes = Axes(high, 0, counts.max() * 1.05, label, "samples")
    for count, left, right in zip(counts, edges, edges[1:]):
        if count:
            x0, y0 = axes.pixel(left, count)
            x1, y1 = axes.pixel(right, 0)
            axes.pen.rectangle((x0, y0, max(x1 - 1, x0), y1), fill=BLUE)
    if line is not None:
        axes.pen.line((*axes.pixel(line, 0), *axes.pixel(line, axes.y_max)), fill=RED, width=2)
        axes.text(axes.pixel(line, 0)[0] + 6, axes.top, f"cut at {line:g}", RED)
    elif not counts.any():
        axes.text(axes.left + 9, axes.top, "none", GRAY)
    return axes.image


def draw(path: str, lengths: dict[str, list[int]], cut: int, sides: list[int]) -> None:
    """One chart below the other: caption lengths of each field, and the shorter sides."""
    charts = [histogram(counts, f"tokens of {field}", cut) for field, counts in lengths.items()]
    charts.append(histogram(sides, "shorter side of the image, pixels"))
    sheet = Image.new("RGB", (charts[0].width, sum(chart.height for chart in charts)), "white")
    top = 0
    for chart in charts:
        sheet.paste(chart, (0, top))
        top += chart.height
    sheet.save(path)


def open_vocab(options: argparse.Namespace, captions: list[str]) -> tokenizer.WordPiece:
    """The tokenizer of --vocab, or one built from the captions."""
    try:
        if options.vocab:
            return tokenizer.load(options.vocab)
        return tokenizer.train_vocab(captions, options.vocab_size)
    except (OSError, ValueError) as problem:
        raise ConfigError(f"{'--vocab: ' if options.vocab else ''}{problem}") from None


def report(source: Any, fields: list[str], options: argparse.Namespace) -> None:
    """Prints the figures of a source and draws stats.png."""
    indices = draw_indices(min(len(source), 1 << 20), options.num_samples)
    bad: Counter = Counter()
    samples = list(read_samples(source, fields, indices, bad))
    if not samples:
        raise DataError(f"not one usable sample in {options.data}; {bad.most_common(1)[0][0]}")
    columns = dict(zip(fields, zip(*(sample.captions for sample in samples))))
    for field, column in columns.items():
        if not any(column):
            raise DataError(f"--caption-field {field}: none of {len(samples)} samples has it: "
                            "leave it out, or raise --num-samples")
    words = open_vocab(options, [text for column in columns.values() for text in column])
    lengths = {field: token_counts(words, column) for field, column in columns.items()}
    sizes = [sample.size for sample in samples]
    rows = [{"": f"tokens of {name}"} | percentiles(counts) for name, counts in lengths.items()]
    rows.append({"": "image width"} | percentiles([width for width, _ in sizes]))
    rows.append({"": "image height"} | percentiles([height for _, height in sizes]))

    print(f"{len(source):,} samples in {options.data}; read: {len(indices):,}, "
          f"usable: {len(samples):,}")
    for why, count in [*source.skipped.items(), *bad.most_common(10)]:
        print(f"  skipped: {count:,} {why}")
    print(format_table(rows))
    for field, counts in lengths.items():
        share = np.mean(np.array(counts) > options.max_text_len)
        texts = [text for text in columns[field] if text]
        print(f"{field}: {share:.1%} longer than --max-text-len {options.max_text_len}; "
              f"{num_repeated(texts) / len(texts):.1%} repeat another caption; "
              f"{len(samples) - len(texts):,} missing")
    repeated = num_repeated([sample.thumbnail for sample in samples])
    print(f"images: {repeated / len(samples):.1%} repeat another image; {len(set(sizes)):,} sizes")
    draw("stats.png", lengths, options.max_text_len, [min(size) for size in sizes])
    print(f"stats.png: the lengths{'' if options.vocab else ' (with a vocabulary made from them)'} "
          "and sizes as charts")


def main(argv: list[str]) -> int:
    parser = CommandParser(prog="python -m inputs.stats",
                           description="Figures of a data set, and stats.png.")
    parser.add_argument("data", help="as --data of train.py")
    parser.add_argument("--caption-field", default="txt", help="as of train.py; a,b for several")
    parser.add_argument("--image-field", default="image", help="as of train.py")
    parser.add_argument("--max-text-len", type=int, default=128, help="as of train.py (default: "
                        "128, as in the paper's recipes; the recipes images and emoji have 48)")
    parser.add_argument("--vocab", default="", help="as of train.py")
    parser.add_argument("--vocab-size", type=int, default=32000, help="as of train.py")
    parser.add_argument("--num-samples", type=int, default=2000, help="samples to read")
    options = parser.parse_args(argv)
    if options.num_samples < 1:
        raise ConfigError(f"--num-samples {options.num_samples} is out of range: at least 1")
    fields = list(caption_weights(options.caption_field))
    read_options = DEFAULT_OPTIONS._replace(image_field=options.image_field)
    source = open_source(options.data, options.caption_field, options=read_options)
    report(source, fields, options)
    return 0


if __name__ == "__main__":
    silence_pillow()
    sys.exit(run_command(main, sys.argv[1:]))

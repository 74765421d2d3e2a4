"""The images that a run leaves, drawn with Pillow alone: curve.png and samples.png.

    python -m runtime.plots RUN [RUN ...]     curves.png: validation losses of several runs, by
                                              images and by seconds
"""
import json
import math
import os
import re
import sys
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLORS = ((31, 90, 180), (214, 90, 20), (30, 140, 70), (150, 60, 160), (120, 90, 60), (200, 40, 80))
GRAY, LIGHT_GRAY, RED = (120, 120, 120), (235, 235, 235), (200, 30, 30)
BLUE, GREEN = COLORS[0], COLORS[2]
OLD_METRICS = {  # names of earlier versions, in metrics.jsonl and summary.json
    "shuffled_loss": "val_loss_shuffled", "floor_loss": "val_loss_blind",
    "data_wait": "data_wait_fraction", "held_out_pictures": "num_val_images",
    "colour_accuracy": "color_accuracy"}


def rename_old_metrics(row: dict[str, Any]) -> dict[str, Any]:
    return {OLD_METRICS.get(name, name): value for name, value in row.items()}


def read_metrics(path: str) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, without a last line that a crash cut off. OSError if it cannot
    be read."""
    rows = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                rows.append(rename_old_metrics(json.loads(line)))
            except json.JSONDecodeError:
                break
    return rows


def read_bad_samples(path: str) -> list[str]:
    """The lines of a bad-samples.txt: step, sample, reason."""
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8", errors="replace") as file:
        return [line for line in file if re.match(r"\d+\t", line)]


# ----------------------------------------------------------------------------------- charts
class Line(NamedTuple):
    x: list[float]
    y: list[float]
    marked: bool    # whether each point has a dot


class Axes:
    """An empty chart, from x = 0 to x_max and y_min to y_max, with ticks."""
    width, height = 900, 528
    left, right, top, bottom = 60, 32, 40, 48

    def __init__(self, x_max: float, y_min: float, y_max: float, x_label: str, y_label: str):
        self.x_max, self.y_min, self.y_max = x_max, y_min, y_max
        self.image = Image.new("RGB", (self.width, self.height), "white")
        self.pen = ImageDraw.Draw(self.image)
        self.font = ImageFont.load_default(14)
        tick = tick_distance(y_max - y_min)
        for y in np.arange(math.ceil(y_min / tick) * tick, y_max, tick):
            self.pen.line((*self.pixel(0, y), *self.pixel(x_max, y)), fill=LIGHT_GRAY)
            self.text(self.left - 8, self.pixel(0, y)[1], f"{y:.4g}", GRAY, "rm")
        for x in np.arange(0, x_max * 1.001, tick_distance(max(x_max, 1))):
            self.text(self.pixel(x, 0)[0], self.height - self.bottom + 8, f"{x:,.0f}", GRAY, "ma")
        self.text(self.width - self.right, self.height - 4, x_label, GRAY, "rb")
        self.text(8, 12, y_label, GRAY)

    def pixel(self, x: float, y: float) -> tuple[float, float]:
        """Where a point lies in the image; one above y_max lies at the top."""
        across = x / max(self.x_max, 1)
        up = (min(y, self.y_max) - self.y_min) / max(self.y_max - self.y_min, 1e-9)
        return (self.left + (self.width - self.left - self.right) * across,
                self.top + (self.height - self.top - self.bottom) * (1 - up))

    def text(self, x: float, y: float, text: str, color: tuple, anchor: str = "la") -> None:
        self.pen.text((x, y), text, fill=color, font=self.font, anchor=anchor)

    def add_line(self, line: Line, color: tuple) -> None:
        points = [self.pixel(x, y) for x, y in zip(line.x, line.y) if math.isfinite(y)]
        self.pen.line(points, fill=color, width=2)
        if line.marked:
            for x, y in points:
                self.pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=color)

    def add_level(self, name: str, y: float) -> None:
        """A dashed horizontal line."""
        height, end = self.pixel(0, y)[1], self.width - self.right
        for x in range(self.left, end, 12):
            self.pen.line((x, height, x + 6, height), fill=RED)
        self.text(end - 4, height - 3, f"{name} {y:.3f}", RED, "rb")

    def add_event(self, name: str, x: float) -> None:
        """A vertical line."""
        self.pen.line((*self.pixel(x, self.y_min), *self.pixel(x, self.y_max)), fill=GRAY)
        self.text(self.pixel(x, self.y_max)[0] + 4, self.top - 2, name, GRAY)


def tick_distance(length: float) -> float:
    """1, 2 or 5 times a power of 10, so that there are at most 8 ticks."""
    power = 10 ** math.floor(math.log10(length))
    return next(t for t in (power / 5, power / 2, power, power * 2) if length / t <= 8)


def y_limits(lines: list[Line], levels: list[float]) -> tuple[float, float]:
    """All marked points and levels are inside, and 98% of the others: a loss starts high. All are
    inside if the highest is less than twice as high as these."""
    points, marked = list(levels), list(levels)
    for line in lines:
        finite = [y for y in line.y if math.isfinite(y)]
        points += finite
        if line.marked:
            marked += finite
    points = sorted(y for y in points if math.isfinite(y)) or [0, 1]
    low, high = points[0], points[int(0.98 * (len(points) - 1))]
    if points[-1] < 2 * high:
        high = points[-1]
    return max(0, low - 0.05 * (points[-1] - low)), max(high, *marked, low + 1e-6) * 1.05


def line_chart(lines: dict[str, Line], levels: dict[str, float], events: dict[float, str],
               x_label: str = "step", y_label: str = "loss (of captions: nats per token)",
               names_below: bool = False) -> Image.Image:
    """`levels` are horizontal lines, such as the blind loss; `events` are vertical lines, such as
    the start of a stage. names_below: for lines that rise, which would cross names at the top."""
    lines = {name: Line(*line) for name, line in lines.items()}
    x_max = max((max(line.x, default=1) for line in lines.values()), default=1)
    y_min, y_max = y_limits(list(lines.values()), list(levels.values()))
    axes = Axes(x_max, y_min, y_max, x_label, y_label)
    for x, name in events.items():
        axes.add_event(name, x)
    for name, y in levels.items():
        axes.add_level(name, y)
    name_y = axes.top + 20
    if names_below:
        name_y = axes.height - axes.bottom - 4 - 18 * len(lines)
    for n, (name, line) in enumerate(lines.items()):
        color = COLORS[n % len(COLORS)]
        axes.add_line(line, color)
        axes.text(axes.width - axes.right - 4, name_y + 18 * n, name, color, "ra")
    return axes.image


def stack_vertically(charts: list[Image.Image]) -> Image.Image:
    """Charts of one width, one below the other."""
    stacked = Image.new("RGB", (charts[0].width, sum(chart.height for chart in charts)))
    top = 0
    for chart in charts:
        stacked.paste(chart, (0, top))
        top += chart.height
    return stacked


def draw_curve(folder: str, blind_loss: float | None, stage_starts: dict[float, str]) -> None:
    """curve.png of a run, from its metrics.jsonl."""
    rows = read_metrics(os.path.join(folder, "metrics.jsonl"))
    lines = {}
    for name, key, marked in (("training", "loss", False), ("validation", "val_loss", True)):
        points = [row for row in rows if row.get(key) is not None]
        lines[name] = Line([row["step"] for row in points], [row[key] for row in points], marked)
    levels = {} if blind_loss is None else {"without the image": blind_loss}
    line_chart(lines, levels, stage_starts).save(os.path.join(folder, "curve.png"))


def compare(path: str, folders: list[str]) -> None:
    """Validation losses of several runs in one image: by images seen, and by seconds. OSError where
    a folder has no metrics.jsonl."""
    by_images, by_seconds = {}, {}
    for folder in dict.fromkeys(map(os.path.normpath, folders)):
        rows = read_metrics(os.path.join(folder, "metrics.jsonl"))
        training = [row for row in rows if "images" in row]
        evaluated = [row for row in rows if "val_loss" in row]
        losses = [row["val_loss"] for row in evaluated]
        images = np.interp([row["step"] for row in evaluated],
                           [0, *(row["step"] for row in training)],
                           [0, *(row["images"] for row in training)])
        by_images[folder] = Line(images.tolist(), losses, True)
        by_seconds[folder] = Line([row["seconds"] for row in evaluated], losses, True)
    charts = [line_chart(by_images, {}, {}, "images"), line_chart(by_seconds, {}, {}, "seconds")]
    stack_vertically(charts).save(path)


# ---------------------------------------------------------------------------------- samples
class CaptionedImage(NamedTuple):
    pixels: np.ndarray          # (R,R,3) uint8
    keep_indices: np.ndarray    # (K,), the patches that the decoder read
    patch_size: int
    caption: str                # the true one
    generated: str | None       # None where the model makes none
    correct: bool


SAMPLE_SIDE, SAMPLE_GAP, SAMPLE_COLUMNS = 160, 6, 2  # of samples.png; runtime/report.py cuts it up
SAMPLE_WIDTH, SAMPLE_HEIGHT = 2 * SAMPLE_SIDE + 300, SAMPLE_SIDE + 16


def sample_position(n: int) -> tuple[int, int]:
    """The left and top pixel of sample n in samples.png."""
    return n % SAMPLE_COLUMNS * SAMPLE_WIDTH + 8, n // SAMPLE_COLUMNS * SAMPLE_HEIGHT + 8


def draw_samples(path: str, samples: list[CaptionedImage]) -> None:
    """samples.png: each image, the patches that the decoder read (the others dimmed), the true
    caption, and the generated one, green where it is right."""
    side, text_width = SAMPLE_SIDE, 270
    font = ImageFont.load_default(13)
    num_rows = math.ceil(len(samples) / SAMPLE_COLUMNS)
    size = SAMPLE_COLUMNS * SAMPLE_WIDTH + 8, num_rows * SAMPLE_HEIGHT + 8
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for n, sample in enumerate(samples):
        x, y = sample_position(n)
        small = len(sample.pixels) < side
        resampling = Image.Resampling.NEAREST if small else Image.Resampling.BILINEAR
        for pixels, offset in ((sample.pixels, 0),
                               (dim_dropped_patches(sample), side + SAMPLE_GAP)):
            resized = Image.fromarray(pixels).resize((side, side), resampling)
            sheet.paste(resized, (x + offset, y))
        text_x = x + 2 * side + 14
        caption = wrap(sample.caption, text_width, font)
        pen.multiline_text((text_x, y), caption, fill="black", font=font)
        if sample.generated is not None:
            generated = wrap(sample.generated or "(nothing)", text_width, font)
            below = pen.multiline_textbbox((0, 0), caption, font=font)[3] + 8
            pen.multiline_text((text_x, y + below), generated, font=font,
                               fill=GREEN if sample.correct else BLUE)
    sheet.save(path)


def dim_dropped_patches(sample: CaptionedImage) -> np.ndarray:
    """(R,R,3). Pixels that fill no patch, at the right and bottom, are dimmed too."""
    size, resolution = sample.patch_size, len(sample.pixels)
    grid = resolution // size
    kept = np.zeros(grid * grid, bool)
    kept[sample.keep_indices] = True
    kept = kept.reshape(grid, grid).repeat(size, 0).repeat(size, 1)
    kept = np.pad(kept, (0, resolution - grid * size))
    dimmed = 255 - (255 - sample.pixels.astype(np.int32)) // 6
    return np.where(kept[..., None], sample.pixels, dimmed).astype(np.uint8)


def wrap(text: str, width: float, font: Any) -> str:
    """Line breaks so that no line is wider than `width` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m runtime.plots RUN [RUN ...], folders that train.py made")
    try:
        compare("curves.png", sys.argv[1:])
    except OSError as problem:
        sys.exit(f"error: {problem.filename} cannot be read ({problem.strerror}): name folders "
                 "that train.py made")
    print("curves.png: validation losses of", ", ".join(sys.argv[1:]))

"""The pictures that a run leaves behind, drawn with Pillow alone: curve.png and samples.png.

    python -m runtime.plots RUN [RUN ...]        draws the held-out losses of several runs over each other, by images and by seconds, in curves.png
"""
import json
import math
import os
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

INKS = ((31, 90, 180), (214, 90, 20), (30, 140, 70), (150, 60, 160), (120, 90, 60), (200, 40, 80))
GRAY = (120, 120, 120)


def read_metrics(path: str) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line that a crash cut off is left out."""
    rows = []
    with open(path, encoding="utf-8") as f:
        for line in f:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows


def line_chart(series: dict[str, tuple[list[float], list[float], bool]], levels: dict[str, float], switches: dict[float, str],
          across: str = "step", up: str = "loss (of captions: nats a token)", names_below: bool = False) -> Image.Image:
    """`up`, such as loss, against `across`. series: {name: (steps, losses, whether to mark the points)}; levels: horizontal lines, such
    as the floor; switches: vertical lines, where a stage starts; names_below: for lines that rise, whose names above would lie on them."""
    W, H, left, right, top, bottom = 900, 528, 60, 20, 40, 48
    xs = [x for s in series.values() for x in s[0]] or [1]
    ys = sorted(y for y in [y for s in series.values() for y in s[1]] + list(levels.values()) if math.isfinite(y)) or [0, 1]
    x1, marked = max(xs), [y for _, found, dots in series.values() if dots for y in found if math.isfinite(y)]
    y0, y1 = max(0, ys[0] - 0.05 * (ys[-1] - ys[0])), max(ys[int(0.98 * (len(ys) - 1))], *marked, *levels.values(), ys[0] + 1e-6) * 1.05
    font, image = ImageFont.load_default(14), Image.new("RGB", (W, H), "white")
    pen = ImageDraw.Draw(image)

    def at(x: float, y: float) -> tuple[float, float]:
        return (left + (W - left - right) * x / max(x1, 1), top + (H - top - bottom) * (1 - (min(y, y1) - y0) / max(y1 - y0, 1e-9)))

    unit = 10 ** math.floor(math.log10(y1 - y0))
    unit = next(u for u in (unit / 5, unit / 2, unit, unit * 2) if (y1 - y0) / u <= 8)
    for tick in np.arange(math.ceil(y0 / unit) * unit, y1, unit):
        pen.line((*at(0, tick), *at(x1, tick)), fill=(235, 235, 235))
        pen.text((left - 8, at(0, tick)[1]), f"{tick:.4g}", fill=GRAY, font=font, anchor="rm")
    for tick in np.linspace(0, x1, 6):
        pen.text((at(tick, 0)[0], H - bottom + 8), f"{tick:,.0f}", fill=GRAY, font=font, anchor="ma")
    pen.text((W - right, H - 4), across, fill=GRAY, font=font, anchor="rb")
    pen.text((8, 12), up, fill=GRAY, font=font)
    for x, text in switches.items():
        pen.line((*at(x, y0), *at(x, y1)), fill=GRAY)
        pen.text((at(x, y1)[0] + 4, top - 2), text, fill=GRAY, font=font)
    for text, y in levels.items():
        for x in range(left, W - right, 12):
            pen.line((x, at(0, y)[1], x + 6, at(0, y)[1]), fill=(200, 30, 30))
        pen.text((W - right - 4, at(0, y)[1] - 3), f"{text} {y:.3f}", fill=(200, 30, 30), font=font, anchor="rb")
    first_name = H - bottom - 4 - 18 * len(series) if names_below else top + 20
    for n, (name, (x, y, dots)) in enumerate(series.items()):
        ink, points = INKS[n % len(INKS)], [at(a, b) for a, b in zip(x, y) if math.isfinite(b)]
        pen.line(points, fill=ink, width=2)
        for a, b in points if dots else ():
            pen.ellipse((a - 3, b - 3, a + 3, b + 3), fill=ink)
        pen.text((W - right - 4, first_name + 18 * n), name, fill=ink, font=font, anchor="ra")
    return image


def run_curve(folder: str, floor: float | None, switches: dict[float, str]) -> None:
    """curve.png of a run, from its metrics.jsonl."""
    rows = read_metrics(os.path.join(folder, "metrics.jsonl"))
    series = {}
    for name, key, dots in (("training", "loss", False), ("held-out", "val_loss", True)):
        having = [r for r in rows if key in r]
        series[name] = [r["step"] for r in having], [r[key] for r in having], dots
    line_chart(series, {} if floor is None else {"without the picture": floor}, switches).save(os.path.join(folder, "curve.png"))


def compare(path: str, folders: list[str]) -> None:
    """Held-out loss of several runs over each other: against the images they have seen, and against the seconds they took.
    OSError where a folder holds no metrics.jsonl."""
    series: dict[str, dict] = {"images": {}, "seconds": {}}
    for folder in dict.fromkeys(map(os.path.normpath, folders)):
        rows = read_metrics(os.path.join(folder, "metrics.jsonl"))
        seen, held = [r for r in rows if "images" in r], [r for r in rows if "val_loss" in r]
        images = np.interp([r["step"] for r in held], [0, *(r["step"] for r in seen)], [0, *(r["images"] for r in seen)])
        for across, xs in (("images", images.tolist()), ("seconds", [r["seconds"] for r in held])):
            series[across][folder] = xs, [r["val_loss"] for r in held], True
    panels = [line_chart(lines, {}, {}, across) for across, lines in series.items()]
    sheet = Image.new("RGB", (panels[0].width, sum(p.height for p in panels)))
    for n, panel in enumerate(panels):
        sheet.paste(panel, (0, n * panel.height))
    sheet.save(path)


def wrap(text: str, width: float, font: Any) -> str:
    """Line breaks so that no line is wider than `width` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if font.getlength(longer) <= width else [*lines, word]
    return "\n".join(lines)


def samples(path: str, items: list[tuple[np.ndarray, np.ndarray, int, str, str | None, bool]], columns: int = 2) -> None:
    """Held-out pictures: (pixels (R,R,3), kept patches (K,), patch size in pixels, true caption, generated caption or None,
    whether it is right). Beside each picture: the patches that the decoder was given, the others dimmed; right ones green."""
    side, width, height = 160, 2 * 160 + 300, 176
    font = ImageFont.load_default(13)
    sheet = Image.new("RGB", (columns * width + 8, math.ceil(len(items) / columns) * height + 8), "white")
    pen = ImageDraw.Draw(sheet)
    for n, (pixels, chosen, patch, truth, said, right) in enumerate(items):
        x, y = n % columns * width + 8, n // columns * height + 8
        grid = len(pixels) // patch
        seen = np.zeros(grid * grid, bool)
        seen[chosen] = True
        rest = (0, len(pixels) - grid * patch)  # what fills no patch is never seen
        seen = np.pad(seen.reshape(grid, grid).repeat(patch, 0).repeat(patch, 1), (rest, rest))[..., None]
        dimmed = np.where(seen, pixels, 255 - (255 - pixels.astype(np.int32)) // 6).astype(np.uint8)
        for k, shown in enumerate((pixels, dimmed)):
            sheet.paste(Image.fromarray(shown).resize((side, side), Image.Resampling.NEAREST if grid * patch < side else Image.Resampling.BILINEAR),
                        (x + k * (side + 6), y))
        text = wrap(truth, 270, font)
        pen.multiline_text((x + 2 * side + 14, y), text, fill="black", font=font)
        below = pen.multiline_textbbox((0, 0), text, font=font)[3] + 8
        if said is not None:
            pen.multiline_text((x + 2 * side + 14, y + below), wrap(said or "(nothing)", 270, font), fill=INKS[2] if right else INKS[0], font=font)
    sheet.save(path)


if __name__ == "__main__":
    import sys
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m runtime.plots RUN [RUN ...], folders that train.py made")
    try:
        compare("curves.png", sys.argv[1:])
    except OSError as problem:
        sys.exit(f"error: {problem.filename} cannot be read ({problem.strerror}): name folders that train.py made")
    print("curves.png: held-out loss of", ", ".join(sys.argv[1:]))

"""What the tutorial draws beyond evaluation/visualize.py and runtime/plots.py. Pillow alone.

Letters: R pixels per side, P patch size, G grid side, N = G*G patches, S sequence length.
"""
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from evaluation.visualize import SIDE
from runtime.plots import BLUE, COLORS, GRAY, GREEN, LIGHT_GRAY, wrap

ORANGE = COLORS[1]
FONT_SIZE, LINE = 13, 18  # pixels of a letter, of a line of text
FOLDER = os.path.join("runs", "tutorial")  # of the figures, outside of a notebook


class Shown:
    """A figure on display, which `update` replaces: in the notebook in its place, elsewhere in its
    file runs/tutorial/NAME.png."""

    def __init__(self, name: str, figure: Image.Image):
        self.path, self.handle = os.path.join(FOLDER, f"{name}.png"), None
        if "ipykernel" in sys.modules:
            from IPython.display import display  # the notebook's own
            self.handle = display(to_palette(figure), display_id=True, include=["image/png"])
        else:
            os.makedirs(FOLDER, exist_ok=True)
            self.update(figure)
            print(f"figure: {self.path}")

    def update(self, figure: Image.Image) -> None:
        if self.handle is not None:
            self.handle.update(to_palette(figure), include=["image/png"])
        else:
            to_palette(figure).save(self.path)


def to_palette(figure: Image.Image) -> Image.Image:
    """With 256 colors: a third of the bytes."""
    return figure.quantize(256, dither=Image.Dither.NONE)


def show(name: str, figure: Image.Image) -> Shown:
    return Shown(name, figure)


def font() -> Any:
    return ImageFont.load_default(FONT_SIZE)


# ------------------------------------------------------------------------------------ tiles
def pixel_tile(pixels: np.ndarray, patch_size: int = 0) -> Image.Image:
    """(R,R,3) uint8 as a tile whose pixels can be seen, with lines between its patches."""
    tile = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(tile)
    if patch_size:
        for edge in np.arange(patch_size, len(pixels), patch_size) * SIDE / len(pixels):
            pen.line((edge, 0, edge, SIDE), fill=GRAY)
            pen.line((0, edge, SIDE, edge), fill=GRAY)
    return tile


def framed(tile: Image.Image, patch: int, grid: int) -> Image.Image:
    """The tile with a frame around one of its G*G patches."""
    tile, side = tile.copy(), SIDE / grid
    row, column = divmod(patch, grid)
    box = [int(edge) for edge in (column * side, row * side, (column + 1) * side - 1,
                                  (row + 1) * side - 1)]
    ImageDraw.Draw(tile).rectangle(box, outline=(255, 60, 60), width=3)
    return tile


def heatmap(values: np.ndarray, scale: int) -> Image.Image:
    """(rows, columns) as squares of `scale` pixels: blue below 0, white at 0, orange above. The
    largest absolute value has the full color."""
    strength = np.clip(values / max(np.abs(values).max(), 1e-9), -1, 1)[..., None]
    color = np.where(strength < 0, np.array(BLUE), np.array(ORANGE))
    rgb = 255 - np.abs(strength) * (255 - color)
    return Image.fromarray(rgb.astype(np.uint8).repeat(scale, 0).repeat(scale, 1))


# ---------------------------------------------------------------------------------- diagrams
def draw_mask(mask: np.ndarray, names: Sequence[str], num_image_tokens: int) -> Image.Image:
    """The attention mask (S,S): row i is colored where token i may attend, blue for image tokens
    and orange for caption tokens."""
    cell, left, top = 14, 84, 24
    S = len(names)
    image = Image.new("RGB", (left + S * cell + 8, top + S * cell + 8), "white")
    pen = ImageDraw.Draw(image)
    pen.text((left, 4), "image tokens", fill=BLUE, font=font())
    pen.text((left + num_image_tokens * cell, 4), "caption tokens", fill=ORANGE, font=font())
    for i, name in enumerate(names):
        y = top + i * cell
        color = BLUE if i < num_image_tokens else ORANGE
        pen.text((left - 6, y + cell / 2), name, fill=color, font=font(), anchor="rm")
        for j in range(S):
            x = left + j * cell
            filled = BLUE if j < num_image_tokens else ORANGE
            box = (x, y, x + cell - 2, y + cell - 2)
            pen.rectangle(box, fill=filled if mask[i, j] else LIGHT_GRAY)
    return image


def draw_token_losses(tokens: Sequence[str], losses: dict[str, np.ndarray]) -> Image.Image:
    """The loss of each token of a caption, in nats, as one bar per entry of `losses`."""
    left, width, bar, right = 84, 560, 8, 60
    height = bar * len(losses) + 8
    most = max(float(values.max()) for values in losses.values())
    top = LINE * (len(losses) + 1)
    image = Image.new("RGB", (left + width + right, top + len(tokens) * height), "white")
    pen = ImageDraw.Draw(image)
    for n, name in enumerate(losses):
        mean = losses[name].mean()
        pen.text((left, n * LINE), f"{name}: mean {mean:.2f} nats per token", fill=COLORS[n],
                 font=font())
    for i, token in enumerate(tokens):
        y = top + i * height
        pen.text((left - 6, y + height / 2), token, fill="black", font=font(), anchor="rm")
        for n, values in enumerate(losses.values()):
            y_bar, end = y + 4 + n * bar, left + width * max(float(values[i]), 0) / most
            pen.rectangle((left, y_bar, end, y_bar + bar - 2), fill=COLORS[n])
        highest = max(float(values[i]) for values in losses.values())
        pen.text((left + width * highest / most + 6, y + height / 2), f"{highest:.2f}", fill=GRAY,
                 font=font(), anchor="lm")
    return image


def draw_history(pixels: Sequence[np.ndarray], captions: Sequence[str],
                 history: Sequence[tuple[str, Sequence[tuple[str, bool]]]]) -> Image.Image:
    """One column per image: the image, its true caption, then what was generated at each moment of
    `history`, a pair of (name, (caption, whether it is right) of each image). Green is right."""
    left, column, text_width = 76, 236, 222
    rows = [("true caption", [(caption, None) for caption in captions]), *history]
    texts = [[wrap(text or "(nothing)", text_width, font()) for text, _ in row] for _, row in rows]
    num_lines = [max(text.count("\n") + 1 for text in row) for row in texts]
    height = SIDE + 16 + sum(n * LINE + 8 for n in num_lines)
    image = Image.new("RGB", (left + column * len(pixels), height), "white")
    pen = ImageDraw.Draw(image)
    for n, tile in enumerate(map(pixel_tile, pixels)):
        image.paste(tile, (left + n * column, 0))
    y = SIDE + 12
    for (name, row), row_texts, lines in zip(rows, texts, num_lines):
        pen.text((left - 8, y), wrap(name, left - 8, font()), fill=GRAY, font=font(), anchor="ra",
                 align="right")
        for n, ((_, right), text) in enumerate(zip(row, row_texts)):
            color = {None: "black", True: GREEN, False: BLUE}[right]
            pen.multiline_text((left + n * column, y), text, fill=color, font=font(), spacing=4)
        y += lines * LINE + 8
    return image

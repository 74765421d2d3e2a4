"""Synthetic scenes: small images with dense captions, drawn as a function of (seed, split, index).

A scene has one to three objects, each with a color, shape, size and place, on a background with a
color and a pattern. Half of the scenes have a short word across one row, and then at most two
objects. The scenes stand in for the paper's Recap-DataComp-1B, at a size that a CPU learns in
minutes. inputs/scene_captions.py writes, parses and grades their captions.
"""
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE = 128  # pixels of a rendered scene
COLORS = {
    "red": (214, 40, 40), "orange": (245, 132, 31), "yellow": (250, 217, 50),
    "green": (46, 160, 67), "cyan": (70, 205, 220), "blue": (40, 80, 220),
    "purple": (130, 50, 180), "pink": (250, 130, 190)}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = {"small": 17.0, "big": 27.0}  # radius in pixels
BACKGROUND_COLORS = {"white": (250, 250, 250), "gray": (178, 178, 178), "tan": (222, 190, 140),
                     "mint": (178, 226, 196)}
PATTERNS = ("plain", "striped", "dotted")
INK = (10, 10, 10)  # of outlines and letters
PLACES = ("top left", "top right", "bottom left", "bottom right")  # of the 2 x 2 cells
ROWS = ("top", "bottom")  # of a word; its row then holds no objects
WORDS = ("cat", "dog", "sun", "bus", "hat", "key", "map", "owl", "bird", "book", "fish", "frog",
         "lamp", "milk", "ship", "tree")
WORDINGS = 3  # of a dense caption
RELATED_SHARE = 0.5  # of alt texts: they name the word or an object of the scene
WRONG_SHARE = 0.15   # of alt texts: they name an object drawn at random; the others are unrelated
UNRELATED = ("free shipping today", "image not found", "click to enlarge", "best offer", "untitled",
             "new in stock")
SUFFIXES = ("", " for sale", " picture")  # of an alt text that names an object


def choose(options: Sequence, draws: Iterator[float]) -> Any:
    """One of the options, by the next number in 0..1."""
    return options[int(next(draws) * len(options))]


def sample_scene(seed: int, split: str, index: int) -> dict[str, Any]:
    """The record of a scene: everything that its image and its captions are made of.

    "objects" are in reading order, at most one per place. "wording" selects the dense caption's
    grammar, "web" is the alt text, "synonym_draws" are numbers in 0..1 that choose the synonyms of
    a conditioned caption, and "jitter" numbers that only the image depends on."""
    rng = np.random.default_rng((seed, ("train", "val").index(split), index))
    numbers = rng.random(80).tolist()
    draws, synonym_draws, alt_draws = iter(numbers[:48]), numbers[48:64], iter(numbers[64:])

    word = choose(WORDS, draws) if next(draws) < 0.5 else None
    row = choose(ROWS, draws) if word else None
    free_cells = [cell for cell in range(4) if row is None or cell // 2 != ROWS.index(row)]
    most = 2 if word else 3
    count = choose(range(1, most + 1), draws)
    cells = sorted(free_cells.pop(choose(range(len(free_cells)), draws)) for _ in range(count))
    objects = []
    for cell in cells:
        objects.append({"size": choose(tuple(SIZES), draws), "color": choose(tuple(COLORS), draws),
                        "shape": choose(SHAPES, draws), "place": PLACES[cell]})
    return {"objects": objects, "background_color": choose(tuple(BACKGROUND_COLORS), draws),
            "pattern": choose(PATTERNS, draws), "word": word, "row": row,
            "wording": choose(range(WORDINGS), draws), "jitter": list(draws),
            "web": alt_text(objects, word, alt_draws), "synonym_draws": synonym_draws}


def alt_text(objects: list[dict], word: str | None, draws: Iterator[float]) -> str:
    """What a web page might say about such an image."""
    kind = next(draws)
    if kind >= RELATED_SHARE + WRONG_SHARE:
        return choose(UNRELATED, draws)
    if kind >= RELATED_SHARE:
        named = {"color": choose(tuple(COLORS), draws), "shape": choose(SHAPES, draws)}
    elif word and next(draws) < 0.5:
        return f"sign {word}"
    else:
        named = choose(objects, draws)
    return f"{named['color']} {named['shape']}{choose(SUFFIXES, draws)}"


# ----------------------------------------------------------------------------------- drawing
POLYGONS = {  # number of corners, radius of the even and odd ones, rotation, shift downwards
    "square": (4, 1.2, 1.2, np.pi / 4, 0.0), "triangle": (3, 1.15, 1.15, 0.0, 0.15),
    "star": (10, 1.1, 0.45, 0.0, 0.0)}


@functools.cache
def polygon(shape: str) -> list[tuple[float, float]]:
    """The corners (x, y) of a shape of radius 1."""
    if shape == "cross":
        a, b = 0.36, 0.95
        return [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a),
                (-b, a), (-b, -a), (-a, -a)]
    count, outer, inner, turn, lowered = POLYGONS[shape]
    corners = np.arange(count)
    angle = corners * 2 * np.pi / count + turn
    radius = np.where(corners % 2, inner, outer)
    return list(zip((np.sin(angle) * radius).tolist(), (lowered - np.cos(angle) * radius).tolist()))


@functools.cache
def background(color: str, pattern: str) -> Image.Image:
    """The color, and a darker one where the pattern is."""
    rgb = BACKGROUND_COLORS[color]
    image = Image.new("RGB", (SIDE, SIDE), rgb)
    y, x = np.mgrid[:SIDE, :SIDE]
    marks = {"plain": np.zeros((SIDE, SIDE), bool), "striped": (x + y) // 8 % 2 == 0,
             "dotted": (x % 16 - 8) ** 2 + (y % 16 - 8) ** 2 < 16}[pattern]
    darker = tuple(value - 24 for value in rgb)
    image.paste(darker, None, Image.fromarray((marks * 255).astype(np.uint8)))
    return image


@functools.cache
def word_mask(word: str) -> Image.Image:
    """The written word as a mask."""
    font = ImageFont.load_default(46)
    left, top, right, bottom = font.getbbox(word, stroke_width=1)
    mask = Image.new("L", (int(right - left) + 2, int(bottom - top) + 2))
    pen = ImageDraw.Draw(mask)
    pen.text((1 - left, 1 - top), word, fill=255, font=font, stroke_width=1)
    return mask


def render(scene: dict[str, Any]) -> Image.Image:
    """The image of a record: RGB, 128 x 128."""
    jitter = iter(scene["jitter"])
    image = background(scene["background_color"], scene["pattern"]).copy()
    pen = ImageDraw.Draw(image)
    for thing in scene["objects"]:
        row, column = divmod(PLACES.index(thing["place"]), 2)
        x = (column + 0.5) * SIDE / 2 + (next(jitter) - 0.5) * 8
        y = (row + 0.5) * SIDE / 2 + (next(jitter) - 0.5) * 8
        radius = SIZES[thing["size"]] + (next(jitter) - 0.5) * 4
        shade = (next(jitter) - 0.5) * 20
        color = tuple(int(min(255, max(0, c + shade))) for c in COLORS[thing["color"]])
        if thing["shape"] in ("circle", "ring"):
            draw_circle(pen, x, y, radius, color, 5)
        else:
            corners = [(x + a * radius, y + b * radius) for a, b in polygon(thing["shape"])]
            pen.polygon(corners, fill=color, outline=INK, width=5)
        if thing["shape"] == "ring":
            draw_circle(pen, x, y, radius * 0.4, BACKGROUND_COLORS[scene["background_color"]], 2)
    if scene["word"]:
        mask = word_mask(scene["word"])
        x = (SIDE - mask.width) / 2 + (next(jitter) - 0.5) * 6
        middle = (ROWS.index(scene["row"]) + 0.5) * SIDE / 2
        y = middle - mask.height / 2 + (next(jitter) - 0.5) * 4
        image.paste(INK, (int(x), max(0, int(y))), mask)
    return image


def draw_circle(pen: ImageDraw.ImageDraw, x: float, y: float, radius: float, color: tuple,
                outline: int) -> None:
    pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color, outline=INK,
                width=outline)

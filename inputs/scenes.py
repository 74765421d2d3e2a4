"""The embedded data set: small pictures with dense captions, drawn by Pillow as a function of (seed, split, index).

A scene has one to three objects (two at most beside a word), each with a color, shape, size and place, on a background with a color and a pattern,
and half of the scenes have a short word written across one row. Captions are dense, in three wordings, and come with
the record that they state: so a generated caption can be graded in any wording (`parse`, `grade`), and the lowest loss
that can be had without looking at the picture is a closed formula (`surprise`). It stands in for the paper's
Recap-DataComp-1B at a size where seeing takes minutes to learn, with its three kinds of caption (Table 6), by name of field:

txt          dense: all that is in the picture
web          alt text as found on the web: one object, or the word; often beside the point, sometimes wrong
conditioned  dense, by one who has read the alt text: what it names comes first, and the choice of words varies

    python -m inputs.scenes         writes scenes.png, a sheet of scenes with their captions
"""
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE = 128  # pixels of a drawn scene; readers resize it
COLORS = {"red": (214, 40, 40), "orange": (245, 132, 31), "yellow": (250, 217, 50), "green": (46, 160, 67),
           "cyan": (70, 205, 220), "blue": (40, 80, 220), "purple": (130, 50, 180), "pink": (250, 130, 190)}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = {"small": 17.0, "big": 27.0}  # radius in pixels
BACKGROUND_COLORS = {"white": (250, 250, 250), "gray": (178, 178, 178), "tan": (222, 190, 140), "mint": (178, 226, 196)}
INK = (10, 10, 10)  # of outlines and letters
PATTERNS = ("plain", "striped", "dotted")
PLACES = ("top left", "top right", "bottom left", "bottom right")
ROWS = ("top", "bottom")  # where a word may stand; objects then keep out of that row
WORDS = ("cat", "dog", "sun", "bus", "hat", "key", "map", "owl", "bird", "book", "fish", "frog", "lamp", "milk", "ship", "tree")
WORDINGS = 3
POINT, WRONG = 0.5, 0.15  # shares of alt texts that tell of the picture, and that look so but are drawn blindly; the rest are:
BESIDE = ("free shipping today", "image not found", "click to enlarge", "best offer", "untitled", "new in stock")
TAILS = ("", " for sale", " picture")


def sample_scene(seed: int, split: str, index: int) -> dict[str, Any]:
    """What is in the scene, and in which wording its caption is. Objects are in reading order, one a place.
    `web` is its alt text, `choices` are the numbers in 0..1 by which a conditioned caption takes synonyms, and `jitter`
    those that the drawing, and no caption, depends on."""
    drawn = np.random.default_rng((seed, ("train", "val").index(split), index)).random(80).tolist()
    u, choices, v = iter(drawn[:48]), drawn[48:64], iter(drawn[64:])

    def pick(options):
        return options[int(next(u) * len(options))]

    word = pick(WORDS) if next(u) < 0.5 else None
    row = pick(ROWS) if word else None
    free = [i for i in range(4) if row is None or i // 2 != ROWS.index(row)]
    count = 1 + pick(range(len(free) - (not word)))
    places = sorted(free.pop(pick(range(len(free)))) for _ in range(count))
    objects = [{"size": pick(tuple(SIZES)), "color": pick(tuple(COLORS)), "shape": pick(SHAPES), "place": PLACES[i]}
               for i in places]
    return {"objects": objects, "background_color": pick(tuple(BACKGROUND_COLORS)), "pattern": pick(PATTERNS), "word": word, "row": row,
            "wording": pick(range(WORDINGS)), "jitter": list(u), "web": alt_text(objects, word, v), "choices": choices}


def alt_text(objects: list[dict], word: str | None, u: Iterator[float]) -> str:
    """What a web page may say of such a picture."""
    def pick(options):
        return options[int(next(u) * len(options))]

    kind = next(u)
    if kind < POINT and word and next(u) < 0.5:
        return f"sign {word}"
    if kind < POINT:
        named = pick(objects)
    elif kind < POINT + WRONG:
        named = {"color": pick(tuple(COLORS)), "shape": pick(SHAPES)}
    else:
        return pick(BESIDE)
    return f"{named['color']} {named['shape']}{pick(TAILS)}"


@functools.cache
def outline(shape: str) -> np.ndarray:
    """Corners of a polygon in a circle of radius 1."""
    if shape == "cross":
        a, b = 0.36, 0.95
        return np.array([(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)])
    corners = {"square": 4, "triangle": 3, "star": 10}[shape]
    turn = np.arange(corners) * 2 * np.pi / corners + (np.pi / 4 if shape == "square" else 0)
    radius = np.where(np.arange(corners) % 2, 0.45, 1.1) if shape == "star" else {"square": 1.2, "triangle": 1.15}[shape]
    return np.stack([np.sin(turn) * radius, -np.cos(turn) * radius], axis=1) + ((0, 0.15) if shape == "triangle" else 0)


@functools.cache
def background(background_color: str, pattern: str) -> Image.Image:
    """A color, and a darker one where the pattern is."""
    picture = Image.new("RGB", (SIDE, SIDE), BACKGROUND_COLORS[background_color])
    if pattern != "plain":
        y, x = np.mgrid[:SIDE, :SIDE]
        on = (x + y) // 8 % 2 == 0 if pattern == "striped" else (x % 16 - 8) ** 2 + (y % 16 - 8) ** 2 < 16
        picture.paste(tuple(c - 24 for c in BACKGROUND_COLORS[background_color]), None, Image.fromarray((on * 255).astype(np.uint8)))
    return picture


@functools.cache
def lettering(word: str) -> Image.Image:
    """The word as a mask."""
    font = ImageFont.load_default(46)
    left, top, right, bottom = font.getbbox(word, stroke_width=1)
    mask = Image.new("L", (int(right - left) + 2, int(bottom - top) + 2))
    ImageDraw.Draw(mask).text((1 - left, 1 - top), word, fill=255, font=font, stroke_width=1)
    return mask


def render(scene: dict[str, Any]) -> Image.Image:
    """The picture of a record: RGB, 128 x 128."""
    u = iter(scene["jitter"])
    picture = background(scene["background_color"], scene["pattern"]).copy()
    pen = ImageDraw.Draw(picture)
    for o in scene["objects"]:
        row, column = divmod(PLACES.index(o["place"]), 2)
        x, y = ((i + 0.5) * SIDE / 2 + (next(u) - 0.5) * 8 for i in (column, row))
        r = SIZES[o["size"]] + (next(u) - 0.5) * 4
        shade = (next(u) - 0.5) * 20
        color = tuple(int(min(255, max(0, c + shade))) for c in COLORS[o["color"]])
        if o["shape"] in ("circle", "ring"):
            pen.ellipse((x - r, y - r, x + r, y + r), fill=color, outline=INK, width=5)
            if o["shape"] == "ring":
                hole = r * 0.4
                pen.ellipse((x - hole, y - hole, x + hole, y + hole), fill=BACKGROUND_COLORS[scene["background_color"]], outline=INK, width=2)
        else:
            pen.polygon([(x + a * r, y + b * r) for a, b in outline(o["shape"]).tolist()], fill=color, outline=INK, width=5)
    if scene["word"]:
        mask = lettering(scene["word"])
        x = (SIDE - mask.width) / 2 + (next(u) - 0.5) * 6
        y = (ROWS.index(scene["row"]) + 0.5) * SIDE / 2 - mask.height / 2 + (next(u) - 0.5) * 4
        picture.paste(INK, (int(x), max(0, int(y))), mask)
    return picture

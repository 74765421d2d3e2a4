"""The embedded data set: small pictures with dense captions, drawn by Pillow as a function of (seed, split, index).

A scene has one to three objects (two at most beside a word), each with a colour, shape, size and place, on a background with a tone and a pattern,
and half of the scenes have a short word written across one row. Captions are dense, in three wordings, and come with
the record that they state: so a generated caption can be graded in any wording (`parse`, `grade`), and the lowest loss
that can be had without looking at the picture is a closed formula (`surprise`). It stands in for the paper's
Recap-DataComp-1B at a size where seeing takes minutes to learn, with its three kinds of caption (Table 6), by name of field:

txt          dense: all that is in the picture
web          alt text as found on the web: one object, or the word; often beside the point, sometimes wrong
conditioned  dense, by one who has read the alt text: what it names comes first, and the choice of words varies

    python scenes.py         writes scenes.png, a sheet of scenes with their captions
"""
import functools
import itertools
import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE = 128  # pixels of a drawn scene; readers resize it
COLOURS = {"red": (214, 40, 40), "orange": (245, 132, 31), "yellow": (250, 217, 50), "green": (46, 160, 67),
           "cyan": (70, 205, 220), "blue": (40, 80, 220), "purple": (130, 50, 180), "pink": (250, 130, 190)}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = {"small": 17.0, "big": 27.0}  # radius in pixels
TONES = {"white": (250, 250, 250), "gray": (178, 178, 178), "tan": (222, 190, 140), "mint": (178, 226, 196)}
INK = (10, 10, 10)  # of outlines and letters
PATTERNS = ("plain", "striped", "dotted")
PLACES = ("top left", "top right", "bottom left", "bottom right")
ROWS = ("top", "bottom")  # where a word may stand; objects then keep out of that row
WORDS = ("cat", "dog", "sun", "bus", "hat", "key", "map", "owl", "bird", "book", "fish", "frog", "lamp", "milk", "ship", "tree")
NUMBERS = ("no", "one", "two", "three")
WORDINGS = 3
FIELDS = ("txt", "web", "conditioned")
POINT, WRONG = 0.5, 0.15  # shares of alt texts that tell of the picture, and that look so but are drawn blindly; the rest are:
BESIDE = ("free shipping today", "image not found", "click to enlarge", "best offer", "untitled", "new in stock")
TAILS = ("", " for sale", " picture")
SYNONYMS = {"big": "large", "small": "little", "circle": "disc", "square": "box", "ring": "hoop", "purple": "violet", "gray": "grey",
            "plain": "blank", "dotted": "spotted"}
BASIC = {other: word for word, other in SYNONYMS.items()}


def record(seed: int, split: str, index: int) -> dict[str, Any]:
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
    objects = [{"size": pick(tuple(SIZES)), "colour": pick(tuple(COLOURS)), "shape": pick(SHAPES), "place": PLACES[i]}
               for i in places]
    return {"objects": objects, "tone": pick(tuple(TONES)), "pattern": pick(PATTERNS), "word": word, "row": row,
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
        named = {"colour": pick(tuple(COLOURS)), "shape": pick(SHAPES)}
    else:
        return pick(BESIDE)
    return f"{named['colour']} {named['shape']}{pick(TAILS)}"


def leads(scene: dict[str, Any]) -> list[float]:
    """How probable it is that a conditioned caption of this record begins with each of its objects: with the first, in
    reading order, that has the named colour and shape; else with the first of all."""
    pairs = [(o["colour"], o["shape"]) for o in scene["objects"]]
    share, blind = POINT * (0.5 if scene["word"] else 1) / len(pairs), WRONG / (len(COLOURS) * len(SHAPES))
    named = [0.0 if pair in pairs[:i] else share * pairs.count(pair) + blind for i, pair in enumerate(pairs)]
    return [1 - sum(named[1:]), *named[1:]]


def surprise(scene: dict[str, Any], field: str = "txt") -> float:
    """-log of the caption's probability, in nats, for one who knows the generator and not the picture. Record and
    wording (and lead and synonyms) fix a dense caption and the other way round, and how likely an alt text is follows
    from its form; so this is exact: no captioner can do better without looking."""
    if field == "web":
        if scene["web"] in BESIDE:
            return -math.log((1 - POINT - WRONG) / len(BESIDE))
        if scene["web"].startswith("sign "):
            return -math.log(POINT / 2 / 2 / len(WORDS))  # half of the scenes have a word
        return -math.log((POINT * 3 / 4 + WRONG) / (len(COLOURS) * len(SHAPES) * len(TAILS)))
    if field == "conditioned":
        options = sum(word in SYNONYMS for word in re.findall("[a-z]+", caption(scene)))
        return surprise(scene) - math.log(leads(scene)[lead(scene)]) + options * math.log(2)
    n, free, most = len(scene["objects"]), *((2, 2) if scene["word"] else (4, 3))
    choices = (2 * (len(WORDS) * len(ROWS) if scene["word"] else 1) * most * math.comb(free, n)
               * (len(SIZES) * len(COLOURS) * len(SHAPES)) ** n * len(TONES) * len(PATTERNS))
    return math.log(choices) + math.log(WORDINGS)


# ------------------------------------------------------------------------------------------------------------- caption
def lead(scene: dict[str, Any]) -> int:
    """The object that a conditioned caption begins with: the first that the alt text names, if it does."""
    return next((i for i, o in enumerate(scene["objects"]) if scene["web"].split()[:2] == [o["colour"], o["shape"]]), 0)


def caption(scene: dict[str, Any], field: str = "txt") -> str:
    """The record in words, of a kind in FIELDS; of a dense caption, every wording states all of it."""
    if field == "web":
        return scene["web"]
    if field == "conditioned":
        rest, choice = list(scene["objects"]), iter(scene["choices"])
        text = caption(scene | {"objects": [rest.pop(lead(scene)), *rest]})
        return re.sub("[a-z]+", lambda m: SYNONYMS[m[0]] if m[0] in SYNONYMS and next(choice) < 0.5 else m[0], text)
    ground = f"{scene['pattern']} {scene['tone']}"
    objects = [(o["place"], o["size"], o["colour"], o["shape"]) for o in scene["objects"]]
    word, row = scene["word"], scene["row"]
    if scene["wording"] == 0:
        text = ", ".join(f"{p} a {s} {c} {f}" for p, s, c, f in objects) + f", on {ground}."
        return text + (f" {row} the word {word}." if word else "")
    if scene["wording"] == 1:
        text = f"{ground} background. " + " ".join(f"{p}: {s} {c} {f}." for p, s, c, f in objects)
        return text + (f" {row}: it says {word}." if word else "")
    text = f"{NUMBERS[len(objects)]} on {ground}: " + ", ".join(f"{p} {c} {f} {s}" for p, s, c, f in objects)
    return text + (f", {row} reading {word}." if word else ".")


def any_of(name: str, options: Any) -> str:
    return f"(?P<{name}>" + "|".join(sorted(options, key=len, reverse=True)) + ")"


def parse(text: str) -> dict[str, Any] | None:
    """The record that a caption states, by the grammar of `caption`; None if it is in none of the wordings. Spacing
    around punctuation does not matter, for a tokenizer does not keep it; nor do synonyms."""
    text = re.sub(r"\s*([.,:])\s*", r"\1", text.strip().lower())
    text = re.sub("[a-z]+", lambda m: BASIC.get(m[0], m[0]), text)
    size, colour, shape, place = (any_of(*x) for x in (("size", SIZES), ("colour", COLOURS), ("shape", SHAPES), ("place", PLACES)))
    ground = any_of("pattern", PATTERNS) + " " + any_of("tone", TONES)
    word, row = r"(?P<word>[a-z]+)", any_of("row", ROWS)
    number = any_of("number", NUMBERS)
    wordings = (
        (r"(?P<objects>.*),on " + ground + rf"\.(?:{row} the word {word}\.)?", ",", rf"{place} a {size} {colour} {shape}"),
        (ground + rf" background\.(?P<objects>.*?)\.(?:{row}:it says {word}\.)?", r"\.", rf"{place}:{size} {colour} {shape}"),
        (number + " on " + ground + rf":(?P<objects>.*?)(?:,{row} reading {word})?\.", ",", rf"{place} {colour} {shape} {size}"),
    )
    for whole, between, one in wordings:
        if found := re.fullmatch(whole, text):
            parts = [re.fullmatch(one, part) for part in re.split(between, found["objects"])]
            stated = found.groupdict()
            if all(parts) and ("number" not in stated or NUMBERS.index(stated["number"]) == len(parts)):
                objects = [{k: part[k] for k in ("size", "colour", "shape", "place")} for part in parts]
                return {"objects": objects} | {k: stated[k] for k in ("tone", "pattern", "word", "row")}
    return None


def grade(text: str, scene: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """(right, out of) by attribute for one generated caption. "object" asks for colour, shape and place together,
    "exact" for the whole record and nothing false. Objects are paired so that most attributes agree; one that the
    caption invents, or leaves out, counts as wrong. A caption in no wording has everything wrong."""
    stated, truth = parse(text) or {"objects": []}, scene["objects"]
    said = stated["objects"][:len(PLACES)]
    most = max(len(truth), len(said))
    size = max(most, 1)
    keys = ("colour", "shape", "size", "place")
    same = np.array([[[a[k] == b[k] for k in keys] for b in said + [{k: None for k in keys}] * (size - len(said))]
                     for a in truth])                                           # (true, said, attribute)
    pairing = max(itertools.permutations(range(size), len(truth)), key=lambda p: sum(same[i, j].sum() for i, j in enumerate(p)))
    right = np.array([same[i, j] for i, j in enumerate(pairing)])               # (true, attribute)
    ground = [stated.get(k) == scene[k] for k in ("tone", "pattern")]
    out = {k: (int(right[:, i].sum()), most) for i, k in enumerate(keys)}
    out["object"] = (int((right[:, 0] & right[:, 1] & right[:, 3]).sum()), most)
    out["count"] = (int(len(said) == len(truth)), 1)
    out["background"] = (int(all(ground)), 1)
    if scene["word"]:
        out["word"] = (int(stated.get("word") == scene["word"]), 1)
    exact = all(ground) and bool(right.all()) and len(said) == len(truth) and all(stated.get(k) == scene[k] for k in ("word", "row"))
    out["exact"] = (int(exact), 1)
    return out


# --------------------------------------------------------------------------------------------------------------- paint
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
def background(tone: str, pattern: str) -> Image.Image:
    """A tone, and a darker one where the pattern is."""
    picture = Image.new("RGB", (SIDE, SIDE), TONES[tone])
    if pattern != "plain":
        y, x = np.mgrid[:SIDE, :SIDE]
        on = (x + y) // 8 % 2 == 0 if pattern == "striped" else (x % 16 - 8) ** 2 + (y % 16 - 8) ** 2 < 16
        picture.paste(tuple(c - 24 for c in TONES[tone]), None, Image.fromarray((on * 255).astype(np.uint8)))
    return picture


@functools.cache
def lettering(word: str) -> Image.Image:
    """The word as a mask."""
    font = ImageFont.load_default(46)
    left, top, right, bottom = font.getbbox(word, stroke_width=1)
    mask = Image.new("L", (int(right - left) + 2, int(bottom - top) + 2))
    ImageDraw.Draw(mask).text((1 - left, 1 - top), word, fill=255, font=font, stroke_width=1)
    return mask


def paint(scene: dict[str, Any]) -> Image.Image:
    """The picture of a record: RGB, 128 x 128."""
    u = iter(scene["jitter"])
    picture = background(scene["tone"], scene["pattern"]).copy()
    pen = ImageDraw.Draw(picture)
    for o in scene["objects"]:
        row, column = divmod(PLACES.index(o["place"]), 2)
        x, y = ((i + 0.5) * SIDE / 2 + (next(u) - 0.5) * 8 for i in (column, row))
        r = SIZES[o["size"]] + (next(u) - 0.5) * 4
        shade = (next(u) - 0.5) * 20
        colour = tuple(int(min(255, max(0, c + shade))) for c in COLOURS[o["colour"]])
        if o["shape"] in ("circle", "ring"):
            pen.ellipse((x - r, y - r, x + r, y + r), fill=colour, outline=INK, width=5)
            if o["shape"] == "ring":
                hole = r * 0.4
                pen.ellipse((x - hole, y - hole, x + hole, y + hole), fill=TONES[scene["tone"]], outline=INK, width=2)
        else:
            pen.polygon([(x + a * r, y + b * r) for a, b in outline(o["shape"]).tolist()], fill=colour, outline=INK, width=5)
    if scene["word"]:
        mask = lettering(scene["word"])
        x = (SIDE - mask.width) / 2 + (next(u) - 0.5) * 6
        y = (ROWS.index(scene["row"]) + 0.5) * SIDE / 2 - mask.height / 2 + (next(u) - 0.5) * 4
        picture.paste(INK, (int(x), max(0, int(y))), mask)
    return picture


if __name__ == "__main__":
    sheet = Image.new("RGB", (4 * 320, 4 * 190), "white")
    for n in range(16):
        scene, x, y = record(0, "train", n), n % 4 * 320 + 8, n // 4 * 190 + 8
        sheet.paste(paint(scene), (x, y))
        words, lines = caption(scene).split(), [""]
        for w in words:
            lines = lines + [w] if len(lines[-1] + w) > 48 else lines[:-1] + [(lines[-1] + " " + w).strip()]
        ImageDraw.Draw(sheet).multiline_text((x, y + 134), "\n".join(lines), fill="black")
    sheet.save("scenes.png")
    print("scenes.png: 16 scenes with their captions")

"""TODO."""
import itertools
import math
import re
from typing import Any

import numpy as np

from inputs.scenes import BESIDE, COLORS, PATTERNS, PLACES, POINT, ROWS, SHAPES, SIZES, TAILS, BACKGROUND_COLORS, WORDINGS, WORDS, WRONG

NUMBERS = ("no", "one", "two", "three")
CAPTION_FIELDS = ("txt", "web", "conditioned")
SYNONYMS = {"big": "large", "small": "little", "circle": "disc", "square": "box", "ring": "hoop", "purple": "violet", "gray": "grey",
            "plain": "blank", "dotted": "spotted"}
BASIC = {other: word for word, other in SYNONYMS.items()}


def lead_probs(scene: dict[str, Any]) -> list[float]:
    """How probable it is that a conditioned caption of this record begins with each of its objects: with the first, in
    reading order, that has the named color and shape; else with the first of all."""
    pairs = [(o["color"], o["shape"]) for o in scene["objects"]]
    share, blind = POINT * (0.5 if scene["word"] else 1) / len(pairs), WRONG / (len(COLORS) * len(SHAPES))
    named = [0.0 if pair in pairs[:i] else share * pairs.count(pair) + blind for i, pair in enumerate(pairs)]
    return [1 - sum(named[1:]), *named[1:]]


def caption_nats(scene: dict[str, Any], field: str = "txt") -> float:
    """-log of the caption's probability, in nats, for one who knows the generator and not the picture. Record and
    wording (and lead and synonyms) fix a dense caption and the other way round, and how likely an alt text is follows
    from its form; so this is exact: no captioner can do better without looking."""
    if field == "web":
        if scene["web"] in BESIDE:
            return -math.log((1 - POINT - WRONG) / len(BESIDE))
        if scene["web"].startswith("sign "):
            return -math.log(POINT / 2 / 2 / len(WORDS))  # half of the scenes have a word
        return -math.log((POINT * 3 / 4 + WRONG) / (len(COLORS) * len(SHAPES) * len(TAILS)))
    if field == "conditioned":
        options = sum(word in SYNONYMS for word in re.findall("[a-z]+", caption(scene)))
        return caption_nats(scene) - math.log(lead_probs(scene)[lead_object(scene)]) + options * math.log(2)
    n, free, most = len(scene["objects"]), *((2, 2) if scene["word"] else (4, 3))
    choices = (2 * (len(WORDS) * len(ROWS) if scene["word"] else 1) * most * math.comb(free, n)
               * (len(SIZES) * len(COLORS) * len(SHAPES)) ** n * len(BACKGROUND_COLORS) * len(PATTERNS))
    return math.log(choices) + math.log(WORDINGS)


def lead_object(scene: dict[str, Any]) -> int:
    """The object that a conditioned caption begins with: the first that the alt text names, if it does."""
    return next((i for i, o in enumerate(scene["objects"]) if scene["web"].split()[:2] == [o["color"], o["shape"]]), 0)


def caption(scene: dict[str, Any], field: str = "txt") -> str:
    """The record in words, of a kind in FIELDS; of a dense caption, every wording states all of it."""
    if field == "web":
        return scene["web"]
    if field == "conditioned":
        rest, choice = list(scene["objects"]), iter(scene["choices"])
        text = caption(scene | {"objects": [rest.pop(lead_object(scene)), *rest]})
        return re.sub("[a-z]+", lambda m: SYNONYMS[m[0]] if m[0] in SYNONYMS and next(choice) < 0.5 else m[0], text)
    ground = f"{scene['pattern']} {scene['background_color']}"
    objects = [(o["place"], o["size"], o["color"], o["shape"]) for o in scene["objects"]]
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


def parse_caption(text: str) -> dict[str, Any] | None:
    """The record that a caption states, by the grammar of `caption`; None if it is in none of the wordings. Spacing
    around punctuation does not matter, for a tokenizer does not keep it; nor do synonyms."""
    text = re.sub(r"\s*([.,:])\s*", r"\1", text.strip().lower())
    text = re.sub("[a-z]+", lambda m: BASIC.get(m[0], m[0]), text)
    size, color, shape, place = (any_of(*x) for x in (("size", SIZES), ("color", COLORS), ("shape", SHAPES), ("place", PLACES)))
    ground = any_of("pattern", PATTERNS) + " " + any_of("background_color", BACKGROUND_COLORS)
    word, row = r"(?P<word>[a-z]+)", any_of("row", ROWS)
    number = any_of("number", NUMBERS)
    wordings = (
        (r"(?P<objects>.*),on " + ground + rf"\.(?:{row} the word {word}\.)?", ",", rf"{place} a {size} {color} {shape}"),
        (ground + rf" background\.(?P<objects>.*?)\.(?:{row}:it says {word}\.)?", r"\.", rf"{place}:{size} {color} {shape}"),
        (number + " on " + ground + rf":(?P<objects>.*?)(?:,{row} reading {word})?\.", ",", rf"{place} {color} {shape} {size}"),
    )
    for whole, between, one in wordings:
        if found := re.fullmatch(whole, text):
            parts = [re.fullmatch(one, part) for part in re.split(between, found["objects"])]
            stated = found.groupdict()
            if all(parts) and ("number" not in stated or NUMBERS.index(stated["number"]) == len(parts)):
                objects = [{k: part[k] for k in ("size", "color", "shape", "place")} for part in parts]
                return {"objects": objects} | {k: stated[k] for k in ("background_color", "pattern", "word", "row")}
    return None


def grade_caption(text: str, scene: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """(right, out of) by attribute for one generated caption. "object" asks for color, shape and place together,
    "exact" for the whole record and nothing false. Objects are paired so that most attributes agree; one that the
    caption invents, or leaves out, counts as wrong. A caption in no wording has everything wrong."""
    stated, truth = parse_caption(text) or {"objects": []}, scene["objects"]
    said = stated["objects"][:len(PLACES)]
    most = max(len(truth), len(said))
    size = max(most, 1)
    keys = ("color", "shape", "size", "place")
    same = np.array([[[a[k] == b[k] for k in keys] for b in said + [{k: None for k in keys}] * (size - len(said))]
                     for a in truth])                                           # (true, said, attribute)
    pairing = max(itertools.permutations(range(size), len(truth)), key=lambda p: sum(same[i, j].sum() for i, j in enumerate(p)))
    right = np.array([same[i, j] for i, j in enumerate(pairing)])               # (true, attribute)
    ground = [stated.get(k) == scene[k] for k in ("background_color", "pattern")]
    out = {k: (int(right[:, i].sum()), most) for i, k in enumerate(keys)}
    out["object"] = (int((right[:, 0] & right[:, 1] & right[:, 3]).sum()), most)
    out["count"] = (int(len(said) == len(truth)), 1)
    out["background"] = (int(all(ground)), 1)
    if scene["word"]:
        out["word"] = (int(stated.get("word") == scene["word"]), 1)
    exact = all(ground) and bool(right.all()) and len(said) == len(truth) and all(stated.get(k) == scene[k] for k in ("word", "row"))
    out["exact"] = (int(exact), 1)
    return out


if __name__ == "__main__":
    from PIL import Image, ImageDraw

    from inputs.scenes import render, sample_scene

    sheet = Image.new("RGB", (4 * 320, 4 * 190), "white")
    for n in range(16):
        scene, x, y = sample_scene(0, "train", n), n % 4 * 320 + 8, n // 4 * 190 + 8
        sheet.paste(render(scene), (x, y))
        words, lines = caption(scene).split(), [""]
        for w in words:
            lines = lines + [w] if len(lines[-1] + w) > 48 else lines[:-1] + [(lines[-1] + " " + w).strip()]
        ImageDraw.Draw(sheet).multiline_text((x, y + 134), "\n".join(lines), fill="black")
    sheet.save("scenes.png")
    print("scenes.png: 16 scenes with their captions")

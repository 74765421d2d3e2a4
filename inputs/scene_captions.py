"""Captions of the synthetic scenes: writing, parsing, grading, and how probable each one is.

Scenes have the paper's three kinds of caption (Table 6), by the name of their field:

txt          dense: all that is in the image, in one of three wordings
web          alt text: one object, or the word; often unrelated to the image, sometimes wrong
conditioned  dense, but the object that the alt text names comes first, and synonyms vary

A generated caption can be parsed and graded in any wording. Because the generator is known, the
best possible loss without seeing the image is an exact figure: the mean of `caption_nats`.

    python -m inputs.scene_captions       writes scenes.png, a sheet of scenes with their captions
"""
import itertools
import math
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from inputs import scenes

CAPTION_FIELDS = ("txt", "web", "conditioned")
NUMBERS = ("no", "one", "two", "three")
SYNONYMS = {"big": "large", "small": "little", "circle": "disc", "square": "box", "ring": "hoop",
            "purple": "violet", "gray": "grey", "plain": "blank", "dotted": "spotted"}
BASIC = {synonym: word for word, synonym in SYNONYMS.items()}


# ----------------------------------------------------------------------------------- writing
def caption(scene: dict[str, Any], field: str = "txt") -> str:
    """The caption of a record, of a kind in CAPTION_FIELDS."""
    if field == "web":
        return scene["web"]
    if field == "txt":
        return dense_caption(scene, scene["objects"])
    others = list(scene["objects"])
    lead = others.pop(lead_object(scene))
    draws = iter(scene["synonym_draws"])

    def vary(match: re.Match) -> str:
        word = match[0]
        return SYNONYMS[word] if word in SYNONYMS and next(draws) < 0.5 else word

    return re.sub("[a-z]+", vary, dense_caption(scene, [lead, *others]))


def dense_caption(scene: dict[str, Any], objects: list[dict[str, str]]) -> str:
    """All of the record, with the objects in this order."""
    ground = f"{scene['pattern']} {scene['background_color']}"
    word, row = scene["word"], scene["row"]
    if scene["wording"] == 0:
        things = ", ".join("{place} a {size} {color} {shape}".format(**o) for o in objects)
        return f"{things}, on {ground}." + (f" {row} the word {word}." if word else "")
    if scene["wording"] == 1:
        things = " ".join("{place}: {size} {color} {shape}.".format(**o) for o in objects)
        return f"{ground} background. {things}" + (f" {row}: it says {word}." if word else "")
    things = ", ".join("{place} {color} {shape} {size}".format(**o) for o in objects)
    text = f"{NUMBERS[len(objects)]} on {ground}: {things}"
    return text + (f", {row} reading {word}." if word else ".")


def lead_object(scene: dict[str, Any]) -> int:
    """The index of the object that a conditioned caption begins with: the first one that the alt
    text names, or 0 if it names none."""
    named = scene["web"].split()[:2]
    for i, thing in enumerate(scene["objects"]):
        if named == [thing["color"], thing["shape"]]:
            return i
    return 0


# ------------------------------------------------------------------------------- probability
def lead_probs(scene: dict[str, Any]) -> list[float]:
    """For each object, the probability that a conditioned caption of this record begins with it."""
    pairs = [(o["color"], o["shape"]) for o in scene["objects"]]
    related = scenes.RELATED_SHARE * (0.5 if scene["word"] else 1) / len(pairs)
    by_chance = scenes.WRONG_SHARE / (len(scenes.COLORS) * len(scenes.SHAPES))
    probs = []
    for i, pair in enumerate(pairs):
        is_twin = pair in pairs[:i]  # the earlier object of this color and shape leads
        probs.append(0.0 if is_twin else related * pairs.count(pair) + by_chance)
    return [1 - sum(probs[1:]), *probs[1:]]


def caption_nats(scene: dict[str, Any], field: str = "txt") -> float:
    """-log of the caption's probability, in nats, under the generator without the image.

    It is exact. Record and wording determine a dense caption and can be recovered from it; the
    same holds for lead and synonyms. The probability of an alt text follows from its form. So no
    captioner reaches a lower mean loss without seeing the image."""
    if field == "web":
        return alt_text_nats(scene["web"])
    if field == "conditioned":
        words = re.findall("[a-z]+", caption(scene))
        num_choices = sum(word in SYNONYMS for word in words)
        lead_prob = lead_probs(scene)[lead_object(scene)]
        return caption_nats(scene) - math.log(lead_prob) + num_choices * math.log(2)
    objects = scene["objects"]
    object_values = len(scenes.SIZES) * len(scenes.COLORS) * len(scenes.SHAPES)
    backgrounds = len(scenes.BACKGROUND_COLORS) * len(scenes.PATTERNS)
    if scene["word"]:
        words, most, cells = len(scenes.WORDS) * len(scenes.ROWS), 2, 2
    else:
        words, most, cells = 1, 3, 4
    records = 2 * words * most * math.comb(cells, len(objects))
    records *= object_values ** len(objects) * backgrounds
    return math.log(records) + math.log(scenes.WORDINGS)


def alt_text_nats(text: str) -> float:
    if text in scenes.UNRELATED:
        return -math.log((1 - scenes.RELATED_SHARE - scenes.WRONG_SHARE) / len(scenes.UNRELATED))
    if text.startswith("sign "):  # half of the scenes have a word, and half of their texts name it
        return -math.log(scenes.RELATED_SHARE / 2 / 2 / len(scenes.WORDS))
    texts = len(scenes.COLORS) * len(scenes.SHAPES) * len(scenes.SUFFIXES)
    return -math.log((scenes.RELATED_SHARE * 3 / 4 + scenes.WRONG_SHARE) / texts)


# ----------------------------------------------------------------------------------- parsing
def one_of(name: str, options: Iterable[str]) -> str:
    """A regular expression for one of the options, as a group of this name."""
    return f"(?P<{name}>" + "|".join(sorted(options, key=len, reverse=True)) + ")"


def wording_patterns() -> tuple[tuple[str, str, str], ...]:
    """(caption, separator of objects, object) as regular expressions, for each wording."""
    size, color = one_of("size", scenes.SIZES), one_of("color", scenes.COLORS)
    shape, place = one_of("shape", scenes.SHAPES), one_of("place", scenes.PLACES)
    background_color = one_of("background_color", scenes.BACKGROUND_COLORS)
    ground = one_of("pattern", scenes.PATTERNS) + " " + background_color
    row, number, word = one_of("row", scenes.ROWS), one_of("number", NUMBERS), "(?P<word>[a-z]+)"
    return (
        (rf"(?P<objects>.*),on {ground}\.(?:{row} the word {word}\.)?",
         ",", rf"{place} a {size} {color} {shape}"),
        (rf"{ground} background\.(?P<objects>.*?)\.(?:{row}:it says {word}\.)?",
         r"\.", rf"{place}:{size} {color} {shape}"),
        (rf"{number} on {ground}:(?P<objects>.*?)(?:,{row} reading {word})?\.",
         ",", rf"{place} {color} {shape} {size}"))


GRAMMAR = wording_patterns()


def parse_caption(text: str) -> dict[str, Any] | None:
    """The record that a dense caption states, or None if it is in none of the wordings. Spaces
    around punctuation do not matter, because a tokenizer does not keep them; nor do synonyms."""
    text = re.sub(r"\s*([.,:])\s*", r"\1", text.strip().lower())
    text = re.sub("[a-z]+", lambda match: BASIC.get(match[0], match[0]), text)
    for pattern, separator, object_pattern in GRAMMAR:
        match = re.fullmatch(pattern, text)
        if match is None:
            continue
        stated = match.groupdict()
        parts = re.split(separator, stated.pop("objects"))
        objects = [re.fullmatch(object_pattern, part) for part in parts]
        number = stated.pop("number", None)
        number_right = number is None or NUMBERS.index(number) == len(objects)
        if all(objects) and number_right:
            return stated | {"objects": [o.groupdict() for o in objects]}
    return None


# ----------------------------------------------------------------------------------- grading
ATTRIBUTES = ("color", "shape", "size", "place")


def grade_caption(text: str, scene: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """(right, out of) by attribute, for one generated caption.

    Objects are paired so that most attributes agree. An object that the caption invents or leaves
    out counts as wrong. "object" needs color, shape and place to be right together, "exact" the
    complete record and nothing else. A caption in no wording has everything wrong."""
    stated = parse_caption(text) or {"objects": []}
    true_objects, stated_objects = scene["objects"], stated["objects"][:len(scenes.PLACES)]
    out_of = max(len(true_objects), len(stated_objects))
    right = pair_objects(true_objects, stated_objects)
    count_right = len(stated_objects) == len(true_objects)
    background_right = all(stated.get(key) == scene[key] for key in ("background_color", "pattern"))
    word_right = stated.get("word") == scene["word"]
    row_right = stated.get("row") == scene["row"]
    exact = background_right and word_right and row_right and count_right and right.all()

    grades = {name: (int(right[:, i].sum()), out_of) for i, name in enumerate(ATTRIBUTES)}
    color, shape, _, place = right.T
    grades["object"] = (int((color & shape & place).sum()), out_of)
    grades["count"] = (int(count_right), 1)
    grades["background"] = (int(background_right), 1)
    if scene["word"]:
        grades["word"] = (int(word_right), 1)
    grades["exact"] = (int(exact), 1)
    return grades


def pair_objects(true_objects: list[dict], stated_objects: list[dict]) -> np.ndarray:
    """(true objects, attributes) bool: which attributes are right, in the best pairing."""
    size = max(len(true_objects), len(stated_objects), 1)
    same = np.zeros((len(true_objects), size, len(ATTRIBUTES)), bool)
    for i, j in itertools.product(range(len(true_objects)), range(len(stated_objects))):
        same[i, j] = [true_objects[i][name] == stated_objects[j][name] for name in ATTRIBUTES]
    rows = np.arange(len(true_objects))
    pairings = itertools.permutations(range(size), len(true_objects))
    return max((same[rows, list(pairing)] for pairing in pairings), key=np.sum)


if __name__ == "__main__":
    import textwrap

    from PIL import Image, ImageDraw

    sheet = Image.new("RGB", (4 * 320, 4 * 144), "white")
    for n in range(16):
        scene = scenes.sample_scene(0, "train", n)
        x, y = n % 4 * 320 + 8, n // 4 * 144 + 8
        sheet.paste(scenes.render(scene), (x, y))
        lines = textwrap.fill(caption(scene), 26)
        ImageDraw.Draw(sheet).multiline_text((x + 136, y), lines, fill="black")
    sheet.save("scenes.png")
    print("scenes.png: 16 scenes with their captions")

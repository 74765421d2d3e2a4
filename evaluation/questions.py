"""Questions about the embedded scenes, each with its one right answer, and what of them is had right without looking.

They are made from the record: color, shape, size, place, what lies beside what, how many, which word is written (as TextVQA and OCR ask of
photographs), and whether something is there (as POPE asks: as often yes as no, and what is not there shares an attribute with what is).

    python -m evaluation.questions         asks about three scenes
"""
import collections
from typing import Any

import numpy as np

from inputs import scene_captions, scenes

KINDS = ("color", "shape", "size", "place", "relation", "count", "word", "presence")
COUNTS = ("zero", "one", "two", "three")
SIDES = {"left of": (1, -1), "right of": (1, 1), "above": (0, -1), "below": (0, 1)}  # axis (row, column) of a place, and the way along it
OWN = 1 << 20               # added to the seed of the scenes: these are pictures that no run was trained on


def cell(thing: dict[str, str]) -> tuple[int, int]:
    """Row and column of an object."""
    return divmod(scenes.PLACES.index(thing["place"]), 2)


def names(thing: dict[str, str], objects: list[dict[str, str]], without: str = "") -> list[str]:
    """What an object may be called so that it is no other of the objects: "red star", "star at the top left", "object at the top left" and
    the like, none of which says the attribute `without`."""
    found = []
    for size in ("", thing["size"]):
        for color in ("", thing["color"]):
            for shape in ("object", thing["shape"]):
                said = {k: v for k, v in (("size", size), ("color", color), ("shape", shape)) if v not in ("", "object")}
                if without in said or len(said) > 2:
                    continue
                text = " ".join(w for w in (size, color, shape) if w)
                if said and sum(all(o[k] == v for k, v in said.items()) for o in objects) == 1:
                    found.append(text)
                if without != "place" and len(said) < 2:
                    found.append(f"{text} at the {thing['place']}")
    return found


def questions(scene: dict[str, Any], key: tuple[int, ...]) -> list[tuple[str, str, str]]:
    """(kind, question, answer) of each kind that the scene allows, as a function of record and key: wordings and objects are drawn. Each has
    one right answer. Of presence there are two questions, one whose answer is yes and one whose answer is no."""
    rng, objects, asked = np.random.default_rng(key), scene["objects"], []

    def pick(options: Any) -> Any:
        return options[int(rng.random() * len(options))]

    def ask(kind: str, answer: str, *wordings: str) -> None:
        asked.append((kind, pick(wordings) + "?", answer))

    for kind, wordings in (("color", ("what color is the {}", "which color has the {}")), ("shape", ("what shape is the {}", "which shape has the {}")),
                           ("size", ("what size is the {}", "is the {} big or small")), ("place", ("where is the {}", "in which corner is the {}"))):
        thing = pick(objects)
        if called := names(thing, objects, kind):
            ask(kind, thing[kind], *(w.format(pick(called)) for w in wordings))

    beside = []  # what lies in the half of the picture on one side of an object, where that is one thing
    for thing in objects:
        for side, (axis, way) in SIDES.items():
            there = [o for o in objects if (cell(o)[axis] - cell(thing)[axis]) * way > 0]
            if len(there) == 1 and (called := [n for n in names(thing, objects, "place")]):
                beside.append((side, pick(called), there[0]))
    if beside:
        side, called, there = pick(beside)
        ask("relation", f"{there['color']} {there['shape']}", f"what is {side} the {called}", f"which object is {side} the {called}")

    which, options = pick((("", [""]), ("color", list(scenes.COLORS)), ("size", list(scenes.SIZES))))
    if which and rng.random() < 0.75:
        options = [o[which] for o in objects]
    value = pick(options)
    number = sum(not which or o[which] == value for o in objects)
    ask("count", COUNTS[number], *(" ".join(w.format(value).split()) for w in ("how many {} objects are there", "count the {} objects")))
    if scene["word"]:
        ask("word", scene["word"], "what does the text say", "which word is written")

    there = {(o["color"], o["shape"]) for o in objects}
    false = [(c, s) for c in scenes.COLORS for s in scenes.SHAPES if (c, s) not in there and any(c == a or s == b for a, b in there)]
    mixed = [(c, s) for c, s in false if any(c == a for a, _ in there) and any(s == b for _, b in there)]  # the color of one, the shape of another
    for answer, (color, shape) in (("yes", pick(sorted(there))), ("no", pick(mixed if mixed and rng.random() < 0.5 else false))):
        article = "an" if color[0] in "aeiou" else "a"
        ask("presence", answer, f"is there {article} {color} {shape}", f"do you see {article} {color} {shape}")
    return asked


def make_questions(seed: int, split: str, count: int, rounds: int = 1) -> list[list[tuple[str, str, str]]]:
    """The questions of the first `count` scenes of a split, each scene asked `rounds` times over."""
    key = seed, ("train", "val").index(split)
    return [[q for r in range(rounds) for q in questions(scene, (*key, i, r))] for i, scene in enumerate(question_scenes(seed, split, count))]


def question_scenes(seed: int, split: str, count: int) -> list[dict[str, Any]]:
    """The scenes that are asked about."""
    return [scenes.sample_scene(OWN + seed, split, i) for i in range(count)]


def blind_accuracy(train: list, held: list) -> dict[str, float]:
    """The share of held-out answers by kind that is had without the picture: by the commonest answer to the very question in the training
    ones, or to its kind, whichever does better."""
    common: dict[Any, collections.Counter] = collections.defaultdict(collections.Counter)
    for kind, question, answer in (q for asked in train for q in asked):
        common[question][answer] += 1
        common[kind, ""][answer] += 1
    best = {k: c.most_common(1)[0][0] for k, c in common.items()}
    right = collections.defaultdict(list)
    for kind, question, answer in (q for asked in held for q in asked):
        right[kind].append((answer == best.get(question, best[kind, ""]), answer == best[kind, ""]))
    return summary({kind: float(np.mean(pairs, axis=0).max()) for kind, pairs in right.items()})


def summary(shares: dict[str, float]) -> dict[str, float]:
    """By kind, in order, and their mean as "all"."""
    return {k: shares[k] for k in KINDS if k in shares} | {"all": float(np.mean(list(shares.values())))}


if __name__ == "__main__":
    for scene, asked in zip(question_scenes(0, "val", 3), make_questions(0, "val", 3)):
        print(scene_captions.caption(scene))
        for kind, question, answer in asked:
            print(f"    {kind:>9}  {question} {answer}")

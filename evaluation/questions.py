"""Questions about scenes, each with one right answer, and how many need no image to answer.

They are made from the record: color, shape, size, place, what lies beside what, how many, which
word is written (as in TextVQA), and whether something is there (as in POPE: "yes" as often as "no",
and an absent object shares an attribute with a present one).

    python -m evaluation.questions         prints questions about three scenes
"""
import collections
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from inputs import scene_captions, scenes

Question = tuple[str, str, str]  # kind, question, answer
KINDS = ("color", "shape", "size", "place", "relation", "count", "word", "presence")
COUNTS = ("zero", "one", "two", "three")
SIDES = {"left of": (1, -1), "right of": (1, 1),  # axis (row, column) of a place, and direction
         "above": (0, -1), "below": (0, 1)}
SEED_OFFSET = 1 << 20  # added to the seed of the scenes: no run trains on these images
ATTRIBUTE_WORDINGS = {
    "color": ("what color is the {}", "which color has the {}"),
    "shape": ("what shape is the {}", "which shape has the {}"),
    "size": ("what size is the {}", "is the {} big or small"),
    "place": ("where is the {}", "in which corner is the {}")}


def referring_phrases(thing: dict[str, str], objects: list[dict[str, str]],
                      without: str = "") -> list[str]:
    """Phrases that fit `thing` and no other object, such as "red star" or "object at the top left",
    and that do not mention the attribute `without`."""
    phrases = []
    for size in ("", thing["size"]):
        for color in ("", thing["color"]):
            for shape in ("", thing["shape"]):
                pairs = (("size", size), ("color", color), ("shape", shape))
                attributes = {name: value for name, value in pairs if value}
                if without in attributes or len(attributes) > 2:
                    continue
                words = [word for word in (size, color, shape or "object") if word]
                text = " ".join(words)
                fitting = [o for o in objects if attributes.items() <= o.items()]
                if attributes and len(fitting) == 1:
                    phrases.append(text)
                if without != "place" and len(attributes) < 2:
                    phrases.append(f"{text} at the {thing['place']}")
    return phrases


def scene_questions(scene: dict[str, Any], key: tuple[int, ...]) -> list[Question]:
    """Questions of each kind that the scene allows, as a function of the record and the key, by
    which wordings and objects are drawn. Of presence there are two: one "yes", one "no"."""
    rng, objects = np.random.default_rng(key), scene["objects"]
    questions: list[Question] = []

    def pick(options: Sequence) -> Any:
        return options[int(rng.random() * len(options))]

    def ask(kind: str, answer: str, *wordings: str) -> None:
        questions.append((kind, pick(wordings) + "?", answer))

    for kind, wordings in ATTRIBUTE_WORDINGS.items():
        thing = pick(objects)
        phrases = referring_phrases(thing, objects, kind)
        if phrases:
            ask(kind, thing[kind], *[wording.format(pick(phrases)) for wording in wordings])
    neighbors = find_neighbors(objects, pick)
    if neighbors:
        side, phrase, neighbor = pick(neighbors)
        ask("relation", f"{neighbor['color']} {neighbor['shape']}", f"what is {side} the {phrase}",
            f"which object is {side} the {phrase}")
    adjective, number = pick_count(objects, pick, rng)
    named = f"{adjective} objects".strip()
    ask("count", COUNTS[number], f"how many {named} are there", f"count the {named}")
    if scene["word"]:
        ask("word", scene["word"], "what does the text say", "which word is written")
    present = {(o["color"], o["shape"]) for o in objects}
    pairs = [("yes", pick(sorted(present))), ("no", pick_absent(present, pick, rng))]
    for answer, (color, shape) in pairs:
        article = "an" if color[0] in "aeiou" else "a"
        thing = f"{article} {color} {shape}"
        ask("presence", answer, f"is there {thing}", f"do you see {thing}")
    return questions


def find_neighbors(objects: list[dict[str, str]],
                   pick: Callable) -> list[tuple[str, str, dict[str, str]]]:
    """(side, phrase for an object, its neighbor) where exactly one object lies in the half of the
    image on that side of the object."""
    neighbors = []
    for thing in objects:
        for side, (axis, direction) in SIDES.items():
            position = row_and_column(thing)[axis]
            beyond = [o for o in objects
                      if (row_and_column(o)[axis] - position) * direction > 0]
            phrases = referring_phrases(thing, objects, "place")
            if len(beyond) == 1 and phrases:
                neighbors.append((side, pick(phrases), beyond[0]))
    return neighbors


def row_and_column(thing: dict[str, str]) -> tuple[int, int]:
    return divmod(scenes.PLACES.index(thing["place"]), 2)


def pick_count(objects: list[dict[str, str]], pick: Callable,
               rng: np.random.Generator) -> tuple[str, int]:
    """(a color, a size or "", the number of objects that have it). Values that are there are drawn
    more often than others."""
    name, values = pick((("", [""]), ("color", list(scenes.COLORS)), ("size", list(scenes.SIZES))))
    if name and rng.random() < 0.75:
        values = [o[name] for o in objects]
    value = pick(values)
    return value, len([o for o in objects if not name or o[name] == value])


def pick_absent(present: set[tuple[str, str]], pick: Callable,
                rng: np.random.Generator) -> tuple[str, str]:
    """A (color, shape) that no object has, but whose color or shape one has. Often one object has
    the color and another has the shape."""
    colors, shapes = {color for color, _ in present}, {shape for _, shape in present}
    absent, mixed = [], []
    for color in scenes.COLORS:
        for shape in scenes.SHAPES:
            if (color, shape) in present:
                continue
            if color in colors or shape in shapes:
                absent.append((color, shape))
            if color in colors and shape in shapes:
                mixed.append((color, shape))
    if mixed and rng.random() < 0.5:
        return pick(mixed)
    return pick(absent)


def make_questions(seed: int, split: str, count: int) -> list[list[Question]]:
    """The questions of the first `count` scenes of a split."""
    split_index = ("train", "val").index(split)
    scenes_of_split = question_scenes(seed, split, count)
    return [scene_questions(scene, (seed, split_index, i, 0))
            for i, scene in enumerate(scenes_of_split)]


def question_scenes(seed: int, split: str, count: int) -> list[dict[str, Any]]:
    return [scenes.sample_scene(SEED_OFFSET + seed, split, i) for i in range(count)]


def blind_accuracy(train: list[list[Question]], val: list[list[Question]]) -> dict[str, float]:
    """The share of validation answers, by kind, that can be guessed without the image: the
    commonest training answer to the same question, or to its kind, whichever is better."""
    counts: dict[Any, collections.Counter] = collections.defaultdict(collections.Counter)
    for questions in train:
        for kind, question, answer in questions:
            counts[question][answer] += 1
            counts[kind, ""][answer] += 1
    guesses = {key: counter.most_common(1)[0][0] for key, counter in counts.items()}
    right = collections.defaultdict(list)
    for questions in val:
        for kind, question, answer in questions:
            of_kind = guesses[kind, ""]
            right[kind].append((answer == guesses.get(question, of_kind), answer == of_kind))
    return with_mean({kind: float(np.mean(pairs, axis=0).max()) for kind, pairs in right.items()})


def with_mean(accuracies: dict[str, float]) -> dict[str, float]:
    """By kind, in the order of KINDS, and their mean as "all"."""
    ordered = {kind: accuracies[kind] for kind in KINDS if kind in accuracies}
    return ordered | {"all": float(np.mean(list(accuracies.values())))}


if __name__ == "__main__":
    for scene, questions in zip(question_scenes(0, "val", 3), make_questions(0, "val", 3)):
        print(scene_captions.caption(scene))
        for kind, question, answer in questions:
            print(f"    {kind:>9}  {question} {answer}")

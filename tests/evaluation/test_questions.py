"""Questions about scenes: one answer each, and it is the true one."""
import collections
import re

from evaluation import questions
from inputs import scene_captions, scenes

SCENES = questions.question_scenes(0, "train", 1500)
QUESTIONS = questions.make_questions(0, "train", 1500)
ROWS = [(scene, *row) for scene, rows in zip(SCENES, QUESTIONS) for row in rows]
ATTRIBUTE_QUESTIONS = (
    (r"(?:what|which) color (?:is|has) the (.*)\?", "color"),
    (r"(?:what|which) shape (?:is|has) the (.*)\?", "shape"),
    (r"what size is the (.*)\?", "size"), (r"is the (.*) big or small\?", "size"),
    (r"(?:where|in which corner) is the (.*)\?", "place"))
OPPOSITES = {"left of": ("left", "right"), "right of": ("right", "left"),
             "above": ("top", "bottom"), "below": ("bottom", "top")}


def fitting(phrase: str, objects: list[dict]) -> list[dict]:
    """The objects that a phrase such as "small star at the top left" fits."""
    attributes, _, place = phrase.partition(" at the ")
    words = set(attributes.split()) - {"object"}
    return [o for o in objects
            if words <= {o["size"], o["color"], o["shape"]} and place in ("", o["place"])]


def related(side: str, thing: dict, objects: list[dict]) -> list[str]:
    """The objects on a side of a thing."""
    there, opposite = OPPOSITES[side]
    if opposite not in thing["place"]:
        return []
    return [f"{o['color']} {o['shape']}" for o in objects if there in o["place"]]


def answers(question: str, scene: dict) -> list[str]:
    """Every answer that the record allows, by a grammar of its own."""
    objects = scene["objects"]
    for pattern, attribute in ATTRIBUTE_QUESTIONS:
        match = re.fullmatch(pattern, question)
        if match:
            return [o[attribute] for o in fitting(match[1], objects)]
    sides = "|".join(OPPOSITES)
    match = re.fullmatch(rf"(?:what|which object) is ({sides}) the (.*)\?", question)
    if match:
        things = fitting(match[2], objects)
        return [text for thing in things for text in related(match[1], thing, objects)]
    match = re.fullmatch(r"(?:how many|count the) (.*?) ?objects(?: are there)?\?", question)
    if match:
        return [("zero", "one", "two", "three")[len(fitting(match[1], objects))]]
    if question in ("what does the text say?", "which word is written?"):
        return [scene["word"]] * (scene["word"] is not None)
    match = re.fullmatch(r"(?:is there|do you see) an? (\w+ \w+)\?", question)
    return ["yes" if fitting(match[1], objects) else "no"]


def test_every_question_has_one_answer_and_it_is_the_true_one():
    for scene, kind, question, answer in ROWS:
        assert answers(question, scene) == [answer], (scene_captions.caption(scene), kind, question)
    assert {kind for _, kind, _, _ in ROWS} == set(questions.KINDS)


def test_no_question_contains_its_answer():
    for _, kind, question, answer in ROWS:
        if kind in ("color", "shape", "place", "word"):
            assert not re.search(rf"\b{answer}\b", question)


def test_answers_are_spread_over_all_values():
    counts = collections.defaultdict(collections.Counter)
    for _, kind, _, answer in ROWS:
        counts[kind][answer] += 1
    values = {"color": scenes.COLORS, "shape": scenes.SHAPES, "size": scenes.SIZES,
              "place": scenes.PLACES, "word": scenes.WORDS,
              "count": ("zero", "one", "two", "three")}
    for kind, answers_of_kind in values.items():
        assert set(counts[kind]) == set(answers_of_kind)
    assert counts["presence"]["yes"] == counts["presence"]["no"] == len(SCENES)
    assert max(counts["relation"].values()) < 0.05 * counts["relation"].total()


def test_an_absent_object_shares_an_attribute_with_a_present_one():
    counts = collections.Counter()
    for scene, kind, question, answer in ROWS:
        if kind == "presence" and answer == "no":
            color, shape = question.rstrip("?").split()[-2:]
            same_color = any(o["color"] == color for o in scene["objects"])
            same_shape = any(o["shape"] == shape for o in scene["objects"])
            counts["color"] += same_color
            counts["shape"] += same_shape
            counts["both"] += same_color and same_shape
            assert same_color or same_shape
    assert min(counts.values()) > 100


def test_questions_follow_from_seed_and_index():
    again = questions.make_questions(0, "train", 40)
    assert again == QUESTIONS[:40] != questions.make_questions(1, "train", 40)
    first, same, other = (questions.scene_questions(SCENES[5], key)
                          for key in ((1, 2), (1, 2), (1, 3)))
    assert first == same != other


def test_validation_scenes_are_neither_training_scenes_nor_those_of_a_run():
    of_runs = [scenes.sample_scene(seed, split, i)
               for seed in (0, 1) for split in ("train", "val") for i in range(1500)]
    groups = SCENES, questions.question_scenes(0, "val", 1500), of_runs
    keys = [{tuple(scene["jitter"]) for scene in group} for group in groups]
    assert [len(group) for group in keys] == [1500, 1500, 6000]
    assert len(set.union(*keys)) == 9000


def test_blind_accuracy_is_that_of_the_commonest_answers():
    train = [[*[("size", "a?", "big")] * 3, ("size", "a?", "small"),
              *[("size", "b?", "small")] * 3]]
    val = [[("size", "a?", "big"), ("size", "b?", "small"), ("size", "c?", "small")]]
    assert questions.blind_accuracy(train, val) == {"size": 1.0, "all": 1.0}
    shares = questions.blind_accuracy(QUESTIONS, questions.make_questions(0, "val", 1000))
    options = {"color": 8, "shape": 6, "size": 2, "place": 4, "word": 16, "presence": 2}
    for kind, count in options.items():
        assert abs(shares[kind] - 1 / count) < 0.06, kind
    assert shares["relation"] < 0.06 and shares["count"] < 0.65

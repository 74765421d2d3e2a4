"""Scenes: captions state what is drawn, grades follow them, and caption_nats is exact."""
import itertools
import math
import re

import numpy as np
import pytest

from inputs import scene_captions, scenes, tokenizer
from inputs.scene_captions import caption, caption_nats, grade_caption, lead_probs, parse_caption

PARTS = [(seed, split) for seed in (0, 7) for split in ("train", "val")]
MANY = [scenes.sample_scene(*part, i) for part in PARTS for i in range(1500)]
STATED = ("objects", "background_color", "pattern", "word", "row")
OBJECT_VALUES = len(scenes.SIZES) * len(scenes.COLORS) * len(scenes.SHAPES)
BACKGROUND_VALUES = len(scenes.BACKGROUND_COLORS) * len(scenes.PATTERNS)


def right(text, scene):
    """Names of the attributes that the caption has right."""
    return {name for name, (n, out_of) in grade_caption(text, scene).items() if n == out_of}


def variants(scene):
    """Every record that differs from this one in one value."""
    values = {"size": scenes.SIZES, "color": scenes.COLORS, "shape": scenes.SHAPES}
    objects = scene["objects"]
    taken = {o["place"] for o in objects}
    for i, thing in enumerate(objects):
        changes = [(key, v) for key, options in values.items() for v in set(options) - {thing[key]}]
        changes += [("place", place) for place in set(scenes.PLACES) - taken]
        for key, value in changes:
            yield scene | {"objects": [*objects[:i], thing | {key: value}, *objects[i + 1:]]}
    for color in set(scenes.BACKGROUND_COLORS) - {scene["background_color"]}:
        yield scene | {"background_color": color}
    for pattern in set(scenes.PATTERNS) - {scene["pattern"]}:
        yield scene | {"pattern": pattern}
    if scene["word"]:
        for word in set(scenes.WORDS) - {scene["word"]}:
            yield scene | {"word": word}
        for row in set(scenes.ROWS) - {scene["row"]}:
            yield scene | {"row": row}


# ------------------------------------------------------------------------------------ scenes
def test_a_scene_is_a_function_of_seed_split_and_index():
    forwards = [scenes.sample_scene(3, "train", i) for i in range(20)]
    backwards = [scenes.sample_scene(3, "train", i) for i in reversed(range(20))]
    assert forwards == backwards[::-1]
    for a, b in zip(forwards, backwards[::-1]):
        assert np.array_equal(scenes.render(a), scenes.render(b))
    for key in ((4, "train", 0), (3, "val", 0), (3, "train", 20)):
        other = scenes.sample_scene(*key)
        assert other != forwards[0]
        assert not np.array_equal(scenes.render(other), scenes.render(forwards[0]))


def test_train_and_val_share_no_image():
    drawn = {}
    for split in ("train", "val"):
        drawn[split] = {tuple(scenes.sample_scene(0, split, i)["jitter"]) for i in range(2000)}
    assert len(drawn["train"]) == len(drawn["val"]) == 2000
    assert not drawn["train"] & drawn["val"]


def test_an_image_is_rgb_and_shows_every_attribute():
    """Two records that differ in one value, with the same jitter, have different images."""
    scene = next(s for s in MANY if s["word"] and len(s["objects"]) == 2)
    image = scenes.render(scene)
    assert image.mode == "RGB" and image.size == (scenes.SIDE, scenes.SIDE)
    for variant in variants(scene):
        assert not np.array_equal(scenes.render(variant), image), variant
    for word in scenes.WORDS:
        assert scenes.render(scene | {"word": word}).size == image.size


def test_nothing_overlaps_and_all_values_occur():
    for scene in MANY:
        places = [o["place"] for o in scene["objects"]]
        assert places == sorted(set(places), key=scenes.PLACES.index)
        assert 1 <= len(places) <= (2 if scene["word"] else 3)
        assert (scene["word"] is None) == (scene["row"] is None)
        assert not scene["row"] or not any(p.startswith(scene["row"]) for p in places)
    for name, values in {"background_color": scenes.BACKGROUND_COLORS, "pattern": scenes.PATTERNS,
                         "wording": range(scenes.WORDINGS), "word": (*scenes.WORDS, None),
                         "row": (*scenes.ROWS, None)}.items():
        assert {s[name] for s in MANY} == set(values)
    for name, values in {"color": scenes.COLORS, "shape": scenes.SHAPES, "size": scenes.SIZES,
                         "place": scenes.PLACES}.items():
        assert {o[name] for s in MANY for o in s["objects"]} == set(values)


# ---------------------------------------------------------------------------------- captions
@pytest.mark.parametrize("wording", range(scenes.WORDINGS))
def test_a_dense_caption_states_the_record_in_every_wording(wording):
    tok = tokenizer.train_vocab(map(caption, MANY), 192)
    for scene in MANY:
        text = caption(scene | {"wording": wording})
        decoded = tok.decode(tok.encode(text, 128))
        assert decoded.count(" ") > text.count(" ")  # the tokenizer separates punctuation
        for form in (text, decoded, text.upper(), re.sub(r"([.,:])", r" \1 ", text)):
            assert parse_caption(form) == {key: scene[key] for key in STATED}, form


def test_the_toys_text_length_and_vocabulary_hold_every_caption():
    for fields in (["txt"], ["web"], ["conditioned"], ["txt", "web"]):
        tok = tokenizer.train_vocab((caption(s, f) for s in MANY[:4000] for f in fields), 192)
        for scene, wording, field in itertools.product(MANY, range(scenes.WORDINGS), fields):
            pieces = tok.encode_pieces(caption(scene | {"wording": wording}, field))
            assert len(pieces) + 2 <= 28
            assert tok.unknown not in pieces


def test_different_records_have_different_captions():
    records = {tuple((key, str(s[key])) for key in (*STATED, "wording")) for s in MANY}
    assert len({caption(s) for s in MANY}) == len(records)


# ------------------------------------------------------------------------------------ grades
@pytest.mark.parametrize("text", [
    "", " ", ".", "a red circle", "two on plain white: top left red circle big.", "[UNK] " * 20,
    "on plain white.", "three on plain white: , , .", "plain white background. .",
    "top left a big red circle, on plain white. top the word"])
def test_a_text_in_no_wording_is_not_parsed_and_has_everything_wrong(text):
    assert parse_caption(text) is None
    for scene in MANY[:50]:
        assert all(n == 0 < out_of for n, out_of in grade_caption(text, scene).values())


def test_the_truth_is_right_in_every_wording_and_order():
    for scene in MANY[:500]:
        orders = itertools.permutations(scene["objects"])
        for wording, objects in itertools.product(range(scenes.WORDINGS), orders):
            text = caption(scene | {"wording": wording, "objects": list(objects)})
            grades = grade_caption(text, scene)
            assert all(n == out_of for n, out_of in grades.values())
            assert ("word" in grades) == bool(scene["word"])


def test_one_wrong_value_costs_its_own_grades_and_no_others():
    costs = {"background_color": {"background"}, "pattern": {"background"}, "word": {"word"},
             "row": set(), "size": {"size"}, "color": {"color", "object"},
             "shape": {"shape", "object"}, "place": {"place", "object"}}
    for scene in MANY[:60]:
        every = set(grade_caption(caption(scene), scene))
        for variant in variants(scene):
            [changed] = [key for key in STATED if variant[key] != scene[key]]
            if changed == "objects":
                [(a, b)] = [pair for pair in zip(scene["objects"], variant["objects"])
                            if pair[0] != pair[1]]
                [changed] = [key for key in a if a[key] != b[key]]
            text = caption(variant)
            assert right(text, scene) == every - costs[changed] - {"exact"}, (text, scene)


def test_objects_left_out_or_invented_count_as_wrong():
    for scene in MANY[:300]:
        objects = scene["objects"]
        n, taken = len(objects), {o["place"] for o in objects}
        free = [place for place in scenes.PLACES if place not in taken]
        extra = {"size": "big", "color": "red", "shape": "star", "place": free[0]}
        for stated, same, out_of in ((objects[1:], n - 1, n), ([*objects, extra], n, n + 1),
                                     ([*objects, objects[0]], n, n + 1)):
            if 0 < len(stated) < len(scene_captions.NUMBERS):
                grades = grade_caption(caption(scene | {"objects": stated}), scene)
                assert grades["count"] == grades["exact"] == (0, 1)
                for name in ("color", "shape", "size", "place", "object"):
                    assert grades[name] == (same, out_of)


def test_a_word_left_out_or_invented_counts_as_wrong():
    for scene in MANY[:300]:
        word, row = (None, None) if scene["word"] else ("cat", "top")
        grades = grade_caption(caption(scene | {"word": word, "row": row}), scene)
        assert grades["exact"] == (0, 1) and grades.get("word", (0, 1)) == (0, 1)


# ------------------------------------------------------------------------------ caption_nats
def num_captions(row, places):
    """The dense captions of scenes with a word in this row and objects at these places."""
    words = len(scenes.WORDS) if row else 1
    return OBJECT_VALUES ** len(places) * BACKGROUND_VALUES * scenes.WORDINGS * words


def test_probabilities_of_dense_captions_sum_to_one():
    """Over kinds of scene: word or not, which places."""
    total = 0.0
    for row in (None, *scenes.ROWS):
        open_places = [p for p in scenes.PLACES if not row or not p.startswith(row)]
        for n in range(1, 3 if row else 4):
            for places in itertools.combinations(open_places, n):
                scene = {"objects": [{"place": place} for place in places],
                         "word": "cat" if row else None, "row": row}
                total += num_captions(row, places) * math.exp(-caption_nats(scene))
    assert total == pytest.approx(1, abs=1e-9)


def test_probabilities_of_dense_captions_agree_with_how_often_scenes_are_drawn():
    """By row of the word and places of the objects, with everything else summed out."""
    by_kind = {}
    for scene in MANY:
        kind = scene["row"], tuple(o["place"] for o in scene["objects"])
        by_kind.setdefault(kind, []).append(scene)
    assert len(by_kind) == 14 + 2 * 3
    for (row, places), members in by_kind.items():
        expected = num_captions(row, places) * math.exp(-caption_nats(members[0]))
        error = len(members) / len(MANY) - expected
        assert abs(error) < 5 * math.sqrt(expected / len(MANY)), (row, places)


MOST_SYNONYMS = 5  # words with a synonym in the scenes that are looked at


def conditioned_captions(scene):
    """{caption: its nats} of all conditioned captions that this record may get."""
    named = [f"{o['color']} {o['shape']}" for o in scene["objects"]]
    out = {}
    for web, wording in itertools.product({"untitled", *named}, range(scenes.WORDINGS)):
        for used in itertools.product((0.0, 1.0), repeat=MOST_SYNONYMS):
            draws = used + (0.0,) * (16 - MOST_SYNONYMS)  # these are not read
            variant = scene | {"web": web, "wording": wording, "synonym_draws": draws}
            out[caption(variant, "conditioned")] = caption_nats(variant, "conditioned")
    return out


def num_synonyms(scene):
    return sum(w in scene_captions.SYNONYMS for w in re.findall("[a-z]+", caption(scene)))


def test_probabilities_of_conditioned_captions_sum_to_that_of_the_record():
    """Over leads, wordings and synonyms."""
    for count in (1, 2, 3):
        known = (s for s in MANY if len(s["objects"]) == count)
        scene = next(s for s in known if num_synonyms(s) <= MOST_SYNONYMS)
        captions = conditioned_captions(scene)
        total = sum(math.exp(-nats) for nats in captions.values())
        expected = scenes.WORDINGS * math.exp(-caption_nats(scene))
        assert total == pytest.approx(expected, rel=1e-9)
        assert all(grade_caption(text, scene)["exact"] == (1, 1) for text in captions)


def test_of_two_objects_that_are_named_alike_the_first_leads():
    scene = next(s for s in MANY if len(s["objects"]) == 3)
    first, second, third = scene["objects"]
    probs = lead_probs(scene | {"objects": [first, first | {"place": second["place"]}, third]})
    assert sum(probs) == pytest.approx(1) and probs[1] == 0


def test_each_object_leads_as_often_as_the_formula_says():
    many = [s for s in MANY if len(s["objects"]) == 3]
    for i in range(3):
        expected = sum(lead_probs(s)[i] for s in many)
        observed = sum(scene_captions.lead_object(s) == i for s in many)
        assert abs(observed - expected) < 5 * math.sqrt(expected)


def test_probabilities_of_alt_texts_sum_to_one_and_agree_with_how_often_they_are_drawn():
    named = itertools.product(scenes.COLORS, scenes.SHAPES, scenes.SUFFIXES)
    texts = [*scenes.UNRELATED, *(f"sign {word}" for word in scenes.WORDS),
             *(f"{color} {shape}{suffix}" for color, shape, suffix in named)]
    probs = {text: math.exp(-caption_nats({"web": text}, "web")) for text in texts}
    assert sum(probs.values()) == pytest.approx(1, abs=1e-9)
    for kind, members in {"unrelated": scenes.UNRELATED,
                          "sign": [t for t in texts if t.startswith("sign ")],
                          "red": [t for t in texts if t.startswith("red ")],
                          "star picture": [t for t in texts if t.endswith("star picture")]}.items():
        expected = sum(probs[text] for text in members)
        observed = sum(s["web"] in members for s in MANY) / len(MANY)
        assert abs(observed - expected) < 5 * math.sqrt(expected / len(MANY)), kind


def test_alt_texts_name_an_object_of_the_scene_in_most_but_not_all_cases():
    naming = [s for s in MANY if s["web"].split()[0] in scenes.COLORS]
    true = 0
    for scene in naming:
        named = tuple(f"{o['color']} {o['shape']}" for o in scene["objects"])
        true += scene["web"].startswith(named)
    assert 0.6 < true / len(naming) < 0.8
    for scene in MANY:
        assert not scene["web"].startswith("sign") or scene["web"] == f"sign {scene['word']}"

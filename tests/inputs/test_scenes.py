"""The embedded pictures: what a caption states is what is drawn, what is graded, and what its surprise counts."""
import itertools
import math
import re

import numpy as np
import pytest

from inputs import scene_captions, scenes, tokenizer

MANY = [scenes.sample_scene(seed, split, i) for seed in (0, 7) for split in ("train", "val") for i in range(1500)]
STATED = ("objects", "background_color", "pattern", "word", "row")


def right(text, scene):
    return {name for name, (n, of) in scene_captions.grade_caption(text, scene).items() if n == of}


def test_a_scene_follows_from_seed_split_and_index():
    there = [scenes.sample_scene(3, "train", i) for i in range(20)]
    back = [scenes.sample_scene(3, "train", i) for i in reversed(range(20))][::-1]
    assert there == back
    assert all(np.array_equal(scenes.render(a), scenes.render(b)) for a, b in zip(there, back))
    others = [scenes.sample_scene(*key) for key in ((4, "train", 0), (3, "val", 0), (3, "train", 20))]
    assert all(o != there[0] and not np.array_equal(scenes.render(o), scenes.render(there[0])) for o in others)


def test_train_and_val_share_no_picture():
    drawn = {split: {tuple(scenes.sample_scene(0, split, i)["jitter"]) for i in range(2000)} for split in ("train", "val")}
    assert len(drawn["train"]) == len(drawn["val"]) == 2000 and not drawn["train"] & drawn["val"]


def test_a_picture_is_rgb_and_shows_every_attribute():
    """Two records that differ in one attribute, drawn with the same jitter, are different pictures."""
    scene = next(s for s in MANY if s["word"] and len(s["objects"]) == 2)
    picture = scenes.render(scene)
    assert picture.mode == "RGB" and picture.size == (scenes.SIDE, scenes.SIDE)
    for changed in one_off(scene):
        assert not np.array_equal(scenes.render(changed), picture), changed
    assert all(scenes.render(scene | {"word": w}).size == picture.size for w in scenes.WORDS)


def test_nothing_overlaps_and_all_values_occur():
    for s in MANY:
        places = [o["place"] for o in s["objects"]]
        assert places == sorted(set(places), key=scenes.PLACES.index) and 1 <= len(places) <= (2 if s["word"] else 3)
        assert (s["word"] is None) == (s["row"] is None)
        assert not s["row"] or not any(p.startswith(s["row"]) for p in places)
    for values, seen in ((scenes.BACKGROUND_COLORS, "background_color"), (scenes.PATTERNS, "pattern"), (range(scenes.WORDINGS), "wording"),
                         ((*scenes.WORDS, None), "word"), ((*scenes.ROWS, None), "row")):
        assert {s[seen] for s in MANY} == set(values)
    for values, seen in ((scenes.COLORS, "color"), (scenes.SHAPES, "shape"), (scenes.SIZES, "size"), (scenes.PLACES, "place")):
        assert {o[seen] for s in MANY for o in s["objects"]} == set(values)


@pytest.mark.parametrize("wording", range(scenes.WORDINGS))
def test_a_caption_states_the_record_in_every_wording(wording):
    tok = tokenizer.train_vocab(map(scene_captions.caption, MANY), 192)
    for s in MANY:
        text = scene_captions.caption(s | {"wording": wording})
        through = tok.decode(tok.encode(text, 128))
        assert through.count(" ") > text.count(" ")  # the tokenizer sets marks apart
        for form in (text, through, text.upper(), re.sub(r"([.,:])", r" \1 ", text)):
            assert scene_captions.parse_caption(form) == {k: s[k] for k in STATED}, form


def test_the_toys_text_length_and_vocabulary_hold_every_caption():
    for fields in (["txt"], ["web"], ["conditioned"], ["txt", "web"]):
        tok = tokenizer.train_vocab((scene_captions.caption(s, f) for s in MANY[:4000] for f in fields), 192)
        found = [tok.encode_pieces(scene_captions.caption(s | {"wording": w}, f)) for s in MANY for w in range(scenes.WORDINGS) for f in fields]
        assert max(map(len, found)) + 2 <= 28
        assert not any(tok.unknown in pieces for pieces in found)


@pytest.mark.parametrize("text", ["", " ", ".", "a red circle", "two on plain white: top left red circle big.", "[UNK] " * 20, "on plain white.",
                                  "three on plain white: , , .", "plain white background. .", "top left a big red circle, on plain white. top the word"])
def test_what_is_in_no_wording_is_not_parsed_and_earns_nothing(text):
    assert scene_captions.parse_caption(text) is None
    for s in MANY[:50]:
        assert all(n == 0 and of > 0 for n, of in scene_captions.grade_caption(text, s).values())


def one_off(scene):
    """Every record that differs from this one in one value."""
    values = {"size": scenes.SIZES, "color": scenes.COLORS, "shape": scenes.SHAPES}
    for i, o in enumerate(scene["objects"]):
        for key, options in values.items():
            for other in set(options) - {o[key]}:
                yield scene | {"objects": [*scene["objects"][:i], o | {key: other}, *scene["objects"][i + 1:]]}
        for other in set(scenes.PLACES) - {x["place"] for x in scene["objects"]}:
            yield scene | {"objects": [*scene["objects"][:i], o | {"place": other}, *scene["objects"][i + 1:]]}
    yield from (scene | {"background_color": t} for t in set(scenes.BACKGROUND_COLORS) - {scene["background_color"]})
    yield from (scene | {"pattern": p} for p in set(scenes.PATTERNS) - {scene["pattern"]})
    if scene["word"]:
        yield from (scene | {"word": w} for w in set(scenes.WORDS) - {scene["word"]})
        yield scene | {"row": next(r for r in scenes.ROWS if r != scene["row"])}


def test_the_truth_is_graded_right_in_every_wording_and_order():
    for s in MANY[:500]:
        for wording in range(scenes.WORDINGS):
            for objects in itertools.permutations(s["objects"]):
                grade = scene_captions.grade_caption(scene_captions.caption(s | {"wording": wording, "objects": list(objects)}), s)
                assert all(n == of for n, of in grade.values()) and ("word" in grade) == bool(s["word"])


def test_each_single_wrong_value_is_noticed_and_nothing_else_is_marked_down():
    for s in MANY[:60]:
        for said in one_off(s):
            [wrong] = [k for k in STATED if said[k] != s[k]]
            if wrong == "objects":
                [(key, _)] = [(k, v) for a, b in zip(s["objects"], said["objects"]) for k, v in a.items() if b[k] != v]
                lost = {key, "exact"} | ({"object"} if key != "size" else set())
            else:
                lost = {"exact"} | {"background_color": {"background"}, "pattern": {"background"}, "word": {"word"}, "row": set()}[wrong]
            every = set(scene_captions.grade_caption(scene_captions.caption(s), s))
            assert right(scene_captions.caption(said), s) == every - lost, (scene_captions.caption(said), s)


def test_objects_left_out_or_invented_count_as_wrong():
    for s in MANY[:300]:
        n, free = len(s["objects"]), [p for p in scenes.PLACES if p not in {o["place"] for o in s["objects"]}]
        extra = {"size": "big", "color": "red", "shape": "star", "place": free[0]}
        for objects, same, of in ((s["objects"][1:], n - 1, n), ([*s["objects"], extra], n, n + 1), ([*s["objects"], s["objects"][0]], n, n + 1)):
            if objects and len(objects) < len(scene_captions.NUMBERS):
                grade = scene_captions.grade_caption(scene_captions.caption(s | {"objects": objects}), s)
                assert grade["count"] == grade["exact"] == (0, 1)
                assert all(grade[k] == (same, of) for k in ("color", "shape", "size", "place", "object"))


def test_a_word_left_out_or_invented_is_noticed():
    for s in MANY[:300]:
        said = s | ({"word": None, "row": None} if s["word"] else {"word": "cat", "row": "top"})
        grade = scene_captions.grade_caption(scene_captions.caption(said), s)
        assert grade["exact"] == (0, 1) and grade.get("word", (0, 1)) == (0, 1)


def test_surprise_is_the_logarithm_of_a_probability_that_sums_to_one():
    """Over kinds of scene (word or not, which places), each standing for as many captions as its other values allow."""
    total = 0.0
    looks = len(scenes.SIZES) * len(scenes.COLORS) * len(scenes.SHAPES)
    grounds = len(scenes.BACKGROUND_COLORS) * len(scenes.PATTERNS)
    for row in (None, *scenes.ROWS):
        open_places = [p for p in scenes.PLACES if not row or not p.startswith(row)]
        for n in (1, 2, 3)[:2 if row else 3]:
            for places in itertools.combinations(open_places, n):
                objects = [{"size": "big", "color": "red", "shape": "star", "place": p} for p in places]
                scene = {"objects": objects, "background_color": "white", "pattern": "plain", "word": "cat" if row else None, "row": row, "wording": 0}
                captions = looks ** n * grounds * scenes.WORDINGS * (len(scenes.WORDS) if row else 1)
                total += captions * math.exp(-scene_captions.caption_nats(scene))
    assert total == pytest.approx(1, abs=1e-9)


def test_surprise_agrees_with_how_often_kinds_of_scene_are_drawn():
    """The share of scenes with (word, n objects, the very places) against the formula with the rest summed out."""
    seen = {}
    for s in MANY:
        kind = s["row"], tuple(o["place"] for o in s["objects"])
        seen.setdefault(kind, []).append(s)
    looks = len(scenes.SIZES) * len(scenes.COLORS) * len(scenes.SHAPES)
    assert len(seen) == 14 + 2 * 3
    for (row, places), found in seen.items():
        alike = looks ** len(places) * len(scenes.BACKGROUND_COLORS) * len(scenes.PATTERNS) * scenes.WORDINGS * (len(scenes.WORDS) if row else 1)
        expected = alike * math.exp(-scene_captions.caption_nats(found[0]))
        assert abs(len(found) / len(MANY) - expected) < 5 * math.sqrt(expected / len(MANY)), (row, places)


def alike(scene):
    """All captions of the conditioned kind that this record may get, by any alt text and choice of words."""
    named = [f"{o['color']} {o['shape']}" for o in scene["objects"]]
    for web in {"untitled": 0, **dict.fromkeys(named)}:
        for wording in range(scenes.WORDINGS):
            for flips in itertools.product((0.0, 1.0), repeat=16):
                yield scene | {"web": web, "wording": wording, "choices": flips}


def test_surprise_of_conditioned_captions_sums_to_that_of_the_record():
    """Over leads, wordings and synonyms; one object with an outlined twin, so that two are named alike."""
    for count in (1, 2, 3):
        scene = next(s for s in MANY if len(s["objects"]) == count and sum(w in scene_captions.SYNONYMS for w in re.findall("[a-z]+", scene_captions.caption(s))) <= 5)
        every = {scene_captions.caption(s, "conditioned"): scene_captions.caption_nats(s, "conditioned") for s in alike(scene)}
        assert sum(math.exp(-x) for x in every.values()) == pytest.approx(scenes.WORDINGS * math.exp(-scene_captions.caption_nats(scene)), rel=1e-9)
        assert all(scene_captions.grade_caption(text, scene)["exact"] == (1, 1) for text in every)
    twins = scene | {"objects": [scene["objects"][0], scene["objects"][0] | {"place": scene["objects"][1]["place"]}, scene["objects"][2]]}
    assert sum(scene_captions.lead_probs(twins)) == pytest.approx(1) and scene_captions.lead_probs(twins)[1] == 0


def test_the_named_object_leads_as_often_as_the_formula_says():
    many = [s for s in MANY if len(s["objects"]) == 3]
    for place in range(3):
        expected = sum(scene_captions.lead_probs(s)[place] for s in many)
        assert abs(sum(scene_captions.lead_object(s) == place for s in many) - expected) < 5 * math.sqrt(expected)


def test_surprise_of_alt_text_sums_to_one_and_agrees_with_how_often_it_is_drawn():
    texts = [*scenes.BESIDE, *(f"sign {w}" for w in scenes.WORDS),
             *(f"{c} {f}{t}" for c in scenes.COLORS for f in scenes.SHAPES for t in scenes.TAILS)]
    chance = {text: math.exp(-scene_captions.caption_nats(MANY[0] | {"web": text}, "web")) for text in texts}
    assert sum(chance.values()) == pytest.approx(1, abs=1e-9)
    kinds = {"beside": scenes.BESIDE, "sign": [t for t in texts if t.startswith("sign ")], "red": [t for t in texts if t.startswith("red ")],
             "star picture": [t for t in texts if t.endswith("star picture")]}
    for kind, members in kinds.items():
        expected = sum(chance[t] for t in members)
        drawn = sum(s["web"] in members for s in MANY) / len(MANY)
        assert abs(drawn - expected) < 5 * math.sqrt(expected / len(MANY)), kind


def test_alt_text_names_what_is_there_more_often_than_chance_and_is_also_wrong():
    named = [s for s in MANY if s["web"].split()[0] in scenes.COLORS]
    true = sum(any(s["web"].startswith(f"{o['color']} {o['shape']}") for o in s["objects"]) for s in named) / len(named)
    assert 0.6 < true < 0.8
    assert all(s["web"] == f"sign {s['word']}" for s in MANY if s["web"].startswith("sign"))


def test_different_records_have_different_captions():
    kinds = {tuple((k, str(s[k])) for k in (*STATED, "wording")) for s in MANY}
    assert len({scene_captions.caption(s) for s in MANY}) == len(kinds)

"""Questions have one answer, and it is the true one; and what reads the features learns from them, and from nothing else."""
import collections
import json
import re

import jax
import numpy as np
import pytest

import decoder
import layers
import vit
from evaluation import questions, vqa
from inputs import scene_captions, scenes
from interop.encoder import load_encoder, random_encoder, raw_pixel_encoder
from runtime import checkpoint

SCENES = questions.question_scenes(0, "train", 1500)
ASKED = questions.make_questions(0, "train", 1500)
PAIRS = [(scene, *q) for scene, asked in zip(SCENES, ASKED) for q in asked]


def meant(words: str, objects: list[dict]) -> list[dict]:
    """The objects that a phrase such as "small star at the top left" fits."""
    said, _, place = words.partition(" at the ")
    known = [w for w in said.split() if w != "object"]
    return [o for o in objects if all(w in (o["size"], o["color"], o["shape"]) for w in known) and place in ("", o["place"])]


def answers(question: str, scene: dict) -> list[str]:
    """Every answer that the record allows to the question, whose grammar is read here anew."""
    objects = scene["objects"]
    for pattern, attribute in ((r"(?:what|which) color (?:is|has) the (.*)\?", "color"), (r"(?:what|which) shape (?:is|has) the (.*)\?", "shape"),
                               (r"what size is the (.*)\?", "size"), (r"is the (.*) big or small\?", "size"),
                               (r"(?:where|in which corner) is the (.*)\?", "place")):
        if found := re.fullmatch(pattern, question):
            return [o[attribute] for o in meant(found[1], objects)]
    if found := re.fullmatch(r"(?:what|which object) is (left of|right of|above|below) the (.*)\?", question):
        there = {"left of": lambda a, b: "left" in a and "right" in b, "right of": lambda a, b: "right" in a and "left" in b,
                 "above": lambda a, b: "top" in a and "bottom" in b, "below": lambda a, b: "bottom" in a and "top" in b}[found[1]]
        return [f"{o['color']} {o['shape']}" for thing in meant(found[2], objects) for o in objects if there(o["place"], thing["place"])]
    if found := re.fullmatch(r"(?:how many|count the) (.*?) ?objects(?: are there)?\?", question):
        return [("zero", "one", "two", "three")[len(meant(found[1], objects))]]
    if question in ("what does the text say?", "which word is written?"):
        return [scene["word"]] * (scene["word"] is not None)
    found = re.fullmatch(r"(?:is there|do you see) an? (\w+ \w+)\?", question)
    return ["yes" if meant(found[1], objects) else "no"]


def test_every_question_has_one_answer_and_it_is_the_true_one():
    for scene, kind, question, answer in PAIRS:
        assert answers(question, scene) == [answer], (scene_captions.caption(scene), kind, question)
    assert {kind for _, kind, _, _ in PAIRS} == set(questions.KINDS)


def test_no_question_says_its_answer():
    for _, kind, question, answer in PAIRS:
        if kind in ("color", "shape", "place", "word"):
            assert not re.search(rf"\b{answer}\b", question)


def test_answers_are_spread_over_all_values():
    said = collections.defaultdict(collections.Counter)
    for _, kind, _, answer in PAIRS:
        said[kind][answer] += 1
    for kind, values in (("color", scenes.COLORS), ("shape", scenes.SHAPES), ("size", scenes.SIZES), ("place", scenes.PLACES),
                         ("word", scenes.WORDS), ("count", ("zero", "one", "two", "three"))):
        assert set(said[kind]) == set(values)
    assert said["presence"]["yes"] == said["presence"]["no"] == len(SCENES)
    assert max(said["relation"].values()) < 0.05 * said["relation"].total()


def test_what_is_not_there_shares_an_attribute_with_what_is():
    near = collections.Counter()
    for scene, kind, question, answer in PAIRS:
        if kind == "presence" and answer == "no":
            color, shape = question.rstrip("?").split()[-2:]
            near["color"] += (same_color := any(o["color"] == color for o in scene["objects"]))
            near["shape"] += (same_shape := any(o["shape"] == shape for o in scene["objects"]))
            near["both"] += same_color and same_shape
            assert same_color or same_shape
    assert min(near.values()) > 100


def test_questions_follow_from_seed_and_index():
    assert questions.make_questions(0, "train", 40) == ASKED[:40] != questions.make_questions(1, "train", 40)
    assert questions.questions(SCENES[5], (1, 2)) == questions.questions(SCENES[5], (1, 2)) != questions.questions(SCENES[5], (1, 3))
    twice = questions.make_questions(0, "train", 40, rounds=2)
    assert all(a == b[:len(a)] and len(b) >= len(a) for a, b in zip(ASKED, twice)) and any(b[len(a):] != a for a, b in zip(ASKED, twice))


def test_held_out_scenes_are_no_training_scenes_nor_any_run_s():
    drawn = [{tuple(s["jitter"]) for s in some} for some in (SCENES, questions.question_scenes(0, "val", 1500),
             [scenes.sample_scene(seed, split, i) for seed in (0, 1) for split in ("train", "val") for i in range(1500)])]
    assert [len(d) for d in drawn] == [1500, 1500, 6000] and len(set.union(*drawn)) == 9000


def test_blind_share_is_that_of_the_commonest_answers():
    train = [[("size", "a?", "big")] * 3 + [("size", "a?", "small")] + [("size", "b?", "small")] * 3]
    assert questions.blind_accuracy(train, [[("size", "a?", "big"), ("size", "b?", "small"), ("size", "c?", "small")]]) == {"size": 1.0, "all": 1.0}
    shares = questions.blind_accuracy(ASKED, questions.make_questions(0, "val", 1000))
    for kind, options in (("color", 8), ("shape", 6), ("size", 2), ("place", 4), ("word", 16), ("presence", 2)):
        assert abs(shares[kind] - 1 / options) < 0.06, kind
    assert shares["relation"] < 0.06 and shares["count"] < 0.65


def told(some: list[dict]) -> np.ndarray:
    """Tokens (B,4,E), one a corner, that hold the record: what an encoder that sees everything could give."""
    values = [*scenes.COLORS, *scenes.SHAPES, *scenes.SIZES, *scenes.WORDS]
    out = np.zeros((len(some), 4, len(values)), np.float32)
    for b, scene in enumerate(some):
        for o in scene["objects"]:
            for name in ("color", "shape", "size"):
                out[b, scenes.PLACES.index(o["place"]), values.index(o[name])] = 1
        if scene["word"]:
            out[b, :, values.index(scene["word"])] = 1
    return out


def some_kinds(asked: list, *kinds: str) -> list:
    return [[q for q in several if q[0] in kinds] for several in asked]


HELD = questions.question_scenes(0, "val", 300)
EXAMS = tuple(some_kinds(e, "color", "size", "word", "presence") for e in (ASKED, questions.make_questions(0, "val", 300)))


def test_it_learns_from_features_that_hold_the_answers():
    shares, floor = vqa.train_reader((told(SCENES), told(HELD)), EXAMS, steps=300, batch=12), questions.blind_accuracy(*EXAMS)
    assert shares["all"] > floor["all"] + 0.2 and shares["color"] > 2 * floor["color"] and shares["word"] > 2 * floor["word"], shares


def test_without_features_it_does_no_better_than_blind():
    shares, floor = vqa.train_reader(tuple(0 * told(x) for x in (SCENES, HELD)), EXAMS, steps=60, batch=12), questions.blind_accuracy(*EXAMS)
    assert all(shares[k] < floor[k] + 0.08 for k in shares), (shares, floor)


def test_it_follows_from_the_seed():
    seen, exams = (told(SCENES[:200]), told(HELD[:100])), tuple(e[:n] for e, n in zip(EXAMS, (200, 100)))
    first, again, other = (vqa.train_reader(seen, exams, seed, steps=8, batch=12) for seed in (0, 0, 1))
    assert first == again != other


def test_questions_side_by_side_are_read_as_if_alone():
    """Of one picture, in another order, with another beside them, or with padding in between: the scores stay."""
    rng, cfg = np.random.default_rng(0), decoder.config("micro", 50, 384)
    params = layers.init_params(jax.random.key(0), vqa.reader_specs(cfg, 7))
    image, text = rng.normal(size=(2, 4, 7)).astype(np.float32), rng.integers(3, 50, (2, 3, 6))
    together = vqa.read(params, image, text, cfg)
    for q in range(3):
        assert np.allclose(together[:, q], vqa.read(params, image, text[:, q:q + 1], cfg)[:, 0], atol=1e-4)
    moved = vqa.read(params, image, np.concatenate([text[..., :4], 0 * text[..., 4:]], -1), cfg)
    assert np.allclose(together[:, :, :4], moved[:, :, :4], atol=1e-4)
    assert not np.allclose(together, vqa.read(params, image[::-1], text, cfg), atol=1e-2)


def test_right_is_what_greedy_words_come_to():
    """Word for word: written one after another by the likeliest, until the end."""
    rng, cfg = np.random.default_rng(1), decoder.config("micro", 4, 384)
    params = layers.init_params(jax.random.key(1), vqa.reader_specs(cfg, 7))
    image, asked = rng.normal(size=(64, 4, 7)).astype(np.float32), rng.integers(3, 4, (64, 1, 3))
    text, true = np.zeros((64, 1, 6), int), rng.integers(2, 4, (64, 2))
    true = np.where((true[:, :1] == 2) & (np.arange(2) == 1), 0, true)           # an answer ends with 2
    text[:, 0, :3], text[:, 0, 3:5], text[:, 0, 5] = asked[:, 0], true, np.where(true[:, 1] == 3, 2, 0)
    answer = (text != 0) & (np.arange(6) >= 3)
    written = text[:, :, :3]
    for _ in range(3):
        written = np.concatenate([written, np.asarray(vqa.read(params, image, written, cfg))[:, :, -1:].argmax(-1)], -1)
    same = [w[3:3 + n].tolist() == t[3:3 + n].tolist() for w, t, n in zip(written[:, 0], text[:, 0], answer.sum((1, 2)))]
    assert vqa.is_correct(params, image, text, answer, cfg)[:, 0].tolist() == same and 0 < sum(same) < 64


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    """One that has learned nothing, on disk."""
    import dataclasses
    cfg, path = vit.vit_config("micro/8"), str(tmp_path_factory.mktemp("encoder") / "encoder.npz")
    checkpoint.save(path, vit.init(jax.random.key(0), cfg), {"encoder": dataclasses.asdict(cfg), "resolution": 16})
    return path


def test_the_command_measures_and_writes(encoder, tmp_path, capsys, monkeypatch):
    """Encoder, random encoder, raw pixels and no picture, each by kind."""
    monkeypatch.setattr(vqa, "TRAIN", 60)
    monkeypatch.setattr(vqa, "HELD", 40)
    assert vqa.main([encoder, "--steps", "2", "--json", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert set(found) == {"encoder", "random encoder", "raw pixels", "without the picture"}
    assert all(tuple(shares) == (*questions.KINDS, "all") and all(0 <= s <= 1 for s in shares.values()) for shares in found.values())
    assert capsys.readouterr().out.count("\n|") >= 5


def test_pixels_and_random_weights_are_read_on_the_same_grid(encoder):
    loaded = load_encoder(encoder)
    images = vqa.pictures(0, "val", 3, 16)
    assert vqa.tokens(loaded, images).shape == vqa.tokens(random_encoder(loaded, 1), images).shape == (3, 4, 96)
    assert np.allclose(vqa.tokens(loaded, images, batch=2), vqa.tokens(loaded, images), atol=1e-5)
    pixels = vqa.tokens(raw_pixel_encoder(loaded), images)
    assert np.allclose(pixels[1, 3], np.asarray(vit.normalize(images[1, 8:, 8:])).ravel(), atol=1e-6)


def test_a_damaged_encoder_gives_a_sentence(encoder, tmp_path, capsys):
    with open(encoder, "rb") as f:
        whole = f.read()
    (tmp_path / "cut.npz").write_bytes(whole[:len(whole) // 2])
    for path in (tmp_path / "cut.npz", tmp_path / "none.npz", tmp_path):
        assert vqa.main([str(path)]) == 1
        said = capsys.readouterr().err
        assert said.startswith("error: ") and str(path) in said and "Traceback" not in said

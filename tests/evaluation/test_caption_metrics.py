"""Caption metrics: known values, and which captions are compared. tests/parity has COCO's code."""
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import evaluate
from evaluation.caption_metrics import bleu, caption_scores, cider_d, repetition, rouge_l
from evaluation.captioning import all_captions
from inputs.sources import open_source, subsample

WORDS = st.lists(st.sampled_from("abcdef"), min_size=1, max_size=12)


def test_known_values():
    reference = ["a", "red", "circle", "left", "of", "a", "blue", "star"]
    hypothesis = ["a", "red", "circle", "left", "of", "a", "green", "star"]
    scores = bleu([hypothesis], [[reference]])
    assert scores[0] == pytest.approx(7 / 8)
    assert scores[3] == pytest.approx((7 / 8 * 5 / 7 * 4 / 6 * 3 / 5) ** 0.25)
    assert bleu([hypothesis[:4]], [[reference]])[0] == pytest.approx(np.exp(1 - 8 / 4))
    assert rouge_l(hypothesis, [reference]) == pytest.approx(7 / 8)
    assert rouge_l(["a", "star", "a"], [reference]) == pytest.approx(
        (1 + 1.44) * (2 / 3) * (2 / 8) / (2 / 8 + 1.44 * 2 / 3))
    # Two images: "a" is in both and has no weight; the others are in one and weigh the same.
    assert cider_d([["a", "b"], ["a", "c"]], [[["a", "b"]], [["a", "d"]]]) == pytest.approx([5, 0])
    assert repetition(["a", "b", "c", "d", "a", "b", "c", "d"]) == pytest.approx(1 / 5)
    assert repetition(["a", "b", "c", "d"]) == repetition([]) == 0


def test_spelling_and_punctuation_do_not_count():
    scores = caption_scores(["a CAFÉ , red .", "one two three four"],
                            [["A cafe: red!"], ["one, two, three, four"]])
    assert scores["rouge_l"] == pytest.approx(1)
    assert scores["words"] == scores["reference_words"] == 3.5 and scores["references"] == 1


@given(st.lists(st.tuples(WORDS, st.lists(WORDS, min_size=1, max_size=3)), min_size=2, max_size=5))
@settings(max_examples=60, deadline=None)
def test_bounds(corpus):
    """A caption that equals a reference is the best; scores stay in their ranges."""
    hypotheses, references = (list(column) for column in zip(*corpus))
    cider = cider_d(hypotheses, references)
    assert all(-1e-9 <= score <= 10 + 1e-9 for score in cider)
    assert all(-1e-9 <= score <= 1 + 1e-9 for score in bleu(hypotheses, references))
    for words, refs in corpus:
        assert 0 <= rouge_l(words, refs) <= 1
        assert rouge_l(refs[0], refs[:1]) == pytest.approx(1)
        assert 0 <= repetition(words) < 1
    firsts = [[refs[0]] for refs in references]
    own = cider_d([refs[0] for refs in references], firsts)
    assert all(a <= b + 1e-9 for a, b in zip(cider_d(hypotheses, firsts), own))


def test_all_captions_of_a_list_are_references(run, tmp_path, capsys):
    texts = ["big red circle", "a circle, in red", "round thing"]
    for i in range(4):
        Image.new("RGB", (20, 20), (40 * i, 0, 0)).save(tmp_path / f"{i}.png")
        captions = texts[:i] if i else "one text"
        (tmp_path / f"{i}.json").write_text(json.dumps({"caption": captions}))
    source = open_source(str(tmp_path), "caption")
    assert all_captions(source, 0, ["caption"]) == ["one text"]
    assert all_captions(source, 3, ["caption", "absent", "caption"]) == [*texts, *texts]
    part = subsample(source, 4)
    assert sorted(len(all_captions(part, i, ["caption"])) for i in range(4)) == [1, 1, 2, 3]
    assert evaluate.main([str(run), "metrics", "--val", str(tmp_path), "--caption-field",
                          "caption"]) == 0
    figures = json.loads(capsys.readouterr().out)["metrics"]
    assert figures["references"] == 7 / 4
    assert figures["reference_words"] == pytest.approx((2 + 3 + 3 + 4 + 3 + 4 + 2) / 7)
    assert 0 < figures["distinct_captions"] <= 1 and 0 <= figures["cider_d"] <= 10

"""Classification by caption likelihood, against the caption loss itself."""
import dataclasses

import numpy as np
import pytest

import decoder
from evaluation import labels, zeroshot
from inputs import scene_captions, scenes
from runtime.errors import DataError
from tests.evaluation.conftest import CFG


def captions(count: int) -> list[str]:
    return [scene_captions.caption(scenes.sample_scene(0, "val", i)) for i in range(count)]


@pytest.mark.parametrize("prefix", ["causal", "bidirectional"])
def test_score_is_minus_the_caption_loss(captioner, prefix):
    cfg, params = captioner.decoder, captioner.params["decoder"]
    cfg = dataclasses.replace(cfg, prefix_attention=prefix)
    tokens = np.random.default_rng(0).normal(size=(3, 4, CFG.width)).astype(np.float32)
    text = np.stack([captioner.tokenizer.encode(caption, 40) for caption in captions(5)])
    scores = np.asarray(zeroshot.score(params, tokens, text, cfg))
    for p in range(3):
        losses = decoder.caption_loss(params, np.repeat(tokens[p:p + 1], 5, 0), text, cfg)
        np.testing.assert_allclose(scores[p], -losses, rtol=2e-5)


def test_likelihood_does_not_depend_on_the_other_sentences(captioner):
    tokens = np.random.default_rng(0).normal(size=(2, 4, CFG.width)).astype(np.float32)
    sentences = captions(3)
    together = zeroshot.likelihood(captioner, tokens, sentences)
    alone = zeroshot.likelihood(captioner, tokens, sentences[1:2])
    np.testing.assert_allclose(together[:, 1:2], alone, rtol=2e-5)
    truth = together.argmax(1)
    figures = zeroshot.measure(captioner, tokens, sentences, truth)
    assert (figures["likelihood"], figures["names"], figures["images"]) == (1, 3, 2)
    twice = [*sentences, *map(str.upper, sentences)]  # the same tokens: neither of the two wins
    figures = zeroshot.measure(captioner, tokens, twice, truth)
    assert figures["likelihood"] == 0 and figures["likelihood, first five"] == 1


def test_classes_come_from_labels_or_a_file(tmp_path):
    texts = np.array([["Cat"], ["dog"], ["cow"], ["dog"]])
    labeled, path = labels.LabeledImages(None, range(4), {"name": texts}), tmp_path / "names"
    sentences, truth = zeroshot.make_classes(labeled, np.array([1, 2, 3]), None, "a {}.")
    assert sentences == ["a dog.", "a cow."] and truth.tolist() == [0, 1, 0]
    sentences, _ = zeroshot.make_classes(labeled, np.array([1]), "all", "{}")
    assert sentences == ["Cat", "dog", "cow"]

    def from_file(content):
        path.write_bytes(content)
        return zeroshot.make_classes(labeled, np.arange(4), str(path), "{}")
    sentences, truth = from_file(b"cat\ndog\n\n")
    assert sentences == ["cat", "dog"] and truth.tolist() == [0, 1, -1, 1]
    sentences, truth = from_file(b"Dog\ncat\nCAT\ndog\n")
    assert sentences == ["Dog", "cat"] and truth.tolist() == [1, 0, -1, 0]
    with pytest.raises(DataError, match="names is not UTF-8"):
        from_file(b"caf\xe9\nbus\n")
    with pytest.raises(DataError, match="none of the labels"):
        from_file(b"car\nbus\n")


def test_a_class_that_is_likely_for_every_image_wins_only_without_the_prior(monkeypatch):
    scores = 10 * np.eye(6)
    scores[:, 0] += 50
    monkeypatch.setattr(zeroshot, "likelihood", lambda *_: scores)
    figures = zeroshot.measure(None, None, list("abcdef"), np.arange(6))
    assert figures["prior subtracted"] == 1
    assert figures["likelihood"] == pytest.approx(1 / 6)


def test_scores_that_are_not_numbers_find_nothing(monkeypatch):
    monkeypatch.setattr(zeroshot, "likelihood", lambda *_: np.full((6, 6), np.nan))
    figures = zeroshot.measure(None, None, list("abcdef"), np.arange(6))
    assert figures["likelihood"] == figures["likelihood, first five"] == 0


def test_the_group_of_a_class_is_that_of_its_first_image():
    texts = {"name": np.array([["Cat"], ["dog"], ["cat"]]),
             "kind": np.array([["pet"], ["pet"], ["wild"]])}
    labeled = labels.LabeledImages(None, range(3), texts)
    groups = zeroshot.groups_of_classes(labeled, ["Cat", "dog", "cow"])
    assert groups["kind"].tolist() == ["pet", "pet", ""]

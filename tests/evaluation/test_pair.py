"""Zero-shot classes, retrieval and search by a text encoder and by likelihood, and bad input."""
import dataclasses
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import evaluate
from config import RECIPES, Config, from_dict
from evaluation import pair, retrieval, search, templates
from inputs import sources
from objectives.registry import init_params, model_spec
from runtime import checkpoint
from runtime.errors import DataError
from tests.evaluation.conftest import scene_vocabulary


@pytest.fixture(scope="module")
def lit_run(tmp_path_factory):
    """A LiT run on scenes that is not trained."""
    folder = str(tmp_path_factory.mktemp("lit"))
    cfg = dataclasses.replace(RECIPES["toy"], encoder="micro/8", objective="lit", scan_unroll=1,
                              val_samples=8, init_encoder="random", max_text_len=40, vocab_size=150,
                              stages="resolution=16 steps=2 batch=8 lr=1e-3", workdir=folder)
    model = model_spec(cfg)
    meta = {"config": dataclasses.asdict(cfg), "vocabulary": scene_vocabulary(150).state,
            "encoder": dataclasses.asdict(model.encoder), "resolution": 16}
    params = init_params(cfg, model)
    checkpoint.save_step(folder, 2, {"params": params}, meta)
    return folder


# ------------------------------------------------------------------------------ the formulas
def test_ranks_are_those_of_a_sort():
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((150, 130)).astype(np.float32)
    captions = np.concatenate([np.arange(130), rng.integers(0, 130, 20)])
    scores[3, captions[3]] = scores[3].max() + 1  # image 3 is certain
    scores[5] = 0.0                               # image 5 cannot tell: all are above its own
    scores[7] = np.nan
    ranks = retrieval.image_to_text_ranks(scores, captions)
    for p in (0, 1, 90, 149):
        order = np.argsort(-scores[p])
        assert ranks[p] == np.flatnonzero(order == captions[p])[0]
    assert ranks[3] == 0 and ranks[5] == ranks[7] == 129
    finite = np.nan_to_num(scores, nan=-9.0)
    ranks = retrieval.text_to_image_ranks(finite, captions)
    for s in range(130):
        order = np.argsort(-finite[:, s], kind="stable")
        first = np.flatnonzero(captions[order] == s)[0]
        assert ranks[s] == first or finite[order[first], s] == 0
    assert retrieval.recalls(np.array([0, 4, 5, 20])) == {"R@1": 0.25, "R@5": 0.5, "R@10": 0.75}


def test_the_prior_is_the_mean_likelihood_of_the_pool():
    scores = np.random.default_rng(0).normal(-50, 3, (40, 70)).astype(np.float32)
    expected = np.log(np.exp(scores.astype(np.float64)).mean(0))
    np.testing.assert_allclose(retrieval.column_log_means(scores), expected, rtol=1e-6)


def test_classify_counts_ties_against_the_image_and_groups_for_it():
    classes = np.array([[1.0, 0], [0, 1], [0, 1], [-1, 0]])
    images = np.array([[1.0, 0], [0, 1], [0.1, 1]])
    groups = {"kind": np.array(["a", "b", "b", "c"])}
    figures = pair.classify(images, classes, np.array([0, 1, 3]), groups)
    assert figures["nearest"] == pytest.approx(1 / 3) and figures["nearest five"] == 1
    assert figures["kind"] == pytest.approx(2 / 3) and figures["chance"] == 0.25


def test_templates():
    photos = templates.read_templates("photo")
    assert len(set(photos)) == 80 and all(text.count("{}") == 1 for text in photos)
    assert {"a photo of a {}.", "itap of my {}.", "the origami {}."} <= set(photos)
    assert templates.read_templates("a {} here") == ["a {} here"]
    with pytest.raises(DataError, match=r"has no \{\} where the name goes"):
        templates.read_templates("a photo")


def test_a_class_is_the_mean_of_its_sentences(lit_run):
    run = pair.read_pair(lit_run)
    sentences = pair.embed_texts(run, ["a red circle", "one red circle", "a blue ring"])
    np.testing.assert_allclose(np.linalg.norm(sentences, axis=1), 1, rtol=1e-5)
    classes = pair.embed_classes(run, ["red circle"], ["a {}", "one {}"])
    mean = sentences[:2].sum(0)
    np.testing.assert_allclose(classes[0], mean / np.linalg.norm(mean), atol=1e-5)


# ------------------------------------------------------------------------------- the command
def figures(tmp_path, *argv):
    path = str(tmp_path / "figures.json")
    assert evaluate.main([*argv, "--json", path]) == 0
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def test_retrieval_and_zeroshot_and_search_of_a_run_with_a_text_encoder(lit_run, tmp_path, capsys):
    found = figures(tmp_path, lit_run, "zeroshot", "retrieval", "search", "a red circle",
                    "--num-samples", "20", "--classnames", "all", "--out", str(tmp_path))
    assert found["zeroshot"]["images"] == 20 and 0 <= found["zeroshot"]["nearest"] <= 1
    for row in ("image to text, vectors", "text to image, vectors"):
        shares = found["retrieval"][row]
        assert 0 <= shares["R@1"] <= shares["R@5"] <= shares["R@10"] <= 1
    assert len(found["search"]["nearest"]) == search.NUM_SHOWN
    assert Image.open(tmp_path / "search.png").width > 600


def test_retrieval_and_search_by_likelihood(run, tmp_path):
    found = figures(tmp_path, str(run), "retrieval", "search", "a red circle", "--num-samples",
                    "14", "--out", str(tmp_path))
    assert set(found["retrieval"]) == {"image to text, prior subtracted",
                                       "image to text, likelihood", "text to image, likelihood"}
    assert len(found["search"]["nearest"]) == 12


def test_search_reads_a_folder_without_captions_and_skips_what_is_broken(tmp_path):
    os.mkdir(tmp_path / "inner")
    for name, color in (("red.png", "red"), ("inner/blue.JPG", "blue")):
        Image.new("RGB", (30, 20), color).save(tmp_path / name)
    Image.new("RGB", (1, 5000), "green").save(tmp_path / "tall.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "notes.txt").write_text("red")
    images = search.readable_images(Config(data=str(tmp_path)), 0, 100, 8)
    best = search.nearest(images, lambda pixels: pixels[:, 0, 0, 0].astype(float))
    assert os.path.basename(best[0][1]) == "red.png" and len(best) == 3
    search.draw(str(tmp_path / "search.png"), "red", best)
    with pytest.raises(DataError, match="no image can be read in what"):
        search.nearest(iter([]), len)


# --------------------------------------------------------------------------------- bad input
def test_pools_that_leave_nothing_to_find_are_refused():
    scenes = sources.SceneSource(0, "val", 30)
    with pytest.raises(DataError, match="a pool of 1 images and 1 captions leaves nothing to find"):
        retrieval.Pool(scenes, 1)
    with pytest.raises(DataError, match="a pool has at most 10,000 images"):
        retrieval.Pool(scenes, 10_001)


@pytest.mark.parametrize("argv, message", [
    (["zeroshot", "--classnames", "{names}"], "there is nothing to tell apart: 1 class in"),
    (["retrieval", "--data", "{empty}"], "empty"),
    (["search", "red", "--data", "{empty}"], "no image can be read in what --data or --val names")])
def test_bad_input_gets_one_sentence(lit_run, tmp_path, capsys, argv, message):
    (tmp_path / "names").write_text("cat\nCat\n")
    os.mkdir(tmp_path / "empty")
    places = {"{names}": str(tmp_path / "names"), "{empty}": str(tmp_path / "empty")}
    assert evaluate.main([lit_run, *(places.get(word, word) for word in argv)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_a_grid_pool_has_one_resolution(lit_run, tmp_path, capsys):
    _, _, meta = checkpoint.latest(lit_run)
    meta["config"] |= {"image_pool": "grid"}
    cfg = from_dict(meta["config"])
    checkpoint.save_step(str(tmp_path), 2, {"params": init_params(cfg, model_spec(cfg))}, meta)
    argv = [str(tmp_path), "search", "red", "--num-samples", "4", "--resolution"]
    assert evaluate.main([*argv, "16"]) == 0
    assert evaluate.main([*argv, "32"]) == 1
    assert "reads images of 16 px alone" in capsys.readouterr().err


def test_a_run_without_text_encoder_or_decoder_says_so(run, lit_run, capsys):
    assert evaluate.main([str(run), "zeroshot", "--template", "photo"]) == 1
    assert "caption likelihood takes one" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evaluate.main([lit_run, "search"])
    assert "search needs a text" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evaluate.main([lit_run, "search", "  "])
    assert "search needs a text" in capsys.readouterr().err
    with pytest.raises(Exception, match="which has no text encoder: train one with"):
        pair.read_pair(str(run))


def test_a_prior_is_subtracted_before_the_ranks():
    scores, own = np.array([[0.0, 1.0]]), np.array([0])
    assert retrieval.image_to_text_ranks(scores, own).tolist() == [1]
    assert retrieval.image_to_text_ranks(scores, own, np.array([0.0, 5.0])).tolist() == [0]
    assert retrieval.image_to_text_ranks(scores, own, np.array([5.0, 0.0])).tolist() == [1]


def pool_of(count: int) -> SimpleNamespace:
    """Pairs whose pixels are their numbers, scored four at a time."""
    def scores(resolution, score):
        return np.concatenate([score(np.arange(i, min(i + 4, count))) for i in range(0, count, 4)])
    return SimpleNamespace(captions=np.array([f"c{i}" for i in range(count)]),
                           caption_of_image=np.arange(count), scores=scores)


def test_vectors_that_are_equal_find_each_other(monkeypatch):
    vectors = np.eye(12)
    monkeypatch.setattr(retrieval.pairs, "embed_texts", lambda _, texts: vectors)
    monkeypatch.setattr(retrieval.pairs, "embed_images", lambda _, pixels: vectors[pixels])
    rows = retrieval.measure_vectors(SimpleNamespace(resolution=8), pool_of(12))
    assert all(row == {"R@1": 1, "R@5": 1, "R@10": 1} for row in rows.values())


def test_a_caption_that_is_likely_for_every_image_wins_only_without_the_prior(monkeypatch):
    scores = 10 * np.eye(12)
    scores[:, 0] += 50
    monkeypatch.setattr(retrieval, "likelihood", lambda c, tokens, captions: scores[tokens])

    class Encoder:
        resolution = 8

        def __call__(self, pixels):
            return SimpleNamespace(tokens=pixels)
    rows = retrieval.measure_likelihood(None, Encoder(), pool_of(12))
    assert rows["image to text, prior subtracted"]["R@1"] == 1
    assert rows["image to text, likelihood"]["R@1"] == pytest.approx(1 / 12)
    assert rows["text to image, likelihood"]["R@1"] == 1

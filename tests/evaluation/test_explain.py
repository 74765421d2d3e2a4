"""The caption of one image and where it comes from: equal to the plain computation."""

import jax
import numpy as np
import pytest

import caption
import decoder
from caption import read_captioner
from evaluation.explain import Explainer, Outputs
from masking import keep_random_tokens, num_kept_tokens
from tests.helpers.encoders import random_image, untrained_run
from vit import vit


def make_explainer(folder: str, **changes) -> Explainer:
    """Of a run with nine patches, whose decoder is random enough to vary its captions."""
    untrained_run(folder, max_text_len=8, **changes)
    captioner = read_captioner(folder)
    params = jax.tree.map(lambda x: 3 * x, captioner.params)
    return Explainer(captioner._replace(params=params))


def plain(explainer: Explainer, pixels: np.ndarray, keep_ratio: float) -> dict:
    """The same with the kept tokens alone in the sequence."""
    c = explainer.captioner
    key = jax.random.split(jax.random.fold_in(jax.random.key(5), 0))[:1]

    @jax.jit
    def run(params: dict, image: jax.Array) -> tuple:
        tokens = vit(params["encoder"], image, c.encoder)["tokens"]
        kept, indices = keep_random_tokens(key, tokens, keep_ratio, c.settings.shuffle_kept)
        text = decoder.generate(params["decoder"], kept, c.decoder, 8)
        scores = decoder.caption_logits(params["decoder"], kept, text[:, :-1], c.decoder)
        probabilities = jax.nn.softmax(scores)[0]
        return text[0], indices[0], probabilities
    text, indices, probabilities = jax.device_get(run(c.params, pixels[None]))
    return {"text": text, "kept": indices, "probability": probabilities[np.arange(7), text[1:]]}


@pytest.mark.parametrize("shuffled, prefix", [(False, "causal"), (True, "bidirectional")])
def test_hidden_tokens_are_as_good_as_absent(tmp_path, shuffled, prefix):
    """At every keep ratio: the same patches, caption and probabilities as without them."""
    explainer = make_explainer(str(tmp_path / "run"), shuffle_kept=shuffled,
                               prefix_attention=prefix)
    pixels = np.asarray(random_image(1, (24, 24)))
    captions = set()
    for keep_ratio in (0.12, 0.35, 1.0):
        out = explainer.outputs(pixels, keep_ratio, seed=5)
        expected = plain(explainer, pixels, keep_ratio)
        kept = num_kept_tokens(9, keep_ratio)
        assert out.order[:kept].tolist() == expected["kept"].tolist()
        assert sorted(out.order.tolist()) == list(range(9))
        assert out.text.tolist() == expected["text"].tolist()
        np.testing.assert_allclose(out.probability, expected["probability"], rtol=1e-4, atol=1e-6)
        dropped = out.order[kept:]
        assert (out.weights[:, dropped] == 0).all()
        assert (out.weights.sum(1) > 0).all() and (out.weights.sum(1) < 1).all()
        captions.add(tuple(out.text.tolist()))
    assert len(captions) > 1


def test_without_the_image_nothing_depends_on_it(tmp_path):
    explainer = make_explainer(str(tmp_path / "run"))
    pixels = [np.asarray(random_image(seed, (24, 24))) for seed in (1, 2)]
    first, second = (explainer.outputs(image, seed=5) for image in pixels)
    assert not np.array_equal(first.probability, second.probability)
    assert np.array_equal(first.blind_text, second.blind_text)
    assert np.array_equal(first.blind_probability, second.blind_probability)
    gray: Outputs = explainer.outputs(np.array(explainer.gray), seed=5)
    np.testing.assert_allclose(gray.probability, gray.without_image, rtol=1e-5)
    assert np.array_equal(gray.text, gray.blind_text)


def test_an_explanation_is_that_of_the_command_in_words(tmp_path, capsys):
    run, path = str(tmp_path / "run"), str(tmp_path / "image.png")
    untrained_run(run)
    random_image().save(path)
    assert caption.main([run, path, "--seed", "7", "--keep-ratio", "0.6"]) == 0
    explainer = Explainer(read_captioner(run))
    pixels = caption.load_pixels(path, explainer.captioner.resolution)
    found = explainer.explain(pixels, 0.6, seed=7)
    assert capsys.readouterr().out == f"{path}: {found['caption']}\n"
    assert len(found["kept"]) == 5 and found["num_patches"] == 9
    words = [token["text"] for token in found["tokens"] if token["text"] != "(end)"]
    assert " ".join(words) == found["caption"]
    for token in found["tokens"]:
        assert 0 <= token["without_image"] <= 1 and len(token["weights"]) == 9
        best, probability = token["alternatives"][0]
        assert best == token["text"] and probability == token["probability"]
    assert explainer.explain(pixels, 0.6, seed=8)["kept"] != found["kept"]

"""The question reader learns from features that hold the answers, and from nothing else."""
import jax
import numpy as np
import pytest

import decoder
import vit
from evaluation import questions, vqa
from inputs import scenes
from interop.encoder import random_encoder, raw_pixel_encoder
from layers import init_params
from tests.helpers.models import noisy_params

SCENES = questions.question_scenes(0, "train", 1500)
VAL_SCENES = questions.question_scenes(0, "val", 300)
KINDS = ("color", "size", "word", "presence")


def of_kinds(split: str, count: int) -> list:
    made = questions.make_questions(0, split, count)
    return [[row for row in rows if row[0] in KINDS] for rows in made]


QUESTIONS = of_kinds("train", 1500), of_kinds("val", 300)
reader_logits = jax.jit(vqa.reader_logits, static_argnums=3)
READER = {"size": "small", "batch": 8, "lr": 4e-3}


@pytest.fixture(autouse=True)
def small_reader(monkeypatch):
    """Half as wide as the smallest decoder. One of a single layer does not learn colors."""
    monkeypatch.setitem(decoder.DECODER_SIZES, "small", (2, 48, 2, 96))


def perfect_tokens(records: list[dict]) -> np.ndarray:
    """Tokens (B,4,E), one per place, that hold the record."""
    values = [*scenes.COLORS, *scenes.SHAPES, *scenes.SIZES, *scenes.WORDS]
    tokens = np.zeros((len(records), 4, len(values)), np.float32)
    for b, scene in enumerate(records):
        for o in scene["objects"]:
            for name in ("color", "shape", "size"):
                tokens[b, scenes.PLACES.index(o["place"]), values.index(o[name])] = 1
        if scene["word"]:
            tokens[b, :, values.index(scene["word"])] = 1
    return tokens


def test_it_learns_from_features_that_hold_the_answers():
    tokens = perfect_tokens(SCENES), perfect_tokens(VAL_SCENES)
    shares = vqa.train_reader(tokens, QUESTIONS, steps=300, **READER)
    blind = questions.blind_accuracy(*QUESTIONS)
    assert shares["all"] > blind["all"] + 0.2, shares
    assert shares["color"] > 2 * blind["color"] and shares["word"] > 2 * blind["word"], shares


def test_without_features_it_is_no_better_than_blind():
    tokens = 0 * perfect_tokens(SCENES), 0 * perfect_tokens(VAL_SCENES)
    shares = vqa.train_reader(tokens, QUESTIONS, steps=60, **READER)
    blind = questions.blind_accuracy(*QUESTIONS)
    assert all(shares[kind] < blind[kind] + 0.08 for kind in shares), (shares, blind)


def test_it_follows_from_the_seed():
    tokens = perfect_tokens(SCENES[:200]), perfect_tokens(VAL_SCENES[:100])
    asked = QUESTIONS[0][:200], QUESTIONS[1][:100]
    first, again, other = (vqa.train_reader(tokens, asked, seed, steps=8, **READER)
                           for seed in (0, 0, 1))
    assert first == again != other


def test_each_question_is_read_as_if_it_were_alone():
    """Beside other questions, and with padding behind it, the logits are the same."""
    rng, cfg = np.random.default_rng(0), decoder.decoder_config("micro", 50, 384)
    params = noisy_params(vqa.reader_specs(cfg, 7))
    image = rng.normal(size=(2, 4, 7)).astype(np.float32)
    text = rng.integers(3, 50, (2, 3, 6))
    together = np.asarray(reader_logits(params, image, text, cfg))
    for q in range(3):
        alone = reader_logits(params, image, text[:, q:q + 1], cfg)
        assert np.allclose(together[:, q], alone[:, 0], atol=1e-4)
    padded = np.concatenate([text[..., :4], 0 * text[..., 4:]], -1)
    logits = reader_logits(params, image, padded, cfg)
    assert np.allclose(together[:, :, :4], logits[:, :, :4], atol=1e-4)
    swapped = reader_logits(params, image[::-1], text, cfg)
    assert not np.allclose(together, swapped, atol=1e-2)


def test_correct_means_that_greedy_generation_gives_the_answer():
    """Token by token, until the end (2). An answer has one or two tokens before it."""
    rng, cfg = np.random.default_rng(1), decoder.decoder_config("micro", 4, 384)
    params = init_params(jax.random.key(1), vqa.reader_specs(cfg, 7))
    image = rng.normal(size=(64, 4, 7)).astype(np.float32)
    question = rng.integers(3, 4, (64, 1, 3))
    truth = rng.integers(2, 4, (64, 2))
    truth = np.where((truth[:, :1] == 2) & (np.arange(2) == 1), 0, truth)
    end = np.where(truth[:, 1] == 3, 2, 0)
    text = np.concatenate([question[:, 0], truth, end[:, None]], 1)[:, None]
    is_answer = (text != 0) & (np.arange(6) >= 3)
    generated = text[:, :, :3]
    for _ in range(3):
        logits = reader_logits(params, image, generated, cfg)
        likeliest = np.asarray(logits)[:, :, -1:].argmax(-1)
        generated = np.concatenate([generated, likeliest], -1)
    same = []
    for row, true_row, length in zip(generated[:, 0], text[:, 0], is_answer.sum((1, 2))):
        same.append(row[3:3 + length].tolist() == true_row[3:3 + length].tolist())
    is_correct = jax.jit(vqa.is_correct, static_argnums=4)
    correct = is_correct(params, image, text, is_answer, cfg)
    assert correct[:, 0].tolist() == same and 0 < sum(same) < 64


def test_baselines_have_tokens_on_the_same_grid(encoder):
    images = vqa.question_images(0, "val", 3, 16)
    tokens = encoder(images).tokens
    width = encoder.cfg.width
    assert tokens.shape == (3, 4, width)
    assert random_encoder(encoder, 1)(images).tokens.shape == (3, 4, width)
    assert np.allclose(encoder(images, batch=2).tokens, tokens, atol=1e-5)
    pixels = raw_pixel_encoder(encoder)(images).tokens
    expected = np.asarray(vit.normalize(images[1, 8:, 8:])).ravel()
    assert np.allclose(pixels[1, 3], expected, atol=1e-6)


def test_each_row_is_of_its_own_encoder(monkeypatch):
    encoder, random, raw = object(), object(), object()
    monkeypatch.setattr(vqa, "random_encoder", lambda encoder, seed: random)
    monkeypatch.setattr(vqa, "raw_pixel_encoder", lambda encoder: raw)
    monkeypatch.setattr(vqa, "measure", lambda encoder, *_: {"all": encoder})
    monkeypatch.setattr(vqa, "NUM_TRAIN", 20)
    monkeypatch.setattr(vqa, "NUM_VAL", 10)
    rows = vqa.measure_all(encoder)
    found = [rows[name]["all"] for name in ("encoder", "random encoder", "raw pixels")]
    assert found == [encoder, random, raw]

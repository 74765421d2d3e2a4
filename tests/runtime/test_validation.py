"""Validation: samples that cannot be used are reported, and what an evaluation makes of losses."""
import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import decoder
import vit
from config import RECIPES
from data import Loader
from inputs import opening, sources
from objectives import cappa, registry
from objectives.registry import model_spec
from runtime import validation
from runtime.devices import DataParallel
from runtime.errors import TrainingError
from runtime.validation import ValidationSet
from tests.evaluation.conftest import scene_vocabulary
from tests.helpers.models import noisy_params
from tests.helpers.samples import TOK, members, spill
from train import openvision2_loss


def test_a_broken_validation_image_is_reported_once_and_replaced(tmp_path, capsys):
    files = [(name, b"no image" if name == "000000001.jpg" else content)
             for name, content in members(4)]
    spill(tmp_path, files)
    cfg = dataclasses.replace(RECIPES["toy"], encoder="micro/8", val_samples=4)
    loader = Loader(sources.open_source(str(tmp_path)), TOK, cfg.max_text_len, 0, None, 1)
    for _ in range(2):  # at two resolutions
        validation_set = ValidationSet(cfg, loader, 16, 4, model_spec(cfg), DataParallel(1),
                                       openvision2_loss)
        assert validation_set.samples.tolist() == [0, 2, 2, 3]
    skipped = [line for line in capsys.readouterr().out.splitlines() if "skipped" in line]
    assert len(skipped) == 1 and "000000001.jpg: image cannot be opened" in skipped[0], skipped


def evaluator(losses: dict, best: float | None = None) -> tuple:
    """An evaluator whose validation set has these losses, and its run."""
    monitor = SimpleNamespace(val_loss_blind=1, log=lambda **row: None, plot=lambda: None,
                              add_image=lambda _: None, postfix={}, window_start=0,
                              bar=SimpleNamespace(set_postfix=lambda _: None))
    run = SimpleNamespace(step=3, state={"best_shuffled": best, "evaluation_pending": True})
    made = validation.Evaluator(run, monitor, None)
    made.validation_set = SimpleNamespace(losses=lambda _: losses)
    return made, run


def test_a_validation_loss_that_is_not_finite_stops_the_run():
    made, _ = evaluator({"val_loss": float("nan"), "val_loss_shuffled": 2.0})
    with pytest.raises(TrainingError, match="validation loss is no longer finite at step 3"):
        made.evaluate(None)


def test_the_best_shuffled_loss_is_the_lowest():
    made, run = evaluator({"val_loss": 1.0, "val_loss_shuffled": 2.5}, best=2.0)
    made.evaluate(None)
    assert run.state["best_shuffled"] == 2.0


def test_cappa_is_validated_token_by_token(monkeypatch):
    monkeypatch.setattr(cappa, "validation_loss",
                        lambda params, batch, keys, model: (keys.shape[0] + params, params))
    monkeypatch.setattr(cappa, "loss", lambda *_: pytest.fail("the training loss"))
    model = registry.ModelSpec(None, None, 1.0, "cappa")
    loss = validation.make_loss(model, None, DataParallel(1))
    loss(np.zeros(1), {"position": np.zeros((1, 2), np.int32)})


def test_captions_are_generated_from_the_kept_tokens_alone():
    """The kept patches come with them, and other values of the dropped tokens change nothing."""
    cfg = dataclasses.replace(RECIPES["toy"], encoder="micro/8", max_text_len=8, scan_unroll=1)
    model = model_spec(cfg)
    parallel, rng = DataParallel(1), np.random.default_rng(0)
    params = noisy_params({"encoder": vit.param_specs(model.encoder)}
                          | registry.param_specs(model))
    batch = {"images": rng.integers(0, 256, (3, 32, 32, 3), np.uint8),
             "text": np.zeros((3, 8), np.int32), "position": np.arange(3, dtype=np.int32)}
    one_device = jax.tree.map(lambda x: x[None], (params, batch))
    captions, kept = validation.make_generate(model, 8, parallel)(*one_device)
    assert kept.shape == (1, 3, 5)  # a third of 16 patches
    tokens = np.asarray(vit.vit(params["encoder"], batch["images"], model.encoder)["tokens"])
    read = np.take_along_axis(tokens, np.asarray(kept)[0][..., None], axis=1)
    expected = decoder.generate(params["decoder"], read, model.decoder, 8)
    assert np.array_equal(captions[0], expected)
    complete = decoder.generate(params["decoder"], tokens, model.decoder, 8)
    assert not np.array_equal(complete, expected)


@pytest.mark.parametrize("length, known", [(80, True), (8, False)])
def test_captions_that_are_cut_off_have_no_known_blind_loss(length, known):
    cfg = dataclasses.replace(RECIPES["toy"], encoder="micro/8", val_samples=8,
                              max_text_len=length, vocab_size=150)
    loader = Loader(opening.open_validation_data(cfg), scene_vocabulary(150), length, 0, None, 1)
    validation_set = ValidationSet(cfg, loader, 16, 4, model_spec(cfg), DataParallel(1),
                                   openvision2_loss)
    assert (validation_set.blind_loss() is not None) == known

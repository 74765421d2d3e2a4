"""LiT: the features of an image are computed once, and the optimizer leaves the encoder alone."""
import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vit
from benchmarks import step_time
from config import RECIPES, Config
from inputs import sources
from inputs.images import Augment
from objectives import lit, registry
from runtime.curriculum import make_optimizer, parse_stages
from tests.helpers.samples import TOK, members, reader, spill
from tests.objectives.small import ENC, make_model, make_params

MODEL = make_model("lit")
CROP = Augment(min_crop_area=0.5)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return sources.open_source(spill(tmp_path_factory.mktemp("images"), members(6)))


def feature_loader(source, copies: int, augment: Augment | None) -> lit.FeatureLoader:
    params = make_params(MODEL)["encoder"]
    return lit.FeatureLoader(params, MODEL, copies, source, TOK, 12, 0, augment, 1)


def test_a_batch_holds_the_encoders_tokens_and_each_image_is_encoded_once(source):
    loader, plain = feature_loader(source, 1, None), reader(source, augment=None)
    encode, calls = loader.encode, []
    loader.encode = lambda pixels: (calls.append(1), encode(pixels))[1]
    first, second = loader.batch(range(6), 16), loader.batch(range(6, 12), 16)
    pixels = plain.batch(range(6), 16)
    tokens = vit.vit(make_params(MODEL)["encoder"], pixels["images"], ENC)["tokens"]
    np.testing.assert_allclose(first["images"], tokens, atol=1e-4)
    assert (first["images"] == second["images"]).all() and len(calls) == 6
    assert (first["text"] == pixels["text"]).all()


def test_copies_of_an_image_come_in_turn(source):
    """With two augmented copies, the third epoch is the first one again."""
    loader = feature_loader(source, 2, CROP)
    of_epoch = []
    for epoch in range(3):
        batch = loader.batch(range(6 * epoch, 6 * epoch + 6), 16)
        of_epoch.append(batch["images"][np.argsort(batch["sample"])])
    assert (of_epoch[0] == of_epoch[2]).all() and len(loader.features) == 12
    assert np.abs(of_epoch[0] - of_epoch[1]).max(axis=(1, 2)).min() > 1e-3


def test_the_optimizer_has_no_state_for_the_encoder_and_does_not_change_it():
    cfg = dataclasses.replace(RECIPES["toy"], objective="lit")
    optimizer = make_optimizer(cfg, parse_stages("resolution=16 steps=9 batch=8 lr=1")[0])
    params = make_params(MODEL)
    state = jax.jit(optimizer.init)(params)
    sizes = sum(x.size for x in jax.tree.leaves(state)) / 2
    trained = {part: tree for part, tree in params.items() if part != "encoder"}
    assert abs(sizes - sum(x.size for x in jax.tree.leaves(trained))) <= 2  # and step counters
    grads = jax.tree.map(jnp.ones_like, trained)
    grads["encoder"] = jax.tree.map(jnp.zeros_like, params["encoder"])
    updates, _ = jax.jit(optimizer.update)(grads, state, params)
    assert not any(np.asarray(u).any() for u in jax.tree.leaves(updates["encoder"]))
    assert all(np.asarray(u).any() for u in jax.tree.leaves(updates["text"]))


def test_the_frozen_encoder_has_no_backward_pass_in_the_flops_of_a_step():
    cfg = Config(objective="lit", init_encoder="random", min_crop_area=0.5)
    parts = registry.flops(registry.model_spec(cfg), 32, cfg.max_text_len)
    stored = 3 * (sum(parts.values()) - parts["encoder"])
    assert registry.training_flops(cfg, 32) == stored + parts["encoder"]
    for changes in ({"min_crop_area": 1.0}, {"feature_copies": 2}):
        changed = dataclasses.replace(cfg, **changes)
        assert registry.training_flops(changed, 32) == stored
        assert step_time.model_flops(changed, 32) == stored + parts["encoder"]
    assert f"{stored:.3g} FLOPs" in registry.run_summary(dataclasses.replace(
        changed, stages="resolution=32 steps=1 batch=1 lr=1"))


@pytest.mark.parametrize("min_area, copies, stored", [(1.0, 0, True), (0.5, 0, False),
                                                      (0.5, 3, True)])
def test_features_are_stored_unless_each_crop_is_new(source, min_area, copies, stored):
    model = make_model("lit")
    run = SimpleNamespace(loader=reader(source, augment=Augment(min_area)), model=model, step=0,
                          cfg=Config(feature_copies=copies, workers=1),
                          stages=parse_stages("resolution=16 steps=9 batch=8 lr=1"))
    loader = lit.training_loader(run, make_params(model))
    assert isinstance(loader, lit.FeatureLoader) == stored

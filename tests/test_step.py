"""One training step: the norm of its gradient, and the precision of its parameters."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import train
from config import RECIPES
from objectives import registry
from runtime import checkpoint


@pytest.mark.parametrize("clip, norm", [(0.0, 5.0), (1.0, 1.0), (10.0, 5.0)])
def test_the_gradient_is_clipped_to_its_norm(monkeypatch, clip, norm):
    def loss(params, batch, keys, model):
        return (params["w"] * jnp.array([3.0, 4.0])).sum(), jnp.int32(1)
    monkeypatch.setattr(train, "openvision2_loss", loss)
    model, sgd = registry.model_spec(RECIPES["toy"]), optax.sgd(1.0)
    step = train.make_step(model, sgd, 0, devices=jax.local_devices()[:1], grad_clip=clip)
    params = {"w": np.zeros((1, 2), np.float32)}
    state = jax.tree.map(lambda x: x[None], sgd.init(params))
    new, _, metrics = step(params, state, {"position": np.zeros((1, 1), np.int32)})
    assert float(jnp.linalg.norm(new["w"])) == pytest.approx(norm)
    assert float(metrics["grad_norm"][0]) == pytest.approx(5)


def test_in_half_precision_only_the_matrices_of_blocks_are_cast():
    cfg = dataclasses.replace(RECIPES["toy"], dtype="bfloat16")
    model = registry.model_spec(cfg)
    shapes = jax.eval_shape(
        lambda: train.cast_block_params(registry.init_params(cfg, model), model))
    for name, x in checkpoint.flatten(shapes).items():
        half = "/blocks/" in name and "/norm" not in name
        assert x.dtype == (jnp.bfloat16 if half else jnp.float32), name

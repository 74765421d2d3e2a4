"""Small models of the objectives, and a batch for them."""
import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np

import decoder
import vit
from objectives import registry
from tests.helpers.models import noisy_params

B, T, V, RESOLUTION, N = 4, 10, 40, 24, 9  # images, text positions, vocabulary, pixels, patches
ENC = vit.ViTConfig(depth=2, width=32, num_heads=2, mlp_dim=48, patch_size=8)
DEC = decoder.DecoderConfig(depth=2, width=24, num_heads=2, mlp_dim=40, vocab_size=V,
                            image_width=32)
KEYS = jax.vmap(lambda n: jax.random.fold_in(jax.random.key(1), n))(np.arange(B))


def captions(seed: int) -> np.ndarray:
    """(B,T) of several lengths."""
    text = np.random.default_rng(seed).integers(3, V, (B, T)).astype(np.int32)
    text[:, 0] = decoder.BOS
    for row, end in zip(text, (T - 1, 6, 3, 4)):
        row[end], row[end + 1:] = decoder.EOS, decoder.PAD
    return text


def make_batch() -> dict[str, np.ndarray]:
    shape = (B, RESOLUTION, RESOLUTION, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    return {"images": images, "text": captions(1), "alt": captions(2)}


def make_model(objective: str, cls_token: bool = False) -> registry.ModelSpec:
    enc = dataclasses.replace(ENC, cls_token=cls_token)
    return registry.ModelSpec(enc, DEC, 1.0, objective, max_text_len=T)


def make_params(model: registry.ModelSpec) -> dict:
    specs = {"encoder": vit.param_specs(model.encoder)} | registry.param_specs(model)
    return noisy_params(specs)


@functools.cache
def mapped_loss(objective: str, **options) -> Callable:
    """The objective's loss over devices, the first axis of its batch and keys."""
    model = make_model(objective)

    def loss(params, batch, keys):
        return registry.objective_module(objective).loss(params, batch, keys, model, **options)
    return jax.jit(jax.vmap(loss, (None, 0, 0), axis_name="devices"))


def loss_and_count(objective: str, batch: dict, devices: int = 1, **options) -> tuple[float, float]:
    """The objective's two sums over the batch, on simulated devices."""
    parts = jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), (batch, KEYS))
    params = make_params(make_model(objective))
    total, count = mapped_loss(objective, **options)(params, *parts)
    return float(total.sum()), float(count.sum())

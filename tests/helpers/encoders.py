"""Small encoders, runs and images for tests of import, export and features."""
import dataclasses
import os

import jax
import numpy as np
from PIL import Image

import config
import layers
import vit
from objectives import registry
from runtime import checkpoint


def random_params(specs: dict, seed: int = 3) -> dict:
    """No parameter is 0 or 1."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda spec: rng.standard_normal(spec.shape, np.float32), specs,
                        is_leaf=layers.is_spec)


def small_encoder(cls_token: bool = False, learned_pos_grid: int = 0) -> tuple:
    """(parameters, config), with no two sizes equal; 24 px are a grid of 3 x 3."""
    cfg = vit.ViTConfig(depth=2, width=48, num_heads=3, mlp_dim=80, patch_size=8,
                        cls_token=cls_token, learned_pos_grid=learned_pos_grid)
    return random_params(vit.param_specs(cfg)), cfg


def zero_params(cfg: vit.ViTConfig) -> dict:
    """Parameters that take no memory: views of one zero."""
    return jax.tree.map(lambda spec: np.broadcast_to(np.float32(0), spec.shape),
                        vit.param_specs(cfg), is_leaf=layers.is_spec)


def random_image(seed: int = 0, size: tuple[int, int] = (37, 29)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels)


def equal_trees(a: dict, b: dict) -> bool:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


def untrained_run(folder: str, **changes) -> config.Config:
    """A run's folder with one checkpoint of initial parameters: at step 4, in the second of two
    stages (16 and 24 px). Its meta is that of earlier versions, which the settings describe."""
    cfg = dataclasses.replace(
        config.RECIPES["toy"], encoder="micro/8", scan_unroll=1, workdir=folder,
        stages="resolution=16 steps=3 batch=2 lr=1e-3, resolution=24 steps=2 batch=2 lr=1e-3")
    cfg = dataclasses.replace(cfg, **changes)
    params = registry.init_params(cfg, registry.model_spec(cfg))
    words = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", *map(str, range(150))]
    meta = {"config": dataclasses.asdict(cfg), "vocabulary": words}
    os.makedirs(folder, exist_ok=True)
    checkpoint.save_step(folder, 4, {"params": params}, meta)
    return cfg

"""The encoder by its properties: sizes, parameters, outputs, positions, resolutions and costs.
tests/parity compares it with PyTorch."""
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layers
import vit
from tests.helpers.models import matmul_flops, noisy_params

CFG = vit.ViTConfig(depth=2, width=32, num_heads=2, mlp_dim=64, patch_size=8)
encode = jax.jit(vit.vit, static_argnums=(2, 3))


def random_images(count: int, resolution: int) -> np.ndarray:
    shape = (count, resolution, resolution, 3)
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


@pytest.mark.parametrize("name,millions", [
    ("Ti/16", 5.5), ("S/16", 21.6), ("B/16", 85.6), ("L/14", 303), ("So400m/14", 412),
    ("H/14", 631), ("g/14", 1011)])
def test_family_has_the_sizes_of_the_paper(name, millions):
    count = layers.count_params(vit.param_specs(vit.vit_config(name)))
    assert count / 1e6 == pytest.approx(millions, rel=0.003)


@pytest.mark.parametrize("name", ["X/16", "L", "L/", "L/0", "L/-1", "L/a", "/14", ""])
def test_unknown_encoder_is_refused(name):
    with pytest.raises(ValueError, match="SIZE/PATCH"):
        vit.vit_config(name)


def test_any_patch_size_is_possible():
    cfg = vit.vit_config("S/8")
    assert cfg.patch_size == 8 and cfg.width == 384


@pytest.mark.parametrize("cls", [False, True])
def test_init_makes_the_declared_parameters(cls):
    cfg = dataclasses.replace(CFG, cls_token=cls)
    params, specs = vit.init(jax.random.key(0), cfg), vit.param_specs(cfg)
    declared = jax.tree.map(lambda spec: spec.shape, specs, is_leaf=layers.is_spec)
    assert jax.tree.map(lambda x: x.shape, params) == declared
    assert sum(x.size for x in jax.tree.leaves(params)) == layers.count_params(specs)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))


def test_a_new_parameter_changes_no_other():
    without_cls = vit.init(jax.random.key(3), CFG)
    with_cls = vit.init(jax.random.key(3), dataclasses.replace(CFG, cls_token=True))
    del with_cls["cls"]
    jax.tree.map(np.testing.assert_array_equal, without_cls, with_cls)


@pytest.mark.parametrize("cls", [False, True])
def test_named_outputs_and_their_shapes(cls):
    cfg = dataclasses.replace(CFG, cls_token=cls)
    params = noisy_params(vit.param_specs(cfg))
    out = jax.device_get(encode(params, random_images(3, 32), cfg, True))
    S = 16 + cls
    shapes = {"tokens": (3, 16, 32), "pooled": (3, 32), "attention": (2, 3, 2, S, S)}
    if cls:
        shapes["cls"] = (3, 32)
    assert {name: x.shape for name, x in out.items()} == shapes
    np.testing.assert_allclose(out["attention"].sum(-1), 1, rtol=1e-5)
    pooled = layers.layer_norm(jnp.asarray(out["tokens"].mean(1)), params["norm"])
    np.testing.assert_allclose(out["pooled"], pooled, rtol=1e-5, atol=1e-6)
    assert "attention" not in encode(params, random_images(3, 32), cfg)


def test_bytes_and_normalized_floats_give_the_same_tokens():
    params, images = noisy_params(vit.param_specs(CFG)), random_images(2, 16)
    by_hand = (images / 255.0 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    tokens = encode(params, images, CFG)["tokens"]
    np.testing.assert_allclose(tokens, encode(params, by_hand.astype(np.float32), CFG)["tokens"],
                               atol=1e-5)


@pytest.mark.parametrize("grid,width", [(2, 8), (6, 96), (16, 1024)])
def test_position_table_follows_the_formula_at_any_grid(grid, width):
    table, quarter = vit.sincos_position_embedding(grid, width), width // 4
    for n in range(0, grid * grid, 5):
        y, x = divmod(n, grid)
        for i in range(0, quarter, 3):
            omega = 10000 ** (-i / (quarter - 1))
            expected = [math.sin(x * omega), math.cos(x * omega),
                        math.sin(y * omega), math.cos(y * omega)]
            np.testing.assert_allclose(table[n, i::quarter], expected, atol=1e-6)
    assert len(np.unique(table.round(5), axis=0)) == grid * grid  # each patch has its own row


def test_any_resolution_works_without_surgery():
    params = noisy_params(vit.param_specs(CFG))
    for resolution in (8, 24, 64):
        tokens = encode(params, random_images(1, resolution), CFG)["tokens"]
        assert tokens.shape == (1, (resolution // 8) ** 2, 32)


def test_pixels_that_fill_no_patch_are_dropped():
    params, images = noisy_params(vit.param_specs(CFG)), random_images(1, 20)
    cropped = encode(params, images[:, :16, :16], CFG)["tokens"]
    np.testing.assert_array_equal(encode(params, images, CFG)["tokens"], cropped)


def test_a_resolution_below_the_patch_size_is_refused():
    with pytest.raises(ValueError, match="below the patch size"):
        vit.vit(noisy_params(vit.param_specs(CFG)), random_images(1, 4), CFG)


@pytest.mark.parametrize("change", [{"remat": "dots"}, {"remat": "block"}, {"scan_unroll": 2}])
def test_memory_and_speed_options_change_no_result(change):
    params, images = noisy_params(vit.param_specs(CFG)), random_images(2, 32)

    def loss(params, cfg):
        return jnp.square(vit.vit(params, images, cfg)["tokens"]).mean()
    value_and_grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    value, grads = value_and_grad(params, CFG)
    value2, grads2 = value_and_grad(params, dataclasses.replace(CFG, **change))
    np.testing.assert_allclose(value, value2, rtol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-6),
                 grads, grads2)


def test_remat_saves_memory_whatever_the_unrolling():
    """XLA merges what an unrolled block computes twice, so remat must not unroll."""
    cfg = dataclasses.replace(CFG, depth=6, scan_unroll=6)
    params, images = noisy_params(vit.param_specs(cfg)), random_images(8, 32)

    def planned_bytes(remat):
        def loss(params):
            model = dataclasses.replace(cfg, remat=remat)
            return jnp.square(vit.vit(params, images, model)["tokens"]).mean()
        return jax.jit(jax.grad(loss)).lower(params).compile().memory_analysis().temp_size_in_bytes
    assert planned_bytes("block") < 0.6 * planned_bytes("none")


@pytest.mark.parametrize("change", [{}, {"cls_token": True}, {"remat": "block"}, {"depth": 1},
                                    {"gated_attention": True, "norm_tokens": True}])
def test_a_last_block_of_the_picked_tokens_alone_gives_their_values_and_gradients(change):
    cfg = dataclasses.replace(CFG, scan_unroll=2, **change)
    params, images = noisy_params(vit.param_specs(cfg)), random_images(2, 32)
    rows = np.array([[5, 0, 11], [3, 15, 2]])[:, :, None]

    def pick(tokens):
        return jnp.take_along_axis(tokens, rows, axis=1)

    def loss(params, select, pick_after):
        tokens = vit.vit(params, images, cfg, select=select)["tokens"]
        tokens = pick(tokens) if pick_after else tokens
        return jnp.square(tokens).mean(), tokens
    grad = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=(1, 2))
    (_, tokens), grads = grad(params, pick, False)
    (_, tokens2), grads2 = grad(params, None, True)
    assert tokens.shape == (2, 3, 32)
    np.testing.assert_allclose(tokens, tokens2, rtol=1e-5, atol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-6),
                 grads, grads2)
    full = matmul_flops(lambda p: vit.vit(p, images, cfg)["tokens"], params)
    picked = matmul_flops(lambda p: vit.vit(p, images, cfg, select=pick)["tokens"], params)
    assert picked == full if cfg.remat != "none" else picked < full  # remat needs the loop


def test_bfloat16_is_close_to_float32():
    params, images = vit.init(jax.random.key(0), CFG), random_images(4, 32)
    exact = np.asarray(encode(params, images, CFG)["tokens"])
    rounded = encode(params, images, dataclasses.replace(CFG, dtype="bfloat16"))["tokens"]
    assert rounded.dtype == jnp.bfloat16
    error = np.linalg.norm(exact - np.asarray(rounded, np.float32)) / np.linalg.norm(exact)
    assert 0 < error < 0.03


@pytest.mark.parametrize("cls", [False, True])
def test_flops_formula_equals_the_count_of_traced_matmuls(cls):
    cfg = dataclasses.replace(CFG, cls_token=cls)
    params = noisy_params(vit.param_specs(cfg))
    counted = matmul_flops(lambda p, x: vit.vit(p, x, cfg)["tokens"], params, random_images(1, 48))
    assert counted == vit.flops(cfg, 48)


def test_learned_positions_are_resized_by_the_cubic():
    cfg = vit.ViTConfig(1, 8, 2, 8, 8, learned_pos_grid=4)
    table = np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)
    expected = jax.image.resize(table.reshape(4, 4, 8), (7, 5, 8), "cubic").reshape(35, 8)
    found = vit.position_embedding({"positions": {"table": table}}, (7, 5), cfg)
    np.testing.assert_allclose(found, expected, atol=1e-6)

"""Weight layouts: each is written and read bit for bit, and what does not fit is refused."""
import ml_dtypes
import numpy as np
import pytest

import layers
import vit
from interop.layouts import LAYOUTS, default_heads, detect, sizes, to_library
from runtime.errors import LayoutError
from tests.helpers.encoders import equal_trees, small_encoder, zero_params

# (layout, CLS token) that exist
CASES = [("siglip", False), ("timm", False), ("open_clip", True), ("vit", True), ("timm", True)]


def test_cases_are_those_of_the_table():
    with_cls = {kind for kind, layout in LAYOUTS.items() if layout.cls}
    assert {kind for kind, cls_token in CASES if cls_token} == with_cls
    assert {kind for kind, _ in CASES} == set(LAYOUTS)


@pytest.mark.parametrize("kind, cls_token", CASES)
@pytest.mark.parametrize("learned_pos_grid", [0, 3])
@pytest.mark.parametrize("prefix", ["", "visual."])
def test_writing_and_reading_is_bit_for_bit(kind, cls_token, learned_pos_grid, prefix):
    params, cfg = small_encoder(cls_token, learned_pos_grid)
    arrays = {"logit_scale": np.zeros(())}
    for name, x in to_library(params, cfg, 3, LAYOUTS[kind]).items():
        arrays[prefix + name] = x
    read, read_cfg, resolution, notes = detect(arrays, heads=3)
    assert equal_trees(read, params) and read_cfg == cfg and resolution == 24
    assert kind in notes[0] and ("is kept" in notes[1]) == bool(learned_pos_grid)
    assert notes[2] == "dropped 1: logit_scale"


@pytest.mark.parametrize("size", vit.ENCODER_SIZES)
def test_sizes_of_the_family_follow_from_the_shapes(size):
    for kind, cls_token in CASES:
        cfg = vit.vit_config(f"{size}/14", cls_token=cls_token)
        arrays = to_library(zero_params(cfg), cfg, 4, LAYOUTS[kind])
        assert sizes(arrays, LAYOUTS[kind], 0) == (cfg, 4)
        patch_bias = 0 if kind == "open_clip" else cfg.width
        table = (4 * 4 + cls_token) * cfg.width
        count = layers.count_params(vit.param_specs(cfg))
        assert sum(x.size for x in arrays.values()) == count + patch_bias + table


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_a_rounded_sin_cos_table_is_recognized(dtype):
    params, cfg = small_encoder(cls_token=True)
    arrays = to_library(params, cfg, 3, LAYOUTS["open_clip"])
    read, read_cfg, _, _ = detect({name: x.astype(dtype) for name, x in arrays.items()}, heads=3)
    assert read_cfg == cfg and read["patch"]["kernel"].dtype == np.float32


def test_another_position_table_is_kept():
    params, cfg = small_encoder(cls_token=True)
    arrays = to_library(params, cfg, 3, LAYOUTS["open_clip"])
    table = arrays["positional_embedding"]
    y_before_x = np.concatenate([table[:, 24:], table[:, :24]], axis=1)
    arrays["positional_embedding"] = y_before_x + 1
    read, read_cfg, _, _ = detect(arrays, heads=3)
    assert read_cfg.learned_pos_grid == 3
    assert np.array_equal(read["positions"]["table"], y_before_x[1:] + 1)
    cls = params["cls"]["embedding"] + 1  # plus its row of the table
    assert np.array_equal(read["cls"]["embedding"], cls)


BLOCK = "transformer.resblocks"
MISFITS = {  # (arrays that change, None for one that is deleted; the message)
    "missing": ({"ln_post.bias": None}, "ln_post.bias is missing"),
    "no patches": ({"conv1.weight": None}, "no patch embedding among its 28 tensors"),
    "no CLS": ({"class_embedding": None}, "class_embedding is missing"),
    "shape": ({f"{BLOCK}.1.mlp.c_fc.weight": np.zeros((48, 80), np.float32)},
              r"c_fc.weight is \(48, 80\), not \(80, 48\)"),
    "axes": ({"conv1.weight": np.zeros((48, 192), np.float32)},
             r"conv1.weight is \(48, 192\), and should have 4 axes"),
    "grid": ({"positional_embedding": np.zeros((9, 48), np.float32)},
             "rows for 8 patches, which make no square grid"),
    "integers": ({"ln_post.weight": np.ones(48, np.int8)}, "ln_post.weight is int8, not floats"),
    "pre-norm": ({"ln_pre.weight": np.ones(48)}, "ln_pre.weight has no place"),
    "layer scale": ({f"{BLOCK}.0.ls_1.gamma": np.ones(48)}, "ls_1.gamma has no place"),
    "gap": ({f"{BLOCK}.3.ln_1.bias": np.ones(48)}, "resblocks.3.ln_1.bias has no place"),
    "width": ({"conv1.weight": np.zeros((50, 3, 8, 8), np.float32)}, "with --heads"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_misfit_is_named(case):
    changes, message = MISFITS[case]
    params, cfg = small_encoder(cls_token=True)
    arrays = to_library(params, cfg, 3, LAYOUTS["open_clip"]) | changes
    arrays = {name: x for name, x in arrays.items() if x is not None}
    with pytest.raises(LayoutError, match=message):
        detect(arrays, heads=0 if case == "width" else 3)


@pytest.mark.parametrize("heads", [-3, 7])
def test_an_impossible_number_of_heads_is_named(heads):
    params, cfg = small_encoder(cls_token=True)
    with pytest.raises(LayoutError, match=f"cannot be divided into {heads} heads"):
        detect(to_library(params, cfg, 3, LAYOUTS["open_clip"]), heads)


def test_a_patch_bias_is_refused():
    params, cfg = small_encoder()
    arrays = to_library(params, cfg, 3, LAYOUTS["siglip"])
    arrays["embeddings.patch_embedding.bias"] = np.ones(48, np.float32)
    with pytest.raises(LayoutError, match="bias is not zero"):
        detect(arrays, heads=3)


def test_learned_positions_are_used_and_resized_to_other_grids():
    params, cfg = small_encoder()
    _, learned = small_encoder(learned_pos_grid=3)
    images = np.random.default_rng(0).integers(0, 256, (2, 24, 24, 3), np.uint8)
    tokens = vit.vit(params, images, cfg)["tokens"]
    table = vit.sincos_position_embedding(3, cfg.width)
    params["positions"] = {"table": table}
    assert np.array_equal(vit.vit(params, images, learned)["tokens"], tokens)
    params["positions"] = {"table": table[::-1]}
    assert np.abs(vit.vit(params, images, learned)["tokens"] - tokens).max() > 0.1
    constant = {"positions": {"table": np.full((9, 48), 0.5, np.float32)}}
    resized = vit.position_embedding(constant, 5, learned)
    assert resized.shape == (25, 48) and np.allclose(resized, 0.5)


def test_the_number_of_heads_is_that_of_the_family(monkeypatch):
    for depth, width, num_heads, mlp_dim in vit.ENCODER_SIZES.values():
        assert default_heads(depth, width, mlp_dim) == num_heads
    assert default_heads(2, 192, 99) == 3  # of its width
    assert default_heads(2, 640, 99) == 10 and default_heads(2, 50, 99) == 0
    monkeypatch.setitem(vit.ENCODER_SIZES, "other", (7, 192, 6, 99))
    assert default_heads(7, 192, 99) == 6 and default_heads(2, 192, 99) == 0

"""Encoders in and out, features and captions of any pictures: what holds without any other library."""
import dataclasses
import json
import os

import jax
import ml_dtypes
import numpy as np
import pytest
from PIL import Image

import caption
import config
import convert
import layers
import train
import vit
from interop import layouts, model_card, transfer
from interop.encoder import load_encoder, load_pixels
from interop.layouts import LAYOUTS, detect, to_library
from objectives import registry
from objectives.registry import ModelSpec, init_params
from runtime import checkpoint
from runtime.errors import BadSample, CheckpointError, LayoutError

R = 24  # a grid of 3 x 3


def encoder(cls=False, positions=0):
    """A small encoder with no weight that is 0 or 1, and no two sizes equal."""
    cfg = vit.ViTConfig(depth=2, width=48, num_heads=3, mlp_dim=80, patch_size=8, cls_token=cls, learned_pos_grid=positions)
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda w: rng.standard_normal(w.shape, np.float32), vit.param_specs(cfg), is_leaf=layers.is_spec), cfg


def picture(seed=0, size=(37, 29)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


HOLDS = [(kind, cls) for kind, layout in LAYOUTS.items() for cls in (False, True) if (layout.cls if cls else kind in ("siglip", "timm"))]


@pytest.mark.parametrize("kind, cls", HOLDS)
@pytest.mark.parametrize("positions", [0, 3])
@pytest.mark.parametrize("prefix", ["", "visual."])
def test_there_and_back_bit_for_bit(kind, cls, positions, prefix):
    params, cfg = encoder(cls, positions)
    arrays = {prefix + name: x for name, x in to_library(params, cfg, 3, LAYOUTS[kind]).items()}
    back, found, resolution, notes = detect(arrays | {"logit_scale": np.zeros(())}, heads=3)
    assert same(back, params) and found == cfg and resolution == R
    assert kind in notes[0] and ("is kept" in notes[1]) == bool(positions) and notes[2] == "dropped 1: logit_scale"


@pytest.mark.parametrize("size", vit.ENCODER_SIZES)
def test_sizes_of_the_family_are_read_off_the_shapes(size):
    for kind, cls in HOLDS:
        cfg = vit.vit_config(f"{size}/14", cls_token=cls)
        hollow = jax.tree.map(lambda w: np.broadcast_to(np.float32(0), w.shape), vit.param_specs(cfg), is_leaf=layers.is_spec)
        arrays = to_library(hollow, cfg, 4, LAYOUTS[kind])
        assert layouts.sizes(arrays, LAYOUTS[kind], 0) == (cfg, 4)
        extra = {"siglip": 1, "timm": 1, "vit": 1}.get(kind, 0) * cfg.width + (4 * 4 + cls) * cfg.width  # patch bias, and the table
        assert sum(x.size for x in arrays.values()) == layers.count_params(vit.param_specs(cfg)) + extra


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_a_rounded_sin_cos_table_is_still_one(dtype):
    params, cfg = encoder(True)
    arrays = {name: x.astype(dtype) for name, x in to_library(params, cfg, 3, LAYOUTS["open_clip"]).items()}
    back, found, _, _ = detect(arrays, heads=3)
    assert found == cfg and back["patch"]["kernel"].dtype == np.float32


def test_the_table_of_another_grid_or_order_is_kept():
    params, cfg = encoder(True)
    arrays = to_library(params, cfg, 3, LAYOUTS["open_clip"])
    turned = np.concatenate([arrays["positional_embedding"][:, 24:], arrays["positional_embedding"][:, :24]], axis=1)  # y before x
    back, found, _, _ = detect(arrays | {"positional_embedding": turned + 1}, heads=3)
    assert found.learned_pos_grid == 3 and np.array_equal(back["positions"]["table"], turned[1:] + 1)
    assert np.array_equal(back["cls"]["embedding"], params["cls"]["embedding"] + 1)  # its row of the table


BREAK = {
    "missing": (lambda a: a.pop("ln_post.bias"), "ln_post.bias is missing"),
    "no patches": (lambda a: a.pop("conv1.weight"), "no patch embedding among its 28 tensors"),
    "no CLS": (lambda a: a.pop("class_embedding"), "class_embedding is missing"),
    "shape": (lambda a: a.update({"transformer.resblocks.1.mlp.c_fc.weight": np.zeros((48, 80), np.float32)}), r"c_fc.weight is \(48, 80\), not \(80, 48\)"),
    "axes": (lambda a: a.update({"conv1.weight": np.zeros((48, 192), np.float32)}), r"conv1.weight is \(48, 192\), and should have 4 axes"),
    "grid": (lambda a: a.update(positional_embedding=np.zeros((9, 48), np.float32)), "rows for 8 patches, which make no square grid"),
    "integers": (lambda a: a.update({"ln_post.weight": np.ones(48, np.int8)}), "ln_post.weight is int8, not floats"),
    "pre-norm": (lambda a: a.update({"ln_pre.weight": np.ones(48)}), "ln_pre.weight has no place"),
    "layer scale": (lambda a: a.update({"transformer.resblocks.0.ls_1.gamma": np.ones(48)}), "ls_1.gamma has no place"),
    "gap": (lambda a: a.update({"transformer.resblocks.3.ln_1.bias": np.ones(48)}), "resblocks.3.ln_1.bias has no place"),
    "width": (lambda a: a.update({"conv1.weight": np.zeros((50, 3, 8, 8), np.float32)}), "with --heads"),
}


@pytest.mark.parametrize("how", BREAK)
def test_what_is_no_such_encoder_is_told(how):
    change, message = BREAK[how]
    params, cfg = encoder(True)
    arrays = to_library(params, cfg, 3, LAYOUTS["open_clip"])
    change(arrays)
    with pytest.raises(LayoutError, match=message):
        detect(arrays, heads=0 if how == "width" else 3)


def test_a_patch_bias_is_refused():
    params, cfg = encoder()
    arrays = to_library(params, cfg, 3, LAYOUTS["siglip"]) | {"embeddings.patch_embedding.bias": np.ones(48, np.float32)}
    with pytest.raises(LayoutError, match="bias is not zero"):
        detect(arrays, heads=3)


def test_learned_positions_are_used_and_fit_other_grids():
    params, cfg = encoder()
    learned = dataclasses.replace(cfg, learned_pos_grid=3)
    images = np.stack([np.asarray(picture(i, (R, R))) for i in range(2)])
    formula = vit.vit(params, images, cfg)["tokens"]
    params["positions"] = {"table": vit.sincos_position_embedding(3, cfg.width)}
    assert np.array_equal(vit.vit(params, images, learned)["tokens"], formula)
    params["positions"]["table"] = params["positions"]["table"][::-1]
    assert np.abs(vit.vit(params, images, learned)["tokens"] - formula).max() > 0.1
    flat = {"positions": {"table": np.full((9, 48), 0.5, np.float32)}}
    assert np.allclose(vit.position_embedding(flat, 5, learned), 0.5) and vit.position_embedding(flat, 5, learned).shape == (25, 48)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run that has learned nothing, at the second of its two stages."""
    folder = str(tmp_path_factory.mktemp("run"))
    cfg = dataclasses.replace(config.RECIPES["toy"], workdir=folder, stages="resolution=16 steps=3 batch=2 lr=1e-3, resolution=24 steps=2 batch=2 lr=1e-3")
    model = ModelSpec(*registry.model_spec(cfg)[:2], cfg.keep_ratio)
    words = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", *map(str, range(150))]
    checkpoint.save_step(folder, 4, {"params": init_params(cfg, model)}, {"config": dataclasses.asdict(cfg), "vocabulary": words})
    return folder


def test_every_way_to_give_pictures(run, tmp_path):
    image, other = picture(1), picture(2)
    image.save(tmp_path / "a.png")
    encode = load_encoder(run)
    assert encode.resolution == 24
    wanted = vit.vit(encode.params, np.stack([encode.pixels(p)[0] for p in (image, other)]), encode.cfg)
    for given in ([image, other], [str(tmp_path / "a.png"), np.asarray(other)], [tmp_path / "a.png", other]):
        found = encode(given)
        assert found.tokens.shape == (2, 9, 96) and found.pooled.shape == (2, 96)
        assert np.abs(found.tokens - wanted["tokens"]).max() < 1e-4 and np.abs(found.pooled - wanted["pooled"]).max() < 1e-4
    for one in (image, tmp_path / "a.png", np.asarray(image)):
        assert np.abs(encode(one).tokens - wanted["tokens"][:1]).max() < 1e-4
    assert encode(np.zeros((3, 8, 9, 3), np.uint8)).tokens.shape == (3, 9, 96)


def test_batches_change_nothing(run):
    images, encode = [picture(i) for i in range(7)], load_encoder(run, resolution=16)
    whole = encode(images)
    assert whole.tokens.shape == (7, 4, 96)
    for batch in (1, 3, 4):
        assert np.abs(encode(images, batch=batch).tokens - whole.tokens).max() < 1e-5


def test_a_jpeg_is_decoded_whole(tmp_path):
    picture(0, (640, 480)).save(tmp_path / "a.jpg")
    plain = np.asarray(Image.open(tmp_path / "a.jpg").resize((32, 32), Image.Resampling.BILINEAR))
    assert np.array_equal(load_pixels(tmp_path / "a.jpg", 32), plain)
    assert np.array_equal(load_pixels(Image.open(tmp_path / "a.jpg"), 32), plain)


@pytest.mark.parametrize("given, message", [
    ("absent.png", "absent.png does not exist"), (__file__, "cannot be opened"), (np.zeros((4, 4, 3)), "array is float64"),
    (np.zeros((4, 4, 2), np.uint8), "must be uint8"), ([], "there is no picture")])
def test_what_is_no_picture_is_named(run, given, message):
    with pytest.raises(BadSample, match=message):
        load_encoder(run)(given)


def test_an_encoder_is_read_from_run_and_file_alike(run, tmp_path):
    transfer.export_encoder(run, "npz", str(tmp_path / "out"))
    a, b = checkpoint.read_encoder(run), checkpoint.read_encoder(str(tmp_path / "out"))
    assert same(a[0], b[0]) and a[1] == b[1] and a[2]["resolution"] == b[2]["resolution"] == 24
    with pytest.raises(ValueError, match="5 is below the patch size 8"):
        load_encoder(run, resolution=5)
    assert same(checkpoint.read_encoder(checkpoint.steps(run)[0][1])[0], a[0])
    checkpoint.save(str(tmp_path / "other.npz"), a[0], {"of": "something else"})
    with pytest.raises(CheckpointError, match="is no encoder"):
        checkpoint.read_encoder(str(tmp_path / "other.npz"))


def test_captions_follow_from_picture_and_seed(run, tmp_path, capsys):
    paths = [str(tmp_path / f"{i}.png") for i in range(3)]
    for i, path in enumerate(paths[:2]):
        picture(i).save(path)

    def say(*words):
        status = caption.main([run, *words])
        return status, capsys.readouterr()
    status, told = say(*paths[:2])
    assert status == 0 and [line.split(": ")[0] for line in told.out.splitlines()] == paths[:2]
    assert say(paths[1])[1].out == told.out.splitlines()[1] + "\n"            # whatever stands beside it
    drawn = say(paths[0], "--top-p", "0.9", "--samples", "3")[1].out.splitlines()
    assert len(drawn) == len(set(drawn)) == 3
    assert say(paths[0], "--top-p", "0.9", "--samples", "3")[1].out.splitlines() == drawn
    assert say(paths[0], "--top-p", "0.9", "--samples", "3", "--seed", "1")[1].out.splitlines() != drawn
    status, told = say(paths[2], paths[0])                                    # a bad one is told, and the others written
    assert status == 1 and told.out.startswith(paths[0]) and told.err == f"error: {paths[2]} does not exist\n"
    assert caption.main([str(tmp_path), paths[0]]) == 1 and "has no checkpoint" in capsys.readouterr().err


def test_training_starts_from_an_encoder(run, tmp_path, capsys):
    small = ["--stages", "resolution=32 steps=1 batch=2 lr=1e-12", "--val-samples", "2", "--workdir", str(tmp_path / "next"), "--num-devices", "1"]
    assert train.main(["--init-encoder", run, *small]) == 0
    old, new = checkpoint.read_encoder(run)[0], checkpoint.read_encoder(str(tmp_path / "next"))
    assert new[2]["resolution"] == 32
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), old, new[0])  # at such a rate nothing moves
    for flags, message in (["--cls-token"], "has cls False, not True"), (["--encoder", "micro/4"], "has patch 8, not 4"):
        assert train.main(["--init-encoder", run, *flags, *small[:-3], str(tmp_path / "other")]) == 1
        assert message in capsys.readouterr().err


def test_bad_files_are_told_in_a_sentence(run, tmp_path, capsys, monkeypatch):
    (tmp_path / "x.safetensors").write_bytes(b"0" * 99)
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)       # as if it were not installed
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    out = str(tmp_path / "out")
    for words, message in [
            (["import", str(tmp_path / "absent.bin"), "--workdir", out], "absent.bin does not exist"),
            (["import", str(tmp_path), "--workdir", out], "holds none of model.safetensors"),
            (["import", str(tmp_path / "x.safetensors"), "--workdir", out], "pip install -e '.[hf]'"),
            (["import", __file__, "--workdir", out], "pip install -e '.[hf]'"),
            (["export", run, "--to", "timm", "--out", out], "pip install -e '.[hf]'"),
            (["export", run, "--to", "open_clip", "--out", out], "always has a CLS token"),
            (["export", run, "--to", "timm", "--out", out, "--resolution", "3"], "3 is below the patch size 8"),
            (["export", str(tmp_path / "absent.npz"), "--to", "npz", "--out", out], "absent.npz does not exist")]:
        assert convert.main(words) == 1
        told = capsys.readouterr().err
        assert message in told and told.startswith("error: ") and told.count("\n") == 1


@pytest.mark.parametrize("to, cls", [("transformers", False), ("transformers", True), ("timm", True), ("open_clip", True)])
def test_configurations_say_what_libraries_would_guess_wrong(to, cls):
    """Their defaults are other epsilons, an approximate gelu, a crop."""
    _, cfg = encoder(cls)
    kind, _, files = transfer.library_files(to, cfg, R)
    said = json.dumps(files)
    assert kind in LAYOUTS and str(list(vit.IMAGENET_MEAN)) in said
    for wanted in {"transformers": ('"layer_norm_eps": 1e-06', '"hidden_act": "gelu"', '"intermediate_size": 80', '"resample": 2'),
                   "timm": ('"crop_mode": "squash"', '"fc_norm": true', '"class_token": true'),
                   "open_clip": ('"eps": 1e-06', '"no_ln_pre": true', '"resize_mode": "squash"', '"head_width": 16')}[to]:
        assert wanted in said


def test_the_card_tells_settings_and_figures(run, tmp_path):
    with open(os.path.join(run, "metrics.jsonl"), "w") as f:
        f.write(json.dumps({"val_loss": 1.2345, "val_loss_blind": 2.5}) + "\n")
    transfer.export_encoder(run, "npz", str(tmp_path))
    text = (tmp_path / "README.md").read_text()
    for row in ("| width | 96 |", "| resolution | 24 |", "| val_loss | 1.234 |", "| keep_ratio | `0.35` |", "| CLS token | no |"):
        assert row in text
    assert model_card.USE["npz"] in text and "library_name" not in text

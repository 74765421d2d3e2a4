"""Exports give the same features in transformers, timm and open_clip; weights from there give the same tokens here."""
import dataclasses
import os
import pathlib
import pickle
import re
import shlex
import subprocess
import sys

import jax
import numpy as np
import open_clip.model
import pytest
import safetensors.torch
import torch
import transformers
from PIL import Image

import caption
import config
import convert
import layers
import vit
from interop import transfer
from interop.encoder import load_encoder
from interop.layouts import LAYOUTS, to_library
from objectives import registry
from runtime import checkpoint
from tests.parity import libraries

HOLDS = [("transformers", False), ("transformers", True), ("timm", False), ("timm", True), ("open_clip", True)]


def drawn(declared, seed=1):
    """Random weights: norm scales not 1, biases not 0."""
    rng = np.random.default_rng(seed)

    def draw(w):
        noise = rng.standard_normal(w.shape, np.float32)
        return 1 + 0.1 * noise if w.std is None else (0.02 + w.std) * noise
    return jax.tree.map(draw, declared, is_leaf=layers.is_spec)


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    return libraries.photograph(tmp_path_factory.mktemp("photo") / "photo.jpg")


@pytest.fixture
def saved(tmp_path):
    """(cls, positions) -> the path of a small encoder's .npz, of 64 px."""
    def save(cls=False, positions=0):
        cfg = vit.ViTConfig(depth=3, width=128, num_heads=2, mlp_dim=440, patch_size=8, cls_token=cls, learned_pos_grid=positions)
        path = str(tmp_path / "ours.npz")
        checkpoint.save(path, drawn(vit.param_specs(cfg)), {"encoder": dataclasses.asdict(cfg), "resolution": 64})
        return path
    return save


@pytest.mark.parametrize("to, cls", HOLDS)
@pytest.mark.parametrize("positions, resolution", [(0, 0), (8, 96)])
def test_the_card_gives_our_features_of_a_photograph(to, cls, positions, resolution, saved, photo, tmp_path, monkeypatch):
    ours = load_encoder(saved(cls, positions), resolution)(photo)
    transfer.export_encoder(saved(cls, positions), to, str(tmp_path / to), resolution)
    monkeypatch.chdir(tmp_path / to)
    found = {"image": Image.open(photo)}
    with torch.no_grad():
        exec(libraries.card_code(tmp_path / to), found)
    for name in ("tokens", "pooled"):
        theirs = found[name].numpy()
        assert theirs.shape == getattr(ours, name).shape
        assert np.abs(theirs - getattr(ours, name)).max() <= 1e-4


@pytest.mark.parametrize("to, cls", HOLDS)
def test_an_export_comes_back_bit_for_bit(to, cls, saved, tmp_path):
    transfer.export_encoder(saved(cls), to, str(tmp_path / to))
    transfer.import_encoder(str(tmp_path / to), str(tmp_path / "back.npz"))
    (there, meta), (back, again) = checkpoint.load(saved(cls)), checkpoint.load(str(tmp_path / "back.npz"))
    assert meta["encoder"] == again["encoder"] and again["resolution"] == 64
    assert there.keys() == back.keys() and all(np.array_equal(there[name], back[name]) for name in there)


@pytest.mark.parametrize("cls", [False, True])
def test_transformers_misses_nothing(cls, saved, tmp_path):
    transfer.export_encoder(saved(cls), "transformers", str(tmp_path / "t"))
    _, info = transformers.AutoModel.from_pretrained(str(tmp_path / "t"), output_loading_info=True, **({"add_pooling_layer": False} if cls else {}))
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert type(transformers.AutoImageProcessor.from_pretrained(str(tmp_path / "t"))).__name__.startswith("ViT" if cls else "Siglip")


@pytest.mark.parametrize("size", vit.ENCODER_SIZES)
@pytest.mark.parametrize("to, cls", HOLDS)
def test_every_family_member_has_the_shapes_of_the_library(to, cls, size):
    """No weight exists: ours are views of one zero, theirs are on torch's meta device."""
    import timm
    patch, resolution = (8, 32) if size == "micro" else (14, 84)
    cfg = vit.vit_config(f"{size}/{patch}", cls_token=cls)
    hollow = jax.tree.map(lambda w: np.broadcast_to(np.float32(0), w.shape), vit.param_specs(cfg), is_leaf=layers.is_spec)
    kind, _, files = transfer.LIBRARY_FILES[to](cfg, resolution)
    ours = {name: x.shape for name, x in to_library(hollow, cfg, resolution // patch, LAYOUTS[kind]).items()}
    with torch.device("meta"):
        if to == "transformers":
            theirs_cfg = transformers.AutoConfig.for_model(**files["config.json"])
            theirs = transformers.ViTModel(theirs_cfg, add_pooling_layer=False) if cls else transformers.SiglipVisionModel(theirs_cfg)
        elif to == "timm":
            theirs = timm.create_model(files["config.json"]["architecture"], num_classes=0, **files["config.json"]["model_args"])
        else:
            tower = files["open_clip_config.json"]["model_cfg"]
            theirs = open_clip.model._build_vision_tower(tower["embed_dim"], open_clip.model.CLIPVisionCfg(**tower["vision_cfg"]))
            ours["proj"] = (cfg.width, cfg.width)
    state = theirs.state_dict()
    if kind == "vit" and "encoder.layer.0.layernorm_before.weight" not in state:  # 5.x names them otherwise, and reads what 4.x wrote
        assert sorted(map(str, ours.values())) == sorted(str(tuple(x.shape)) for x in state.values())
    else:
        assert ours == {name.removeprefix("vision_model."): tuple(x.shape) for name, x in state.items()}


def tower(size, patch, resolution, table):
    """open_clip's own tower as the released encoders have it, with random weights. table: our sin-cos one, or open_clip's."""
    layers, width, heads, mlp = size
    cfg = open_clip.model.CLIPVisionCfg(image_size=resolution, layers=layers, width=width, head_width=width // heads, patch_size=patch,
                                        mlp_ratio=(mlp + 0.5) / width, no_ln_pre=True, pool_type="avg", final_ln_after_pool=True, norm_kwargs={"eps": 1e-6},
                                        pos_embed_type="sin_cos_2d" if table == "theirs" else "learnable")
    torch.manual_seed(resolution)
    model = open_clip.model._build_vision_tower(64, cfg).eval()
    with torch.no_grad():
        for name, x in model.named_parameters():
            if x.ndim == 1 and name != "class_embedding":
                x.add_(0.1 * torch.randn_like(x))
        if table == "released":
            model.positional_embedding[0] = 0
            model.positional_embedding[1:] = torch.from_numpy(vit.sincos_position_embedding(resolution // patch, width))
    return model


@pytest.mark.parametrize("patch, resolution", [(16, 64), (14, 84), (8, 72)])
@pytest.mark.parametrize("table, prefix, ending", [("released", "visual.", "bin"), ("theirs", "", "bin"), ("random", "visual.", "safetensors")])
def test_an_open_clip_tower_gives_the_same_tokens_here(patch, resolution, table, prefix, ending, tmp_path, capsys):
    model = tower((2, 128, 2, 440), patch, resolution, table)
    state = {prefix + name: x for name, x in model.state_dict().items()} | {"logit_scale": torch.tensor(1.0)}
    path = str(tmp_path / f"open_clip_pytorch_model.{ending}")
    (torch.save if ending == "bin" else safetensors.torch.save_file)(state, path)
    assert convert.main(["import", path, "--out", str(tmp_path / "out.npz")]) == 0
    said = capsys.readouterr().out
    assert f"dropped 2: {prefix}proj, logit_scale" in said or f"dropped 2: logit_scale, {prefix}proj" in said
    assert ("is the sin-cos table" in said) == (table == "released")
    encode = load_encoder(str(tmp_path / "out.npz"))
    assert encode.resolution == resolution and encode.cfg.num_heads == 2
    images = np.random.default_rng(0).integers(0, 256, (2, resolution, resolution, 3), np.uint8)
    ours = encode(images)
    with torch.no_grad():
        pixels = torch.from_numpy(np.asarray(vit.normalize(images)).transpose(0, 3, 1, 2).copy())
        theirs = model.forward_intermediates(pixels, indices=1, output_fmt="NLC")["image_intermediates"][0]
    assert np.abs(ours.tokens - theirs.numpy()).max() <= 1e-4
    assert np.abs(ours.pooled - model.ln_post(theirs.mean(1)).detach().numpy()).max() <= 1e-4


def test_half_precision_files_are_read(tmp_path):
    state = {name: x.bfloat16() for name, x in tower((1, 64, 1, 256), 8, 32, "released").state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "a.bin")
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    for name in ("a.bin", "a.safetensors"):
        notes = transfer.import_encoder(str(tmp_path / name), str(tmp_path / f"{name}.npz"))
        params, cfg, _ = checkpoint.read_encoder(str(tmp_path / f"{name}.npz"))
        assert notes[1] == "its position table is the sin-cos table" and cfg.num_heads == 1
        assert np.array_equal(params["norm"]["scale"], state["ln_post.weight"].float().numpy())


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('the pickle ran code')",)


def test_files_that_are_no_encoder_are_told_in_a_sentence(tmp_path, capsys):
    state = tower((1, 64, 1, 256), 8, 32, "released").state_dict()
    good = {"bin": tmp_path / "good.bin", "safetensors": tmp_path / "good.safetensors"}
    torch.save(state, good["bin"])
    safetensors.torch.save_file(state, good["safetensors"])
    torch.save(state | {"conv1.weight": Bomb()}, tmp_path / "bomb.bin")
    (tmp_path / "old-bomb.bin").write_bytes(pickle.dumps(Bomb()))
    torch.save([state], tmp_path / "list.bin")
    torch.save({"epoch": 3}, tmp_path / "empty.bin")
    for ending, path in good.items():
        whole = path.read_bytes()
        for cut in (0, 5, 100, len(whole) - 5):
            (tmp_path / f"cut{cut}.{ending}").write_bytes(whole[:cut])
    (tmp_path / "text.safetensors").write_text("not a checkpoint at all")
    (tmp_path / "text.bin").write_text("not a checkpoint at all")
    for path in sorted({*tmp_path.iterdir()} - {*good.values()}):
        assert convert.main(["import", str(path), "--out", str(tmp_path / "out")]) == 1, path
        told = capsys.readouterr().err
        assert told.startswith(f"error: {path}") and told.count("\n") == 1, told
        assert (path.name == "bomb.bin") == ("is refused: it holds code" in told), told
    assert not (tmp_path / "out").exists()
    for path in good.values():
        assert convert.main(["import", str(path), "--out", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("cls", [False, True])
def test_llava_sees_through_it(cls, saved, photo, tmp_path):
    """A tiny random language model reads our tokens, and a training step on a picture and its text reaches the encoder."""
    folder = str(tmp_path / "t")
    transfer.export_encoder(saved(cls), "transformers", folder)
    text = transformers.LlamaConfig(vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    llava = transformers.LlavaConfig(vision_config=transformers.AutoConfig.from_pretrained(folder), text_config=text, image_token_index=39,
                                     image_seq_length=64, vision_feature_select_strategy="default" if cls else "full", vision_feature_layer=-1)
    model = transformers.LlavaForConditionalGeneration(llava)
    model.model.vision_tower = transformers.AutoModel.from_pretrained(folder, **({"add_pooling_layer": False} if cls else {}))
    pixels = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")(Image.open(photo), return_tensors="pt")["pixel_values"]
    ids = torch.tensor([[1, *[39] * 64, 5, 6, 7, 2]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, "labels": torch.where(ids == 39, -100, ids)}
    before = model(**batch)
    ours = model.model.multi_modal_projector(torch.from_numpy(load_encoder(saved(cls))(photo).tokens))
    assert (before.image_hidden_states - ours[0]).abs().max() <= 1e-4
    before.loss.backward()
    first = next(model.model.vision_tower.parameters())
    assert first.grad.abs().max() > 0
    torch.optim.SGD(model.parameters(), 1e-2).step()
    assert model(**batch).loss < before.loss


def test_the_commands_of_the_readme_run(tmp_path, monkeypatch, capsys):
    """Features, captions, export and import as the README has them, on a run that has learned nothing and a small tower."""
    root = pathlib.Path(convert.__file__).parent
    text = (root / "README.md").read_text()
    commands = re.findall(r"^python ((?:caption|convert)\.py .*)$", text, re.M) + re.findall(r"`python (features\.py [^`]*)`", text)
    assert len(commands) == 5
    (tmp_path / "runs/toy").mkdir(parents=True)
    (tmp_path / "docs").symlink_to(root / "docs")
    monkeypatch.chdir(tmp_path)
    cfg = config.RECIPES["toy"]
    model = registry.ModelSpec(*registry.model_spec(cfg)[:2], cfg.keep_ratio)
    checkpoint.save_step("runs/toy", 1270, {"params": registry.init_params(cfg, model)}, {
        "config": dataclasses.asdict(cfg), "vocabulary": ["[PAD]", "[BOS]", "[EOS]", "[UNK]", *map(str, range(99))]})
    torch.save(tower((1, 64, 1, 256), 8, 32, "released").state_dict(), "open_clip_pytorch_model.bin")
    for command in commands:
        script, *words = shlex.split(command)
        if script == "interop/encoder.py":
            done = subprocess.run([sys.executable, root / script, *words], capture_output=True, text=True)
            assert done.stdout == "features.npz: tokens (1, 16, 96), pooled (1, 96)\n", done.stderr
        else:
            assert {"caption.py": caption, "convert.py": convert}[script].main(words) == 0
    told = capsys.readouterr().out
    assert told.count("docs/samples.png: ") == 4 and "written: released.npz" in told and os.path.exists("exported/toy/config.json")

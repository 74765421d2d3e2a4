"""Exports give the same features in transformers, timm and open_clip; imports the same tokens."""
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
import convert
import layers
import vit
from interop import transfer
from interop.encoder import load_encoder
from interop.layouts import LAYOUTS, to_library
from runtime import checkpoint
from tests.helpers.encoders import untrained_run, zero_params
from tests.helpers.paths import ROOT
from tests.parity import libraries

# (library, CLS token) that exist
CASES = [("transformers", False), ("transformers", True), ("timm", False), ("timm", True),
         ("open_clip", True)]


def random_params(specs: dict, seed: int = 1) -> dict:
    """Norm scales are not 1, biases not 0."""
    rng = np.random.default_rng(seed)

    def sample(spec):
        noise = rng.standard_normal(spec.shape, np.float32)
        return 1 + 0.1 * noise if spec.std is None else (0.02 + spec.std) * noise
    return jax.tree.map(sample, specs, is_leaf=layers.is_spec)


def load_vision_tower(folder, cls_token: bool, **options):
    if cls_token:
        options["add_pooling_layer"] = False
    return transformers.AutoModel.from_pretrained(folder, **options)


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    return libraries.photograph(tmp_path_factory.mktemp("photo") / "photo.jpg")


@pytest.fixture
def saved(tmp_path):
    """(cls_token, learned_pos_grid) -> the path of a small encoder's .npz, of 64 px."""
    def save(cls_token=False, learned_pos_grid=0):
        cfg = vit.ViTConfig(depth=3, width=128, num_heads=2, mlp_dim=440, patch_size=8,
                            cls_token=cls_token, learned_pos_grid=learned_pos_grid)
        path = str(tmp_path / "encoder.npz")
        meta = {"encoder": dataclasses.asdict(cfg), "resolution": 64}
        checkpoint.save(path, random_params(vit.param_specs(cfg)), meta)
        return path
    return save


# ----------------------------------------------------------------------------------- export
@pytest.mark.parametrize("library, cls_token", CASES)
@pytest.mark.parametrize("learned_pos_grid, resolution", [(0, 0), (8, 96)])
def test_the_cards_code_gives_our_features_of_a_photograph(
        library, cls_token, learned_pos_grid, resolution, saved, photo, tmp_path, monkeypatch):
    path = saved(cls_token, learned_pos_grid)
    ours = load_encoder(path, resolution)(photo)
    transfer.export_encoder(path, library, str(tmp_path / library), resolution)
    monkeypatch.chdir(tmp_path / library)
    variables = {"image": Image.open(photo)}
    with torch.no_grad():
        exec(libraries.card_code(tmp_path / library), variables)
    for name in ("tokens", "pooled"):
        theirs = variables[name].numpy()
        assert theirs.shape == getattr(ours, name).shape
        assert np.abs(theirs - getattr(ours, name)).max() <= 1e-4


@pytest.mark.parametrize("library, cls_token", CASES)
def test_an_export_is_imported_bit_for_bit(library, cls_token, saved, tmp_path):
    path, imported_path = saved(cls_token), str(tmp_path / "imported.npz")
    transfer.export_encoder(path, library, str(tmp_path / library))
    transfer.import_encoder(str(tmp_path / library), imported_path)
    original, meta = checkpoint.load(path)
    imported, imported_meta = checkpoint.load(imported_path)
    assert meta["encoder"] == imported_meta["encoder"] and imported_meta["resolution"] == 64
    assert original.keys() == imported.keys()
    assert all(np.array_equal(original[name], imported[name]) for name in original)


@pytest.mark.parametrize("cls_token", [False, True])
def test_transformers_loads_every_array(cls_token, saved, tmp_path):
    folder = str(tmp_path / "t")
    transfer.export_encoder(saved(cls_token), "transformers", folder)
    _, info = load_vision_tower(folder, cls_token, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    assert type(processor).__name__.startswith("ViT" if cls_token else "Siglip")


def library_model(library: str, files: dict, cls_token: bool):
    """The library's model of these configuration files, on torch's meta device."""
    import timm
    with torch.device("meta"):
        if library == "transformers":
            cfg = transformers.AutoConfig.for_model(**files["config.json"])
            if cls_token:
                return transformers.ViTModel(cfg, add_pooling_layer=False)
            return transformers.SiglipVisionModel(cfg)
        if library == "timm":
            cfg = files["config.json"]
            return timm.create_model(cfg["architecture"], num_classes=0, **cfg["model_args"])
        cfg = files["open_clip_config.json"]["model_cfg"]
        vision_cfg = open_clip.model.CLIPVisionCfg(**cfg["vision_cfg"])
        return open_clip.model._build_vision_tower(cfg["embed_dim"], vision_cfg)


@pytest.mark.parametrize("size", vit.ENCODER_SIZES)
@pytest.mark.parametrize("library, cls_token", CASES)
def test_every_size_has_the_shapes_of_the_library(library, cls_token, size):
    """No array takes memory."""
    patch, resolution = (8, 32) if size == "micro" else (14, 84)
    cfg = vit.vit_config(f"{size}/{patch}", cls_token=cls_token)
    kind, _, files = transfer.LIBRARY_FILES[library](cfg, resolution)
    arrays = to_library(zero_params(cfg), cfg, resolution // patch, LAYOUTS[kind])
    ours = {name: x.shape for name, x in arrays.items()}
    if library == "open_clip":
        ours["proj"] = (cfg.width, cfg.width)
    theirs = {}
    for name, x in library_model(library, files, cls_token).state_dict().items():
        theirs[name.removeprefix("vision_model.")] = tuple(x.shape)
    if kind == "vit" and "encoder.layer.0.layernorm_before.weight" not in theirs:
        # transformers 5 has other names, and reads the files of version 4
        assert sorted(ours.values()) == sorted(theirs.values())
    else:
        assert ours == theirs


@pytest.mark.parametrize("cls_token", [False, True])
def test_llava_reads_our_tokens(cls_token, saved, photo, tmp_path):
    """With a tiny random language model, whose training step reaches the encoder."""
    folder = str(tmp_path / "t")
    path = saved(cls_token)
    transfer.export_encoder(path, "transformers", folder)
    text_cfg = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2)
    llava_cfg = transformers.LlavaConfig(
        vision_config=transformers.AutoConfig.from_pretrained(folder), text_config=text_cfg,
        image_token_index=39, image_seq_length=64, vision_feature_layer=-1,
        vision_feature_select_strategy="default" if cls_token else "full")
    model = transformers.LlavaForConditionalGeneration(llava_cfg)
    model.model.vision_tower = load_vision_tower(folder, cls_token)
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    pixels = processor(Image.open(photo), return_tensors="pt")["pixel_values"]
    ids = torch.tensor([[1, *[39] * 64, 5, 6, 7, 2]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels,
             "labels": torch.where(ids == 39, -100, ids)}
    before = model(**batch)
    tokens = torch.from_numpy(load_encoder(path)(photo).tokens)
    ours = model.model.multi_modal_projector(tokens)
    assert (before.image_hidden_states - ours[0]).abs().max() <= 1e-4
    before.loss.backward()
    assert next(model.model.vision_tower.parameters()).grad.abs().max() > 0
    torch.optim.SGD(model.parameters(), 1e-2).step()
    assert model(**batch).loss < before.loss


# ----------------------------------------------------------------------------------- import
def tower(width: int, heads: int, mlp: int, patch: int, resolution: int, table: str):
    """open_clip's tower in the form of the released encoders, with random weights. table:
    "released" (our sin-cos table), "theirs" (open_clip's) or "random"."""
    cfg = open_clip.model.CLIPVisionCfg(
        image_size=resolution, layers=2, width=width, head_width=width // heads, patch_size=patch,
        mlp_ratio=(mlp + 0.5) / width, no_ln_pre=True, pool_type="avg", final_ln_after_pool=True,
        norm_kwargs={"eps": 1e-6},
        pos_embed_type="sin_cos_2d" if table == "theirs" else "learnable")
    torch.manual_seed(resolution)
    model = open_clip.model._build_vision_tower(64, cfg).eval()
    with torch.no_grad():
        for name, x in model.named_parameters():
            if x.ndim == 1 and name != "class_embedding":
                x.add_(0.1 * torch.randn_like(x))
        if table == "released":
            positions = vit.sincos_position_embedding(resolution // patch, width)
            model.positional_embedding[0] = 0
            model.positional_embedding[1:] = torch.from_numpy(positions)
    return model


def small_tower():
    return tower(64, 1, 256, 8, 32, "released")


@pytest.mark.parametrize("patch, resolution", [(16, 64), (14, 84), (8, 72)])
@pytest.mark.parametrize("table, prefix, ending", [
    ("released", "visual.", "bin"), ("theirs", "", "bin"), ("random", "visual.", "safetensors")])
def test_an_open_clip_tower_gives_the_same_tokens_here(
        patch, resolution, table, prefix, ending, tmp_path, capsys):
    model = tower(128, 2, 440, patch, resolution, table)
    state = {prefix + name: x for name, x in model.state_dict().items()}
    state["logit_scale"] = torch.tensor(1.0)
    path = str(tmp_path / f"open_clip_pytorch_model.{ending}")
    (torch.save if ending == "bin" else safetensors.torch.save_file)(state, path)
    assert convert.main(["import", path, "--out", str(tmp_path / "out.npz")]) == 0
    out = capsys.readouterr().out
    dropped = re.search("dropped 2: (.*)", out)[1]
    assert sorted(dropped.split(", ")) == sorted([f"{prefix}proj", "logit_scale"])
    assert ("is the sin-cos table" in out) == (table == "released")
    encoder = load_encoder(str(tmp_path / "out.npz"))
    assert encoder.resolution == resolution and encoder.cfg.num_heads == 2
    shape = (2, resolution, resolution, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    ours = encoder(images)
    with torch.no_grad():
        normalized = np.asarray(vit.normalize(images)).transpose(0, 3, 1, 2).copy()
        theirs = model.forward_intermediates(torch.from_numpy(normalized), indices=1,
                                             output_fmt="NLC")["image_intermediates"][0]
        pooled = model.ln_post(theirs.mean(1))
    assert np.abs(ours.tokens - theirs.numpy()).max() <= 1e-4
    assert np.abs(ours.pooled - pooled.numpy()).max() <= 1e-4


def test_half_precision_files_are_read(tmp_path):
    state = {name: x.bfloat16() for name, x in small_tower().state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "a.bin")
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    for name in ("a.bin", "a.safetensors"):
        out = str(tmp_path / f"{name}.npz")
        notes = transfer.import_encoder(str(tmp_path / name), out)
        params, cfg, _ = checkpoint.read_encoder(out)
        assert notes[1] == "its position table is the sin-cos table" and cfg.num_heads == 1
        assert np.array_equal(params["norm"]["scale"], state["ln_post.weight"].float().numpy())


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('the pickle ran code')",)


def test_files_that_are_no_encoder_are_reported_in_one_line(tmp_path, capsys):
    state = small_tower().state_dict()
    good = {"bin": tmp_path / "good.bin", "safetensors": tmp_path / "good.safetensors"}
    torch.save(state, good["bin"])
    safetensors.torch.save_file(state, good["safetensors"])
    torch.save(state | {"conv1.weight": Bomb()}, tmp_path / "bomb.bin")
    (tmp_path / "old-bomb.bin").write_bytes(pickle.dumps(Bomb()))
    torch.save([state], tmp_path / "list.bin")
    torch.save({"epoch": 3}, tmp_path / "empty.bin")
    for ending, path in good.items():
        content = path.read_bytes()
        for size in (0, 5, 100, len(content) - 5):
            (tmp_path / f"cut{size}.{ending}").write_bytes(content[:size])
    for ending in good:
        (tmp_path / f"text.{ending}").write_text("not a checkpoint at all")
    out = tmp_path / "out"
    for path in sorted({*tmp_path.iterdir()} - {*good.values()}):
        assert convert.main(["import", str(path), "--out", str(out)]) == 1, path
        error = capsys.readouterr().err
        assert error.startswith(f"error: {path}") and error.count("\n") == 1, error
        assert (path.name == "bomb.bin") == ("is refused: it holds code" in error), error
    assert not out.exists()
    for path in good.values():
        assert convert.main(["import", str(path), "--out", str(out)]) == 0


def test_the_commands_of_the_documentation_run(tmp_path, monkeypatch, capsys):
    """Features, captions, export and import of docs/encoder.md, with an untrained run."""
    text = (pathlib.Path(ROOT) / "docs/encoder.md").read_text()
    pattern = r"^python (-m interop\.encoder .*|caption\.py .*|convert\.py .*)$"
    commands = re.findall(pattern, text, re.M)
    assert len(commands) == 6
    (tmp_path / "docs").symlink_to(os.path.join(ROOT, "docs"))
    monkeypatch.chdir(tmp_path)
    untrained_run("runs/toy")
    untrained_run("runs/toy-map", objective="lit", image_pool="map", init_encoder="random")
    os.mkdir("released")
    torch.save(small_tower().state_dict(), "released/open_clip_pytorch_model.bin")
    for command in commands:
        script, *argv = shlex.split(command)
        if script == "-m":
            ended = subprocess.run([sys.executable, "-m", *argv], capture_output=True, text=True,
                                   env=os.environ | {"PYTHONPATH": ROOT})
            expected = "features.npz: tokens (2, 9, 96), pooled (2, 96)\n"
            assert ended.stdout == expected, ended.stderr
        else:
            assert {"caption.py": caption, "convert.py": convert}[script].main(argv) == 0
    out = capsys.readouterr().out
    assert out.count("docs/samples.png: ") == 4 and "written: released.npz" in out
    assert os.path.exists("exported/toy/config.json")
    assert os.path.exists("exported/pair/tokenizer.json")

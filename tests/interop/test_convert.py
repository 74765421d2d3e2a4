"""Import and export commands, as far as they need no other library."""
import json
import os
import sys

import pytest

import convert
import vit
from interop import model_card, transfer
from interop.layouts import LAYOUTS
from tests.helpers.encoders import small_encoder


def test_mistakes_are_reported_in_one_line(run, tmp_path, capsys, monkeypatch):
    weights, out = str(tmp_path / "x.safetensors"), str(tmp_path / "out")
    (tmp_path / "x.safetensors").write_bytes(b"0" * 99)
    (tmp_path / "weights.pt").write_bytes(b"PK\x03\x04" + b"0" * 99)
    torch_file = str(tmp_path / "weights.pt")
    for package in ("safetensors", "torch"):
        monkeypatch.setitem(sys.modules, package, None)       # as if it were not installed
    extra = "pip install -e '.[hf]'"
    for argv, message in [
            (["import", str(tmp_path / "absent.bin")], "absent.bin does not exist"),
            (["import", str(tmp_path)], "holds none of model.safetensors"),
            (["import", weights], extra),
            (["import", torch_file], extra),
            (["import", __file__], "is no file of weights: give a .safetensors file, a torch"),
            (["export", run, "--to", "timm"], extra),
            (["export", run, "--to", "open_clip"], "always has a CLS token"),
            (["export", run, "--to", "timm", "--resolution", "3"], "3 is below the patch size 8"),
            (["export", str(tmp_path / "absent.npz"), "--to", "npz"], "absent.npz does not exist")]:
        assert convert.main([*argv, "--out", out]) == 1
        error = capsys.readouterr().err
        assert message in error and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize("argv", [
    ["export", "{run}", "--to", "npz", "--out", "{run}"],
    ["export", "{run}", "--to", "open_clip", "--pair", "--out", "{run}"],
    ["import", "weights.safetensors", "--out", "{run}"],
    ["import", "weights.safetensors", "--out", "{run}/encoder.npz"]])
def test_nothing_is_written_into_the_folder_of_a_run(argv, run, capsys):
    before = os.listdir(run)
    assert convert.main([word.replace("{run}", run) for word in argv]) == 1
    assert "is the folder of a run" in capsys.readouterr().err and os.listdir(run) == before


LIBRARY_DEFAULTS = {  # what the libraries would otherwise take: another epsilon, tanh GELU, a crop
    "transformers": ('"layer_norm_eps": 1e-06', '"hidden_act": "gelu"', '"intermediate_size": 80',
                     '"resample": 2'),
    "timm": ('"crop_mode": "squash"', '"fc_norm": true', '"class_token": true'),
    "open_clip": ('"eps": 1e-06', '"no_ln_pre": true', '"resize_mode": "squash"',
                  '"head_width": 16')}


@pytest.mark.parametrize("library, cls_token", [
    ("transformers", False), ("transformers", True), ("timm", True), ("open_clip", True)])
def test_configurations_override_the_libraries_defaults(library, cls_token):
    _, cfg = small_encoder(cls_token)
    kind, _, files = transfer.LIBRARY_FILES[library](cfg, 24)
    text = json.dumps(files)
    assert kind in LAYOUTS and str(list(vit.IMAGENET_MEAN)) in text
    for setting in LIBRARY_DEFAULTS[library]:
        assert setting in text


def test_the_card_shows_settings_and_metrics(run, tmp_path):
    with open(os.path.join(run, "metrics.jsonl"), "w") as f:
        f.write(json.dumps({"val_loss": 1.2345, "val_loss_blind": 2.5}) + "\n")
    transfer.export_encoder(run, "npz", str(tmp_path))
    text = (tmp_path / "README.md").read_text()
    for row in ("| width | 96 |", "| resolution | 24 |", "| val_loss | 1.234 |",
                "| keep_ratio | `0.35` |", "| CLS token | no |"):
        assert row in text
    assert model_card.USE["npz"] in text and "library_name" not in text


@pytest.mark.parametrize("objective, trains_norm, origin", [
    ("openvision2", False, "trained from captions alone"), ("lit", False, "--objective lit"),
    ("clip", True, "--objective clip"), ("genlip", True, "--objective genlip")])
def test_the_card_says_what_trained_the_encoder_and_its_norm(objective, trains_norm, origin):
    text = model_card.model_card("npz", vit.vit_config("micro/8"), 24,
                                 {"config": {"objective": objective}}, {})
    assert origin in text
    assert trains_norm != ("give the norm no gradient" in text)
    assert ("**after** the final norm" in text) == (objective == "genlip")


def test_the_card_of_a_run_that_started_from_an_encoder_and_has_gates():
    cfg = vit.vit_config("micro/8", gated_attention=True)
    settings = {"gated_attention": True, "init_encoder": "runs/toy"}
    text = model_card.model_card("npz", cfg, 24, {"config": settings}, {})
    assert "A ViT with gated attention" in text and "| gated_attention | `True` |" in text
    assert "give the norm no gradient" not in text


def test_the_card_shows_settings_of_earlier_versions():
    rows = model_card.setting_rows({"shuffle": True, "caption": "txt", "b2": 0.99, "data": "a/b"})
    assert rows == {"caption_field": "`txt`", "adam_b2": "`0.99`", "data": "`b`"}

"""The number of heads and the metrics that belong to a file of weights."""
import json

import pytest

import vit
from interop import model_card, transfer


@pytest.mark.parametrize("library", ["transformers", "timm", "open_clip"])
def test_the_number_of_heads_is_read_from_the_librarys_configuration(tmp_path, library):
    cfg = vit.ViTConfig(2, 256, 8, 512, 16, cls_token=True)
    for name, config in transfer.LIBRARY_FILES[library](cfg, 32)[2].items():
        (tmp_path / name).write_text(json.dumps(config))
    assert transfer.heads_in_config(str(tmp_path)) == 8
    assert transfer.heads_in_config(str(tmp_path / "model.safetensors")) == 8


def test_unknown_configurations_name_no_heads(tmp_path):
    for text in ("", "[]", "{}", '{"num_heads": "many"}'):
        (tmp_path / "config.json").write_text(text)
        assert transfer.heads_in_config(str(tmp_path)) == 0


def test_a_checkpoint_has_the_metrics_of_its_own_step(tmp_path):
    rows = [{"step": 4, "val_loss": 2.0}, {"step": 6, "loss": 1.5}, {"step": 8, "val_loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "summary.json").write_text('{"val_loss": 1.0}')
    of_file = {step: model_card.read_metrics(str(tmp_path / f"step-{step:08d}.npz"), step)
               for step in (4, 6)}
    assert of_file[4]["val_loss"] == 2.0 and of_file[6] == {}
    assert model_card.read_metrics(str(tmp_path), 8) == {"val_loss": 1.0}


def test_the_card_names_a_frozen_encoder_and_other_losses():
    def card(objective: str) -> str:
        return model_card.model_card("npz", vit.vit_config("micro/8"), 24,
                                     {"config": {"objective": objective}}, {"val_loss": 1.0})
    assert "kept frozen" in card("lit") and "nats per token" not in card("lit")
    assert "nats per token" in card("openvision2")

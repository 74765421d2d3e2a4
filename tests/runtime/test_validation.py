"""Validation samples that cannot be used are reported."""
import dataclasses

from config import RECIPES
from data import Loader
from inputs import sources
from objectives.registry import model_spec
from runtime.devices import DataParallel
from runtime.validation import ValidationSet
from tests.helpers.samples import TOK, members, spill
from train import openvision2_loss


def test_a_broken_validation_image_is_reported_once_and_replaced(tmp_path, capsys):
    files = [(name, b"no image" if name == "000000001.jpg" else content)
             for name, content in members(4)]
    spill(tmp_path, files)
    cfg = dataclasses.replace(RECIPES["toy"], encoder="micro/8", val_samples=4)
    loader = Loader(sources.open_source(str(tmp_path)), TOK, cfg.max_text_len, 0, None, 1)
    for _ in range(2):  # at two resolutions
        validation_set = ValidationSet(cfg, loader, 16, 4, model_spec(cfg), DataParallel(1),
                                       openvision2_loss)
        assert validation_set.samples.tolist() == [0, 2, 2, 3]
    skipped = [line for line in capsys.readouterr().out.splitlines() if "skipped" in line]
    assert len(skipped) == 1 and "000000001.jpg: image cannot be opened" in skipped[0], skipped

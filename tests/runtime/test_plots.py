"""The colors of the images that a run draws."""
import numpy as np
import pytest
from PIL import Image

from runtime import plots


def test_samples_are_green_where_right_and_dim_where_dropped(tmp_path):
    pixels = np.zeros((16, 16, 3), np.uint8)
    made = [plots.CaptionedImage(pixels, np.array([0]), 8, "", "word", correct)
            for correct in (True, False)]
    plots.draw_samples(str(tmp_path / "s.png"), made)
    sheet = np.asarray(Image.open(tmp_path / "s.png"))
    for n, color in enumerate((plots.GREEN, plots.BLUE)):
        x, y = plots.sample_position(n)
        text = sheet[y:y + 160, x + 330:x + plots.SAMPLE_WIDTH - 10]
        assert (text == color).all(-1).any()
        right = x + plots.SAMPLE_SIDE + plots.SAMPLE_GAP
        assert sheet[y + 40, right + 40].tolist() == [0, 0, 0]  # kept
        assert sheet[y + 120, right + 120].min() > 200  # dropped


@pytest.mark.parametrize("level", [0.5, None])
def test_the_curve_has_the_level_in_red_if_there_is_one(tmp_path, level):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0, "val_loss": 1.5}\n')
    plots.draw_curve(str(tmp_path), level, {})
    image = np.asarray(Image.open(tmp_path / "curve.png"))
    assert (image == plots.RED).all(-1).any() == (level is not None)

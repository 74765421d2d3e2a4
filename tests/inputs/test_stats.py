"""Statistics of a data set: the figures are those of the samples, and the bad ones are named."""
import json

import pytest

from inputs import stats
from inputs.sources import draw_indices
from runtime.errors import run_command
from tests.helpers.samples import encoded, photo, put


def write(path):
    """20 samples of 40x30 pixels: captions of 1 to 10 words twice, one image broken, one repeated;
    every second has a field b."""
    files = []
    for i in range(20):
        image = encoded(photo(40, 30, seed=0 if i == 1 else i))
        fields = {"a": "cat " * (i % 10 + 1)} | ({"b": f"dog {i}"} if i % 2 else {})
        files += [(f"{i:03}.png", b"noise" if i == 7 else image),
                  (f"{i:03}.json", json.dumps(fields).encode())]
    return put(path, files)


def test_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert stats.main([write(tmp_path / "a.tar"), "--caption-field", "a,b", "--max-text-len", "7",
                       "--vocab-size", "200"]) == 0
    output = capsys.readouterr().out
    assert "20 samples" in output and "usable: 19" in output
    assert "skipped: 1 image cannot be opened" in output
    lines = {line.split("  ")[0]: line.split("  ")[1:] for line in output.splitlines()}
    lengths = [word.strip() for word in lines["tokens of a"] if word.strip()]
    assert lengths[0] == "3" and lengths[-1] == "12"  # with start and end
    assert "a: 47.4% longer than --max-text-len 7; 47.4% repeat another caption;" in output
    assert "10 missing" in output
    assert "images: 5.3% repeat another image; 1 sizes" in output
    assert (tmp_path / "stats.png").stat().st_size > 2000


def test_scenes_and_a_part_of_a_set(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert stats.main(["scenes", "--num-samples", "30", "--vocab-size", "200"]) == 0
    assert "read: 30, usable: 30" in capsys.readouterr().out


@pytest.mark.parametrize("flags, message", [
    (["absent/*.tar"], "no file matches"), (["a.tar", "--num-samples", "0"], "out of range"),
    (["a.tar", "--caption-field", "a", "--vocab", "absent"], "--vocab"),
    (["a.tar", "--caption-field", "a", "--vocab-size", "9"], "--vocab-size 9 is too small")])
def test_a_mistake_is_one_sentence(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.tar")
    assert run_command(stats.main, flags) == 1
    assert message in capsys.readouterr().err


def test_a_field_that_no_sample_has_is_named(tmp_path, capsys):
    rare = 1 - draw_indices(2, 1)[0]  # the one of two samples that is not drawn
    files = []
    for i in range(2):
        fields = {"a": "cat"} | ({"b": "dog"} if i == rare else {})
        files += [(f"{i}.png", encoded(photo(40, 30))), (f"{i}.json", json.dumps(fields).encode())]
    argv = [put(tmp_path / "a.tar", files), "--caption-field", "a,b", "--num-samples", "1"]
    assert run_command(stats.main, argv) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: --caption-field b: none of 1 samples has it")

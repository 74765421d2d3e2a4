"""The tutorial runs, its notebook is that of its script, and nothing else needs its extra."""
import base64
import copy
import io
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.helpers.compiling import QUICK_FLAGS
from tests.helpers.paths import ROOT
from tests.test_structure import imported_names, modules
from tutorial import build, figures


@pytest.fixture(scope="module")
def cells() -> list[build.Cell]:
    with open(build.SCRIPT, encoding="utf-8") as file:
        return build.read_cells(file.read())


@pytest.fixture(scope="module")
def notebook() -> dict:
    with open(build.NOTEBOOK, encoding="utf-8") as file:
        return json.load(file)


# --------------------------------------------------------------------- script and notebook
def test_the_script_runs_from_another_folder(tmp_path, cache):
    """As it is, with a training of a few steps and a compiler that saves time."""
    env = cache | {"TUTORIAL_LENGTH": "0.01", "PYTHONPATH": ROOT, "XLA_FLAGS": QUICK_FLAGS}
    done = subprocess.run([sys.executable, build.SCRIPT], cwd=tmp_path, env=env,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown = re.findall(r"^figure: (.*)$", done.stdout, re.M)
    assert len(shown) >= 15 and len(set(shown)) == len(shown)
    for path in shown:
        with Image.open(tmp_path / path) as figure:
            assert figure.convert("L").getextrema()[0] < 128, path


def test_the_notebook_has_the_cells_of_the_script(cells, notebook):
    expected = build.to_notebook(cells)["cells"]
    assert len(expected) == len(notebook["cells"])
    for ours, theirs in zip(expected, notebook["cells"]):
        for key in ("cell_type", "id", "metadata", "source"):
            assert ours[key] == theirs[key], (ours["id"], "run make tutorial")


def test_the_notebook_shows_the_full_training_in_less_than_1_mb(cells, notebook):
    assert os.path.getsize(build.NOTEBOOK) <= 1e6
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in code)
    outputs = [output for cell in code for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 15
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    text = "".join(build.output_text(output) for output in outputs)
    assert "object_accuracy: 0.00" not in text
    assert ROOT not in text and "/tmp/" not in text


def test_each_section_says_what_to_expect_and_has_an_exercise(cells):
    text = "\n".join(cell.source for cell in cells if cell.kind == "markdown")
    sections = re.split(r"^## ", text, flags=re.M)[1:]
    assert len(sections) >= 13
    for section in sections[:-1]:  # the last one says where to go from here
        title = section.partition("\n")[0]
        assert "**What to expect.**" in section, title
        assert "**Exercise.**" in section and "<details><summary>Answer" in section, title
        assert section.count("<details>") == section.count("</details>") == 1, title


def test_links_of_the_tutorial_resolve(cells):
    text = "".join(cell.source for cell in cells if cell.kind == "markdown")
    links = re.findall(r"\]\(([^)#]+)", text)
    assert len(links) >= 5
    for link in links:
        if not link.startswith("https://"):
            assert os.path.exists(os.path.join(build.FOLDER, link)), link


# -------------------------------------------------------------------------------- comparison
def test_cells_of_the_percent_format():
    script = ('# a head\n# %% [markdown]\n# # Title\n#\n# text\n\n# %%\nx = 1\n\n\n'
              '# %% tags=["trained"]\ny = 2  # %% no mark\n')
    assert build.read_cells(script) == [
        build.Cell("markdown", "# Title\n\ntext", False), build.Cell("code", "x = 1", False),
        build.Cell("code", "y = 2  # %% no mark", True)]


def outputs_of(text: str, gray: int) -> list[dict]:
    png = io.BytesIO()
    Image.fromarray(np.full((4, 6, 3), gray, np.uint8)).save(png, "PNG")
    data = {"image/png": base64.b64encode(png.getvalue()).decode()}
    return [{"output_type": "stream", "name": "stdout", "text": [text]},
            {"output_type": "display_data", "data": data, "metadata": {}}]


def test_differences_between_notebooks_are_found():
    cells = [build.Cell("code", "draw()", trained) for trained in (False, True)]
    old = build.to_notebook(cells)
    for cell in old["cells"]:
        cell["outputs"] = outputs_of("loss 1.500 at 24 px", 100)
    assert build.differences(old, copy.deepcopy(old)) == []
    cut = copy.deepcopy(old)
    cut["cells"][0]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": [text]}
                                  for text in ("loss 1.500 ", "at 24 px")]
    cut["cells"][0]["outputs"].insert(1, old["cells"][0]["outputs"][1])
    assert build.differences(old, cut) == []

    def found(text: str, gray: int) -> list[str]:
        """Which cells differ: the one before the training, the trained one."""
        new = copy.deepcopy(old)
        for cell in new["cells"]:
            cell["outputs"] = outputs_of(text, gray)
        return [difference.partition(":")[0] for difference in build.differences(old, new)]
    assert found("loss 1.501 at 24 px", 100) == []
    assert found("loss 1.55 at 24 px", 110) == ["cell 0", "cell 0"]
    assert found("loss 2.500 at 24 px", 100) == ["cell 0", "cell 1"]
    assert found("cost 1.500 at 24 px", 100) == ["cell 0", "cell 1"]
    assert found("loss 1.500 at 24 px", 200) == ["cell 0", "cell 1"]
    old["cells"][0]["source"] = ["other()"]
    assert len(build.differences(old, build.to_notebook(cells))) == 1


def test_nothing_imports_the_tutorial_or_its_extra():
    for module, path in modules().items():
        packages = {name.partition(".")[0] for name in imported_names(path)}
        assert not packages & {"tutorial", "nbclient", "nbformat", "IPython"}, module


def test_a_missing_extra_is_named(tmp_path):
    """nbclient is hidden by a module that fails on import, as if it were not installed."""
    (tmp_path / "nbclient.py").write_text("raise ImportError('hidden')")
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, os.path.join(build.FOLDER, "build.py")], env=env,
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ") and "'.[tutorial]'" in done.stderr


# ---------------------------------------------------------------------------------- figures
def test_a_heatmap_has_white_at_zero_and_one_color_per_sign():
    image = np.asarray(figures.heatmap(np.array([[0.0, 2.0], [-2.0, -1.0]]), 3))
    assert image.shape == (6, 6, 3)
    assert (image[0, 0] == 255).all() and tuple(image[0, 5]) == figures.ORANGE
    assert tuple(image[5, 0]) == figures.BLUE and (image[5, 5] > figures.BLUE).all()


def test_the_mask_picture_is_colored_where_a_token_may_attend():
    mask = np.tril(np.ones((4, 4), bool))
    image = figures.draw_mask(mask, ["patch 0", "patch 1", "[bos]", "a"], 2)
    colors = [[image.getpixel((84 + j * 14 + 6, 24 + i * 14 + 6)) for j in range(4)]
              for i in range(4)]
    for i, row in enumerate(colors):
        for j, color in enumerate(row):
            expected = figures.LIGHT_GRAY
            if mask[i, j]:
                expected = figures.BLUE if j < 2 else figures.ORANGE
            assert color == expected, (i, j)


def test_a_shown_picture_can_be_replaced(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shown = figures.show("curve", Image.new("RGB", (2, 2), "white"))
    shown.update(Image.new("RGB", (2, 2), "black"))
    path = capsys.readouterr().out.removeprefix("figure: ").strip()
    with Image.open(path) as figure:
        assert figure.convert("RGB").getpixel((0, 0)) == (0, 0, 0)

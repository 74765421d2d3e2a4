"""Runs the tutorial as a notebook, and writes openvision2.ipynb with what it shows.

The script openvision2.py is the source, in the percent format that editors and jupytext read: a
cell begins with "# %%", one of text with "# %% [markdown]".

    python tutorial/build.py           runs every cell; prints what differs from the notebook before
    python tutorial/build.py --check   the same, but keeps the notebook; status 1 for a difference
"""
import argparse
import base64
import io
import json
import os
import re
import sys
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

FOLDER = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(FOLDER))  # where the project's modules are

from runtime.errors import MissingExtra, UserError, run_command

SCRIPT = os.path.join(FOLDER, "openvision2.py")
NOTEBOOK = os.path.join(FOLDER, "openvision2.ipynb")
CELL = re.compile(r'^# %%(?P<markdown> \[markdown\])?(?P<trained> tags=\["trained"\])?$', re.M)
# How far two runs may differ, on other processors, Pythons and versions of jax. In cells with the
# tag "trained", all follows from a training: rounding errors grow in it. Between jax 0.10 (Python
# 3.11) and 0.12 (3.13), numbers differed by up to 0.14. One figure differed by 28.8, all others by
# less than 12: in section 11 the decoder generated another wording, so the tiles are other tokens.
TOLERANCE = {False: {"number": 0.002, "pixel": 0.5}, True: {"number": 0.2, "pixel": 35.0}}


class Cell(NamedTuple):
    kind: str      # "markdown" or "code"
    source: str
    trained: bool  # whether what it shows depends on a training


def read_cells(script: str) -> list[Cell]:
    """The cells of a script in the percent format. What comes before the first one is left out."""
    marks = list(CELL.finditer(script))
    ends = [*(mark.start() for mark in marks[1:]), len(script)]
    cells = []
    for mark, end in zip(marks, ends):
        source = script[mark.end():end].strip("\n")
        if mark["markdown"]:
            source = "\n".join(line.removeprefix("#").removeprefix(" ")
                               for line in source.split("\n"))
        cells.append(Cell("markdown" if mark["markdown"] else "code", source,
                          bool(mark["trained"])))
    return cells


def to_notebook(cells: list[Cell]) -> dict[str, Any]:
    """The cells as a notebook of format 4.5, without outputs."""
    entries = []
    for n, cell in enumerate(cells):
        metadata = {"tags": ["trained"]} if cell.trained else {}
        entry = {"cell_type": cell.kind, "id": f"cell-{n:02d}", "metadata": metadata,
                 "source": cell.source.splitlines(keepends=True)}
        if cell.kind == "code":
            entry |= {"execution_count": None, "outputs": []}
        entries.append(entry)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": entries, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def run_cells(notebook: dict[str, Any]) -> dict[str, Any]:
    """The notebook with the outputs of its cells. MissingExtra if nothing can run it, UserError for
    a cell that fails."""
    try:
        import nbclient
        import nbformat
    except ImportError:
        raise MissingExtra("the tutorial's notebook is run by nbclient and ipykernel: "
                           "pip install -e '.[tutorial]'") from None
    nodes = nbformat.reads(json.dumps(notebook), as_version=4)
    client = nbclient.NotebookClient(nodes, timeout=1200, kernel_name="python3",
                                     resources={"metadata": {"path": FOLDER}},
                                     extra_arguments=["--log-level=ERROR"])
    try:
        client.execute()
    except nbclient.exceptions.CellExecutionError as problem:
        raise UserError(f"a cell of {SCRIPT} failed: {problem}") from None
    for cell in nodes.cells:
        cell.metadata.pop("execution", None)  # the times, which are other ones in each run
        for output in cell.get("outputs", []):
            output.get("metadata", {}).clear()
            output.pop("transient", None)
    # Without the metadata of the kernel, which names a version of Python.
    return json.loads(nbformat.writes(nodes)) | {"metadata": notebook["metadata"]}


# ------------------------------------------------------------------------------- comparison
def output_text(output: dict[str, Any]) -> str:
    """Printed text, or the text of a result."""
    return "".join(output.get("text", output.get("data", {}).get("text/plain", "")))


def output_pixels(output: dict[str, Any]) -> np.ndarray | None:
    """(height, width, 3) of a figure, None for an output without one."""
    png = output.get("data", {}).get("image/png")
    if png is None:
        return None
    with Image.open(io.BytesIO(base64.b64decode("".join(png)))) as image:
        return np.asarray(image.convert("RGB"), np.float64)


def join_prints(outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The outputs of a cell with all that it prints as the first one: where in between the figures
    the kernel cuts the printed text depends on time."""
    printed = [output for output in outputs if output["output_type"] == "stream"]
    others = [output for output in outputs if output["output_type"] != "stream"]
    text = "".join(output_text(output) for output in printed)
    return [{"output_type": "stream", "name": "stdout", "text": [text]}, *others]


def output_difference(old: dict[str, Any], new: dict[str, Any], trained: bool) -> str:
    """What differs by more than the tolerance, or nothing."""
    tolerance = TOLERANCE[trained]
    old_pixels, new_pixels = output_pixels(old), output_pixels(new)
    if (old_pixels is None) != (new_pixels is None):
        return "a figure became a text or a text a figure"
    if old_pixels is not None:
        if old_pixels.shape != new_pixels.shape and not trained:
            return f"a figure has the shape {new_pixels.shape}, not {old_pixels.shape}"
        if old_pixels.shape[1:] != new_pixels.shape[1:]:
            return f"a figure has the width {new_pixels.shape[1]}, not {old_pixels.shape[1]}"
        rows = min(len(old_pixels), len(new_pixels))  # captions have more lines or fewer
        difference = np.abs(old_pixels[:rows] - new_pixels[:rows]).mean()
        return f"a figure by {difference:.2f}" if difference > tolerance["pixel"] else ""
    number = r"-?\d+(?:\.\d+)?"
    old_text, new_text = output_text(old), output_text(new)
    if re.sub(rf"\s*{number}", "#", old_text) != re.sub(rf"\s*{number}", "#", new_text):
        return f"the text {new_text!r} was {old_text!r}"
    old_numbers = np.array(re.findall(number, old_text), float)
    new_numbers = np.array(re.findall(number, new_text), float)
    excess = np.abs(old_numbers - new_numbers) / np.maximum(1, np.abs(old_numbers))
    largest = excess.max(initial=0)
    return f"a number by {largest:.4f} in {new_text!r}" if largest > tolerance["number"] else ""


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between two notebooks, a sentence each. Figures are compared by the mean
    absolute difference of their values (0..255), numbers by the absolute difference, or the
    relative one if they are above 1."""
    if [cell["source"] for cell in old["cells"]] != [cell["source"] for cell in new["cells"]]:
        return ["the cells are others"]
    reports = []
    for n, (old_cell, new_cell) in enumerate(zip(old["cells"], new["cells"])):
        old_outputs = join_prints(old_cell.get("outputs", []))
        new_outputs = join_prints(new_cell.get("outputs", []))
        trained = "trained" in new_cell["metadata"].get("tags", [])
        if len(old_outputs) != len(new_outputs):
            reports.append(f"cell {n}: {len(new_outputs)} outputs, not {len(old_outputs)}")
        for old_output, new_output in zip(old_outputs, new_outputs):
            difference = output_difference(old_output, new_output, trained)
            if difference:
                reports.append(f"cell {n}: {difference}")
    return reports


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="tutorial/build.py", description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true",
                        help="keep the notebook; exit status 1 if an output differs from it")
    args = parser.parse_args(argv)
    with open(SCRIPT, encoding="utf-8") as file:
        cells = read_cells(file.read())
    new = run_cells(to_notebook(cells))
    reports = []
    if os.path.exists(NOTEBOOK):
        with open(NOTEBOOK, encoding="utf-8") as file:
            reports = differences(json.load(file), new)
    for difference in reports:
        print(difference)
    print(f"{len(reports)} outputs differ from {os.path.relpath(NOTEBOOK)} beyond the tolerance")
    if args.check:
        return 1 if reports else 0
    with open(NOTEBOOK, "w", encoding="utf-8") as file:
        json.dump(new, file, indent=1, ensure_ascii=False)
        file.write("\n")
    print(f"{os.path.relpath(NOTEBOOK)}: {os.path.getsize(NOTEBOOK) / 1e3:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))

"""The ablations: each cell is the run that its name says, what is stopped goes on, and the tables are what the figures say."""
import dataclasses
import json

import pytest

import bench
import config
import masking
from benchmarks import ablations
from benchmarks.ablations import CELLS, COSTS, TABLES, load, markdown, rewritten, settings
from objectives import registry
from runtime import curriculum
from runtime.errors import ConfigError

SECONDS = {"base": 100.0, "openvision": 290.0}
PRICES = {cell: {"seconds": SECONDS.get(cell, 200.0), "GFLOPs": 1.5, "MiB": 70.0} for cell in CELLS}


def figures(value):
    return {column: value for table in TABLES.values() for column in table.columns if column not in (*COSTS, "images")} | {"images": 81280}


@pytest.mark.parametrize("cell", CELLS)
def test_each_cell_is_a_run_that_its_command_line_makes(cell):
    cfg = dataclasses.replace(settings(cell, PRICES), seed=2, workdir="x")
    config.validate(cfg)
    assert config.parse_args(ablations.flags(cfg)) == (cfg, False)
    toy, plan = curriculum.parse_stages(ablations.TOY.stages), curriculum.parse_stages(cfg.stages)
    images = sum(s.steps * s.batch for s in plan)
    if cell.endswith("-time"):
        dearer = PRICES[cell.removesuffix("-time")]["seconds"] / PRICES["base"]["seconds"]
        assert [(s.steps, s.warmup) for s in plan] == [(round(s.steps / dearer), round(s.warmup / dearer)) for s in toy]
    else:
        assert images == sum(s.steps * s.batch for s in toy)


def test_every_table_has_the_method_itself_and_known_cells():
    for table in TABLES.values():
        assert "base" in table.rows and set(table.rows) <= set(CELLS)
    assert set().union(*(table.rows for table in TABLES.values())) == set(CELLS)


def test_a_table_gives_mean_and_spread_and_says_what_is_missing():
    found = {"costs": PRICES, "cells": {"base": {"0": figures(0.5), "1": figures(0.6), "2": figures(0.7)}, "clip": {"0": figures(0.25)}}}
    lines = markdown(found, "objectives").splitlines()
    base, clip, cappa = (next(line for line in lines if line.startswith(f"| {name} |")) for name in ("OpenVision 2", "CLIP", "CapPa"))
    assert "| 60.0 ± 10.0 |" in base and base.endswith("| 100 |")
    assert "| 25.0 |" in clip and clip.endswith("| 200 |")
    assert "| – | –" in cappa and lines[-1] == "Seeds a cell: 0 to 3."


def test_the_committed_tables_are_those_of_the_committed_figures():
    with open(ablations.TEXT, encoding="utf-8") as f:
        text = f.read()
    assert rewritten(text, load()) == text
    other = load()
    other["cells"].setdefault("base", {})["0"] = figures(0.123)
    assert rewritten(text, other) != text
    with pytest.raises(ConfigError, match="lacks the mark"):
        rewritten(text.replace("<!-- keep -->", ""), load())


def test_every_objective_trained_below_its_floor_and_the_text_says_so():
    cells = load()["cells"]
    for cell in ("base", *ablations.RIVALS):
        known = [f for f in cells[cell].values() if "floor" in f]
        assert len(known) > 1 and all(f["held-out loss"] < 0.6 * f["floor"] for f in known), cell
    with open(ablations.TEXT, encoding="utf-8") as f:
        text = f.read()
    for cell in ("base", *ablations.RIVALS):
        loss, floor = (f"{cells[cell]['1'][k]:.2f}" for k in ("held-out loss", "floor"))
        assert f"{loss} against {floor}" in text, cell


def test_what_is_stopped_goes_on_and_does_nothing_twice(tmp_path, monkeypatch):
    for name in ("RESULTS", "TEXT", "PLOT"):
        monkeypatch.setattr(ablations, name, str(tmp_path / f"{name}.png"))
    monkeypatch.setattr(ablations.load, "__defaults__", (str(tmp_path / "RESULTS.png"),))
    monkeypatch.setattr(ablations.store, "__defaults__", (str(tmp_path / "RESULTS.png"),))
    (tmp_path / "TEXT.png").write_text("".join(f"<!-- {name} -->\n<!-- end of {name} -->\n" for name in TABLES))
    done = []

    def cell(name, seed, folder, costs):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append((name, seed))
        return figures(0.5)
    monkeypatch.setattr(ablations, "train_and_read", cell)
    monkeypatch.setattr(ablations, "measure_costs", lambda cells: {c: PRICES[c] for c in cells})
    ask = ["keep", "captions"], 2, str(tmp_path / "runs"), False
    (tmp_path / "RESULTS.png").write_text(json.dumps({"recipe": "a longer night", "costs": {}, "cells": {}}))
    with pytest.raises(ConfigError, match="another recipe"):
        ablations.rows(*ask)
    (tmp_path / "RESULTS.png").unlink()
    with pytest.raises(KeyboardInterrupt):
        ablations.rows(*ask)
    assert len(json.loads((tmp_path / "RESULTS.png").read_text())["cells"]) == 5 and "| 50.0 |" in (tmp_path / "TEXT.png").read_text()
    first, done[:] = list(done), []
    for _ in range(9):
        try:
            ablations.rows(*ask)
            break
        except KeyboardInterrupt:
            first, done[:] = first + done, []
    rows = first + done
    wanted = {*TABLES["keep"].rows, *TABLES["captions"].rows, *ablations.BASELINES}
    assert len(rows) == len(set(rows)) == 2 * len(wanted) and {name for name, _ in rows} == wanted
    (tmp_path / "TEXT.png").write_text("".join(f"<!-- {name} -->\n<!-- end of {name} -->\n" for name in TABLES))
    ablations.rows(*ask)  # nothing is left to do, but the tables are made
    assert "| 50.0 " in (tmp_path / "TEXT.png").read_text()
    shown = ablations.rows(["keep"], 2, "nowhere", True)
    assert [r["seeds"] for r in shown] == [2] * len(shown)


def test_a_finished_run_of_other_settings_is_not_taken_for_the_cell(tmp_path, monkeypatch):
    (tmp_path / "clip-0").mkdir()
    (tmp_path / "clip-0" / "summary.json").write_text("{}")

    def refuse(cfg, log):
        raise ConfigError(f"{cfg.workdir} holds a run with other settings")
    monkeypatch.setattr(ablations, "train", refuse)
    with pytest.raises(ConfigError, match="clip-0 holds a run with other settings"):
        ablations.train_and_read("clip", 0, str(tmp_path), PRICES)


def test_damaged_figures_and_unknown_tables_are_one_sentence(tmp_path, capsys):
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ConfigError, match="mend it, or move it away"):
        load(str(tmp_path / "x.json"))
    with pytest.raises(SystemExit):
        bench.main(["ablate", "keeps"])
    assert "unknown table 'keeps'" in capsys.readouterr().err


def test_a_run_that_fails_says_where_its_words_are(tmp_path):
    with pytest.raises(ConfigError, match=r"status 1 .*no data.*log has its words"):
        ablations.train(dataclasses.replace(ablations.TOY, data="nothing/here", workdir=str(tmp_path / "r")), str(tmp_path / "r.log"))


def test_the_text_counts_the_kept_tokens_as_the_mask_does():
    """Of the base cell's last stage."""
    with open(ablations.TEXT, encoding="utf-8") as f:
        text = f.read()
    cfg = ablations.TOY
    patch = registry.model_spec(cfg).encoder.patch_size
    n = (curriculum.parse_stages(cfg.stages)[-1].resolution // patch) ** 2
    kept = masking.num_kept_tokens(n, cfg.keep_ratio)
    numbers = ("no", "one", "two", "three", "four", "five", "six")
    assert f"give {n}\ntokens" in text and f"over any {numbers[kept]} of them" in text

"""The ablations: a cell is the run of its name, an interrupted command resumes, tables show the
stored figures."""
import dataclasses
import json

import pytest

import bench
import config
import masking
from benchmarks import ablation_tables, ablations, step_time
from benchmarks.ablation_tables import COSTS, TABLES, load, markdown, update_text
from benchmarks.ablations import CELLS, TIMED, settings
from objectives import registry
from runtime.curriculum import parse_stages
from runtime.errors import ConfigError

SECONDS = {"base": 100.0, "openvision": 290.0}
FAKE_COSTS = {cell: {"seconds": SECONDS.get(cell, 200.0), "GFLOPs": 1.5, "MiB": 70.0}
              for cell in TIMED}
EMPTY_TEXT = "".join(f"<!-- {name} -->\n<!-- end of {name} -->\n" for name in TABLES)


def fake_figures(value):
    figures = {"images": 81280}
    for table in TABLES.values():
        for column in table.columns:
            if column not in (*COSTS, "images"):
                figures[column] = value
    return figures


@pytest.fixture
def text():
    with open(ablation_tables.TEXT, encoding="utf-8") as f:
        return f.read()


@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_is_the_run_of_its_command_line(cell):
    cfg = dataclasses.replace(settings(cell, FAKE_COSTS), seed=2, workdir="x")
    config.validate(cfg)
    assert config.parse_args(ablations.flags(cfg)) == (cfg, False)
    base, stages = parse_stages(ablations.BASE.stages), parse_stages(cfg.stages)
    if cell.endswith("-time"):
        cost = FAKE_COSTS[cell.removesuffix("-time")]["seconds"] / FAKE_COSTS["base"]["seconds"]
        assert [stage.steps for stage in stages] == [round(s.steps / cost) for s in base]
        assert [stage.warmup for stage in stages] == [round(s.warmup / cost) for s in base]
    elif cell.endswith(tuple(ablations.LENGTHS)):
        images = sum(s.steps * s.batch for s in stages) / sum(s.steps * s.batch for s in base)
        assert images == pytest.approx(ablations.LENGTHS[cell.rpartition("-")[2]], rel=1e-3)
    else:
        assert sum(s.steps * s.batch for s in stages) == sum(s.steps * s.batch for s in base)


def test_costs_are_of_the_steps_of_all_stages(monkeypatch):
    """Steps of 2 s, of which the run has 9."""
    class FakeStep:
        def __init__(self, cfg, resolution, batch, parallel):
            self.bytes = 2**20 * resolution

        def __call__(self):
            return 0.0

        def planned_bytes(self):  # a device counts the peak of all steps together
            return self.bytes
    monkeypatch.setattr(step_time, "JaxStep", FakeStep)
    monkeypatch.setattr(step_time, "time_interleaved",
                        lambda runs, repeats: {name: [1.0, 2.0, 9.0] for name in runs})
    stages = "resolution=16 steps=4 batch=8 lr=1e-3, resolution=32 steps=5 batch=8 lr=1e-3"
    cfg = dataclasses.replace(ablations.BASE, stages=stages)
    measured = step_time.measure_costs({"base": cfg})
    gflops = step_time.model_flops(cfg, 32) / 1e9
    assert measured["costs"] == {"base": {"seconds": 18.0, "GFLOPs": gflops, "MiB": 32.0}}
    assert "jax" in measured["machine"]


def test_every_table_has_the_method_and_known_cells():
    in_tables = set()
    for table in TABLES.values():
        assert "base" in table.rows
        in_tables |= set(table.rows)
    assert in_tables == set(CELLS)


def test_a_table_shows_mean_and_spread_and_marks_missing_figures():
    base = {str(seed): fake_figures(0.5 + seed / 10) for seed in range(3)}
    cells = {"base": base, "openvision": {"0": {"answers": 0.25}}}
    lines = markdown({"costs": FAKE_COSTS, "cells": cells}, "predecessor").splitlines()
    by_title = {line.split(" | ")[0].removeprefix("| "): line for line in lines}
    assert "| 60.0 ± 10.0 |" in by_title["OpenVision 2"]
    assert by_title["OpenVision 2"].endswith("| 100 | 1.50 | 70.00 |")
    assert by_title["OpenVision"].endswith("| 290 | 1.50 | 70.00 |")
    assert by_title["OpenVision"].startswith("| OpenVision | 25.0 | – | –")
    assert "raw pixels" not in by_title and lines[-1] == "Seeds per cell: 1 to 3."
    only = markdown({"costs": FAKE_COSTS, "cells": {"base": base}}, "open")
    assert only == "Not measured yet: `python bench.py ablate open`.\n"


def test_committed_tables_show_the_committed_figures(text):
    assert update_text(text, load()) == text
    changed = load()
    changed["cells"].setdefault("base", {})["0"] = fake_figures(0.123)
    assert update_text(text, changed) != text
    with pytest.raises(ConfigError, match="lacks the mark"):
        update_text(text.replace("<!-- keep -->", ""), load())


def test_every_objective_trained_below_its_blind_loss_and_the_text_says_so(text):
    cells = load()["cells"]
    measured = [cell for cell in TABLES["time"].rows if cell in cells]
    assert len(measured) > 4
    for cell in measured:
        for figures in cells[cell].values():
            assert figures["val_loss"] < 0.6 * figures["val_loss_blind"], cell
        loss, blind = cells[cell]["0"]["val_loss"], cells[cell]["0"]["val_loss_blind"]
        assert f"{loss:.2f} against {blind:.2f}" in " ".join(text.split()), cell


def test_a_text_of_the_committed_run_counts_kept_tokens_as_the_mask_does(text):
    """In the last stage of the base cell."""
    cfg = ablations.BASE
    patch_size = registry.model_spec(cfg).encoder.patch_size
    num_patches = (parse_stages(cfg.stages)[-1].resolution // patch_size) ** 2
    num_kept = masking.num_kept_tokens(num_patches, cfg.keep_ratio)
    assert f"keeps {num_kept} of {num_patches} tokens" in " ".join(text.split())


def test_an_interrupted_command_resumes_and_repeats_nothing(tmp_path, monkeypatch):
    results, text = tmp_path / "results" / "ablations.json", tmp_path / "results.md"
    monkeypatch.setattr(ablation_tables, "RESULTS", str(results))
    monkeypatch.setattr(ablation_tables, "TEXT", str(text))
    monkeypatch.setattr(ablation_tables, "PLOT", str(tmp_path / "plot.png"))
    monkeypatch.setattr(ablation_tables, "LENGTH_PLOT", str(tmp_path / "lengths.png"))
    text.write_text(EMPTY_TEXT)
    finished, in_this_command = [], []

    def train_and_evaluate(cell, seed, folder, costs):
        if len(in_this_command) == 5:
            raise KeyboardInterrupt
        in_this_command.append((cell, seed))
        return fake_figures(0.5)
    monkeypatch.setattr(ablations, "train_and_evaluate", train_and_evaluate)

    def measure_costs(cfgs):
        return {"machine": "none", "costs": {cell: FAKE_COSTS[cell] for cell in cfgs}}
    arguments = ["keep", "captions"], 2, str(tmp_path / "runs"), False, measure_costs
    results.parent.mkdir()
    results.write_text(json.dumps({"recipe": "a longer night", "costs": {}, "cells": {}}))
    with pytest.raises(ConfigError, match="another recipe"):
        ablations.rows(*arguments)
    results.unlink()
    with pytest.raises(KeyboardInterrupt):
        ablations.rows(*arguments)
    assert len(json.loads(results.read_text())["cells"]) == 5
    assert "| 50.0 |" in text.read_text()
    for _ in range(9):
        finished += in_this_command
        in_this_command.clear()
        try:
            ablations.rows(*arguments)
            break
        except KeyboardInterrupt:
            pass
    finished += in_this_command
    wanted = {*TABLES["keep"].rows, *TABLES["captions"].rows, *ablation_tables.BASELINES}
    assert {cell for cell, _ in finished} == wanted
    assert len(finished) == len(set(finished)) == 2 * len(wanted)
    text.write_text(EMPTY_TEXT)
    ablations.rows(*arguments)  # nothing is left to train, but the tables are made
    assert "| 50.0 " in text.read_text()
    assert (tmp_path / "plot.png").exists() and (tmp_path / "lengths.png").exists()
    shown = ablations.rows(["keep"], 2, "nowhere", True, measure_costs)
    assert [row["seeds"] for row in shown] == [2] * len(shown)


def test_a_finished_run_with_other_settings_is_not_taken_for_the_cell(tmp_path, monkeypatch):
    (tmp_path / "clip-0").mkdir()
    (tmp_path / "clip-0" / "summary.json").write_text("{}")

    def refuse(cfg, log):
        raise ConfigError(f"{cfg.workdir} holds a run with other settings")
    monkeypatch.setattr(ablations, "train", refuse)
    with pytest.raises(ConfigError, match="clip-0 holds a run with other settings"):
        ablations.train_and_evaluate("clip", 0, str(tmp_path), FAKE_COSTS)


def test_damaged_results_and_unknown_tables_are_reported(tmp_path, capsys):
    for damaged in ("{", "[]", '{"cells": {}}'):
        (tmp_path / "x.json").write_text(damaged)
        with pytest.raises(ConfigError, match="repair it, or move it away"):
            load(str(tmp_path / "x.json"))
    with pytest.raises(SystemExit):
        bench.main(["ablate", "keeps"])
    assert "unknown table 'keeps'" in capsys.readouterr().err


def test_a_failed_run_is_reported_with_its_log(tmp_path):
    cfg = dataclasses.replace(ablations.BASE, data="nothing/here", workdir=str(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"status 1 .*no data.*output is in .*run.log"):
        ablations.train(cfg, str(tmp_path / "run.log"))


def test_a_longer_cell_takes_as_many_times_the_seconds_of_the_toy():
    results = {"costs": FAKE_COSTS, "cells": {}}
    for cell in ("base", "keep-10"):
        seconds = ablation_tables.figures_of(results, cell, "seconds")[0]
        for length, times in ablations.LENGTHS.items():
            longer = f"{cell}-{length}"
            assert ablation_tables.figures_of(results, longer, "seconds") == [times * seconds]

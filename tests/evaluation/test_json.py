"""What is written as JSON is JSON: a figure that is not defined is null, never NaN."""
import argparse
import json

import numpy as np
from PIL import Image

import bench
import evaluate
import train
from benchmarks import ablation_tables
from evaluation import vqa
from runtime import checkpoint, validation

NAN = float("nan")


def read_strictly(path) -> dict:
    """What a JSON file holds. NaN and Infinity, which are not JSON, fail."""
    def refuse(name):
        raise AssertionError(f"{path} holds {name}")
    return json.loads(path.read_text(), parse_constant=refuse)


def test_numbers_that_are_not_finite_are_null():
    value = {"a": NAN, "b": [1, float("inf"), {"c": (-float("inf"), 2.5)}], "d": "NaN", "e": None,
             "f": np.float64("nan")}
    expected = {"a": None, "b": [1, None, {"c": [None, 2.5]}], "d": "NaN", "e": None, "f": None}
    assert json.loads(checkpoint.to_json(value)) == expected


def test_a_label_without_a_training_image_is_null(run, tmp_path, capsys):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for i in range(6):
            Image.new("RGB", (20, 20), (40 * i, 0, 90)).save(tmp_path / split / f"{i}.png")
            shape = ("circle", "star")[i % 2]
            about = {"caption": f"big red {shape}", "name": f"{split} {i}"}
            (tmp_path / split / f"{i}.json").write_text(json.dumps(about))
    figures = tmp_path / "figures"
    assert evaluate.main([str(run / "encoder.npz"), "knn", "--data", str(tmp_path / "train"),
                          "--val", str(tmp_path / "val"), "--label-fields", "caption,name",
                          "--json", str(figures)]) == 0
    row = read_strictly(figures)["knn"]["pixels nearest"]
    assert row["name"] is None and row["caption"] == 1
    assert "–" in capsys.readouterr().out  # the table has a cell for it


def test_vqa_and_bench_write_null(run, tmp_path, monkeypatch):
    rows = {"encoder": {"color": NAN, "all": 0.5}}
    monkeypatch.setattr(vqa, "measure_all", lambda *_: rows)
    assert evaluate.main([str(run / "encoder.npz"), "vqa", "--json", str(tmp_path / "vqa")]) == 0
    assert read_strictly(tmp_path / "vqa") == {"vqa": {"encoder": {"color": None, "all": 0.5}}}
    rows = [{"what": "a", "ms": NAN, "rate": float("inf"), "all": [NAN]}]
    args = argparse.Namespace(function=lambda _: rows, json=str(tmp_path / "bench"), lr=NAN)
    monkeypatch.setattr(bench, "parse", lambda argv: args)
    assert bench.main([]) == 0
    result = read_strictly(tmp_path / "bench")
    assert result["rows"] == [{"what": "a", "ms": None, "rate": None, "all": [None]}]
    assert result["arguments"]["lr"] is None


def test_ablations_keep_null_and_leave_it_out_of_means(tmp_path, monkeypatch):
    path = tmp_path / "results" / "ablations.json"
    monkeypatch.setattr(ablation_tables, "RESULTS", str(path))
    cells = {"base": {"0": {"answers": NAN}, "1": {"answers": 0.5}}, "openvision": {"0": {}}}
    ablation_tables.store({"machine": "", "costs": {"base": {"MiB": NAN}}, "cells": cells})
    assert read_strictly(path)["cells"]["base"]["0"] == {"answers": None}
    results = ablation_tables.load()
    assert ablation_tables.figures_of(results, "base", "answers") == [0.5]
    assert ablation_tables.figures_of(results, "base", "MiB") == []
    assert "–" in ablation_tables.markdown(results, "predecessor")
    del results["cells"]["base"]["1"]
    ablation_tables.draw(results, str(tmp_path / "plot.png"))
    assert not (tmp_path / "plot.png").exists()  # no figure is left


def test_a_run_writes_null(tmp_path, monkeypatch):
    """In the summary and in the metrics."""
    losses = {"val_loss": 1.0, "val_loss_shuffled": 2.0, "other": NAN}
    monkeypatch.setattr(validation, "caption_metrics", lambda *_: {"object_accuracy": NAN})
    monkeypatch.setattr(validation.ValidationSet, "losses", lambda *_: dict(losses))
    folder = tmp_path / "run"
    assert train.main(["toy", "--encoder", "micro/8", "--scan-unroll", "1", "--stages",
                       "resolution=16 steps=1 batch=8 lr=1e-3", "--val-samples", "8",
                       "--max-text-len", "12", "--num-devices", "1", "--workdir", str(folder)]) == 0
    summary = read_strictly(folder / "summary.json")
    assert summary["object_accuracy"] is None and summary["other"] is None
    assert summary["val_loss"] == 1
    assert read_strictly(folder / "config.json")["seed"] == 0
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (row,) = [json.loads(line) for line in lines if "val_loss" in line]
    assert row["other"] is None and "NaN" not in "".join(lines)

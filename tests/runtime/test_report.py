"""The report of a run: what it shows, that it is one file, and that text stays text."""
import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from config import RECIPES
from objectives import registry
from runtime import html_page, plots, report
from runtime.errors import run_command

EVIL = '<script>document.title = "taken"</script>&amp; "\'</td>'
STAGES = "resolution=16 steps=4 batch=8 lr=1e-3, resolution=24 steps=6 batch=4 lr=1e-3"


class Page(HTMLParser):
    """The elements, attributes and text of a page; scripts and styles apart from the text."""

    def __init__(self, path: Path):
        super().__init__()
        self.elements, self.scripts, self.text, self.open = [], [], "", ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.open = tag
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        self.open = ""

    def handle_data(self, data):
        if self.open == "script":
            self.scripts.append(data)
        elif self.open != "style":
            self.text += data + "\n"

    def attributes(self, name: str) -> list[str]:
        return [attrs[name] for _, attrs in self.elements if attrs.get(name)]


def write_run(folder: Path, steps: int = 10, finished: bool = True, text: str = "a caption",
              **changes) -> None:
    """A run's folder as train.py leaves it, with these many steps."""
    folder.mkdir(parents=True)
    cfg = dataclasses.replace(RECIPES["toy"], encoder="micro/8", stages=STAGES, **changes)
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(cfg)))
    rows = []
    for step in range(1, steps + 1):
        stage, images = (1, step * 8) if step <= 4 else (2, 32 + (step - 4) * 4)
        speed = 900.0 if step == 2 else 100.0 * stage
        rows.append({"step": step, "stage": stage, "images": images, "loss": 5 / step,
                     "grad_norm": 1.0, "lr": 1e-3, "images_per_second": speed,
                     "data_wait_fraction": 0.25, "bad_samples": 0, "seconds": step * 2.0})
    if rows:
        rows.append({"step": steps, "val_loss": 0.5, "val_loss_shuffled": 3.0,
                     "val_loss_blind": 0.8125, "seconds": steps * 2.0 + 1})
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "metrics.jsonl").write_text("".join(lines))
    if not finished:
        return
    (folder / "summary.json").write_text(json.dumps({"val_loss": 0.4321, "seconds": 77.0}))
    sample = plots.CaptionedImage(np.zeros((24, 24, 3), np.uint8), np.arange(3), 8, "", "", True)
    plots.draw_samples(str(folder / "samples.png"), [sample] * 3)
    samples = [{"caption": text, "generated": text, "correct": n == 0} for n in range(2)]
    samples.append({"caption": text, "generated": None, "correct": False})
    (folder / "samples.json").write_text(json.dumps(samples))
    (folder / "environment.json").write_text(json.dumps({"python": "3.11", "device": text}))
    skipped = f"3\t{text}.jpg\tit is {text}\n"
    (folder / "bad-samples.txt").write_bytes(skipped.encode(errors="replace"))
    (folder / "evaluation.json").write_text(json.dumps({"knn": {text: {"color": 0.75}}}))
    Image.new("RGB", (8, 8)).save(folder / "pca.png")


def test_a_finished_run_shows_all_its_parts(tmp_path):
    write_run(tmp_path / "run")
    assert report.main([str(tmp_path / "run")]) == 0
    page = Page(tmp_path / "run" / "report.html")
    for text in ("finished, 10 of 10 steps", "0.432", "16 px", "24 px", "without the image",
                 "a caption", "evaluation.json: knn", "0.75", "a caption.jpg", "keep_ratio",
                 "3.11", "resolution=16"):
        assert text in page.text, text
    # One image of the samples, which each sample shows a part of; and what evaluate.py drew.
    assert len([uri for uri in page.attributes("href") if uri.startswith("data:image")]) == 1
    boxes = [box for box in page.attributes("viewbox") if box.endswith("326 160")]
    assert boxes == ["8 8 326 160", "628 8 326 160", "8 184 326 160"]
    assert page.attributes("src")[0].startswith("data:image/png")


def test_it_is_one_file_whose_policy_allows_its_own_script_alone(tmp_path):
    write_run(tmp_path / "run", text=EVIL)
    report.main([str(tmp_path / "run")])
    page = Page(tmp_path / "run" / "report.html")
    links = page.attributes("src") + page.attributes("href")
    assert links and all(link.startswith(("data:", "#")) for link in links)
    (policy,) = page.attributes("content")[:1]
    assert html_page.source_hash(page.scripts[0]) in policy and "default-src 'none'" in policy
    assert "'unsafe-inline'" not in policy.split("script-src")[1].split(";")[0]


def test_text_of_the_data_stays_text(tmp_path):
    """In captions, names of files, settings, evaluations, and the names of runs."""
    write_run(tmp_path / EVIL.replace("/", "-"), text=EVIL, data=EVIL)
    write_run(tmp_path / "other\udce9", text="\ud800 a lone surrogate")
    path = tmp_path / "report.html"
    report.write_report([str(folder) for folder in sorted(tmp_path.iterdir())], str(path))
    page = Page(path)
    assert page.scripts == [html_page.SCRIPT]
    assert page.text.count(EVIL) >= 8 and "a lone surrogate" in page.text
    assert {tag for tag, _ in page.elements} <= {
        "html", "head", "meta", "link", "title", "style", "script", "body", "h1", "h2", "h3", "p",
        "div", "table", "thead", "tbody", "tr", "th", "td", "button", "figure", "figcaption", "svg",
        "image", "use", "text", "path", "polyline", "circle", "span", "i", "img"}


@pytest.mark.parametrize("steps", [0, 1, 7])
def test_an_unfinished_run_has_a_report_of_what_is_there(tmp_path, steps):
    write_run(tmp_path / "run", steps, finished=False)
    report.main([str(tmp_path / "run")])
    page = Page(tmp_path / "run" / "report.html")
    assert f"not finished, logged up to step {steps} of 10" in page.text
    assert "No samples yet" in page.text and "Nothing was skipped" in page.text
    assert "nan" not in page.text.lower() and "inf" not in " ".join(page.attributes("points"))


def test_flops_are_those_of_the_steps_that_were_made(tmp_path):
    write_run(tmp_path / "run", steps=7, finished=False)
    run = report.read_run(str(tmp_path / "run"))
    model = registry.model_spec(run.cfg)
    for row, steps, batch, pixels in zip(report.stage_costs(run), (4, 3), (8, 4), (16, 24)):
        forward = sum(registry.flops(model, pixels, run.cfg.max_text_len).values())
        assert row["TFLOPs of training"] == pytest.approx(3 * forward * steps * batch / 1e12)
        assert row["images/s (median)"] == 100.0 * row["stage"]


def test_several_runs_are_side_by_side_and_differences_are_marked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a" / "toy")
    write_run(tmp_path / "b" / "toy", keep_ratio=1.0)
    assert report.main(["a/toy", "b/toy", "a/toy"]) == 0
    assert "report.html" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    marked = re.findall(r"<tr class=differs><td>(\w+)", page)
    assert marked == ["keep_ratio"]
    assert page.count("<polyline") == 2 * 2 * 3 + 3 * 2
    for name in ("toy (1)", "toy (2)"):
        assert f"{name}: validation" in page


@pytest.mark.parametrize("name, content, sentence", [
    ("config.json", None, "has no config.json"), ("summary.json", "{", "is damaged"),
    ("samples.json", "{}", "is damaged"), ("evaluation.json", "\ufffd[", "is damaged")])
def test_what_cannot_be_read_is_named(tmp_path, capsys, name, content, sentence):
    write_run(tmp_path / "run")
    (tmp_path / "run" / name).unlink()
    if content:
        (tmp_path / "run" / name).write_text(content)
    assert run_command(report.main, [str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and sentence in error and "Traceback" not in error


def test_settings_of_another_version_leave_out_the_costs(tmp_path):
    write_run(tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"future": 1}))
    report.main([str(tmp_path / "run")])
    text = Page(tmp_path / "run" / "report.html").text
    assert "future" in text and "finished, 10 steps" in text and "GFLOPs" not in text

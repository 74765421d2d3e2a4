"""report.html: what a run was, cost and reached, in one page that needs no network.

    python -m runtime.report RUN               writes RUN/report.html; train.py does so at its end
    python -m runtime.report RUN RUN [...]     writes report.html, with the runs side by side

It reads the run's folder alone (runtime/run_record.py). A run that is under way or was interrupted
has a report of what is there.
"""
import io
import json
import os
import sys
from typing import Any

import numpy as np
from PIL import Image

from objectives import registry
from runtime import checkpoint, html_page, plots
from runtime.errors import run_command
from runtime.html_page import escape, table
from runtime.run_record import RunRecord, evaluations, read_run

MAX_SKIPPED_ROWS = 200  # of bad-samples.txt
LINE_NAMES = {"loss": "training", "val_loss": "validation", "val_loss_blind": "without the image"}
EVALUATED_IMAGES = {"pca.png": "Patch tokens as colors",
                    "attention.png": "Attention of the encoder",
                    "words.png": "Attention of the decoder, token by token"}


# ---------------------------------------------------------------------------------- sections
def status(run: RunRecord) -> str:
    steps = run.stages[-1].end if run.stages else None
    of_steps = f" of {steps:,}" if steps else ""
    if run.summary:
        return f"{run.name}: finished, {run.last_step:,}{of_steps} steps"
    return (f"{run.name}: not finished, logged up to step {run.last_step:,}{of_steps}. The same "
            "command continues it.")


def side_by_side(runs: list[RunRecord], dicts: list[dict[str, Any]], first: str) -> str:
    """Dicts of the runs as one table, with a row for each key."""
    rows = []
    for key in dict.fromkeys(key for values in dicts for key in values):
        row = {first: key}
        for run, values in zip(runs, dicts):
            row[run.name] = plain(values.get(key))
        rows.append(row)
    if not rows:
        return "<p>Nothing is recorded yet.</p>"
    return table(rows, mark_differences=True)


def plain(value: Any) -> Any:
    """A value as a cell shows it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return json.dumps(value) if isinstance(value, dict | list) else value


def stage_costs(run: RunRecord) -> list[dict[str, Any]]:
    """A row for each stage. FLOPs are counted from the settings: 2 per multiply-add, matmuls only;
    of a training step as in registry.training_flops."""
    if run.cfg is None:
        return []
    model = registry.model_spec(run.cfg)
    lines = []
    for stage in run.stages:
        rows = [row for row in run.rows if row.get("stage") == stage.number]
        steps = max((row["step"] for row in rows), default=stage.start) - stage.start
        speeds = [row["images_per_second"] for row in rows]
        forward = sum(registry.flops(model, stage.resolution, run.cfg.max_text_len).values())
        training = registry.training_flops(run.cfg, stage.resolution)
        # The first window compiles, so the median stands for the rest.
        speed = float(np.median(speeds)) if speeds else None
        lines.append({
            "run": run.name, "stage": stage.number, "pixels": stage.resolution,
            "batch": stage.batch, "steps": steps, "of": stage.steps,
            "images": steps * stage.batch, "images/s (median)": speed,
            "GFLOPs per image, forward": forward / 1e9,
            "TFLOPs of training": training * steps * stage.batch / 1e12,
            "GFLOPs/s": training * speed / 1e9 if speed else None,
            "waited for data": float(np.mean([row.get("data_wait_fraction", 0) for row in rows]))
            if rows else None})
    return lines


def totals(run: RunRecord) -> dict[str, Any]:
    parameters = registry.param_counts(run.cfg) if run.cfg else {}
    seconds = run.summary.get("seconds", max((row["seconds"] for row in run.rows), default=None))
    cost = {"seconds": seconds, "images seen": run.summary.get("images_seen"),
            "images/s, without compilation": run.summary.get("images_per_second"),
            "peak memory, GiB": run.summary.get("peak_memory_gib")}
    return cost | {f"parameters of the {part}": count for part, count in parameters.items()}


def curves(runs: list[RunRecord]) -> list[str]:
    """Losses by images and by seconds, then learning rate, gradient norm and speed."""
    colors: dict[str, str] = {}
    by_images, by_seconds = {}, {}
    more: dict[str, dict[str, plots.Line]] = {"lr": {}, "grad_norm": {}, "images_per_second": {}}
    for n, run in enumerate(runs):
        color = plots.COLORS[n % len(plots.COLORS)]
        colors[run.name] = html_page.rgb(color)
        training = [row for row in run.rows if "images" in row]
        steps, images = ([0, *(row[key] for row in training)] for key in ("step", "images"))
        for key, title in LINE_NAMES.items():
            name = f"{run.name}: {title}" if len(runs) > 1 else title
            rows = [row for row in run.rows if row.get(key) is not None]
            values, marked = [row[key] for row in rows], key == "val_loss"
            at = np.interp([row["step"] for row in rows], steps, images).tolist()
            by_images[name] = plots.Line(at, values, marked)
            by_seconds[name] = plots.Line([row["seconds"] for row in rows], values, marked)
            colors[name] = html_page.rgb(color, pale=key == "loss")
        for key, lines in more.items():
            lines[run.name] = plots.Line(images[1:], [row.get(key) for row in training], False)
    dashed = [name for name in by_images if name.endswith(LINE_NAMES["val_loss_blind"])]
    events = {}
    if all(run.stages == runs[0].stages for run in runs):
        events = {stage.first_image: f"{stage.resolution} px" for stage in runs[0].stages}
    label = "loss (of captions: nats per token)"
    parts = [html_page.chart(label, by_images, colors, "images", events, dashed),
             html_page.chart(label, by_seconds, colors, "seconds", {}, dashed)]
    titles = ("learning rate", "gradient norm", "images per second")
    for title, lines in zip(titles, more.values()):
        parts.append(html_page.chart(title, lines, colors, "images", events, height=180))
    return parts


def sample_cards(run: RunRecord, number: int) -> str:
    """The images of samples.png, each with its captions as text."""
    path = os.path.join(run.folder, "samples.png")
    if not os.path.exists(path):
        return "<p>No samples yet: a run draws them at its end.</p>"
    with open(path, "rb") as file:
        content = file.read()
    uri = html_page.data_uri(content)
    if not run.samples:  # of an earlier version: the captions are in the image alone
        return f'<p><img src="{uri}" alt="images, kept patches and captions"></p>'
    width, height = Image.open(io.BytesIO(content)).size
    side, pair = plots.SAMPLE_SIDE, 2 * plots.SAMPLE_SIDE + plots.SAMPLE_GAP
    cards = []
    for n, sample in enumerate(run.samples):
        x, y = plots.sample_position(n)
        lines = [f"<p>{escape(sample.get('caption'))}</p>"]
        if sample.get("generated") is not None:
            kind = "right" if sample.get("correct") else "wrong"
            text = sample["generated"] or "(nothing)"
            lines.append(f'<p class="{kind}">{kind}: {escape(text)}</p>')
        cards.append(f'<div><svg viewBox="{x} {y} {pair} {side}" width="{pair}" role="img" '
                     'aria-label="the image, and the patches that the decoder received">'
                     f'<use href="#sheet{number}"/></svg>{"".join(lines)}</div>')
    sheet = (f'<svg class="sheet" width="0" height="0"><image id="sheet{number}" href="{uri}" '
             f'width="{width}" height="{height}"/></svg>')
    return f'{sheet}<div class="samples">{"".join(cards)}</div>'


def evaluated(run: RunRecord) -> list[str]:
    """The evaluations during training, those of evaluate.py --json, and the images it drew."""
    rows = []
    for row in run.rows:
        if "val_loss" in row:
            names = ("step", "val_loss", "val_loss_shuffled", "val_loss_blind", "seconds")
            rows.append({name: row.get(name) for name in names})
    parts = [table(rows) if rows else "<p>None yet.</p>"]
    for title, figures in evaluations(run).items():
        parts.append(f"<h3>{escape(title)}</h3>")
        of_rows = all(isinstance(row, dict) for row in figures.values())
        if of_rows:
            parts.append(table([{"of": title} | row for title, row in figures.items()]))
        else:
            parts.append(table([{"figure": key, "value": plain(value)}
                                for key, value in figures.items()]))
    for name, title in EVALUATED_IMAGES.items():
        path = os.path.join(run.folder, name)
        if os.path.exists(path):
            with open(path, "rb") as file:
                uri = html_page.data_uri(file.read())
            parts.append(f'<h3>{escape(title)}</h3><p><img src="{uri}" alt="{escape(title)}"></p>')
    return parts


def skipped(run: RunRecord) -> str:
    if not run.bad_samples:
        return "<p>Nothing was skipped.</p>"
    rows = []
    for line in run.bad_samples[:MAX_SKIPPED_ROWS]:
        step, sample, reason = (line + ["", ""])[:3]
        rows.append({"step": int(step) if step.isdecimal() else step, "sample": sample,
                     "reason": reason})
    more = len(run.bad_samples) - len(rows)
    rest = f"<p>And {more:,} more in bad-samples.txt.</p>" if more else ""
    return table(rows) + rest


# ------------------------------------------------------------------------------------ report
def build(runs: list[RunRecord]) -> str:
    """The page of one run, or of several side by side."""
    title = "Report of " + ", ".join(run.name for run in runs)
    body = [f"<p>{escape(status(run))}</p>" for run in runs]
    body += ["<h2>Result</h2>", side_by_side(runs, [run.summary for run in runs], "figure")]
    body += ["<h2>Curves</h2>", *curves(runs)]
    body += ["<h2>Cost</h2>", side_by_side(runs, [totals(run) for run in runs], "cost")]
    costs = []
    for run in runs:
        costs += stage_costs(run)
    body.append(table(costs))

    for number, run in enumerate(runs):
        of_run = f" of {escape(run.name)}" if len(runs) > 1 else ""
        body += [f"<h2>Samples{of_run}</h2>", sample_cards(run, number)]
        body += [f"<h2>Evaluations{of_run}</h2>", *evaluated(run)]
        body += [f"<h2>Skipped samples{of_run}</h2>", skipped(run)]
    settings = [{name: str(plain(value)) for name, value in run.settings.items()} for run in runs]
    body += ["<h2>Settings</h2>", side_by_side(runs, settings, "setting")]
    body += ["<h2>Environment of the last start</h2>",
             side_by_side(runs, [run.environment for run in runs], "environment")]
    return html_page.document(title, body)


def write_report(folders: list[str], path: str) -> None:
    """Writes the page of the runs in `folders`. ConfigError for a folder that holds no run."""
    runs = name_apart([read_run(folder) for folder in dict.fromkeys(folders)])
    checkpoint.write_text(path, build(runs))


def name_apart(runs: list[RunRecord]) -> list[RunRecord]:
    """Runs whose folders have the same name are numbered."""
    names = [run.name for run in runs]
    return [run._replace(name=f"{run.name} ({n + 1})") if names.count(run.name) > 1 else run
            for n, run in enumerate(runs)]


def main(folders: list[str]) -> int:
    path = os.path.join(folders[0], "report.html") if len(folders) == 1 else "report.html"
    write_report(folders, path)
    print(f"{path}: the report of {', '.join(folders)}; open it in a browser")
    return 0


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m runtime.report RUN [RUN ...], folders that train.py made")
    sys.exit(run_command(main, sys.argv[1:]))

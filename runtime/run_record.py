"""What a run's folder says about the run, whether it is finished, under way or interrupted.

config.json and metrics.jsonl are there from the start. environment.json names the machine and the
versions. summary.json, samples.json and samples.png come at the end. bad-samples.txt is there if
samples were skipped. evaluation*.json are what evaluate.py wrote with --json RUN/evaluation.json.
"""
import json
import os
from typing import Any, NamedTuple

from config import Config, from_dict
from runtime import plots
from runtime.curriculum import Stage, parse_stages
from runtime.errors import ConfigError


class RunRecord(NamedTuple):
    """What a run's folder holds. Parts that are missing are empty."""
    name: str
    folder: str
    settings: dict[str, Any]
    cfg: Config | None            # None where the settings are those of another version
    rows: list[dict[str, Any]]    # of metrics.jsonl
    summary: dict[str, Any]
    samples: list[dict[str, Any]]
    environment: dict[str, Any]
    bad_samples: list[list[str]]  # step, sample, reason

    @property
    def stages(self) -> tuple[Stage, ...]:
        return parse_stages(self.cfg.stages) if self.cfg else ()

    @property
    def last_step(self) -> int:
        return max((row["step"] for row in self.rows), default=0)


# ----------------------------------------------------------------------------------- reading
def read_json(folder: str, name: str, missing: Any) -> Any:
    """A JSON file of the folder, `missing` if there is none. ConfigError if it is damaged."""
    path = os.path.join(folder, name)
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except FileNotFoundError:
        return missing
    except (json.JSONDecodeError, UnicodeDecodeError):
        value = None
    if not isinstance(value, type(missing)):
        raise ConfigError(f"{path} is damaged: delete it, and the report leaves it out")
    return value


def read_run(folder: str) -> RunRecord:
    """ConfigError if the folder is no run's."""
    settings = read_json(folder, "config.json", {})
    if not settings:
        raise ConfigError(f"{folder} has no config.json: name a folder that train.py made")
    try:
        cfg = from_dict(settings)
        parse_stages(cfg.stages)
    except (TypeError, ConfigError):
        cfg = None
    rows, bad_samples = [], []
    if os.path.exists(os.path.join(folder, "metrics.jsonl")):
        rows = plots.read_metrics(os.path.join(folder, "metrics.jsonl"))
    if os.path.exists(os.path.join(folder, "bad-samples.txt")):
        with open(os.path.join(folder, "bad-samples.txt"), encoding="utf-8",
                  errors="replace") as file:
            bad_samples = [line.rstrip("\n").split("\t") for line in file]
    summary = plots.rename_old_metrics(read_json(folder, "summary.json", {}))
    return RunRecord(os.path.basename(os.path.abspath(folder)), folder, settings, cfg, rows,
                     summary, read_json(folder, "samples.json", []),
                     read_json(folder, "environment.json", {}), bad_samples)


def evaluations(run: RunRecord) -> dict[str, dict[str, Any]]:
    """{"file: measure": figures} of the files evaluation*.json."""
    tables = {}
    for name in sorted(os.listdir(run.folder)):
        if name.startswith("evaluation") and name.endswith(".json"):
            for measure, figures in read_json(run.folder, name, {}).items():
                if isinstance(figures, dict):
                    tables[f"{name}: {measure}"] = figures
    return tables

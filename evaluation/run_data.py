"""The settings of a run with the data that an evaluation measures in place of its own.

Where the run split its validation images from its training data, the same images must be measured:
those of another split would nearly all be training images.
"""
import dataclasses
import os
from typing import Any

from config import Config
from inputs import opening
from runtime.errors import ConfigError


def override_config(cfg: Config, changes: dict[str, Any], count: int) -> Config:
    """The run's settings with changes and `count` validation images (0: as many as the run has).

    Where the run split its validation images from its training data, val_samples stays: another
    number would be another draw, and nearly all of its images would be training images."""
    new = dataclasses.replace(cfg, **changes)
    if not count or is_split_by_run(cfg, new):
        return new
    return dataclasses.replace(new, val_samples=count)


def is_split_by_run(run_cfg: Config, cfg: Config) -> bool:
    """Whether the validation images of cfg are those that the run split from its training data."""
    is_own = place(cfg.data) == place(run_cfg.data)
    return is_own and not cfg.val and run_cfg.data != "scenes"


def check_split(run_cfg: Config, cfg: Config) -> None:
    """ConfigError if the caption field of cfg, or a label in its place, changes which validation
    images are split from the run's data: most of the new ones would be images it has trained on."""
    if not is_split_by_run(run_cfg, cfg) or cfg.caption_field == run_cfg.caption_field:
        return
    splits = []
    for field in (cfg.caption_field, run_cfg.caption_field):
        source = opening.open_validation_data(
            dataclasses.replace(run_cfg, caption_field=field, alt_field=""))
        splits.append([source.name(i) for i in range(len(source))])
    if splits[0] != splits[1]:
        raise ConfigError(f"the images of {run_cfg.data} that have {cfg.caption_field} are not "
                          f"those that have {run_cfg.caption_field}, so the run's own validation "
                          "images cannot be split off again: name validation images with --val")


def place(data: str) -> str:
    """--data in one spelling: photos/, ./photos and an absolute path are the same folder."""
    return data.rstrip("/") if "://" in data else os.path.realpath(data)

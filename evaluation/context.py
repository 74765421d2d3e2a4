"""TODO."""
import argparse
import dataclasses
import functools
import os
from typing import Any

import caption
from config import Config
from evaluation import labels
from evaluation.captioning import override_config
from interop import layouts, transfer
from interop.encoder import Encoder
from runtime import checkpoint
from runtime.errors import ConfigError


def open_encoder(path: str, resolution: int) -> tuple[Encoder, dict[str, Any]]:
    """The encoder of a run, a checkpoint, an .npz, or of what convert.py exported; and the settings of the run that it is from, if that is known."""
    if path.endswith((".safetensors", ".bin")) or (os.path.isdir(path) and any(n.endswith((".safetensors", ".bin")) for n in os.listdir(path))):
        params, cfg, found, _ = layouts.detect(transfer.load_arrays(path), 0)
        return Encoder(params, cfg, resolution or found), {}
    params, cfg, meta = checkpoint.read_encoder(path)
    return Encoder(params, dataclasses.replace(cfg, dtype="float32", remat="none"), resolution or meta["resolution"]), meta.get("config", {})


class EvalContext:
    """What a command line asks: encoder, decoder and pictures, each opened when it is first wanted, and once."""

    def __init__(self, given: argparse.Namespace):
        self.given = given
        self.changes = {name: getattr(given, name) for name in ("data", "val", "caption_field") if getattr(given, name) is not None}
        if "data" in self.changes:
            self.changes.setdefault("val", "")

    @functools.cached_property
    def opened(self) -> tuple[Encoder, dict]:
        return open_encoder(self.given.encoder, self.given.resolution)

    @property
    def encoder(self) -> Encoder:
        return self.opened[0]

    @functools.cached_property
    def own(self) -> Config:
        """The settings of the encoder's run, as far as they are known."""
        known = {f.name for f in dataclasses.fields(Config)}
        return Config(**{k: v for k, v in self.opened[1].items() if k in known})

    @functools.cached_property
    def captioner(self) -> Any:
        return caption.read_captioner(self.given.encoder)

    @functools.cached_property
    def pictures(self) -> tuple[labels.LabeledImages | None, labels.LabeledImages]:
        """Training pictures, if a probe is asked for, and held-out ones."""
        given, settings = self.given, override_config(self.own, self.changes, 0)
        if not (settings.data or settings.val):
            raise ConfigError(f"--data is missing: {given.encoder} does not say what it was trained on")
        trains, drawn = bool({"probe", "knn"} & set(given.measures)), (settings.val or settings.data) == "scenes"
        many = (1000 if settings.data == "scenes" else 2000) if trains else 200 if "zeroshot" in given.measures else 12
        count = 1 << 30 if given.classnames == "all" and not drawn else given.num_samples or many  # of what is drawn there is no end
        asked = given.label_fields or (() if trains or drawn else (settings.caption_field,))
        return labels.open_labeled_images(override_config(self.own, self.changes, count), asked, count, trains)

"""What a measure gets: the flags, and the encoder, captioner and images, opened when needed."""
import argparse
import dataclasses
import functools
import os
from typing import Any

import caption
from config import Config, from_dict
from evaluation import pair
from evaluation.labels import LabeledImages, open_labeled_images
from evaluation.run_data import override_config
from inputs.files import caption_weights
from interop import layouts, transfer
from interop.encoder import Encoder
from objectives.registry import CONTRASTIVE
from runtime import checkpoint
from runtime.errors import ConfigError


def open_encoder(path: str, resolution: int) -> tuple[Encoder, dict[str, Any]]:
    """(encoder, settings of its run) of a run's folder, a checkpoint, an .npz, or what convert.py
    exported. resolution 0: the last of training. The settings are {} where they are not known."""
    names = os.listdir(path) if os.path.isdir(path) else [path]
    if any(name.endswith(checkpoint.EXPORT_ENDINGS) for name in names):
        arrays, heads = transfer.load_arrays(path), transfer.heads_in_config(path)
        params, cfg, exported_resolution, _ = layouts.detect(arrays, heads)
        return Encoder(params, cfg, resolution or exported_resolution), {}
    params, cfg, meta = checkpoint.read_encoder(path)
    cfg = dataclasses.replace(cfg, dtype="float32", remat="none")
    return Encoder(params, cfg, resolution or meta["resolution"]), meta.get("config", {})


class EvalContext:
    """The flags `args` of evaluate.py and what they name."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.changes = {}  # settings of the run that flags replace
        for name in ("data", "val", "caption_field"):
            if getattr(args, name) is not None:
                self.changes[name] = getattr(args, name)
        if "data" in self.changes:
            self.changes.setdefault("val", "")

    @functools.cached_property
    def encoder_and_settings(self) -> tuple[Encoder, dict[str, Any]]:
        try:
            return open_encoder(self.args.encoder, self.args.resolution)
        except ValueError as problem:
            raise ConfigError(f"{self.args.encoder}: {problem}") from None

    @property
    def encoder(self) -> Encoder:
        return self.encoder_and_settings[0]

    @functools.cached_property
    def run_config(self) -> Config:
        """The settings of the encoder's run, as far as they are known."""
        try:
            return from_dict(self.encoder_and_settings[1])
        except TypeError as problem:
            raise ConfigError(f"{self.args.encoder}: {problem}") from None

    @functools.cached_property
    def captioner(self) -> caption.Captioner:
        return caption.read_captioner(self.args.encoder)

    @property
    def out_folder(self) -> str:
        """Where images are written: --out, or the folder of the run."""
        path = self.args.encoder
        run_folder = path if os.path.isdir(path) else os.path.dirname(path) or "."
        return self.args.out or run_folder

    @property
    def has_text_encoder(self) -> bool:
        return self.run_config.objective in CONTRASTIVE

    @functools.cached_property
    def pair(self) -> pair.Pair:
        trained = pair.read_pair(self.args.encoder)
        resolution = self.args.resolution or trained.resolution
        side = resolution // trained.model.encoder.patch_size
        if trained.model.num_patches not in (0, side * side):
            raise ConfigError(f"--resolution {resolution}: a run of --image-pool grid reads images "
                              f"of {trained.resolution} px alone: leave it out")
        return trained._replace(resolution=resolution)

    @functools.cached_property
    def data_config(self) -> Config:
        """The settings of the run with the data that the flags name."""
        cfg = override_config(self.run_config, self.changes, 0)
        if not (cfg.data or cfg.val):
            raise ConfigError(f"--data is missing: {self.args.encoder} does not name its training "
                              "data")
        return cfg

    @property
    def of_scenes(self) -> bool:
        return (self.data_config.val or self.data_config.data) == "scenes"

    @functools.cached_property
    def probe_images(self) -> tuple[LabeledImages | None, LabeledImages]:
        """(training, validation) images of probes and neighbors."""
        count = self.args.num_samples or (1000 if self.data_config.data == "scenes" else 2000)
        sized = override_config(self.run_config, self.changes, count)
        return open_labeled_images(sized, self.args.label_fields, count,
                                   run_cfg=self.run_config)

    def val_images(self, default_count: int) -> LabeledImages:
        """Validation images for measures that train nothing; all of them for --classnames all."""
        count, labels = self.args.num_samples or default_count, self.args.label_fields
        if not self.of_scenes:
            if self.args.classnames == "all":
                count = 1 << 30
            fields = ",".join(caption_weights(self.data_config.caption_field))  # without weights
            labels = labels or (fields,)
        sized = override_config(self.run_config, self.changes, count)
        return open_labeled_images(sized, labels, count, False, self.run_config)[1]

"""Caption loss and blind loss of a run, on its validation images or on other data.

A captioner lowers its loss a good way without the image, because captions are predictable. So the
validation loss stands beside the best possible loss without the image (the blind loss). For scenes
it is the exact entropy of the captions. For other data it is the lowest loss that the run has
reached with captions shuffled among the images. A model uses the image if its loss is clearly below
the blind loss.
"""
import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax

import data
from caption import load_run_checkpoint
from config import Config, validate
from evaluation.caption_metrics import caption_scores
from evaluation.run_data import check_split, override_config
from inputs import opening, tokenizer
from inputs.files import caption_weights
from inputs.sources import SceneSource
from objectives.registry import init_params, model_spec
from runtime import checkpoint
from runtime.curriculum import parse_stages
from runtime.devices import DataParallel
from runtime.errors import BadSample, CheckpointError, ConfigError
from runtime.validation import ValidationSet, caption_metrics


def open_validation(path: str, changes: dict[str, Any], count: int,
                    method_loss: Callable) -> tuple[ValidationSet, Any, Config, dict[str, Any]]:
    """(validation set, parameters, settings, meta) of a checkpoint, or of a run's last one.

    changes: settings that differ from the run's, such as other data. count: validation images at
    most (0: as in the run). method_loss: train.openvision2_loss. ConfigError if the run's
    validation data has changed."""
    run_cfg, arrays, meta = load_run_checkpoint(path)
    cfg = override_config(run_cfg, changes, count)
    validate(cfg)
    reached = [stage for stage in parse_stages(cfg.stages) if meta["step"] <= stage.end]
    stage = reached[0]
    # A contrastive loss depends on the batch. So the batch stays the run's, and fewer devices are
    # used where it cannot be divided by all.
    parallel = DataParallel(math.gcd(stage.batch, jax.local_device_count()))
    model = model_spec(cfg)
    target = jax.eval_shape(lambda: init_params(cfg, model))
    params = parallel.replicate(checkpoint.restore(arrays, target, path, prefix="params"))
    check_split(run_cfg, cfg)
    source = opening.open_validation_data(cfg)
    if not changes and cfg == run_cfg and source.fingerprint() != meta["data"]["validation data"]:
        raise ConfigError(f"the validation data is now {source.fingerprint()}, and was "
                          f"{meta['data']['validation data']}: name the data with --data and --val")
    try:
        vocabulary = tokenizer.from_state(meta["vocabulary"])
    except ValueError as problem:
        raise CheckpointError(f"{path}: {problem}") from None
    loader = data.Loader(source, vocabulary, cfg.max_text_len, cfg.seed, None, cfg.workers,
                         cfg.alt_field)
    sized = dataclasses.replace(cfg, val_samples=count or cfg.val_samples)
    val_set = ValidationSet(sized, loader, stage.resolution, stage.batch, model, parallel,
                            method_loss)
    return val_set, params, cfg, meta


def evaluate_captions(path: str, changes: dict[str, Any], count: int,
                      method_loss: Callable) -> dict[str, float]:
    """Losses and, for scenes, graded captions. Arguments as of `open_validation`. For other images
    than the run's, an unknown blind loss is their own shuffled loss."""
    val_set, params, _, meta = open_validation(path, changes, count, method_loss)
    metrics = val_set.losses(params)
    metrics["val_loss_blind"] = val_set.blind_loss()
    if metrics["val_loss_blind"] is None:
        same_images = not changes and not count
        shuffled = metrics["val_loss_shuffled"]
        best = meta["best_shuffled"] if same_images else None  # None before the first evaluation
        metrics["val_loss_blind"] = shuffled if best is None else best
    if isinstance(val_set.loader.source, SceneSource) and val_set.can_caption:
        metrics |= caption_metrics(val_set, params)
    return metrics


def compare_with_references(path: str, changes: dict[str, Any], count: int,
                            method_loss: Callable) -> dict[str, float]:
    """caption_metrics.caption_scores of greedy captions, with all captions of each image as its
    references. Arguments as of `open_validation`. CheckpointError if the run writes no captions."""
    val_set, params, cfg, _ = open_validation(path, changes, count, method_loss)
    if not val_set.can_caption:
        raise CheckpointError(f"{path} is a run of --objective {val_set.model.objective}, which "
                              "writes no captions")
    source, fields = val_set.loader.source, list(caption_weights(cfg.caption_field))
    captions, references = [], []
    for i, caption, _ in val_set.generate_captions(params):
        captions.append(caption)
        references.append(all_captions(source, i, fields))
    return caption_scores(captions, references)


def all_captions(source: Any, i: int, fields: Iterable[str]) -> list[str]:
    """Every caption of sample i: those of each field that it has, and of a list all texts."""
    texts: list[str] = []
    for field in fields:
        sizes = [1]

        def first(size: int) -> int:
            sizes.append(size)
            return 0
        with contextlib.suppress(BadSample):
            texts += source.sample(i, (field,), first)[0]
            for n in range(1, sizes[-1]):
                texts += source.sample(i, (field,), lambda size: n)[0]
    return texts

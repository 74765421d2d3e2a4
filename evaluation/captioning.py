"""TODO."""
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax

import data
from caption import load_run_checkpoint
from config import Config, validate
from inputs import sources, tokenizer
from objectives import registry
from objectives.registry import model_spec
from runtime import checkpoint
from runtime.curriculum import parse_stages
from runtime.devices import DataParallel
from runtime.errors import ConfigError
from runtime.validation import ValidationSet, caption_metrics


def override_config(cfg: Config, changes: dict[str, Any], count: int) -> Config:
    """The run's settings with changes, and `count` held-out pictures (0: as many as the run has). But what the run has held out of its
    training data stays that, whatever the count: another number would be another draw, nearly all of which the run was trained on."""
    new = dataclasses.replace(cfg, **changes)
    return new if not count or (not new.val and new.data == cfg.data != "scenes") else dataclasses.replace(new, val_samples=count)


def evaluate_captions(path: str, changes: dict[str, Any], count: int, method_loss: Callable) -> dict[str, float]:
    """Losses and grades of a run's last checkpoint, or of the one that is named, on its held-out pictures, or `count` of them; or, by changes
    of its settings, on others. Where no floor is known and they are not the run's very pictures, it is their own shuffled loss."""
    own, arrays, meta = load_run_checkpoint(path)
    cfg = override_config(own, changes, count)
    validate(cfg)
    stage = next(s for s in parse_stages(cfg.stages) if meta["step"] <= s.end)
    # The batch stays the run's, because a contrastive loss depends on it: where it cannot be divided by all devices, fewer are used.
    parallel, networks = DataParallel(math.gcd(stage.batch, jax.local_device_count())), model_spec(cfg)
    params = parallel.replicate(checkpoint.restore(arrays, jax.eval_shape(lambda: registry.init_params(cfg, networks)), path, prefix="params"))
    source = data.open_validation_data(cfg)
    if not changes and cfg == own and source.fingerprint() != meta["data"]["validation data"]:
        raise ConfigError(f"the validation data is now {source.fingerprint()}, and was {meta['data']['validation data']}: "
                          "name what to measure on with --data and --val")
    reader = data.Loader(source, tokenizer.from_state(meta["vocabulary"]), cfg.max_text_len, cfg.seed, None, cfg.workers, cfg.alt_field)
    held = ValidationSet(dataclasses.replace(cfg, val_samples=count or cfg.val_samples), reader, stage.resolution, stage.batch, networks, parallel,
                         method_loss)
    losses, blind = held.losses(params), held.blind_loss()
    floor = blind if blind is not None else losses["val_loss_shuffled"] if changes or count else meta["best_shuffled"]
    return losses | {"val_loss_blind": floor} | (caption_metrics(held, params) if isinstance(source, sources.SceneSource) and held.can_caption else {})

"""The CLIPA curriculum (paper section 2.1): stages of growing resolution, and their optimizers.

A stage starts from the parameters before it and a new optimizer state. The learning rate rises
linearly from 0 during the warm-up and falls to 0 along a cosine.
"""
import dataclasses
import math
from typing import Any

import jax
import optax

from runtime.errors import ConfigError

KEYS = ("resolution", "steps", "images", "batch", "lr", "warmup")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One part of the curriculum."""
    number: int       # from 1
    resolution: int   # pixels per side
    batch: int
    lr: float         # the peak
    steps: int
    warmup: int       # steps
    start: int        # steps of the run before this stage
    first_image: int  # images of the run before this stage

    @property
    def end(self) -> int:
        return self.start + self.steps


def parse_stages(text: str) -> tuple[Stage, ...]:
    """The stages in "resolution=R steps=S batch=B lr=L warmup=W, ...", where images=I may stand for
    steps; the warm-up then counts images too. ConfigError names what cannot be read."""
    stages: list[Stage] = []
    start = first_image = 0
    for part in text.split(","):
        numbers = parse_numbers(part)
        missing = [name for name in ("resolution", "batch", "lr") if name not in numbers]
        if "steps" in numbers and "images" in numbers:
            raise ConfigError(f"--stages: {part.strip()!r} has both steps and images: give one")
        if "steps" not in numbers and "images" not in numbers:
            missing.append("steps or images (one of the two)")
        if missing:
            raise ConfigError(f"--stages: {part.strip()!r} lacks {', '.join(missing)}")
        batch, warmup = numbers["batch"], numbers.get("warmup", 0)
        if "images" in numbers:  # as released, images that do not fill a batch are left out
            steps = max(1, numbers["images"] // batch)
            warmup = warmup // batch
        else:
            steps = numbers["steps"]
        if warmup >= steps:
            raise ConfigError(f"--stages: the warm-up of {part.strip()!r} must be shorter than the "
                              f"stage ({steps} steps)")
        stages.append(Stage(len(stages) + 1, numbers["resolution"], batch, numbers["lr"], steps,
                            warmup, start, first_image))
        start += steps
        first_image += steps * batch
    return tuple(stages)


def parse_numbers(text: str) -> dict:
    """{name: number} of one stage. ConfigError for a name that is unknown or given twice, and for
    a value that is no number."""
    numbers: dict = {}
    for word in text.split():
        name, _, value = word.partition("=")
        if name not in KEYS or name in numbers:
            raise ConfigError(f"--stages: {word!r} is not one of resolution=, steps=, images=, "
                              "batch=, lr=, warmup=, each once per stage")
        try:
            number = float(value)
            integer = int(number)
        except (ValueError, OverflowError):
            number = integer = -1
        if number < 0 or (name != "lr" and integer != number):
            kind = "number" if name == "lr" else "whole number"
            raise ConfigError(f"--stages: {word!r} wants a {kind} that is not negative")
        if number == 0 and name != "warmup":
            raise ConfigError(f"--stages: {word!r} must be above 0")
        numbers[name] = number if name == "lr" else integer
    return numbers


def lr_schedule(stage: Stage) -> optax.Schedule:
    """Linear from 0 over the warm-up, then a cosine to 0."""
    return optax.warmup_cosine_decay_schedule(0.0, stage.lr, stage.warmup, stage.steps)


def make_optimizer(cfg: Any, stage: Stage) -> optax.GradientTransformation:
    """AdamW (b1 0.9, as released) with the settings of a Config. Only matrices decay: not biases,
    norms, or the token embedding. With LiT the encoder and what is computed from its tokens are
    frozen, and have no state."""
    def is_matrix(params: dict) -> dict:
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)

    def is_trained(params: dict) -> dict:
        return {part: part not in ("encoder", "discriminant") for part in params}
    adamw = optax.adamw(lr_schedule(stage), b1=0.9, b2=cfg.adam_b2, mu_dtype=cfg.mu_dtype,
                        weight_decay=cfg.weight_decay, mask=is_matrix)
    # The updates of what is not trained are its gradients, which are 0.
    return optax.masked(adamw, is_trained) if cfg.objective == "lit" else adamw


def learning_rate(stage: Stage, step: int) -> float:
    """`lr_schedule` at a step of the stage (from 0), for the log. It is computed on the host: optax
    would run it on the device and wait for the training step before it."""
    if step < stage.warmup:
        return stage.lr * step / stage.warmup
    progress = min(1.0, (step - stage.warmup) / (stage.steps - stage.warmup))
    return stage.lr * (1 + math.cos(math.pi * progress)) / 2


# ------------------------------------------------------------------------------------- progress
def new_state() -> dict[str, Any]:
    """What a checkpoint holds beside its arrays, with the values of a new run."""
    return {"step": 0, "bad_samples": 0, "vocabulary": None,
            "seconds": 0.0,                             # of the run, pauses left out
            "train_seconds": 0.0, "train_images": 0,    # without compilation, for images per second
            "window": [],                               # losses since the last row of metrics.jsonl
            "evaluation_pending": False,                # the saved step is not yet evaluated
            "best_shuffled": None}                      # the lowest val_loss_shuffled so far

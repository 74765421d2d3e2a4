"""The CLIPA curriculum (paper section 2.1): stages of growing resolution, and their learning rates.

A stage starts from the parameters before it and a new optimizer state. The learning rate rises
linearly from 0 during the warm-up and falls to 0 along a cosine.
"""
import dataclasses
import math

import optax

from runtime.errors import ConfigError

WORDS = ("resolution", "steps", "images", "batch", "lr", "warmup")


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
        given = parse_words(part)
        missing = [name for name in ("resolution", "batch", "lr") if name not in given]
        if ("steps" in given) == ("images" in given):
            missing.append("steps or images (one of the two)")
        if missing:
            raise ConfigError(f"--stages: {part.strip()!r} lacks {', '.join(missing)}")
        steps, warmup = given.get("steps", given.get("images")), given.get("warmup", 0)
        if "images" in given:  # as released, images that do not fill a batch are left out
            steps = max(1, steps // given["batch"])
            warmup = warmup // given["batch"]
        if warmup >= steps:
            raise ConfigError(f"--stages: the warm-up of {part.strip()!r} is as long as the stage")
        stages.append(Stage(len(stages) + 1, given["resolution"], given["batch"], given["lr"],
                            steps, warmup, start, first_image))
        start += steps
        first_image += steps * given["batch"]
    return tuple(stages)


def parse_words(text: str) -> dict:
    """{name: number} of one stage. ConfigError for a word that is unknown, double or no number."""
    given: dict = {}
    for word in text.split():
        name, _, value = word.partition("=")
        if name not in WORDS or name in given:
            raise ConfigError(f"--stages: {word!r} is not one of resolution=, steps=, images=, "
                              "batch=, lr=, warmup=, each once per stage")
        try:
            number = float(value)
            integer = int(number)
        except (ValueError, OverflowError):
            number = integer = -1
        if not math.isfinite(number) or number < 0 or (name != "lr" and integer != number):
            kind = "number" if name == "lr" else "whole number"
            raise ConfigError(f"--stages: {word!r} wants a {kind} that is not negative")
        if number == 0 and name != "warmup":
            raise ConfigError(f"--stages: {word!r} must be above 0")
        given[name] = number if name == "lr" else integer
    return given


def lr_schedule(stage: Stage) -> optax.Schedule:
    """Linear from 0 over the warm-up, then a cosine to 0."""
    return optax.warmup_cosine_decay_schedule(0.0, stage.lr, stage.warmup, stage.steps)


def learning_rate(stage: Stage, step: int) -> float:
    """What `lr_schedule` gives for a step of the stage (from 0), for the log. It is computed on the
    host: optax would launch device operations behind the step under way and wait for them."""
    if step < stage.warmup:
        return stage.lr * step / stage.warmup
    progress = min(1.0, (step - stage.warmup) / (stage.steps - stage.warmup))
    return stage.lr * (1 + math.cos(math.pi * progress)) / 2

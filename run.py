"""A run's folder and its life: what is read, logged, measured, saved, continued and left at the end.

config.json  vocab.txt  metrics.jsonl  step-N.npz (the last two)  curve.png  and, at the end, samples.png, summary.json
and encoder.npz, the product. Training itself is in train.py; this file only watches it.
"""
import contextlib
import dataclasses
import json
import os
import signal
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

import checkpoint
import data
import decoder
import evaluate
import plots
import scenes
import sources
import tokenizer
import vit
from config import Config, ConfigError, Stage, models, stages
from devices import Place

FREE = ("out", "workers", "log_every", "eval_every", "save_every", "devices", "unroll", "remat", "loss_chunk", "accum")  # may differ in a continued run


class Stop(Exception):
    """Training cannot go on; the message says why."""


class Model(NamedTuple):
    """What a step needs to know of the two networks."""
    encoder: vit.ViTConfig
    decoder: decoder.DecoderConfig
    keep_ratio: float


class Interrupt:
    """SIGTERM and SIGINT ask for a save at the next step; a second signal ends the process at once."""

    def __enter__(self) -> "Interrupt":
        self.signal = 0
        self.before = {s: signal.signal(s, self.note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def note(self, number: int, frame: Any) -> None:
        self.signal = number
        for s in self.before:
            signal.signal(s, signal.SIG_DFL)

    def __exit__(self, *problem: Any) -> None:
        for s, handler in self.before.items():
            signal.signal(s, handler)


def open_data(cfg: Config) -> tuple[Any, Any]:
    """(training source, held-out source)."""
    if not cfg.data:
        raise ConfigError("--data is missing: give a folder of captioned images, tars, or scenes")
    source = sources.open_source(cfg.data, cfg.caption, cfg.seed, "train")
    if cfg.val or cfg.data == "scenes":
        return source, sources.draw(sources.open_source(cfg.val or "scenes", cfg.caption, cfg.seed, "val", cfg.val_count), cfg.val_count)
    return sources.hold_out(source, cfg.val_count)


def open_tokenizer(cfg: Config, source: Any) -> tokenizer.Tokenizer:
    """The one that --vocab names, or one built from the training captions (of 100,000 samples at most)."""
    if cfg.vocab:
        try:
            found = tokenizer.load(cfg.vocab)
        except (OSError, ValueError) as problem:
            raise ConfigError(f"--vocab: {problem}") from None
        if len(found) > cfg.vocab_size:
            raise ConfigError(f"--vocab-size {cfg.vocab_size} is less than the {len(found)} pieces of {cfg.vocab}")
        return found

    def captions() -> Iterator[str]:
        for i in range(min(len(source), 4000 if isinstance(source, sources.Scenes) else 100_000)):
            with contextlib.suppress(sources.BadSample):
                yield source.caption(i)
    try:
        return tokenizer.build(captions(), cfg.vocab_size)
    except ValueError as problem:
        raise ConfigError(str(problem)) from None


class Run:
    """One run in one folder, new or continued. `state` is what a checkpoint carries beside arrays."""

    def __init__(self, cfg: Config, place: Place, write: bool = True):
        """write=False looks at a run and leaves its folder as it is."""
        self.cfg, self.place, self.plan, self.write = cfg, place, stages(cfg), write and place.first
        if self.write:
            try:
                os.makedirs(cfg.out, exist_ok=True)
                checkpoint.write(self.path("probe"), lambda f: None)
                os.remove(self.path("probe"))
            except OSError as problem:
                raise ConfigError(f"--out {cfg.out} cannot be written to ({problem.strerror}): name a folder of yours") from None
        self.source, self.val_source = open_data(cfg)
        for name, s in (("training", self.source), ("held-out", self.val_source)):
            if not isinstance(s, sources.Scenes) and self.write:
                left_out = "; ".join(f"{n} {why}" for why, n in s.skipped.items() if name == "training" or cfg.val)
                print(f"{name}: {len(s):,} samples" + (f"; skipped: {left_out}" if left_out else ""))
        self.prints = {"training data": self.source.fingerprint(), "held-out data": self.val_source.fingerprint()}
        self.state = {"step": 0, "seconds": 0.0, "train_seconds": 0.0, "train_images": 0, "best_shuffled": None, "window": []}
        self.arrays = self.resume()
        self.begun = time.time() - self.state["seconds"]
        self.tok = tokenizer.Tokenizer(self.state["vocabulary"]) if self.arrays else open_tokenizer(cfg, self.source)
        self.model = Model(*models(cfg, cfg.vocab_size), cfg.keep_ratio)
        augment = data.Augment(cfg.crop, cfg.flip, cfg.jitter, cfg.gray)
        self.reader = data.Reader(self.source, self.tok, cfg.text_length, cfg.seed, augment, cfg.workers)
        self.val_reader = data.Reader(self.val_source, self.tok, cfg.text_length, cfg.seed, None, cfg.workers)
        if self.write:
            rows = [r for r in plots.read_metrics(self.path("metrics.jsonl")) if r["step"] <= self.step] if self.arrays else []
            checkpoint.write(self.path("metrics.jsonl"), lambda f: f.write("".join(json.dumps(r) + "\n" for r in rows).encode()))
            checkpoint.write(self.path("config.json"), lambda f: f.write(json.dumps(dataclasses.asdict(cfg), indent=1).encode()))
            self.tok.save(self.path("vocab.txt"))
        self.floor: float | None = None  # for scenes, the loss that can be had without looking
        self.shown: set[int] = set()

    @property
    def step(self) -> int:
        return self.state["step"]

    @property
    def finished(self) -> bool:
        return self.step == self.plan[-1].end and os.path.exists(self.path("summary.json"))

    def path(self, name: str) -> str:
        return os.path.join(self.cfg.out, name)

    def resume(self) -> dict[str, np.ndarray] | None:
        """The arrays of the last checkpoint, or None. ConfigError where the settings or the data are others."""
        found = checkpoint.latest(self.cfg.out)
        if found is None:
            return None
        _, arrays, meta = found
        now = dataclasses.asdict(self.cfg)
        differ = [f"--{k.replace('_', '-')} is {now.get(k)!r}, was {v!r}" for k, v in meta["config"].items() if k not in FREE and now.get(k) != v]
        differ += [f"the {k} is {self.prints[k]}, was {v}" for k, v in meta["data"].items() if self.prints[k] != v]
        if differ:
            raise ConfigError(f"{self.cfg.out} holds a run with other settings: {'; '.join(differ)}. Use its settings to continue it, or another --out")
        self.state = {k: v for k, v in meta.items() if k not in ("config", "data")}
        if self.write:
            print(f"continuing {self.cfg.out} from step {self.step} of {self.plan[-1].end}")
        return arrays

    def save(self, params: Any, opt_state: Any) -> None:
        if self.place.first:
            now = {"seconds": time.time() - self.begun, "config": dataclasses.asdict(self.cfg), "data": self.prints, "vocabulary": self.tok.pieces}
            checkpoint.save_step(self.cfg.out, self.step, self.place.get({"params": params, "opt": opt_state}), self.state | now)

    def log(self, **row: Any) -> None:
        if self.place.first:
            with open(self.path("metrics.jsonl"), "a", encoding="utf-8") as f:
                f.write(json.dumps(row | {"seconds": round(time.time() - self.begun, 1)}) + "\n")

    # --------------------------------------------------------------------------------------------------------- a stage
    def batches(self, stage: Stage) -> Iterator[Any]:
        """The stage's batches from the run's step on, on the devices."""
        def wanted() -> Iterator[tuple[range, int]]:
            for step in range(self.step, stage.end):
                first, share = stage.first_image + (step - stage.start) * stage.batch, self.place.share(stage.batch)
                yield range(first + share.start, first + share.stop), stage.resolution
        return self.reader.ahead(wanted(), self.place.put)

    def enter(self, stage: Stage) -> None:
        """Held-out pictures at the stage's resolution, its bar, and its clocks."""
        self.stage, self.begun_at = stage, self.step
        self.held = evaluate.HeldOut(self.cfg, self.val_reader, stage.resolution, stage.batch, self.model, self.place)
        self.floor = self.held.blind()
        self.bar = tqdm(total=stage.steps * stage.batch, initial=(self.step - stage.start) * stage.batch, unit=" images", unit_scale=True,
                        desc=f"stage {stage.number} of {len(self.plan)}, {stage.resolution} px", disable=not self.place.first, mininterval=0.5,
                        dynamic_ncols=True)
        self.clock, self.waited, self.shows = time.time(), 0.0, {}

    def note(self, step: int, loss: float, grad_norm: float, lr: float) -> None:
        """A finished step. Stop if it was not finite."""
        stage, cfg = self.stage, self.cfg
        if not np.isfinite(loss + grad_norm):
            raise Stop(f"the loss is no longer finite at step {step} (loss {loss}, gradient norm {grad_norm}): lower lr in --stages, or set --clip 1; "
                       f"what {cfg.out} has saved is from before")
        self.state["window"].append(loss)
        self.state["step"] = step
        self.bar.update(stage.batch)
        if step % cfg.log_every and step != stage.end:
            return
        for i in sorted(set(self.reader.bad) - self.shown)[:max(0, 10 - len(self.shown))]:
            self.bar.write(f"skipped: {self.source.name(i)}: {self.reader.bad[i]}")
            self.shown.add(i)
        window = self.state["window"]
        took, images, mean = time.time() - self.clock, len(window) * stage.batch, sum(window) / len(window)
        self.log(step=step, stage=stage.number, images=stage.first_image + (step - stage.start) * stage.batch, loss=mean, grad_norm=grad_norm, lr=lr,
                 images_per_second=images / took, data_wait=self.waited / took, bad_samples=len(self.reader.bad))
        if step - len(window) > self.begun_at:  # the first window of a stage compiles
            self.state["train_seconds"] += took
            self.state["train_images"] += images
        self.shows |= {"loss": f"{mean:.3f}"} | ({"bad": len(self.reader.bad)} if self.reader.bad else {})
        self.bar.set_postfix(self.shows)
        self.state["window"], self.clock, self.waited = [], time.time(), 0.0

    def measure(self, params: Any) -> None:
        """Held-out losses now, and the curve so far."""
        paused = time.time()
        losses = self.held.losses(params)
        if not np.isfinite(losses["val_loss"] + losses["shuffled_loss"]):
            raise Stop(f"the held-out loss is no longer finite at step {self.step}: lower lr in --stages, or set --clip 1")
        self.state["best_shuffled"] = min(losses["shuffled_loss"], self.state["best_shuffled"] or float("inf"))
        self.log(step=self.step, **losses, floor_loss=self.floor_loss)
        if self.place.first:
            plots.run_curve(self.cfg.out, self.floor_loss, {s.start: f"{s.resolution} px" for s in self.plan})
        self.shows["held-out"] = f"{losses['val_loss']:.3f}"
        self.bar.set_postfix(self.shows)
        self.clock += time.time() - paused

    @property
    def floor_loss(self) -> float:
        return self.floor if self.floor is not None else self.state["best_shuffled"]

    # ----------------------------------------------------------------------------------------------------------- the end
    def finish(self, params: Any) -> None:
        """What a run leaves: encoder, pictures and summary."""
        last, one = self.plan[-1], self.place.get(params)
        if self.place.first:
            checkpoint.save(self.path("encoder.npz"), one["encoder"], {"encoder": dataclasses.asdict(self.model.encoder),
                                                                       "resolution": last.resolution, "config": dataclasses.asdict(self.cfg)})
        losses, items = self.held.losses(params), []
        for i, said, chosen in self.held.write(params, 12):
            truth = self.tok.decode(self.tok.encode(self.val_source.caption(i), self.cfg.text_length))
            right = scenes.grade(said, self.val_source.record(i))["exact"][0] == 1 if isinstance(self.val_source, sources.Scenes) else truth == said
            items.append((data.to_pixels(self.val_source.picture(i), last.resolution), chosen, self.model.encoder.patch, truth, said, right))
        graded = evaluate.grades(self.held, params) if isinstance(self.val_source, sources.Scenes) else {}
        if not self.place.first:
            return
        plots.samples(self.path("samples.png"), items)
        summary = losses | {
            "floor_loss": self.floor_loss, "images_seen": last.first_image + last.steps * last.batch, "seconds": round(time.time() - self.begun, 1),
            "images_per_second": round(self.state["train_images"] / max(self.state["train_seconds"], 1e-9), 1),
            "parameters": sum(x.size for x in checkpoint.flatten(one).values()), "held_out_pictures": self.held.count,
            "bad_samples": len(self.reader.bad)} | graded
        checkpoint.write(self.path("summary.json"), lambda f: f.write(json.dumps(summary, indent=1).encode()))
        print(json.dumps(summary, indent=1))
        print(f"held-out loss {summary['val_loss']:.3f}; without the picture {summary['floor_loss']:.3f}")
        print(f"pictures: {self.path('samples.png')} and {self.path('curve.png')}; the encoder: {self.path('encoder.npz')}")

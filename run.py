"""A run's folder and its life: what is read, logged, measured, saved, continued and left at the end.

config.json  vocab.txt (or tokenizer.json)  metrics.jsonl  step-N.npz (the last two)  curve.png  bad-samples.txt (if there are any)
and, at the end, samples.png, summary.json and encoder.npz, the product. Training itself is in train.py; this file only watches it.
"""
import contextlib
import dataclasses
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

import baselines
import checkpoint
import data
import decoder
import evaluate
import plots
import sources
import tokenizer
import vit
import watch
from config import Config, ConfigError, Model, Stage, model, stages
from devices import Place
from lock import FolderLock, Locked

FREE = ("out", "workers", "log_every", "eval_every", "save_every", "keep_last", "milestone_every", "max_bad", "devices", "distributed", "unroll",
        "remat", "loss_chunk", "accum", "shard", "tensorboard", "profile")  # may differ in a continued run

# What checkpoint.write leaves of a save that was killed, by the names that a run writes. Other
# files are not a run's to delete.
LEFT_OVER = re.compile(r"(step-\d{8,}\.npz|encoder\.npz|metrics\.jsonl|bad-samples\.txt"
                       r"|config\.json|summary\.json)\.part")

# Masks draw from fold_in(key(seed), a sample's position), and positions are below this number. So no
# key serves both a mask and an initial parameter.
INIT_DOMAIN = 1 << 31


class Stop(Exception):
    """Training cannot go on; the message says why."""


def init(cfg: Config, model: Model) -> dict:
    """{"encoder": ..., "decoder": ...} (other parts for a baseline): the parameters that a run starts from."""
    key = jax.random.fold_in(jax.random.key(cfg.seed), INIT_DOMAIN)
    parts = {"encoder": vit.weights(model.encoder)} | baselines.weights(model)
    if cfg.init_scale == "released":
        for name, declared in parts.items():
            scales = vit.RELEASED if name == "encoder" else decoder.RELEASED
            parts[name] = vit.rescale(declared, scales)
    return {name: vit.initialise(jax.random.fold_in(key, n), declared) for n, (name, declared) in enumerate(parts.items())}


def open_data(cfg: Config) -> tuple[Any, Any]:
    """(training source, held-out source)."""
    if not cfg.data:
        raise ConfigError("--data is missing: give a folder of captioned images, tars, or scenes")
    if cfg.alt and cfg.data != "scenes" and cfg.caption == "txt":
        raise ConfigError(f"--alt {cfg.alt} is a field of the KEY.json, from which --caption must then come too: name its field")
    source = sources.open_source(cfg.data, cfg.caption, cfg.seed, "train")
    if cfg.val or cfg.data == "scenes":
        return source, sources.draw(sources.open_source(cfg.val or "scenes", cfg.caption, cfg.seed, "val", cfg.val_count), cfg.val_count)
    return sources.hold_out(source, cfg.val_count)


def open_held_out(cfg: Config) -> Any:
    """The held-out source; where it lies elsewhere, the training data need not be there, nor have the same captions."""
    return open_data(dataclasses.replace(cfg, data=cfg.val or cfg.data))[1]


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
                if cfg.alt:
                    yield source.caption(i, cfg.alt)
    try:
        return tokenizer.build(captions(), cfg.vocab_size)
    except ValueError as problem:
        raise ConfigError(str(problem)) from None


class Run:
    """One run in one folder, new or continued. `state` is what a checkpoint carries beside arrays."""

    def __init__(self, cfg: Config, place: Place, write: bool = True,
                 lock: FolderLock | None = None):
        """write=False looks at a run and leaves its folder as it is. The first process acquires
        `lock`, and the caller closes it."""
        self.lock = lock or FolderLock(cfg.out)
        self.cfg, self.place, self.plan, self.write = cfg, place, stages(cfg), write and place.first
        place.told(self.prepare)
        self.source, self.val_source = open_data(cfg)
        for name, s in (("training", self.source), ("held-out", self.val_source)):
            if not isinstance(s, sources.Scenes) and self.write:
                left_out = "; ".join(f"{n} {why}" for why, n in s.skipped.items() if name == "training" or cfg.val)
                print(f"{name}: {len(s):,} samples" + (f"; skipped: {left_out}" if left_out else ""))
        self.prints = {"training data": self.source.fingerprint(), "held-out data": self.val_source.fingerprint(),
                       "order of the training data": data.order_name(self.source)}
        for name, seen in place.told(lambda: self.prints).items():
            if seen != self.prints[name]:
                raise ConfigError(f"the {name} here is {self.prints[name]}, and in process 0 {seen}: all processes must find the same files")
        self.model, self.arrays = model(cfg), None
        self.state = {"step": 0, "seconds": 0.0, "train_seconds": 0.0, "train_images": 0, "best_shuffled": None, "window": [], "unmeasured": False,
                      "bad_samples": 0} | place.told(self.resume)
        self.begun = time.time() - self.state["seconds"]
        stored = self.state["vocabulary"] if self.step else place.told(lambda: open_tokenizer(cfg, self.source).stored)
        try:
            self.tok = tokenizer.restore(stored)
        except ValueError as problem:
            raise ConfigError(str(problem)) from None
        augment = data.Augment(cfg.crop, cfg.flip, cfg.jitter, cfg.hue, cfg.gray)
        self.reader = data.Reader(self.source, self.tok, cfg.text_length, cfg.seed, augment, cfg.workers, cfg.alt)
        self.val_reader = data.Reader(self.val_source, self.tok, cfg.text_length, cfg.seed, None, cfg.workers, cfg.alt)
        if self.write:
            os.makedirs(self.cfg.out, exist_ok=True)
            rows = [r for r in plots.read_metrics(self.path("metrics.jsonl")) if r["step"] <= self.step] if self.step else []
            if self.state["unmeasured"]:  # the evaluation at the checkpoint's step is made again
                rows = [r for r in rows if r["step"] < self.step or "val_loss" not in r]
            checkpoint.write(self.path("metrics.jsonl"), lambda f: f.write("".join(checkpoint.to_json(r) + "\n" for r in rows).encode()))
            if listed := self.listed():
                kept = "".join(line for line in listed if int(line.split("\t")[0]) <= self.step)
                checkpoint.write(self.path("bad-samples.txt"), lambda f: f.write(kept.encode()))
            checkpoint.write(self.path("config.json"), lambda f: f.write(checkpoint.to_json(dataclasses.asdict(cfg), indent=1).encode()))
            self.tok.save(self.path(self.tok.filename))
        self.profile = watch.Profile(self.path("profile") if self.write and cfg.profile else "")
        self.floor: float | None = None  # for scenes, the loss that can be had without looking
        self.shown, self.bar, self.drawn, self.board = 0, tqdm(disable=True), 0.0, None

    @property
    def step(self) -> int:
        return self.state["step"]

    @property
    def finished(self) -> bool:
        return self.place.told(lambda: self.step == self.plan[-1].end and os.path.exists(self.path("summary.json")))

    def path(self, name: str) -> str:
        return os.path.join(self.cfg.out, name)

    def prepare(self) -> None:
        """ConfigError unless the folder can be written to, and no other process does so."""
        if self.write:
            if self.cfg.tensorboard:
                watch.check_tensorboard()
            try:
                self.lock.acquire()
                for name in os.listdir(self.cfg.out):
                    if LEFT_OVER.fullmatch(name):
                        os.remove(self.path(name))
                with tempfile.TemporaryFile(dir=self.cfg.out) as f:  # new files are possible too
                    f.write(b"x")
            except Locked as problem:
                raise ConfigError(f"--out {problem}") from None
            except OSError as problem:
                raise ConfigError(f"--out {self.cfg.out} cannot be written to ({problem.strerror}): name a folder of yours") from None

    def resume(self) -> dict[str, Any]:
        """The state in the last checkpoint, whose arrays are then in `self.arrays`; or nothing. ConfigError where the settings or the
        data are others, CheckpointError where shapes are."""
        def fits(path: str, shapes: dict, meta: dict) -> None:
            now = dataclasses.asdict(self.cfg)
            # The checkpoint may be older than some options: its run had their defaults.
            before = dict(meta["config"])
            for name, default in dataclasses.asdict(Config()).items():
                before.setdefault(name, default)
            differ = [f"--{k.replace('_', '-')} is {now.get(k)!r}, was {v!r}"
                      for k, v in before.items() if k not in FREE and now.get(k) != v]
            data_before = {"order of the training data": data.former_order_name(self.source)} | meta["data"]
            differ += [f"the {k} is {self.prints[k]}, was {v}" for k, v in data_before.items() if self.prints[k] != v]
            if differ:
                raise ConfigError(f"{self.cfg.out} holds a run with other settings: {'; '.join(differ)}. "
                                  "Use its settings to continue it, or another --out")
            checkpoint.fit(shapes, jax.eval_shape(lambda: init(self.cfg, self.model)), path, under="params")
        found = checkpoint.latest(self.cfg.out, fits)
        if found is None:
            return {}
        _, self.arrays, meta = found
        if self.write:
            print(f"continuing {self.cfg.out} from step {meta['step']} of {self.plan[-1].end}")
        return {k: v for k, v in meta.items() if k not in ("config", "data")}

    def restore(self, like: Any, under: str) -> Any:
        """Parameters or optimizer state from the checkpoint, in every process: the first one reads."""
        return self.place.arrays(checkpoint.restore(self.arrays, like, self.cfg.out, under) if self.place.first else
                                 jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like))

    def save(self, tree: Any) -> None:
        if self.place.first:
            now = {"seconds": time.time() - self.begun, "config": dataclasses.asdict(self.cfg), "data": self.prints, "vocabulary": self.tok.stored}
            checkpoint.save_step(self.cfg.out, self.step, tree, self.state | now, self.cfg.keep_last, self.cfg.milestone_every)

    def log(self, **row: Any) -> None:
        if self.place.first:
            row["seconds"] = round(time.time() - self.begun, 1)
            with open(self.path("metrics.jsonl"), "a", encoding="utf-8") as f:
                f.write(checkpoint.to_json(row) + "\n")
            if self.board:
                self.board.row(row)

    def picture(self, name: str) -> None:
        """A picture of the run has been drawn."""
        if self.board:
            self.board.picture(self.path(name), self.step)

    def close(self) -> None:
        """However training ends."""
        self.bar.close()
        self.profile.close()
        if self.board:
            self.board.close()

    def listed(self) -> list[str]:
        """The lines of bad-samples.txt: step, sample, reason."""
        try:
            with open(self.path("bad-samples.txt"), encoding="utf-8") as f:
                return [line for line in f if re.match(r"\d+\t", line)]
        except FileNotFoundError:
            return []

    # --------------------------------------------------------------------------------------------------------- a stage
    def batches(self, stage: Stage) -> Iterator[Any]:
        """The stage's batches from the run's step on, on the devices."""
        def wanted() -> Iterator[tuple[range, int]]:
            for step in range(self.step, stage.end):
                first = stage.first_image + (step - stage.start) * stage.batch
                # every n-th row: so each process has lanes of tars to itself (data.Order)
                yield range(first + jax.process_index(), first + stage.batch, self.place.processes), stage.resolution
        return self.reader.ahead(wanted(), self.place.put)

    def enter(self, stage: Stage, check: Callable[[], None] = lambda: None) -> None:
        """Held-out pictures at the stage's resolution, its bar, and its clocks."""
        self.stage, self.begun_at = stage, self.step
        if self.write and self.cfg.tensorboard and not self.board:
            self.board = watch.Board(self.cfg.out, self.begun)
        self.held = evaluate.HeldOut(self.cfg, self.val_reader, stage.resolution, stage.batch, self.model, self.place, check)
        self.floor = self.held.blind()
        self.bar = tqdm(total=stage.steps * stage.batch, initial=(self.step - stage.start) * stage.batch, unit=" images", unit_scale=True,
                        desc=f"stage {stage.number} of {len(self.plan)}, {stage.resolution} px", disable=not self.place.first, mininterval=0.5,
                        dynamic_ncols=True, postfix="compiling")
        self.clock, self.waited, self.shows = time.time(), 0.0, {}

    def note(self, step: int, lr: float, metrics: dict[str, Any], votes: Any, bad: dict[int, str]) -> int:
        """A finished step, and the signal that any process has had. Stop if it was not finite, or if too much of the data is bad."""
        stage, cfg = self.stage, self.cfg
        loss, grad_norm, (stop, found) = *(float(self.place.get(metrics[k])) for k in ("loss", "grad_norm")), map(int, self.place.get(votes))
        if not np.isfinite(loss + grad_norm):
            raise Stop(f"the loss is no longer finite at step {step} (loss {loss}, gradient norm {grad_norm}): lower lr in --stages, or set --clip 1; "
                       f"what {cfg.out} has saved is from before")
        self.state["window"].append(loss)
        self.state["step"] = step
        self.bar.set_postfix(self.shows, refresh=False)
        self.bar.update(stage.batch)
        images = stage.first_image + (step - stage.start) * stage.batch
        if found:
            self.count(found, bad, images)
        if step % cfg.log_every and step != stage.end:
            return stop
        window = self.state["window"]
        took, rows, mean = time.time() - self.clock, len(window) * stage.batch, sum(window) / len(window)
        self.log(step=step, stage=stage.number, images=images, loss=mean, grad_norm=grad_norm, lr=lr, images_per_second=rows / took,
                 data_wait=self.waited / took, bad_samples=self.state["bad_samples"])
        if time.time() - self.drawn > 10:  # from the first line on there is a curve to watch
            self.draw()
        if step - len(window) > self.begun_at:  # the first window of a stage compiles
            self.state["train_seconds"] += took
            self.state["train_images"] += rows
        self.shows |= {"loss": f"{mean:.3f}"} | ({"bad": self.state["bad_samples"]} if self.state["bad_samples"] else {})
        self.state["window"], self.clock, self.waited = [], time.time(), 0.0
        return stop

    def count(self, found: int, bad: dict[int, str], images: int) -> None:
        """Lists what all processes found bad in the last step. Stop if that is too much of what has been read: of 1,000 samples at least, or
        of the whole set."""
        said = self.place.lines([f"{self.state['step']}\t{self.source.name(i)}\t{why}".replace("\n", " ") for i, why in bad.items()])
        self.state["bad_samples"] += found
        if self.place.first:
            with open(self.path("bad-samples.txt"), "a", encoding="utf-8") as f:
                f.write("".join(line + "\n" for line in said))
            for line in said[:max(0, 10 - self.shown)]:
                self.bar.write("skipped: " + ": ".join(line.split("\t")[1:]))
            self.shown += len(said)
        read = min(images, len(self.source))
        if self.state["bad_samples"] > self.cfg.max_bad * read and read >= min(1000, len(self.source)):
            raise Stop(f"{self.state['bad_samples']} of the first {read} samples are bad, more than --max-bad {self.cfg.max_bad} allows; "
                       f"{self.path('bad-samples.txt')} lists them with the reasons: mend the data, or allow more")

    def measure(self, params: Any) -> None:
        """Held-out losses now, and the curve so far."""
        paused = time.time()
        losses = self.held.losses(params)
        if not np.isfinite(losses["val_loss"] + losses["shuffled_loss"]):
            raise Stop(f"the held-out loss is no longer finite at step {self.step}: lower lr in --stages, or set --clip 1")
        self.state["best_shuffled"] = min(losses["shuffled_loss"], self.state["best_shuffled"] or float("inf"))
        self.state["unmeasured"] = False
        self.log(step=self.step, **losses, floor_loss=self.floor_loss)
        self.draw()
        self.picture("curve.png")
        self.shows["held-out"] = f"{losses['val_loss']:.3f}"
        self.bar.set_postfix(self.shows)
        self.clock += time.time() - paused

    def draw(self) -> None:
        """The curve so far."""
        if self.place.first:
            plots.run_curve(self.cfg.out, self.floor_loss, {s.start: f"{s.resolution} px" for s in self.plan})
        self.drawn = time.time()

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
        losses, items, tells = self.held.losses(params), [], self.held.tells
        for i, said, chosen in self.held.write(params, 12):
            truth = self.tok.decode(self.tok.encode(self.val_source.caption(i), self.cfg.text_length))
            grade = self.val_source.grade(said, i) if isinstance(self.val_source, sources.Scenes) else {}
            right = grade["exact"][0] == 1 if grade else truth == said
            items.append((data.to_pixels(self.val_source.picture(i), last.resolution), chosen, self.model.encoder.patch, truth, said if tells else None, right))
        graded = evaluate.grades(self.held, params) if isinstance(self.val_source, sources.Scenes) and tells else {}
        if not self.place.first:
            return
        plots.samples(self.path("samples.png"), items)
        self.picture("samples.png")
        summary = losses | {
            "floor_loss": self.floor_loss, "images_seen": last.first_image + last.steps * last.batch, "seconds": round(time.time() - self.begun, 1),
            "images_per_second": round(self.state["train_images"] / max(self.state["train_seconds"], 1e-9), 1),
            "parameters": sum(x.size for x in checkpoint.flatten(one).values()), "held_out_pictures": self.held.count,
            "bad_samples": self.state["bad_samples"]} | graded
        checkpoint.write(self.path("summary.json"), lambda f: f.write(checkpoint.to_json(summary, indent=1).encode()))
        print(checkpoint.to_json(summary, indent=1))
        print(f"held-out loss {summary['val_loss']:.3f}; without the picture {summary['floor_loss']:.3f}")
        print(f"pictures: {self.path('samples.png')} and {self.path('curve.png')}; the encoder: {self.path('encoder.npz')}")

"""One writer per run folder: a lock that the system releases when its process ends in any way.

The lock is flock(2) on the file `train.lock`, so a process that was killed leaves no lock behind,
only the file. Reading a folder needs no lock: evaluation works beside training. On NFS the lock
holds between hosts, as Linux mounts it. A file system that has no locks (Lustre without -o flock,
for example) gives a warning, and the run goes on without a lock.
"""
import dataclasses
import errno
import fcntl
import os
import re
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

import jax
import numpy as np
from tqdm import tqdm

import data
from config import RESUMABLE, Config
from data import open_data, open_tokenizer
from inputs import images, sources, tokenizer
from objectives.registry import init_params, model_spec
from runtime import checkpoint, monitoring, plots, validation
from runtime.curriculum import Stage, parse_stages
from runtime.devices import DataParallel
from runtime.errors import ConfigError, TrainingError

NAME = "train.lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class Locked(Exception):
    """Another process holds the folder; the message names it."""


class FolderLock:
    """The right to write to `folder`, from acquire() to close()."""

    def __init__(self, folder: str):
        self.folder, self.path = folder, os.path.join(folder, NAME)
        self.file, self.new = None, False

    def acquire(self) -> None:
        """Makes the folder if it is not there, and locks it. Locked if another process holds it,
        OSError where nothing can be written."""
        self.new = not os.path.exists(self.folder)
        os.makedirs(self.folder, exist_ok=True)
        while self.file is None:
            file = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644), "r+")
            try:
                self.lock(file)
                if self.stands(file):
                    self.file, file = file, None
            finally:
                if file:
                    file.close()
        self.file.truncate()
        self.file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self.file.flush()

    def lock(self, file: TextIO) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # some network file systems say EACCES
            holder = file.read(200).strip() or "another process"
            raise Locked(f"{self.folder} is in use by {holder}: wait until it ends, stop it, "
                         "or name another --workdir") from None
        except OSError as problem:
            if problem.errno not in NO_LOCKS:
                raise
            print(f"warning: {self.folder} cannot be locked, because its file system has no locks "
                  f"({problem.strerror}): make sure that no other process trains in it",
                  file=sys.stderr)

    def stands(self, file: TextIO) -> bool:
        """Whether the locked file still has the name: its former holder may have deleted it."""
        try:
            return os.path.samestat(os.fstat(file.fileno()), os.stat(self.path))
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """Deletes the file and gives the lock back. A folder that was made for the lock goes too,
        if there is nothing in it."""
        if self.file is None:
            return
        try:
            if self.stands(self.file):
                os.remove(self.path)
            if self.new and not os.listdir(self.folder):
                os.rmdir(self.folder)
        except OSError:
            pass  # somebody moved the folder, or made it read-only: closing the file still unlocks
        finally:
            self.file.close()
            self.file = None
# What checkpoint.write leaves of a save that was killed, by the names that a run writes. Other
# files are not a run's to delete.
LEFT_OVER = re.compile(r"(step-\d{8,}\.npz|encoder\.npz|metrics\.jsonl|bad-samples\.txt"
                       r"|config\.json|summary\.json)\.part")
class Run:
    """One run in one folder, new or continued. `state` is what a checkpoint carries beside arrays."""

    def __init__(self, cfg: Config, parallel: DataParallel, write: bool = True,
                 lock: FolderLock | None = None):
        """write=False looks at a run and leaves its folder as it is. The first process acquires
        `lock`, and the caller closes it."""
        self.lock = lock or FolderLock(cfg.workdir)
        self.cfg, self.parallel, self.plan, self.write = cfg, parallel, parse_stages(cfg.stages), write and parallel.is_main
        parallel.broadcast_from_main(self.prepare)
        self.source, self.val_source = open_data(cfg)
        for name, s in (("training", self.source), ("held-out", self.val_source)):
            if not isinstance(s, sources.SceneSource) and self.write:
                left_out = "; ".join(f"{n} {why}" for why, n in s.skipped.items() if name == "training" or cfg.val)
                print(f"{name}: {len(s):,} samples" + (f"; skipped: {left_out}" if left_out else ""))
        self.prints = {"training data": self.source.fingerprint(), "held-out data": self.val_source.fingerprint(),
                       "order of the training data": data.order_name(self.source)}
        for name, seen in parallel.broadcast_from_main(lambda: self.prints).items():
            if seen != self.prints[name]:
                raise ConfigError(f"the {name} here is {self.prints[name]}, and in process 0 {seen}: all processes must find the same files")
        self.model, self.arrays = model_spec(cfg), None
        self.state = {"step": 0, "seconds": 0.0, "train_seconds": 0.0, "train_images": 0, "best_shuffled": None, "window": [], "unmeasured": False,
                      "bad_samples": 0} | parallel.broadcast_from_main(self.resume)
        self.begun = time.time() - self.state["seconds"]
        stored = self.state["vocabulary"] if self.step else parallel.broadcast_from_main(lambda: open_tokenizer(cfg, self.source).state)
        try:
            self.tok = tokenizer.from_state(stored)
        except ValueError as problem:
            raise ConfigError(str(problem)) from None
        augment = images.Augment(cfg.min_crop_area, cfg.hflip, cfg.jitter, cfg.hue, cfg.grayscale_prob)
        self.reader = data.Loader(self.source, self.tok, cfg.max_text_len, cfg.seed, augment, cfg.workers, cfg.alt_field)
        self.val_reader = data.Loader(self.val_source, self.tok, cfg.max_text_len, cfg.seed, None, cfg.workers, cfg.alt_field)
        if self.write:
            os.makedirs(self.cfg.workdir, exist_ok=True)
            rows = [r for r in plots.read_metrics(self.path("metrics.jsonl")) if r["step"] <= self.step] if self.step else []
            if self.state["unmeasured"]:  # the evaluation at the checkpoint's step is made again
                rows = [r for r in rows if r["step"] < self.step or "val_loss" not in r]
            checkpoint.atomic_write(self.path("metrics.jsonl"), lambda f: f.write("".join(checkpoint.to_json(r) + "\n" for r in rows).encode()))
            if listed := self.listed():
                kept = "".join(line for line in listed if int(line.split("\t")[0]) <= self.step)
                checkpoint.atomic_write(self.path("bad-samples.txt"), lambda f: f.write(kept.encode()))
            checkpoint.atomic_write(self.path("config.json"), lambda f: f.write(checkpoint.to_json(dataclasses.asdict(cfg), indent=1).encode()))
            self.tok.save(self.path(self.tok.filename))
        self.profile = monitoring.Profile(self.path("profile") if self.write and cfg.profile else "")
        self.floor: float | None = None  # for scenes, the loss that can be had without looking
        self.shown, self.bar, self.drawn, self.board = 0, tqdm(disable=True), 0.0, None

    @property
    def step(self) -> int:
        return self.state["step"]

    @property
    def finished(self) -> bool:
        return self.parallel.broadcast_from_main(lambda: self.step == self.plan[-1].end and os.path.exists(self.path("summary.json")))

    def path(self, name: str) -> str:
        return os.path.join(self.cfg.workdir, name)

    def prepare(self) -> None:
        """ConfigError unless the folder can be written to, and no other process does so."""
        if self.write:
            if self.cfg.tensorboard:
                monitoring.check_tensorboard()
            try:
                self.lock.acquire()
                for name in os.listdir(self.cfg.workdir):
                    if LEFT_OVER.fullmatch(name):
                        os.remove(self.path(name))
                with tempfile.TemporaryFile(dir=self.cfg.workdir) as f:  # new files are possible too
                    f.write(b"x")
            except Locked as problem:
                raise ConfigError(f"--workdir {problem}") from None
            except OSError as problem:
                raise ConfigError(f"--workdir {self.cfg.workdir} cannot be written to ({problem.strerror}): name a folder of yours") from None

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
                      for k, v in before.items() if k not in RESUMABLE and now.get(k) != v]
            data_before = {"order of the training data": data.former_order_name(self.source)} | meta["data"]
            differ += [f"the {k} is {self.prints[k]}, was {v}" for k, v in data_before.items() if self.prints[k] != v]
            if differ:
                raise ConfigError(f"{self.cfg.workdir} holds a run with other settings: {'; '.join(differ)}. "
                                  "Use its settings to continue it, or another --workdir")
            checkpoint.check_shapes(shapes, jax.eval_shape(lambda: init_params(self.cfg, self.model)), path, prefix="params")
        found = checkpoint.latest(self.cfg.workdir, fits)
        if found is None:
            return {}
        _, self.arrays, meta = found
        if self.write:
            print(f"continuing {self.cfg.workdir} from step {meta['step']} of {self.plan[-1].end}")
        return {k: v for k, v in meta.items() if k not in ("config", "data")}

    def restore(self, like: Any, under: str) -> Any:
        """Parameters or optimizer state from the checkpoint, in every process: the first one reads."""
        return self.parallel.broadcast_arrays(checkpoint.restore(self.arrays, like, self.cfg.workdir, under) if self.parallel.is_main else
                                 jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like))

    def save(self, tree: Any) -> None:
        if self.parallel.is_main:
            now = {"seconds": time.time() - self.begun, "config": dataclasses.asdict(self.cfg), "data": self.prints, "vocabulary": self.tok.state}
            checkpoint.save_step(self.cfg.workdir, self.step, tree, self.state | now, self.cfg.keep_checkpoints, self.cfg.keep_every)

    def log(self, **row: Any) -> None:
        if self.parallel.is_main:
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
                yield range(first + jax.process_index(), first + stage.batch, self.parallel.num_processes), stage.resolution
        return self.reader.prefetch(wanted(), self.parallel.shard_batch)

    def enter(self, stage: Stage, check: Callable[[], None] = lambda: None) -> None:
        """Held-out pictures at the stage's resolution, its bar, and its clocks."""
        self.stage, self.begun_at = stage, self.step
        if self.write and self.cfg.tensorboard and not self.board:
            self.board = monitoring.Board(self.cfg.workdir, self.begun)
        self.held = validation.ValidationSet(self.cfg, self.val_reader, stage.resolution, stage.batch, self.model, self.parallel, check)
        self.floor = self.held.blind_loss()
        self.bar = tqdm(total=stage.steps * stage.batch, initial=(self.step - stage.start) * stage.batch, unit=" images", unit_scale=True,
                        desc=f"stage {stage.number} of {len(self.plan)}, {stage.resolution} px", disable=not self.parallel.is_main, mininterval=0.5,
                        dynamic_ncols=True, postfix="compiling")
        self.clock, self.waited, self.shows = time.time(), 0.0, {}

    def note(self, step: int, lr: float, metrics: dict[str, Any], votes: Any, bad: dict[int, str]) -> int:
        """A finished step, and the signal that any process has had. Stop if it was not finite, or if too much of the data is bad."""
        stage, cfg = self.stage, self.cfg
        loss, grad_norm, (stop, found) = *(float(self.parallel.unreplicate(metrics[k])) for k in ("loss", "grad_norm")), map(int, self.parallel.unreplicate(votes))
        if not np.isfinite(loss + grad_norm):
            raise TrainingError(f"the loss is no longer finite at step {step} (loss {loss}, gradient norm {grad_norm}): lower lr in --stages, or set --grad-clip 1; "
                       f"what {cfg.workdir} has saved is from before")
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
                 data_wait_fraction=self.waited / took, bad_samples=self.state["bad_samples"])
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
        said = self.parallel.gather_lines([f"{self.state['step']}\t{self.source.name(i)}\t{why}".replace("\n", " ") for i, why in bad.items()])
        self.state["bad_samples"] += found
        if self.parallel.is_main:
            with open(self.path("bad-samples.txt"), "a", encoding="utf-8") as f:
                f.write("".join(line + "\n" for line in said))
            for line in said[:max(0, 10 - self.shown)]:
                self.bar.write("skipped: " + ": ".join(line.split("\t")[1:]))
            self.shown += len(said)
        read = min(images, len(self.source))
        if self.state["bad_samples"] > self.cfg.max_bad_fraction * read and read >= min(1000, len(self.source)):
            raise TrainingError(f"{self.state['bad_samples']} of the first {read} samples are bad, more than --max-bad-fraction {self.cfg.max_bad_fraction} allows; "
                       f"{self.path('bad-samples.txt')} lists them with the reasons: mend the data, or allow more")

    def measure(self, params: Any) -> None:
        """Held-out losses now, and the curve so far."""
        paused = time.time()
        losses = self.held.losses(params)
        if not np.isfinite(losses["val_loss"] + losses["val_loss_shuffled"]):
            raise TrainingError(f"the held-out loss is no longer finite at step {self.step}: lower lr in --stages, or set --grad-clip 1")
        self.state["best_shuffled"] = min(losses["val_loss_shuffled"], self.state["best_shuffled"] or float("inf"))
        self.state["unmeasured"] = False
        self.log(step=self.step, **losses, val_loss_blind=self.val_loss_blind)
        self.draw()
        self.picture("curve.png")
        self.shows["held-out"] = f"{losses['val_loss']:.3f}"
        self.bar.set_postfix(self.shows)
        self.clock += time.time() - paused

    def draw(self) -> None:
        """The curve so far."""
        if self.parallel.is_main:
            plots.run_curve(self.cfg.workdir, self.val_loss_blind, {s.start: f"{s.resolution} px" for s in self.plan})
        self.drawn = time.time()

    @property
    def val_loss_blind(self) -> float:
        return self.floor if self.floor is not None else self.state["best_shuffled"]

    # ----------------------------------------------------------------------------------------------------------- the end
    def finish(self, params: Any) -> None:
        """What a run leaves: encoder, pictures and summary."""
        last, one = self.plan[-1], self.parallel.unreplicate(params)
        if self.parallel.is_main:
            checkpoint.save(self.path("encoder.npz"), one["encoder"], {"encoder": dataclasses.asdict(self.model.encoder),
                                                                       "resolution": last.resolution, "config": dataclasses.asdict(self.cfg)})
        losses, items, tells = self.held.losses(params), [], self.held.can_caption
        for i, said, chosen in self.held.generate_captions(params, 12):
            truth = self.tok.decode(self.tok.encode(self.val_source.caption(i), self.cfg.max_text_len))
            grade = self.val_source.grade(said, i) if isinstance(self.val_source, sources.SceneSource) else {}
            right = grade["exact"][0] == 1 if grade else truth == said
            items.append((images.decode_and_augment(self.val_source.image(i), last.resolution), chosen, self.model.encoder.patch_size, truth, said if tells else None, right))
        graded = validation.caption_metrics(self.held, params) if isinstance(self.val_source, sources.SceneSource) and tells else {}
        if not self.parallel.is_main:
            return
        plots.samples(self.path("samples.png"), items)
        self.picture("samples.png")
        summary = losses | {
            "val_loss_blind": self.val_loss_blind, "images_seen": last.first_image + last.steps * last.batch, "seconds": round(time.time() - self.begun, 1),
            "images_per_second": round(self.state["train_images"] / max(self.state["train_seconds"], 1e-9), 1),
            "parameters": sum(x.size for x in checkpoint.flatten(one).values()), "held_out_pictures": self.held.count,
            "bad_samples": self.state["bad_samples"]} | graded
        checkpoint.atomic_write(self.path("summary.json"), lambda f: f.write(checkpoint.to_json(summary, indent=1).encode()))
        print(checkpoint.to_json(summary, indent=1))
        print(f"held-out loss {summary['val_loss']:.3f}; without the picture {summary['val_loss_blind']:.3f}")
        print(f"pictures: {self.path('samples.png')} and {self.path('curve.png')}; the encoder: {self.path('encoder.npz')}")

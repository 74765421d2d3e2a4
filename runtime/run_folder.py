"""A run's folder: lock, checkpoints, metrics.jsonl, config.json, vocabulary and bad-samples.txt.

Only the first process (`parallel.is_main`) reads and writes the folder, and sends the others what
they need. A run that is started again on its folder continues from its newest checkpoint.

The lock is flock(2) on the file `train.lock`. The system releases it when the process ends in any
way. Reading needs no lock. On NFS, other hosts see the lock if Linux mounts it as usual. On a file
system without locks (Lustre without -o flock) the run continues with a warning.
"""
import contextlib
import dataclasses
import errno
import fcntl
import importlib
import os
import re
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any, TextIO

import jax
import numpy as np

import data
from config import FIELDS, RESUMABLE, Config, flag, from_dict
from inputs import images, opening, order, sources, tokenizer
from objectives.registry import init_params, model_spec
from runtime import checkpoint, plots
from runtime.curriculum import Stage, new_state, parse_stages
from runtime.devices import DataParallel
from runtime.errors import CheckpointError, ConfigError

LOCK_NAME = "train.lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
# What a killed checkpoint.atomic_write leaves. The next start deletes it.
LEFT_OVER = re.compile(r"(step-\d{8,}\.npz|encoder\.npz|metrics\.jsonl|bad-samples\.txt"
                       r"|(config|summary|samples|environment)\.json|report\.html)\.part")


# ---------------------------------------------------------------------------------- the lock
class Locked(ConfigError):
    """Another process writes to the folder; the message names it."""


class FolderLock:
    """The right to write to `folder`, from acquire() to close()."""

    flag = "--workdir"  # the one that names the folder

    def __init__(self, folder: str):
        self.folder, self.path = folder, os.path.join(folder, LOCK_NAME)
        self.workdir = folder  # as the user names it
        self.file: TextIO | None = None
        self.made_folder = False

    def acquire(self) -> None:
        """Creates the folder if it is missing, and locks it. Raises Locked if another process holds
        the lock, OSError if nothing can be written."""
        self.made_folder = not os.path.exists(self.folder)
        os.makedirs(self.folder, exist_ok=True)
        while self.file is None:
            file = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644), "r+")
            try:
                self.lock(file)
                if self.has_name(file):
                    self.file = file
            finally:
                if self.file is None:
                    file.close()
        self.file.truncate()
        self.file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self.file.flush()

    def lock(self, file: TextIO) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # some network file systems say EACCES
            holder = file.read(200).strip() or "another process"
            raise Locked(f"--workdir {self.folder} is in use by {holder}: wait until it ends, stop "
                         "it, or name another --workdir") from None
        except OSError as problem:
            if problem.errno not in NO_LOCKS:
                raise
            print(f"warning: {self.folder} cannot be locked, because its file system has no locks "
                  f"({problem.strerror}): make sure that no other process trains in it",
                  file=sys.stderr)

    def has_name(self, file: TextIO) -> bool:
        """Whether the file is still at the lock's path: its former holder may have deleted it."""
        try:
            return os.path.samestat(os.fstat(file.fileno()), os.stat(self.path))
        except FileNotFoundError:
            return False

    def sync(self, urgent: bool = True) -> None:
        """Nothing to do on this machine; see remote_folder.RemoteFolder."""

    def close(self) -> None:
        """Unlocks. Deletes the file, and the folder if acquire() created it and it is empty."""
        if self.file is None:
            return
        try:
            if self.has_name(self.file):
                os.remove(self.path)
            if self.made_folder and not os.listdir(self.folder):
                os.rmdir(self.folder)
        except OSError:
            pass  # the folder was moved or made read-only: closing the file still unlocks
        finally:
            self.file.close()
            self.file = None


@contextlib.contextmanager
def open_folder(cfg: Config) -> Iterator[tuple[Config, FolderLock]]:
    """(settings, lock) of a run. Of a --workdir in a bucket, the settings have its local copy."""
    lock = FolderLock(cfg.workdir)
    if "://" in cfg.workdir:  # by name, because the extra may be missing
        cfg, lock = importlib.import_module("runtime.remote_folder").open_remote_folder(cfg)
    with contextlib.closing(lock):
        yield cfg, lock


# ----------------------------------------------------------------------------------- the run
class Run:
    """A run in its folder, new or continued: settings, data, and `state` (curriculum.new_state)."""

    def __init__(self, cfg: Config, parallel: DataParallel, lock: FolderLock | None = None):
        """The first process acquires `lock`, and the caller closes it. ConfigError where the folder
        holds another run, or processes see different data; CheckpointError for damaged files."""
        self.cfg, self.parallel, self.lock = cfg, parallel, lock or FolderLock(cfg.workdir)
        self.stages, self.model = parse_stages(cfg.stages), model_spec(cfg)
        parallel.broadcast_from_main(self.prepare_folder)
        self.source, self.val_source = opening.open_data(cfg)
        self.report_skipped_samples()
        self.fingerprints = {"training data": self.source.fingerprint(),
                             "validation data": self.val_source.fingerprint(),
                             "order of the training data": order.order_name(self.source)}
        for name, fingerprint in parallel.broadcast_from_main(lambda: self.fingerprints).items():
            if fingerprint != self.fingerprints[name]:
                raise ConfigError(f"the {name} here is {self.fingerprints[name]}, and in process 0 "
                                  f"{fingerprint}: all processes must read the same files")
        self.arrays: dict[str, np.ndarray] = {}   # of the checkpoint, until on the devices
        self.state = new_state() | parallel.broadcast_from_main(self.load_checkpoint)
        self.start_time = time.monotonic() - self.state["seconds"]  # as if it had never paused
        self.tokenizer = self.open_tokenizer()
        augment = images.Augment(*[getattr(cfg, name) for name in images.Augment._fields])
        self.loader = self.make_loader(self.source, augment)
        self.val_loader = self.make_loader(self.val_source, None)
        if parallel.is_main:
            self.write_folder()

    @property
    def step(self) -> int:
        return self.state["step"]

    @property
    def finished(self) -> bool:
        return self.parallel.broadcast_from_main(
            lambda: self.step == self.stages[-1].end and os.path.exists(self.path("summary.json")))

    def path(self, name: str) -> str:
        return os.path.join(self.cfg.workdir, name)

    def elapsed(self) -> float:  # seconds of the run, without pauses
        return time.monotonic() - self.start_time

    def prepare_folder(self) -> None:
        """ConfigError unless the folder can be written to, and no other process writes to it."""
        if not self.parallel.is_main:
            return
        folder = self.cfg.workdir
        try:
            self.lock.acquire()
            for name in filter(LEFT_OVER.fullmatch, os.listdir(folder)):
                os.remove(self.path(name))
            with tempfile.TemporaryFile(dir=folder) as file:  # also a new file must be possible
                file.write(b"x")
        except OSError as problem:
            raise ConfigError(f"{self.lock.flag} {folder} cannot be written to ({problem.strerror})"
                              ": name a folder that you can write to") from None
        for name in ("summary.json", "encoder.npz"):
            if os.path.exists(self.path(name)) and not checkpoint.steps(folder):
                raise ConfigError(f"--workdir {self.lock.workdir} has {name} and no checkpoint: "
                                  "name another folder, or delete this one to train again")

    # ---- data
    def report_skipped_samples(self) -> None:
        for name, source in (("training", self.source), ("validation", self.val_source)):
            if isinstance(source, sources.SceneSource) or not self.parallel.is_main:
                continue
            line = f"{name}: {len(source):,} samples"
            if source.skipped and (name == "training" or self.cfg.val):
                line += f"; skipped: {sources.skipped_samples(source)}"
            print(line)

    def open_tokenizer(self) -> Any:
        if self.state["vocabulary"] is None:
            self.state["vocabulary"] = self.parallel.broadcast_from_main(
                lambda: opening.open_tokenizer(self.cfg, self.source).state)
        try:
            return tokenizer.from_state(self.state["vocabulary"])
        except ValueError as problem:
            raise ConfigError(str(problem)) from None

    def make_loader(self, source: Any, augment: images.Augment | None) -> data.Loader:
        cfg, kind, workers = self.cfg, data.Loader, self.cfg.workers
        if augment and cfg.worker_processes:  # by name, because few runs need them
            kind = importlib.import_module("runtime.worker_processes").ProcessLoader
            workers = cfg.worker_processes
        return kind(source, self.tokenizer, cfg.max_text_len, cfg.seed, augment, workers,
                    cfg.alt_field, cfg.caption_field)

    def batches(self, stage: Stage) -> Iterator[tuple[dict, dict[int, str]]]:
        """(batch on the devices, its bad samples) for each remaining step of the stage."""
        def requests() -> Iterator[tuple[range, int]]:
            for step in range(self.step, stage.end):
                first = stage.first_image + (step - stage.start) * stage.batch
                # Every n-th position, so that each process has its own lanes (LaneShuffle).
                positions = range(first + jax.process_index(), first + stage.batch,
                                  self.parallel.num_processes)
                yield positions, stage.resolution
        return self.loader.prefetch_batches(requests(), self.parallel.shard_batch)

    # ---- checkpoints
    def load_checkpoint(self) -> dict[str, Any]:
        """The state in the newest checkpoint, whose arrays are then in `self.arrays`; {} for a new
        run. ConfigError if settings or data differ, CheckpointError if shapes differ."""
        newest = checkpoint.latest(self.cfg.workdir, self.check_resumable, self.lock.workdir)
        if newest is None:
            return {}
        _, self.arrays, meta = newest
        return {name: meta[name] for name in new_state() if name in meta}

    def check_resumable(self, path: str, shapes: dict, meta: dict) -> None:
        try:
            saved = from_dict(meta["config"])
        except (TypeError, LookupError):
            raise CheckpointError(f"{path} is no checkpoint of a run of this version") from None
        differences = []
        for name in FIELDS:
            before, now = getattr(saved, name), getattr(self.cfg, name)
            if name not in RESUMABLE and before != now:
                differences.append(f"{flag(name)} is {now!r}, was {before!r}")
        data_before = {"order of the training data": order.former_order_name(self.source)}
        for name, before in (data_before | meta["data"]).items():
            if self.fingerprints[name] != before:
                differences.append(f"the {name} is {self.fingerprints[name]}, was {before}")
        if differences:
            raise ConfigError(f"{self.lock.workdir} holds a run with other settings: "
                              f"{'; '.join(differences)}. Use its settings to continue it, or "
                              "another --workdir")
        target = jax.eval_shape(lambda: init_params(self.cfg, self.model))
        checkpoint.check_shapes(shapes, target, path, "params")

    def restore(self, target: Any, prefix: str) -> Any:
        """The checkpoint's parameters or optimizer state, in every process; the first one reads."""
        if self.parallel.is_main:
            tree = checkpoint.restore(self.arrays, target, self.cfg.workdir, prefix)
        else:
            tree = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), target)
        return self.parallel.broadcast_arrays(tree)

    def save(self, tree: Any) -> None:
        """step-N.npz, with settings, data and the encoder's sizes in its metadata."""
        if not self.parallel.is_main:
            return
        stage = next(stage for stage in self.stages if self.step <= stage.end)
        meta = self.state | {
            "seconds": self.elapsed(), "config": dataclasses.asdict(self.cfg),
            "data": self.fingerprints, "encoder": dataclasses.asdict(self.model.encoder),
            "resolution": stage.resolution}
        checkpoint.save_step(self.cfg.workdir, self.step, tree, meta, self.cfg.keep_checkpoints,
                             self.cfg.keep_every)
        self.lock.sync()

    # ---- other files
    def write_folder(self) -> None:
        """Writes the files of each start. Removes lines that are newer than the checkpoint."""
        path = self.path("metrics.jsonl")
        rows = plots.read_metrics(path) if self.step and os.path.exists(path) else []
        kept_rows = [checkpoint.to_json(row) + "\n" for row in rows if self.is_final(row)]
        checkpoint.write_text(path, "".join(kept_rows))
        if lines := plots.read_bad_samples(self.path("bad-samples.txt")):
            kept_lines = [line for line in lines if int(line.split("\t")[0]) <= self.step]
            checkpoint.write_text(self.path("bad-samples.txt"), "".join(kept_lines))
        settings = checkpoint.to_json(dataclasses.asdict(self.cfg), indent=1)
        checkpoint.write_text(self.path("config.json"), settings)
        self.tokenizer.save(self.path(self.tokenizer.filename))

    def is_final(self, row: dict[str, Any]) -> bool:
        """Whether to keep a row: the run, continued, does not write it again."""
        if row["step"] == self.step and self.state["evaluation_pending"]:
            return "val_loss" not in row
        return row["step"] <= self.step

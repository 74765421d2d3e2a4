"""A run's folder in a bucket: `--workdir gs://bucket/runs/l14` (extra `remote`).

The run works in a folder on the local disk, as every run does. That folder is a copy: at the start
it is filled from the bucket, and after each save what is new goes to the bucket. Metrics and images
go first, then the checkpoint, summary.json last. An object appears complete or not at all. So a
checkpoint in the bucket has its metrics beside it, and a kill at any moment leaves the one before.

Only the first process reads and writes. It holds the right to write by an object `train.lock`, to
which it writes a new number every BEAT_SECONDS. A lock whose number stays the same is a dead one.
"""
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import re
import socket
import threading
import time
import uuid
from typing import Any

from config import Config
from inputs import remote
from inputs.disk_cache import default_folder
from runtime import checkpoint
from runtime.errors import CheckpointError, ConfigError, DataError
from runtime.run_folder import LEFT_OVER, LOCK_NAME, FolderLock, Locked

BEAT_SECONDS = 20
DEAD_SECONDS = 70        # without a new number
SYNC_SECONDS = 60        # at least, between uploads of metrics and images alone
BYTES_PER_SECOND = 1e6   # an upload that is slower fails
CHECKPOINT = re.compile(r"step-(\d+)\.npz")
KEPT_LOCAL = (LOCK_NAME, "profile")  # never uploaded
ATOMIC = ("gs", "gcs", "s3", "memory")  # an object is there when it is complete


def open_remote_folder(cfg: Config) -> tuple[Config, "RemoteFolder"]:
    """The settings with the local folder as --workdir, and the lock of both."""
    url = cfg.workdir.rstrip("/")
    if remote.is_http(url):
        raise ConfigError(f"--workdir {url}: a web server stores nothing: name a bucket")
    name = hashlib.sha1(url.encode()).hexdigest()[:16]
    local = os.path.join(cfg.cache_dir or default_folder(), "runs", name)
    return dataclasses.replace(cfg, workdir=local), RemoteFolder(url, local, cfg)


class RemoteFolder(FolderLock):
    """The right to write to a folder in a bucket and to its local copy."""
    flag = "--cache-dir: the local copy"

    def __init__(self, url: str, local: str, cfg: Config):
        super().__init__(local)
        self.workdir = self.url = url
        self.keep, self.keep_every = cfg.keep_checkpoints, cfg.keep_every
        self.protocol = remote.scheme(url)
        self.known: dict[str, tuple[int, int]] = {}  # in the bucket: size and time of the copy
        self.last_sync, self.filled = float("-inf"), False
        self.process_ids = process_ids()
        self.owner = self.process_ids | {"pid": os.getpid(), "id": uuid.uuid4().hex}
        self.stop, self.beat = threading.Event(), threading.Thread()

    # ---- requests
    def call(self, name: str, *args: Any, seconds: float = remote.REQUEST_SECONDS) -> Any:
        attempt = functools.partial(remote.call, self.protocol, name, *args, seconds=seconds)
        return remote.with_retries(self.url, attempt, "used as --workdir")

    def names(self) -> list[str]:
        """The objects in the folder, without those in folders below it."""
        paths = self.call("find", self.url)
        top = self.url.partition("://")[2]
        return sorted(os.path.basename(path) for path in paths
                      if os.path.dirname(path).endswith(top))

    def upload(self, name: str) -> None:
        path, target = os.path.join(self.folder, name), f"{self.url}/{name}"
        stat = os.stat(path)
        seconds = remote.REQUEST_SECONDS + stat.st_size / BYTES_PER_SECOND
        part = target if self.protocol in ATOMIC else f"{target}.part"
        self.call("put_file", path, part, seconds=seconds)
        if part != target:
            self.call("mv", part, target)
        self.known[name] = stat.st_size, stat.st_mtime_ns

    def download(self, name: str) -> None:
        path = os.path.join(self.folder, name)
        url = f"{self.url}/{name}"
        info = remote.file_info(url)
        with open(path, "wb") as file:
            for start in range(0, info.size, remote.PIECE_BYTES):
                file.write(remote.fetch(url, start, start + remote.PIECE_BYTES, info))
        stat = os.stat(path)
        self.known[name] = stat.st_size, stat.st_mtime_ns

    # ---- the lock in the bucket
    def read_owner(self) -> dict[str, Any]:
        """What the lock says; {} without one."""
        try:
            return json.loads(remote.call(self.protocol, "cat_file", f"{self.url}/{LOCK_NAME}"))
        except FileNotFoundError:
            return {}
        except ValueError:
            return {"host": "an unknown host"}

    def write_owner(self) -> None:
        content = json.dumps(self.owner | {"time": time.time()}).encode()
        self.call("pipe_file", f"{self.url}/{LOCK_NAME}", content)

    def acquire(self) -> None:
        """Locks both folders and fills the local one. Locked if another process writes there."""
        super().acquire()
        read = functools.partial(remote.with_retries, self.url, self.read_owner,
                                 "used as --workdir")
        owner, waited = read(), 0
        if owner and not self.is_dead(owner):
            print(f"{self.url} is locked by process {owner.get('pid')} on {owner.get('host')}: "
                  f"waiting {DEAD_SECONDS} seconds for a sign of life", flush=True)
        while owner and not self.is_dead(owner) and waited < DEAD_SECONDS:
            time.sleep(min(5, DEAD_SECONDS))
            waited += 5
            now = read()
            if now and now != owner:
                raise Locked(f"--workdir {self.url} is in use by process {now.get('pid')} on "
                             f"{now.get('host')}: wait until it ends, stop it, or name another "
                             "--workdir")
            owner = now
        if self.protocol not in ATOMIC:
            self.call("makedirs", self.url, True)
        self.write_owner()
        self.stop.clear()
        self.beat = threading.Thread(target=self.keep_beating, daemon=True)
        self.beat.start()
        self.fill()

    def is_dead(self, owner: dict[str, Any]) -> bool:
        """Whether the lock is that of a process of this machine that has ended."""
        if any(owner.get(name) != value for name, value in self.process_ids.items()):
            return False
        try:
            os.kill(int(owner["pid"]), 0)
        except (ProcessLookupError, ValueError, KeyError):
            return True
        except PermissionError:
            return False
        return int(owner["pid"]) == os.getpid()

    def keep_beating(self) -> None:
        while not self.stop.wait(BEAT_SECONDS):
            with contextlib.suppress(Exception):  # the next upload reports what stays wrong
                if self.read_owner().get("id") == self.owner["id"]:
                    self.write_owner()

    # ---- copies
    def fill(self) -> None:
        """Replaces the local copy by what is in the bucket: of checkpoints, the newest, and older
        ones until one is sound."""
        names = [name for name in self.names() if name != LOCK_NAME]
        checkpoints = [name for name in names if CHECKPOINT.fullmatch(name)]
        newest, older = checkpoints[-self.keep:], checkpoints[:-self.keep]
        self.remove_local_files(max([step_of(name) for name in checkpoints], default=0))
        for name in names:
            if LEFT_OVER.fullmatch(name):
                self.call("rm_file", f"{self.url}/{name}")
            elif name not in older:
                self.download(name)
            elif not self.keep_every or step_of(name) % self.keep_every:
                self.known[name] = 0, 0  # left by a kill: the next upload deletes it
        while older and not any(self.is_sound(name) for name in reversed(newest)):
            newest = [older.pop()]
            self.download(newest[0])
        self.filled = True
        print(f"{self.url}: its local copy is {self.folder}", flush=True)

    def is_sound(self, name: str) -> bool:
        """Whether the copy of a checkpoint can be read to its end."""
        try:
            checkpoint.load(os.path.join(self.folder, name))
        except CheckpointError:
            return False
        return True

    def remove_local_files(self, uploaded_step: int) -> None:
        """Removes the local copy. A checkpoint of a later step than the bucket has, which could not
        be uploaded, is moved beside the folder."""
        for name in os.listdir(self.folder):
            path = os.path.join(self.folder, name)
            if name in KEPT_LOCAL or not os.path.isfile(path):
                continue
            if CHECKPOINT.fullmatch(name) and step_of(name) > uploaded_step:
                os.makedirs(f"{self.folder}-not-uploaded", exist_ok=True)
                moved = os.path.join(f"{self.folder}-not-uploaded", name)
                os.replace(path, moved)
                print(f"{moved} is later than what {self.url} has: to continue from it, upload it "
                      "there first", flush=True)
            else:
                os.remove(path)

    def sync(self, urgent: bool = True) -> None:
        """Brings the bucket up to date. ConfigError if another process has taken the folder."""
        is_early = not urgent and time.monotonic() - self.last_sync < SYNC_SECONDS
        if self.file is None or not self.filled or is_early:
            return
        owner = remote.with_retries(self.url, self.read_owner, "used as --workdir")
        if owner.get("id") != self.owner["id"]:
            raise ConfigError(f"--workdir {self.url} was taken over by another process, on "
                              f"{owner.get('host', 'an unknown host')}: this one ends")
        local = {}
        for name in os.listdir(self.folder):
            path = os.path.join(self.folder, name)
            if name not in KEPT_LOCAL and not name.endswith(".part") and os.path.isfile(path):
                stat = os.stat(path)
                local[name] = stat.st_size, stat.st_mtime_ns
        for name in sorted(local, key=upload_order):
            if self.known.get(name) != local[name]:
                self.upload(name)
        for name in self.known.keys() - local.keys():
            self.call("rm_file", f"{self.url}/{name}")
            del self.known[name]
        self.last_sync = time.monotonic()

    def close(self) -> None:
        """Uploads what is left, and unlocks."""
        if self.file is None:
            return
        try:
            if self.beat.is_alive():  # else it was never acquired
                with contextlib.suppress(ConfigError, DataError):  # the error before matters more
                    self.sync()
                self.stop.set()
                self.beat.join()
                with contextlib.suppress(Exception):
                    if self.read_owner().get("id") == self.owner["id"]:
                        remote.call(self.protocol, "rm_file", f"{self.url}/{LOCK_NAME}")
        finally:
            super().close()


def process_ids() -> dict[str, Any]:
    """Where a process id means one process. Containers may share the host's name, or its kernel."""
    ids: dict[str, Any] = {"host": socket.gethostname()}
    with contextlib.suppress(OSError):  # elsewhere than on Linux
        ids["pid_namespace"] = os.stat("/proc/self/ns/pid").st_ino
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            ids["boot"] = file.read().strip()
    return ids


def step_of(name: str) -> int:
    """The step of a checkpoint's file."""
    return int(CHECKPOINT.fullmatch(name)[1])


def upload_order(name: str) -> tuple[int, str]:
    """Checkpoints after what belongs to them; the file that says that a run is finished last."""
    if CHECKPOINT.fullmatch(name):
        return 1, name
    return (2 if name == "summary.json" else 0), name

"""One writer per run folder: a lock that the system releases when its process ends in any way.

The lock is flock(2) on the file `train.lock`, so a process that was killed leaves no lock behind,
only the file. Reading a folder needs no lock: evaluation works beside training. On NFS the lock
holds between hosts, as Linux mounts it. A file system that has no locks (Lustre without -o flock,
for example) gives a warning, and the run goes on without a lock.
"""
import errno
import fcntl
import os
import socket
import sys
from typing import TextIO

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
                         "or name another --out") from None
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

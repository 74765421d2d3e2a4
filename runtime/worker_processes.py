"""Worker processes (--worker-processes) decode, augment and tokenize in place of threads.

Threads of one Python process share its interpreter lock (GIL), which decoding holds for 35 to 45%
of its time. So any number of threads makes as many samples as two or three cores. A ProcessLoader
has as many threads as processes. Each thread reads the samples of a task, sends them to its own
worker through a pipe, and receives the arrays. The batches are those of a Loader, bit for bit.

A worker is a new program, because a fork of a process that runs JAX may hang. It imports no JAX. It
ends when its input does, so in any case when the training process has ended. SIGTERM and Ctrl-C are
blocked in it: the training process receives them, and needs the workers until it has saved.
"""
import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from data import Loader
from inputs import tokenizer
from inputs.images import silence_pillow
from runtime.errors import BadSample, DataError, DistributedError, UserError

PIPE_BROKEN = (EOFError, pickle.UnpicklingError, BrokenPipeError)  # the other process has ended
SIGNALS = (signal.SIGTERM, signal.SIGINT)


# ------------------------------------------------------------------- in the training process
class ProcessLoader(Loader):
    """A Loader with `workers` processes, which start when a batch first needs them."""

    def __init__(self, *args: Any, **options: Any):
        """args, options: those of data.Loader."""
        super().__init__(*args, **options)
        self.local = threading.local()  # .process: the worker of each thread
        self.processes: list[subprocess.Popen] = []
        weakref.finalize(self, end_workers, self.processes)

    def run_task(self, task: list[tuple[int, int]], resolution: int) -> list[tuple]:
        samples: list = [None] * len(task)
        missing = {n: self.candidates(first) for n, (_, first) in enumerate(task)}
        while missing:
            requests = [self.read_next(task[n][0], search) for n, search in missing.items()]
            replies = self.ask(requests, resolution)
            for n, (_, i, *_), reply in zip(list(missing), requests, replies):
                if isinstance(reply, DataError):
                    raise reply
                if isinstance(reply, BadSample):
                    self.bad[i] = str(reply)
                else:
                    samples[n] = *reply, i
                    self.any_good = True
                    del missing[n]
        return samples

    def read_next(self, position: int, search: Iterator[int]) -> tuple:
        """(position, i, captions, image) of the next sample that can be read."""
        for i in search:
            try:
                return position, i, *self.read(position, i)
            except BadSample as problem:
                self.bad[i] = str(problem)

    def ask(self, requests: list[tuple], resolution: int) -> list[tuple | UserError]:
        """What this thread's worker makes of (position, i, captions, image): pixels and texts, or
        its BadSample or DataError. DistributedError if the worker has ended."""
        try:
            process = self.process()
            pickle.dump((requests, resolution), process.stdin, pickle.HIGHEST_PROTOCOL)
            process.stdin.flush()
            return pickle.load(process.stdout)
        except PIPE_BROKEN:
            status = self.local.process.wait()
        ending = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
        raise DistributedError(
            f"a worker process ended {ending}: if memory ran out, lower --worker-processes; the "
            "same command continues from the last checkpoint")

    def process(self) -> subprocess.Popen:
        if not hasattr(self.local, "process"):
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # a program inherits this
            code = [sys.executable, "-P", "-m", "runtime.worker_processes"]
            env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path),
                                "OPENBLAS_NUM_THREADS": "1"}  # else NumPy starts one per core
            self.local.process = subprocess.Popen(code, env=env, stdin=subprocess.PIPE,
                                                  stdout=subprocess.PIPE)
            self.processes.append(self.local.process)
            settings = self.tokenizer.state, self.max_text_len, self.seed, self.augment
            pickle.dump(settings, self.local.process.stdin)
        return self.local.process


def end_workers(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        for pipe in (process.stdout, process.stdin):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        process.wait()


# -------------------------------------------------------------------------------- in a worker
def answer(loader: Loader, request: tuple, resolution: int) -> tuple | UserError:
    try:
        return loader.prepare(*request, resolution)
    except (BadSample, DataError) as problem:
        return problem


def main() -> None:
    silence_pillow()
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not come between the replies
    with contextlib.suppress(*PIPE_BROKEN):
        state, *settings = pickle.load(requests)
        loader = Loader(SimpleNamespace(starts=None), tokenizer.from_state(state), *settings, 1)
        while True:
            task, resolution = pickle.load(requests)
            made = [answer(loader, request, resolution) for request in task]
            pickle.dump(made, replies, pickle.HIGHEST_PROTOCOL)
            replies.flush()
    os._exit(0)  # without a complaint about replies that nobody reads


if __name__ == "__main__":
    main()

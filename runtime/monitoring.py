"""Watching a run from outside: its numbers and pictures in TensorBoard, and a profile of a few training steps.

Neither changes what is computed. The numbers are those of metrics.jsonl, which stays the one record: event files are written
anew from it whenever a run goes on, so that no point is there twice, and a run that began without them has them whole.

    python train.py --tensorboard        then: tensorboard --logdir runs
    python train.py --profile            then: open runs/toy/profile/plugins/profile/*/perfetto_trace.json.gz in ui.perfetto.dev
"""
import glob
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from inputs.images import open_image
from runtime.errors import ConfigError
from runtime.plots import read_metrics

FIRST, LAST = 10, 14  # of a start's steps, the first of which compiles


def check_tensorboard() -> None:
    """ConfigError where the extra is missing."""
    if importlib.util.find_spec("tensorboardX") is None:
        raise ConfigError("--tensorboard needs the package tensorboardX: pip install -e '.[tensorboard]', or leave it out (curve.png has the same numbers)")


class Board:
    """The event files of a run, in its folder. Tags are the names in metrics.jsonl, and of the pictures; "seconds" is each point's time."""

    def __init__(self, folder: str, begun: float):
        """begun: when the run would have begun had it never paused, in seconds since 1970."""
        from tensorboardX import SummaryWriter
        for old in glob.glob(os.path.join(glob.escape(folder), "events.out.tfevents.*")):
            os.remove(old)
        self.begun = begun
        self.writer = SummaryWriter(folder, purge_step=0)  # a TensorBoard that is looking drops what it has read of the old files
        for row in read_metrics(os.path.join(folder, "metrics.jsonl")):
            self.row(row)

    def row(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if name not in ("step", "seconds"):
                self.writer.add_scalar(name, value, row["step"], self.begun + row["seconds"])

    def picture(self, path: str, step: int) -> None:
        """A .png that the run has just drawn."""
        name = os.path.splitext(os.path.basename(path))[0]
        with open(path, "rb") as file:
            pixels = np.asarray(open_image(file).convert("RGB"))
        self.writer.add_image(name, pixels, step, dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()
class Profile:
    """Calls training steps, and traces those from the FIRST to the LAST of this start. The programs in the trace name each operation's
    concept (encoder, keep, decoder, loss, optimizer). A CPU's timeline has the operations' own names alone."""

    def __init__(self, folder: str):
        """folder: where traces go; "" for none."""
        self.folder, self.calls, self.tracing = folder, 0, False

    def __call__(self, number: int, step: Callable[..., Any], *args: Any) -> Any:
        """step(*args), which is the run's step `number`."""
        self.calls += 1
        if self.folder and self.calls == FIRST:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # its thousands of events an interpreted line would hide the few that matter
            jax.profiler.start_trace(self.folder, create_perfetto_trace=True, profiler_options=options)
            self.tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            found = step(*args)
        if self.tracing and self.calls == LAST:
            jax.block_until_ready(found)
            self.close()
        return found

    def close(self) -> None:
        """Writes the trace that is being taken: also where a run ends before its LAST step."""
        if self.tracing:
            self.tracing = False
            jax.profiler.stop_trace()
            tqdm.write(f"profile: {self.folder} (perfetto_trace.json.gz in it for ui.perfetto.dev, the folder itself for TensorBoard with xprof)")
        elif self.folder and self.calls < FIRST:
            tqdm.write(f"profile: none, for this start made fewer than {FIRST} steps")

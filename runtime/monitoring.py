"""What a run reports while it trains: metrics.jsonl, environment.json, bar, plots, TensorBoard,
profile.

None of it changes what is computed. metrics.jsonl is the record. TensorBoard's event files are
written anew from it whenever a run continues, so no point is in them twice.

    python train.py --tensorboard        then: tensorboard --logdir runs
    python train.py --profile            then open in ui.perfetto.dev:
                                         runs/toy/profile/plugins/profile/*/perfetto_trace.json.gz
"""
import glob
import importlib.metadata
import importlib.util
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from inputs.images import open_image
from runtime import checkpoint, plots
from runtime.curriculum import Stage
from runtime.errors import ConfigError, TrainingError

FIRST_TRACED, LAST_TRACED = 10, 14  # steps of a start; the first ones compile
PLOT_SECONDS = 10                   # at least, between two drawings of curve.png
MAX_SHOWN_BAD_SAMPLES = 10
MIN_JUDGED_SAMPLES = 1000           # before --max-bad-fraction is applied


class PendingStep(NamedTuple):
    """A training step that was started. metrics and status are still being computed on the device:
    to read them is to wait for the step."""
    step: int
    lr: float
    metrics: dict[str, Any]     # "loss" and "grad_norm"
    status: Any                 # of all processes: largest signal number, number of bad samples
    bad: dict[int, str]         # this process's bad samples: index, reason


class Monitor:
    """The reports of a run (run_folder.Run)."""

    def __init__(self, run: Any):
        self.run, cfg = run, run.cfg
        traced = cfg.profile and run.parallel.is_main
        self.profiler = StepProfiler(run.path("profile") if traced else "")
        if run.parallel.is_main:
            text = checkpoint.to_json(environment(), indent=1)
            checkpoint.write_text(run.path("environment.json"), text)
        self.tensorboard = None
        if cfg.tensorboard and run.parallel.is_main:
            self.tensorboard = TensorBoardWriter(cfg.workdir, time.time() - run.elapsed())
        self.bar = tqdm(disable=True)
        self.blind_loss: float | None = None  # the best possible loss without the image, if known
        self.last_plot = float("-inf")
        self.num_shown_bad = 0

    @property
    def val_loss_blind(self) -> float:
        """The blind loss; where it is not known, the best loss so far with shuffled images."""
        return self.run.state["best_shuffled"] if self.blind_loss is None else self.blind_loss

    def start_stage(self, stage: Stage) -> None:
        run = self.run
        self.stage, self.first_step = stage, run.step
        self.bar = tqdm(
            total=stage.steps * stage.batch, initial=(run.step - stage.start) * stage.batch,
            desc=f"stage {stage.number} of {len(run.stages)}, {stage.resolution} px",
            unit=" images", unit_scale=True, mininterval=0.5, dynamic_ncols=True,
            postfix="compiling", disable=not run.parallel.is_main)
        self.postfix: dict[str, Any] = {}
        self.start_window()

    def start_window(self) -> None:
        """A window is the steps between two lines of metrics.jsonl."""
        self.window_start = time.monotonic()
        self.window_step = self.run.step  # the losses of a continued run's window begin before it
        self.data_wait = 0.0  # seconds in which the loop waited for a batch

    def finish_step(self, pending: PendingStep) -> int:
        """Waits for a step and logs it. Returns the signal that any process received, 0 for none.
        TrainingError if the loss is not finite, or if too many samples are bad."""
        run, stage, step = self.run, self.stage, pending.step
        loss = float(run.parallel.unreplicate(pending.metrics["loss"]))
        grad_norm = float(run.parallel.unreplicate(pending.metrics["grad_norm"]))
        signal, num_bad = (int(x) for x in run.parallel.unreplicate(pending.status))
        if not np.isfinite(loss + grad_norm):
            raise TrainingError(
                f"the loss is no longer finite at step {step} (loss {loss}, gradient norm "
                f"{grad_norm}): lower lr in --stages, or set --grad-clip 1; what {run.cfg.workdir} "
                "has saved is from before")
        run.state["step"] = step
        run.state["window"].append(loss)
        self.bar.set_postfix(self.postfix, refresh=False)
        self.bar.update(stage.batch)
        images = stage.first_image + (step - stage.start) * stage.batch
        if num_bad:
            self.log_bad_samples(num_bad, pending.bad)
        if run.state["bad_samples"]:
            self.check_bad_fraction(images)
        if step % run.cfg.log_every == 0 or step == stage.end:
            self.log_window(pending, images, grad_norm)
        return signal

    def log_window(self, pending: PendingStep, images: int, grad_norm: float) -> None:
        """A line of metrics.jsonl: the mean loss since the line before."""
        state, window = self.run.state, self.run.state["window"]
        seconds = time.monotonic() - self.window_start
        num_images = (pending.step - self.window_step) * self.stage.batch
        loss = sum(window) / len(window)
        self.log(step=pending.step, stage=self.stage.number, images=images, loss=loss,
                 grad_norm=grad_norm, lr=pending.lr, images_per_second=num_images / seconds,
                 data_wait_fraction=self.data_wait / seconds, bad_samples=state["bad_samples"])
        if time.monotonic() - self.last_plot > PLOT_SECONDS:
            self.plot()
        if pending.step - len(window) > self.first_step:  # the first window of a stage compiles
            state["train_seconds"] += seconds
            state["train_images"] += num_images
        self.postfix["loss"] = f"{loss:.3f}"
        if state["bad_samples"]:
            self.postfix["bad"] = state["bad_samples"]
        state["window"] = []
        self.start_window()

    def log_bad_samples(self, num_bad: int, bad: dict[int, str]) -> None:
        """Lists the bad samples that all processes met in the last step."""
        run, state = self.run, self.run.state
        lines = [f"{state['step']}\t{run.source.name(i)}\t{why}" for i, why in bad.items()]
        lines = run.parallel.gather_lines([line.replace("\n", " ") for line in lines])
        state["bad_samples"] += num_bad
        if run.parallel.is_main:
            with open(run.path("bad-samples.txt"), "a", encoding="utf-8") as file:
                file.writelines(line + "\n" for line in lines)
            for line in lines[:max(0, MAX_SHOWN_BAD_SAMPLES - self.num_shown_bad)]:
                self.bar.write("skipped: " + ": ".join(line.split("\t")[1:]))
            self.num_shown_bad += len(lines)

    def check_bad_fraction(self, images: int) -> None:
        """TrainingError if more than --max-bad-fraction of the samples read are bad."""
        run, num_bad = self.run, self.run.state["bad_samples"]
        num_read = min(images, len(run.source))
        judged = num_read >= min(MIN_JUDGED_SAMPLES, len(run.source))
        if judged and num_bad > run.cfg.max_bad_fraction * num_read:
            raise TrainingError(
                f"{num_bad} of the first {num_read} samples are bad, more than "
                f"--max-bad-fraction {run.cfg.max_bad_fraction} allows; "
                f"{run.path('bad-samples.txt')} lists them with the reasons: repair the data, or "
                "allow more")

    def log(self, **row: Any) -> None:
        """Appends a row to metrics.jsonl."""
        if not self.run.parallel.is_main:
            return
        row["seconds"] = round(self.run.elapsed(), 1)
        with open(self.run.path("metrics.jsonl"), "a", encoding="utf-8") as file:
            file.write(checkpoint.to_json(row) + "\n")
        if self.tensorboard:
            self.tensorboard.add_row(row)

    def plot(self) -> None:
        """Draws curve.png."""
        if self.run.parallel.is_main:
            stage_starts = {stage.start: f"{stage.resolution} px" for stage in self.run.stages}
            plots.draw_curve(self.run.cfg.workdir, self.val_loss_blind, stage_starts)
            self.run.lock.sync(urgent=False)
        self.last_plot = time.monotonic()

    def add_image(self, name: str) -> None:
        """Shows an image of the folder in TensorBoard too."""
        if self.tensorboard:
            self.tensorboard.add_image(self.run.path(name), self.run.step)

    def close(self) -> None:
        """However training ends."""
        self.bar.close()
        self.profiler.close()
        if self.tensorboard:
            self.tensorboard.close()


# ---------------------------------------------------------------------------- environment
def environment() -> dict[str, Any]:
    """The machine and the versions of this start of a run, for the report."""
    device = jax.local_devices()[0]
    versions = {name: importlib.metadata.version(name)
                for name in ("jax", "jaxlib", "numpy", "optax", "pillow")}
    return {"started": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
            "system": platform.platform(), "CPU cores": os.cpu_count(),
            "device": f"{device.platform}: {device.device_kind}", "devices": jax.device_count(),
            "processes": jax.process_count(), "python": platform.python_version()} | versions


def peak_memory_gib() -> float:
    """The most memory that was in use: of the first device, or of this process on a CPU."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


# ---------------------------------------------------------------------------- TensorBoard
def check_tensorboard() -> None:
    """ConfigError where the extra is missing."""
    if importlib.util.find_spec("tensorboardX") is None:
        raise ConfigError("--tensorboard needs the package tensorboardX: pip install -e "
                          "'.[tensorboard]', or leave it out (curve.png has the same numbers)")


class TensorBoardWriter:
    """The event files of a run, in its folder. Tags are the names in metrics.jsonl, and those of
    the images; "seconds" is each point's time."""

    def __init__(self, folder: str, start_time: float):
        """start_time: of the run, as if it had never paused, in seconds since 1970."""
        from tensorboardX import SummaryWriter
        for old in glob.glob(os.path.join(glob.escape(folder), "events.out.tfevents.*")):
            os.remove(old)
        self.start_time = start_time
        # purge_step: a TensorBoard that is open drops what it has read of the old files.
        self.writer = SummaryWriter(folder, purge_step=0)
        for row in plots.read_metrics(os.path.join(folder, "metrics.jsonl")):
            self.add_row(row)

    def add_row(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if name not in ("step", "seconds"):
                self.writer.add_scalar(name, value, row["step"], self.start_time + row["seconds"])

    def add_image(self, path: str, step: int) -> None:
        """A .png that was just drawn."""
        name = os.path.splitext(os.path.basename(path))[0]
        with open(path, "rb") as file:
            pixels = np.asarray(open_image(file).convert("RGB"))
        self.writer.add_image(name, pixels, step, dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


# -------------------------------------------------------------------------------- profiling
class StepProfiler:
    """Runs training steps, and traces those from FIRST_TRACED to LAST_TRACED of this start. The
    trace names each operation's concept (encoder, keep, decoder, loss, optimizer). A CPU's timeline
    has only the operations' own names."""

    def __init__(self, folder: str):
        """folder: where traces go; "" for none."""
        self.folder, self.num_calls, self.tracing = folder, 0, False

    def run_step(self, step_number: int, step: Callable[..., Any], *args: Any) -> Any:
        """step(*args), which is step `step_number` of the run."""
        self.num_calls += 1
        if self.folder and self.num_calls == FIRST_TRACED:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # it adds thousands of events per Python line
            jax.profiler.start_trace(self.folder, create_perfetto_trace=True,
                                     profiler_options=options)
            self.tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step_number):
            outputs = step(*args)
        if self.tracing and self.num_calls == LAST_TRACED:
            jax.block_until_ready(outputs)
            self.close()
        return outputs

    def close(self) -> None:
        """Writes the trace under way, also where a run ends before its last traced step."""
        if self.tracing:
            self.tracing = False
            jax.profiler.stop_trace()
            tqdm.write(f"profile: {self.folder} (perfetto_trace.json.gz in it for ui.perfetto.dev, "
                       "the folder itself for TensorBoard with xprof)")
        elif self.folder and self.num_calls < FIRST_TRACED:
            tqdm.write(f"profile: none, because this start made fewer than {FIRST_TRACED} steps")

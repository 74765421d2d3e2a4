"""Several processes in 50 steps and two stages: every division, each process lost."""
import signal
import sys

import numpy as np
import pytest
from PIL import Image

from tests.helpers.hosts import (
    COMMAND,
    close,
    complete_run,
    interrupt,
    launch,
    read_losses,
    start,
    wait,
)

STAGES = ("resolution=16 steps=25 batch=8 lr=1e-3 warmup=5, "
          "resolution=24 steps=25 batch=8 lr=1e-3 warmup=5")
FLAGS = ("--stages", STAGES, "--eval-every", "25", "--save-every", "10")


@pytest.fixture(scope="module")
def causal(cache, tmp_path_factory) -> dict:
    """One process, one device, each batch in four pieces."""
    folder = tmp_path_factory.mktemp("runs") / "pieces"
    return complete_run(cache, folder, 1, 1, *FLAGS, "--grad-accum", "4")


@pytest.mark.parametrize("prefix", ["causal", "bidirectional"])
def test_processes_devices_and_pieces_are_one_run(cache, causal, tmp_path, prefix):
    """2 processes x 2 devices (also with --zero1) = 4 devices = 1 device in 4 pieces."""
    flags = [*FLAGS, "--prefix-attention", prefix]
    pieces = causal
    if prefix != "causal":
        pieces = complete_run(cache, tmp_path / "pieces", 1, 1, "--grad-accum", "4", *flags)
    assert len({step for step, _ in pieces}) == 50 and pieces[50, "loss"] < pieces[1, "loss"]
    assert close(complete_run(cache, tmp_path / "devices", 1, 4, *flags), pieces)
    if prefix == "causal":
        flags.append("--zero1")
    assert close(complete_run(cache, tmp_path / "hosts", 2, 2, *flags), pieces)


def test_each_process_is_lost_and_any_number_continues(cache, causal, tmp_path):
    folder = tmp_path / "run"
    for victim, number, step in ((1, signal.SIGKILL, 11), (0, signal.SIGKILL, 21),
                                 (1, signal.SIGTERM, 32)):
        interrupt(cache, folder, victim, number, step, *FLAGS)
    [(status, out, errors)] = wait(start(cache, folder, 1, 1, *FLAGS))
    assert status == 0 and "continuing" in out, errors
    assert close(read_losses(folder), causal)


def test_lit_with_the_grid_pool_is_one_run(cache, tmp_path):
    """2 processes x 2 devices = 8 devices = 1 device: each process computes the discriminant."""
    photos = tmp_path / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for n in range(40):
        pixels = rng.integers(0, 256, (24, 24, 3), np.uint8)
        Image.fromarray(pixels).save(photos / f"{n}.png")
        (photos / f"{n}.txt").write_text(f"image number {n}")
    flags = ("--data", str(photos), "--val", str(photos), "--objective", "lit", "--init-encoder",
             "random", "--image-pool", "grid", "--feature-copies", "3", "--min-crop-area", "0.5",
             "--stages", "resolution=16 steps=6 batch=8 lr=1e-3 warmup=1")
    one = complete_run(cache, tmp_path / "one", 1, 1, *flags)
    assert len({step for step, _ in one}) == 6
    assert close(complete_run(cache, tmp_path / "devices", 1, 8, *flags), one)
    assert close(complete_run(cache, tmp_path / "hosts", 2, 2, *flags), one)


SLOW_END = """
import sys, time
import jax
import train
from runtime import validation

initialize, finish = jax.distributed.initialize, validation.Evaluator.finish
jax.distributed.initialize = lambda **flags: initialize(**flags | {"shutdown_timeout_seconds": 2})

def finish_slowly(evaluator, params):
    finish(evaluator, params)
    if evaluator.run.parallel.is_main:
        time.sleep(6)
validation.Evaluator.finish = finish_slowly
sys.exit(train.main(sys.argv[1:]))
"""


def test_the_others_wait_for_what_the_first_process_saves_last(cache, tmp_path):
    """JAX aborts all processes if one is still at work so long after another has left."""
    stage = "resolution=16 steps=2 batch=8 lr=1e-3"
    command = [sys.executable, "-c", SLOW_END, *COMMAND[2:], "--stages", stage, "--workdir",
               str(tmp_path / "run"), "--distributed"]
    for status, _, errors in wait(launch(cache, command, 2, 1)):
        assert status == 0, errors
    assert (tmp_path / "run" / "summary.json").exists()

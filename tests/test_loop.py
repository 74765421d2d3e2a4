"""The training loop in this process: the host never waits for the step under way, a run resumes at
every stage boundary, and the arrays of its checkpoint are freed."""
import contextlib
import gc
import os
import signal
import weakref

import jax
import numpy as np
import pytest
from jax._src.array import ArrayImpl

import config
import train
from runtime import checkpoint, curriculum, plots, validation
from runtime.devices import DataParallel
from runtime.distributed import PreemptionHandler
from runtime.run_folder import Run

STAGES = ("resolution=16 steps=3 batch=8 lr=1e-3 warmup=1, resolution=24 steps=3 batch=8 lr=1e-3, "
          "resolution=32 steps=3 batch=8 lr=1e-3")
FLAGS = ["--stages", STAGES, "--val-samples", "16", "--log-every", "1", "--eval-every", "100",
         "--save-every", "100"]


def rows(folder) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    timed = ("images_per_second", "data_wait_fraction", "seconds")
    found = plots.read_metrics(str(folder / "metrics.jsonl"))
    return [{k: v for k, v in r.items() if k not in timed} for r in found]


@pytest.mark.parametrize("steps, warmup", [(1, 0), (7, 0), (7, 1), (7, 6), (350, 100),
                                           (390_981, 1563)])
def test_the_logged_rate_is_that_of_the_optimizer(steps, warmup):
    stage = curriculum.Stage(1, 16, 8, 3e-3, steps, warmup, 0, 0)
    near = [n + d for n in (0, warmup, steps) for d in (-1, 0, 1)]
    spread = range(0, steps + 1, max(1, steps // 200))
    counts = sorted({n for n in [*near, *spread] if 0 <= n <= steps})
    wanted = np.array([float(curriculum.lr_schedule(stage)(n)) for n in counts])
    found = [curriculum.learning_rate(stage, n) for n in counts]
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=3e-9)
    assert all(type(rate) is float for rate in found)


def test_the_loop_computes_nothing_else_and_reads_only_the_step_before(tmp_path, monkeypatch):
    """Between two steps the host makes no implicit transfer, starts no eager operation with numbers
    of its own, and reads what the step before returned, never what the step under way returns."""
    dispatched, reads, early, other = [], [], [], []
    make, get, vote, value = train.make_step, DataParallel.get, DataParallel.vote, ArrayImpl._value
    inside = []  # whether the loop is between two steps

    def make_step(*args, **how):
        step = make(*args, **how)

        def spied(*given):
            found = step(*given)
            dispatched.append([id(x) for x in found[2].values()])
            alive.append(found[2])
            return found
        return spied

    def spied_vote(place, *given):
        found = vote(place, *given)
        dispatched[-1] += [id(x) for x in found]
        alive.append(found)
        return found

    def spied_get(tree):
        if inside:
            for x in jax.tree.leaves(tree):
                reads.append(x)
                if id(x) in dispatched[-1]:
                    early.append(len(dispatched))
        return get(tree)

    def spied_value(array):
        if inside:
            other.append(array.shape)
        return value.fget(array)

    def batches(run, stage):
        for n, item in enumerate(real_batches(run, stage)):
            if n == 2:  # the first two compile
                inside.append(True)
                jax.config.update("jax_transfer_guard", "disallow")
            if run.step == stage.end - 2:  # the last is waited for, because an evaluation follows
                leave()
            yield item

    def leave():
        inside.clear()
        jax.config.update("jax_transfer_guard", before)

    alive, before, real_batches = [], jax.config.jax_transfer_guard, Run.batches
    monkeypatch.setattr(train, "make_step", make_step)
    monkeypatch.setattr(DataParallel, "vote", spied_vote)
    monkeypatch.setattr(DataParallel, "get", staticmethod(spied_get))
    monkeypatch.setattr(ArrayImpl, "_value", property(spied_value))
    monkeypatch.setattr(Run, "batches", batches)
    stages = "resolution=16 steps=9 batch=8 lr=1e-3 warmup=1"
    try:
        assert train.main([*FLAGS, "--stages", stages, "--workdir", str(tmp_path / "run")]) == 0
    finally:
        leave()
    assert len(dispatched) >= 9 and len(reads) >= 5 * 4
    assert not early and not other
    logged = [r["lr"] for r in rows(tmp_path / "run") if "lr" in r]
    [stage] = curriculum.parse_stages(config.parse_args(["--stages", stages])[0].stages)
    assert logged == [curriculum.learning_rate(stage, n) for n in range(9)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert train.main([*FLAGS, "--workdir", str(folder)]) == 0
    return folder


@contextlib.contextmanager
def sigterm(moment: str, step: int):
    """SIGTERM to this process, once: before training step `step`, or as its evaluation begins."""
    with pytest.MonkeyPatch.context() as patch:
        batches, losses, open_runs, sent = Run.batches, validation.ValidationSet.losses, [], []

        def send() -> None:
            if not sent:
                sent.append(True)
                os.kill(os.getpid(), signal.SIGTERM)

        def spied_batches(run, stage):
            for n, item in enumerate(batches(run, stage), run.step + 1):
                if moment == "step" and n == step:
                    send()
                yield item

        def spied_measure(run, params):
            open_runs.append(run)
            return measure(run, params)

        def spied_losses(held, params):
            if moment == "evaluation" and open_runs[-1].step == step:
                send()
            return losses(held, params)
        measure = Run.measure
        patch.setattr(Run, "batches", spied_batches)
        patch.setattr(Run, "measure", spied_measure)
        patch.setattr(validation.ValidationSet, "losses", spied_losses)
        yield sent


@pytest.mark.parametrize("moment", ["step", "evaluation"])
def test_interrupted_at_every_stage_boundary(whole, tmp_path, moment, capsys):
    """The pending evaluation is made at the resolution of the stage that has ended: parameters,
    optimizer state and metrics are those of the uninterrupted run. The second interruption at each
    boundary falls in the evaluation that is made again."""
    folder = tmp_path / "run"
    command = [*FLAGS, "--workdir", str(folder)]
    for step in (3, 6, 9):
        for again in (moment, "evaluation"):
            with sigterm(again, step) as sent:
                assert train.main(command) == 143 and sent
            assert f"SIGTERM: saved at step {step};" in capsys.readouterr().out
            assert checkpoint.latest(str(folder))[2]["unmeasured"]
    assert train.main(command) == 0
    assert rows(folder) == rows(whole)
    found, wanted = (checkpoint.latest(str(f))[1] for f in (folder, whole))
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("step", [3, 4])
def test_a_resumed_run_frees_the_arrays_of_its_checkpoint(tmp_path, monkeypatch, step):
    """At a stage boundary, where an evaluation is pending, and inside of a stage."""
    command = [*FLAGS, "--workdir", str(tmp_path / "run")]
    with sigterm("step", step):
        assert train.main(command) == 143
    loaded, alive, latest, batches = [], [], checkpoint.latest, Run.batches

    def spied_latest(*args):
        path, arrays, meta = latest(*args)
        loaded.extend(weakref.ref(array) for array in arrays.values())
        return path, arrays, meta

    def spied_batches(run, stage):
        for item in batches(run, stage):
            gc.collect()
            alive.append(sum(ref() is not None for ref in loaded))
            yield item
    monkeypatch.setattr(checkpoint, "latest", spied_latest)
    monkeypatch.setattr(Run, "batches", spied_batches)
    assert train.main(command) == 0
    assert len(loaded) > 50 and len(alive) == (6 if step == 3 else 4)
    assert max(alive) == 0


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_handlers_are_installed(monkeypatch, first):
    """It is noted, a second one is not caught, and the handlers from before come back."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before, install, sent = [signal.getsignal(n) for n in numbers], signal.signal, []

    def spied(number, handler):
        found = install(number, handler)
        if number == first and not sent:
            sent.append(number)
            os.kill(os.getpid(), first)
        return found
    monkeypatch.setattr(signal, "signal", spied)
    with PreemptionHandler(DataParallel()) as interrupt:
        assert sent and interrupt.signal == first
        assert [signal.getsignal(n) for n in numbers] == [signal.SIG_DFL] * 2
    assert [signal.getsignal(n) for n in numbers] == before

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
from runtime import checkpoint, curriculum, validation
from runtime.devices import DataParallel
from runtime.distributed import PreemptionHandler
from runtime.run_folder import Run
from tests.helpers.runs import SMALL_RUN, STAGE, STAGES, assert_equal_runs, rows

# The third stage needs no programs of its own.
FLAGS = [*SMALL_RUN, "--stages", f"{STAGES}, {STAGE}", "--log-every", "1", "--eval-every", "100",
         "--save-every", "100"]


@pytest.mark.parametrize("steps, warmup", [(1, 0), (7, 0), (7, 1), (7, 6), (350, 100),
                                           (390_981, 1563)])
def test_logged_learning_rate_is_that_of_the_optimizer(steps, warmup):
    stage = curriculum.Stage(1, 16, 8, 3e-3, steps, warmup, 0, 0)
    near = [n + d for n in (0, warmup, steps) for d in (-1, 0, 1)]
    spread = range(0, steps + 1, max(1, steps // 200))
    counts = sorted({n for n in [*near, *spread] if 0 <= n <= steps})
    expected = np.array([float(curriculum.lr_schedule(stage)(n)) for n in counts])
    rates = [curriculum.learning_rate(stage, n) for n in counts]
    np.testing.assert_allclose(rates, expected, rtol=1e-5, atol=3e-9)
    assert all(type(rate) is float for rate in rates)


def test_loop_computes_nothing_else_and_reads_only_the_step_before(tmp_path, monkeypatch):
    """Between two steps the host makes no implicit transfer, starts no eager operation with numbers
    of its own, and reads what the step before returned, never what the step under way returns."""
    dispatched, reads, early, other = [], [], [], []
    make_step, all_reduce_status = train.make_step, DataParallel.all_reduce_status
    unreplicate, value, batches = DataParallel.unreplicate, ArrayImpl._value, Run.batches
    inside = []  # not empty while the loop is between two steps
    alive = []   # so that no id is used twice

    def spied_make_step(*args, **kwargs):
        step = make_step(*args, **kwargs)

        def spied_step(*args):
            outputs = step(*args)
            dispatched.append([id(x) for x in outputs[2].values()])
            alive.append(outputs[2])
            return outputs
        return spied_step

    def spied_all_reduce_status(parallel, *args):
        status = all_reduce_status(parallel, *args)
        dispatched[-1] += [id(x) for x in status]
        alive.append(status)
        return status

    def spied_unreplicate(tree):
        if inside:
            for x in jax.tree.leaves(tree):
                reads.append(x)
                if id(x) in dispatched[-1]:
                    early.append(len(dispatched))
        return unreplicate(tree)

    def spied_value(array):
        if inside:
            other.append(array.shape)
        return value.fget(array)

    def spied_batches(run, stage):
        for n, item in enumerate(batches(run, stage)):
            if n == 2:  # the first two compile
                inside.append(True)
                jax.config.update("jax_transfer_guard", "disallow")
            if run.step == stage.end - 2:  # the last is waited for, because an evaluation follows
                leave()
            yield item

    def leave():
        inside.clear()
        jax.config.update("jax_transfer_guard", guard)

    guard = jax.config.jax_transfer_guard
    monkeypatch.setattr(train, "make_step", spied_make_step)
    monkeypatch.setattr(DataParallel, "all_reduce_status", spied_all_reduce_status)
    monkeypatch.setattr(DataParallel, "unreplicate", staticmethod(spied_unreplicate))
    monkeypatch.setattr(ArrayImpl, "_value", property(spied_value))
    monkeypatch.setattr(Run, "batches", spied_batches)
    try:
        assert train.main([*FLAGS, "--stages", STAGE, "--workdir", str(tmp_path / "run")]) == 0
    finally:
        leave()
    assert len(dispatched) >= 12 and len(reads) >= 8 * 4
    assert not early and not other
    logged = [row["lr"] for row in rows(tmp_path / "run") if "lr" in row]
    [stage] = curriculum.parse_stages(config.parse_args(["--stages", STAGE])[0].stages)
    assert logged == [curriculum.learning_rate(stage, n) for n in range(12)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "uninterrupted"
    assert train.main([*FLAGS, "--workdir", str(folder)]) == 0
    return folder


@contextlib.contextmanager
def sigterm(moment: str, step: int):
    """SIGTERM to this process, once: before training step `step`, or as its evaluation begins."""
    evaluate, losses = validation.Evaluator.evaluate, validation.ValidationSet.losses
    batches, evaluated_runs, sent = Run.batches, [], []

    def send() -> None:
        if not sent:
            sent.append(True)
            os.kill(os.getpid(), signal.SIGTERM)

    def spied_batches(run, stage):
        for n, item in enumerate(batches(run, stage), run.step + 1):
            if moment == "step" and n == step:
                send()
            yield item

    def spied_evaluate(evaluator, params):
        evaluated_runs.append(evaluator.run)
        return evaluate(evaluator, params)

    def spied_losses(validation_set, params):
        if moment == "evaluation" and evaluated_runs[-1].step == step:
            send()
        return losses(validation_set, params)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "batches", spied_batches)
        patch.setattr(validation.Evaluator, "evaluate", spied_evaluate)
        patch.setattr(validation.ValidationSet, "losses", spied_losses)
        yield sent


@pytest.mark.parametrize("moment", ["step", "evaluation"])
def test_run_interrupted_at_every_stage_boundary_ends_the_same(uninterrupted, tmp_path, moment,
                                                               capsys):
    """The pending evaluation is made at the resolution of the stage that has ended: parameters,
    optimizer state and metrics are those of the uninterrupted run. The second interruption at each
    boundary comes during the evaluation that is made again."""
    folder = tmp_path / "run"
    command = [*FLAGS, "--workdir", str(folder)]
    for step in (12, 24, 36):
        for second in (moment, "evaluation"):
            with sigterm(second, step) as sent:
                assert train.main(command) == 143 and sent
            assert f"SIGTERM: saved at step {step};" in capsys.readouterr().out
            assert checkpoint.latest(str(folder))[2]["evaluation_pending"]
    assert train.main(command) == 0
    assert_equal_runs(folder, uninterrupted)


def test_resumed_run_frees_the_arrays_of_its_checkpoint(tmp_path, monkeypatch):
    """At a stage boundary, where an evaluation is pending, and inside a stage."""
    command = [*FLAGS, "--stages", STAGES, "--workdir", str(tmp_path / "run")]
    with sigterm("step", 12):
        assert train.main(command) == 143
    loaded, num_alive, latest, batches = [], [], checkpoint.latest, Run.batches

    def spied_latest(*args):
        path, arrays, meta = latest(*args)
        loaded.extend(weakref.ref(array) for array in arrays.values())
        return path, arrays, meta

    def spied_batches(run, stage):
        for n, item in enumerate(batches(run, stage)):
            if n % 3 == 0:
                gc.collect()
                num_alive.append(sum(ref() is not None for ref in loaded))
            yield item
    monkeypatch.setattr(checkpoint, "latest", spied_latest)
    monkeypatch.setattr(Run, "batches", spied_batches)

    def resume(status: int) -> None:
        loaded.clear()
        num_alive.clear()
        assert train.main(command) == status
        assert len(loaded) > 50 and len(num_alive) >= 2 and max(num_alive) == 0
    with sigterm("step", 18):
        resume(143)
    resume(0)


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_signal_while_the_handlers_are_installed(monkeypatch, first):
    """It is noted, a second one is not caught, and the handlers from before come back."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    install, sent = signal.signal, []

    def spied_signal(number, handler):
        former = install(number, handler)
        if number == first and not sent:
            sent.append(number)
            os.kill(os.getpid(), first)
        return former
    monkeypatch.setattr(signal, "signal", spied_signal)
    with PreemptionHandler(DataParallel()) as preemption:
        assert sent and preemption.signal == first
        assert [signal.getsignal(number) for number in numbers] == [signal.SIG_DFL] * 2
    assert [signal.getsignal(number) for number in numbers] == before

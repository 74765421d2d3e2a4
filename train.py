"""Train the encoder from captions alone (paper section 2.2), through the stages of the CLIPA curriculum (2.1).

    python train.py                      the toy: embedded pictures, minutes on a laptop's CPU
    python train.py pictures --data DIR  your pictures, likewise
    python train.py l14 --data ...       the paper's L/14 recipe, on TPUs or GPUs, by this same file

The method is `method` below, and `make_step` around it is the one training step there is: on one CPU, on eight pretend
devices, on the chips of a TPU machine. What a run leaves in its folder is in run.py; started again on that folder, it goes on from its last checkpoint.
"""
import contextlib
import errno
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import baselines
import checkpoint
import decoder
import sources
import vit
import zero
from config import Config, ConfigError, Stage, check, describe, parameters, parse, stages
from devices import ENDED, Place, PlaceError, hasten, join, leave, remember_programs
from features import read
from interrupt import Interrupt, Interrupted
from lock import FolderLock
from masking import keep
from run import Model, Run, Stop, init


# ----------------------------------------------------------------------------------------------------------- the method
def method(params: dict, batch: dict, keys: jax.Array, model: Model) -> tuple[jax.Array, jax.Array]:
    """OpenVision 2: the summed caption loss of a batch, and the words in it. This, and its gradient, is all the training signal there is."""
    tokens = vit.vit(params["encoder"], batch["images"], model.encoder)["tokens"]         # every patch is encoded
    kept, _ = keep(keys, tokens, model.keep_ratio, model.shuffle)                         # a random third is kept
    losses = decoder.caption_loss(params["decoder"], kept, batch["text"], model.decoder)  # and must tell the caption
    return losses.sum(), decoder.target_count(batch["text"]).sum()


OBJECTIVES = {"openvision2": method} | baselines.OBJECTIVES


def light(params: dict, model: Model) -> dict:
    """The blocks' matmul weights in the dtype of the matmuls, cast before the loops over layers and not in them: XLA would
    hold these copies either way, and so the gradients too take half the bytes until they are summed, in fp32."""
    def cast(path: tuple, x: jax.Array) -> jax.Array:
        return x.astype(model.encoder.dtype) if "blocks" in (p.key for p in path) and not path[-2].key.startswith("norm") else x
    return jax.tree_util.tree_map_with_path(cast, params)


def make_step(model: Model, optimizer: optax.GradientTransformation, seed: int, accum: int = 1,
              devices: list | None = None, shard: bool = False, clip: float = 0.0) -> Callable:
    """The training step, pmapped: (params, opt_state, batch) -> (params, opt_state, metrics), all with a leading axis
    of local devices; the batch is {"images" (B,R,R,3) uint8, "text" (B,T), "row" (B,)} a device, with a second caption "alt" (B,T) where one is read.

    Sums of loss and words (of what the model's objective counts) cross the devices, and the division comes after: so the update is that of the whole batch,
    however it is shared out, or cut into `accum` pieces. A row's mask is drawn from its position in the run.
    With `shard`, each device keeps the optimizer state of its own slice of the parameters, updates that, and all
    exchange the new slices (ZeRO, arXiv:1910.02054, stage 1): the same update in less memory."""
    root = jax.random.key(seed)

    def piece(params, batch):
        keys = jax.vmap(lambda row: jax.random.fold_in(root, row))(batch["row"])
        sums, grads = jax.value_and_grad(OBJECTIVES[model.objective], has_aux=True)(light(params, model), batch, keys, model)
        return grads, sums

    def step(params, opt_state, batch):
        mine = params
        if shard:  # cut now: a late look at the old parameters would keep their bytes from the new ones
            mine, params = jax.lax.optimization_barrier((jax.tree.map(zero.own, params), params))
        if accum == 1:
            grads, sums = piece(params, batch)
        else:
            parts = jax.tree.map(lambda x: x.reshape(accum, -1, *x.shape[1:]), batch)
            none = jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), params), (jnp.float32(0), jnp.int32(0))
            (grads, sums), _ = jax.lax.scan(lambda total, part: (jax.tree.map(jnp.add, total, piece(params, part)), None), none, parts)
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)
        loss, words = jax.lax.psum(sums, "devices")
        words = jnp.maximum(words, 1)
        grads = jax.tree.map(lambda g: g / words, jax.tree.map(zero.sum_slice, grads) if shard else jax.lax.psum(grads, "devices"))
        norm = zero.norm(grads, params) if shard else optax.tree.norm(grads)
        if clip:
            grads = jax.tree.map(lambda g: g * jnp.minimum(1, clip / norm), grads)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, opt_state, mine)
            mine = optax.apply_updates(mine, updates)
        params = jax.tree.map(lambda x, p: zero.join(x, p.shape), mine, params) if shard else mine
        return params, opt_state, {"loss": loss / words, "grad_norm": norm}

    return jax.pmap(step, axis_name="devices", donate_argnums=(0, 1), devices=devices)


def schedule(stage: Stage) -> optax.Schedule:
    """Linear from 0 over the warm-up, then a cosine to 0."""
    return optax.warmup_cosine_decay_schedule(0.0, stage.lr, stage.warmup, stage.steps)


def learning_rate(stage: Stage, step: int) -> float:
    """What `schedule` gives for a step of the stage (from 0), for the log. Computed on the host,
    because optax would launch operations on the device behind the step under way, and reading their
    result would wait for that step."""
    if step < stage.warmup:
        return stage.lr * step / stage.warmup
    share = min(1.0, (step - stage.warmup) / (stage.steps - stage.warmup))
    return stage.lr * (1 + math.cos(math.pi * share)) / 2


def make_optimizer(cfg: Config, stage: Stage) -> optax.GradientTransformation:
    """AdamW (b1 0.9, as released) with decay on matrices alone: not on biases, norms, or the word table."""
    def matrices(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)
    return optax.adamw(schedule(stage), b1=0.9, b2=cfg.b2, mu_dtype=cfg.mu_dtype, weight_decay=cfg.weight_decay, mask=matrices)


def start(cfg: Config, model: Model) -> dict:
    """What a new run starts from: fresh parameters, or --init's encoder with a fresh decoder. ConfigError where it does not fit."""
    params = init(cfg, model)
    if cfg.init:
        params["encoder"], found, _ = read(cfg.init)
        sizes = ((name, getattr(found, name), getattr(model.encoder, name)) for name in ("layers", "width", "heads", "mlp", "patch", "cls", "positions"))
        if differ := [f"{name} {theirs}, not {ours}" for name, theirs, ours in sizes if theirs != ours]:
            raise ConfigError(f"--init {cfg.init} has {'; '.join(differ)}: change --encoder, --cls or --positions to suit it")
    return params


# ------------------------------------------------------------------------------------------------------------- the loop
def train(cfg: Config) -> int:
    """A whole run, or what is left of it. Returns the exit status: 0, or 128 + the signal that stopped it."""
    sys.setswitchinterval(0.0005)  # seconds that a thread which makes batches may hold Python while the loop wants it; 0.005 is what it was
    check(cfg)
    hasten(sum(parameters(cfg).values()), [] if cfg.distributed else [stage.batch // cfg.accum for stage in stages(cfg)], cfg.devices)
    join(cfg.distributed, cfg.out)
    try:
        place = Place(cfg.devices)
    except ValueError as problem:
        raise ConfigError(f"--devices: {problem}") from None
    check(cfg, place.total)
    with contextlib.closing(FolderLock(cfg.out)) as lock:
        return train_run(cfg, place, Run(cfg, place, lock=lock))


def train_run(cfg: Config, place: Place, run: Run) -> int:
    """What is left of a run whose folder is open, and the exit status."""
    if run.finished:
        print(f"{cfg.out} is finished: look at {run.path('samples.png')}; delete the folder or name another --out to train anew")
        return 0
    shapes = jax.eval_shape(lambda: init(cfg, run.model))
    params = place.copies(run.restore(shapes, "params") if run.step else start(cfg, run.model))

    with Interrupt(place) as interrupt:
        try:
            for stage in run.plan:
                pending = run.step == stage.end and run.state["unmeasured"]  # at its own resolution
                if run.step < stage.end or pending or stage is run.plan[-1]:
                    params = train_stage(cfg, run, stage, params, interrupt)
            run.finish(params)
        except Interrupted as found:
            run.bar.close()
            if place.first:
                print(f"{found}: saved at step {run.step}; the same command goes on from there")
            return 128 + found.signal
        finally:
            run.close()  # before an error is told, or the bar is drawn over it
    return 0


def train_stage(cfg: Config, run: Run, stage: Stage, params: Any, interrupt: Interrupt) -> Any:
    """The stage's steps from the run's on, and the parameters after it."""
    place, optimizer = run.place, make_optimizer(cfg, stage)
    step = make_step(run.model, optimizer, cfg.seed, cfg.accum, place.pmap, cfg.shard, cfg.clip)
    like = jax.eval_shape(optimizer.init, jax.eval_shape(lambda: init(cfg, run.model)))
    if run.step > stage.start:
        opt_state = (place.slices if cfg.shard else place.copies)(run.restore(like, "opt"))
    else:
        opt_state = jax.pmap(lambda p: optimizer.init(jax.tree.map(zero.own, p) if cfg.shard else p), "devices", devices=place.pmap)(params)
    run.arrays = None  # all that is used of a checkpoint is on the devices now
    run.enter(stage, interrupt.check)

    def save() -> None:
        run.save({"params": place.get(params), "opt": place.whole(opt_state, like)})

    behind, stop = None, 0
    try:
        if run.state["unmeasured"]:
            run.measure(params)
        with contextlib.closing(run.batches(stage)) as feed:
            for at in range(run.step + 1, stage.end + 1):
                asked = time.time()
                batch, bad = next(feed)
                run.waited += time.time() - asked
                params, opt_state, metrics = run.profile(at, step, params, opt_state, batch)
                lr = learning_rate(stage, at - stage.start - 1)
                now = at, lr, metrics, place.vote(interrupt.signal, len(bad)), bad
                if behind:
                    stop = run.note(*behind)  # looked at a step later: the device is never waited for while it could work
                behind = now
                measure, due = at % cfg.eval_every == 0 or at == stage.end, at % cfg.save_every == 0 or at == run.plan[-1].end
                if measure or due or stop:
                    stop, behind = run.note(*now) or stop, None
                    run.state["unmeasured"] = measure
                    if stop:
                        raise Interrupted(stop)
                    if measure:
                        run.measure(params)
                    if due:
                        save()
    except Interrupted:  # in an evaluation too, which is then made anew
        save()
        raise
    run.bar.close()
    return params


def main(argv: list[str]) -> int:
    cfg, dry = parse(argv)
    try:
        if not dry:
            return train(cfg)
        check(cfg)
        print(describe(cfg))
        return 0
    except (ConfigError, sources.DataError, checkpoint.CheckpointError, PlaceError, Stop) as problem:
        print(f"error: {problem}", file=sys.stderr)
    except OSError as problem:
        if problem.strerror is None:
            raise
        full = problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        print(f"error: {problem.filename or cfg.out}: {problem.strerror}" + full * ": make room, and the same command will go on from the last checkpoint",
              file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped before the first step", file=sys.stderr)
        return 130
    except jax.errors.JaxRuntimeError as problem:
        if "RESOURCE_EXHAUSTED" in str(problem):
            print(f"error: out of memory: --accum 4 makes the same update in four pieces; then --remat block, then a smaller batch in --stages "
                  f"({str(problem).splitlines()[0][:200]})", file=sys.stderr)
            leave()
            return 1
        if jax.process_count() == 1:
            raise
        print(f"error: {ENDED} ({str(problem).splitlines()[0][:200]})", file=sys.stderr)
    leave()
    return 1


if __name__ == "__main__":
    remember_programs()
    sources.silence_pillow()
    sys.exit(main(sys.argv[1:]))

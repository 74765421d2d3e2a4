"""Train the encoder from captions alone (paper section 2.2), through the stages of the CLIPA curriculum (2.1).

    python train.py                      the toy: embedded pictures, minutes on a laptop's CPU
    python train.py pictures --data DIR  your pictures, likewise
    python train.py l14 --data ...       the paper's L/14 recipe, on TPUs or GPUs, by this same file

The method is `method` below, and `make_step` around it is the one training step there is: on one CPU, on eight pretend
devices, on the chips of a TPU machine. What a run leaves in its folder is in run.py; started again on that folder, it goes on from its last checkpoint.
"""
import contextlib
import sys
import time
from collections.abc import Callable
from signal import Signals

import jax
import jax.numpy as jnp
import optax

import checkpoint
import decoder
import sources
import vit
from config import Config, ConfigError, Stage, check, describe, parse
from devices import Place
from masking import keep
from run import Interrupt, Model, Run, Stop


# ----------------------------------------------------------------------------------------------------------- the method
def method(params: dict, batch: dict, keys: jax.Array, model: Model) -> jax.Array:
    """OpenVision 2: the summed caption loss of a batch. This, and its gradient, is all the training signal there is."""
    tokens = vit.vit(params["encoder"], batch["images"], model.encoder)["tokens"]         # every patch is encoded
    kept, _ = keep(keys, tokens, model.keep_ratio)                                        # a random third is kept
    return decoder.caption_loss(params["decoder"], kept, batch["text"], model.decoder).sum()  # and must tell the caption


def make_step(model: Model, optimizer: optax.GradientTransformation, seed: int, accum: int = 1,
              devices: list | None = None) -> Callable:
    """The training step, pmapped: (params, opt_state, batch) -> (params, opt_state, metrics), all with a leading axis
    of local devices; the batch is {"images" (B,R,R,3) uint8, "text" (B,T), "row" (B,)} a device.

    Sums of loss and words cross the devices, and the division comes after: so the update is that of the whole batch,
    however it is shared out, or cut into `accum` pieces. A row's mask is drawn from its position in the run."""
    root = jax.random.key(seed)

    def piece(params, batch):
        keys = jax.vmap(lambda row: jax.random.fold_in(root, row))(batch["row"])
        loss, grads = jax.value_and_grad(method)(params, batch, keys, model)
        return loss, grads, decoder.target_count(batch["text"]).sum()

    def step(params, opt_state, batch):
        if accum == 1:
            sums = piece(params, batch)
        else:
            parts = jax.tree.map(lambda x: x.reshape(accum, -1, *x.shape[1:]), batch)
            zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(piece, params, jax.tree.map(lambda x: x[0], parts)))
            sums, _ = jax.lax.scan(lambda total, part: (jax.tree.map(jnp.add, total, piece(params, part)), None), zero, parts)
        loss, grads, words = jax.lax.psum(sums, "devices")
        words = jnp.maximum(words, 1)
        grads = jax.tree.map(lambda g: g / words, grads)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, {"loss": loss / words, "grad_norm": optax.tree.norm(grads)}

    return jax.pmap(step, axis_name="devices", donate_argnums=(0, 1), devices=devices)


def schedule(stage: Stage) -> optax.Schedule:
    """Linear from 0 over the warm-up, then a cosine to 0."""
    return optax.warmup_cosine_decay_schedule(0.0, stage.lr, stage.warmup, stage.steps)


def make_optimizer(cfg: Config, stage: Stage) -> optax.GradientTransformation:
    """AdamW (b1 0.9, as released) with decay on matrices alone: not on biases, norms, or the word table."""
    def matrices(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)
    adamw = optax.adamw(schedule(stage), b1=0.9, b2=cfg.b2, mu_dtype=cfg.mu_dtype, weight_decay=cfg.weight_decay, mask=matrices)
    return optax.chain(optax.clip_by_global_norm(cfg.clip), adamw) if cfg.clip else adamw


def init(cfg: Config, model: Model) -> dict:
    key = jax.random.key(cfg.seed)
    return {"encoder": vit.init(jax.random.fold_in(key, 0), model.encoder), "decoder": decoder.init(jax.random.fold_in(key, 1), model.decoder)}


# ------------------------------------------------------------------------------------------------------------- the loop
def train(cfg: Config) -> int:
    """A whole run, or what is left of it. Returns the exit status: 0, or 128 + the signal that stopped it."""
    try:
        place = Place(cfg.devices)
    except ValueError as problem:
        raise ConfigError(f"--devices: {problem}") from None
    check(cfg, place.total)
    run = Run(cfg, place)
    if run.finished:
        print(f"{cfg.out} is finished: look at {run.path('samples.png')}; delete the folder or name another --out to train anew")
        return 0
    shapes = jax.eval_shape(lambda: init(cfg, run.model))
    params = place.copies(checkpoint.restore(run.arrays, shapes, cfg.out, under="params") if run.arrays else init(cfg, run.model))

    with Interrupt() as interrupt:
        for stage in run.plan:
            if run.step >= stage.end and stage is not run.plan[-1]:
                continue
            optimizer = make_optimizer(cfg, stage)
            opt_state = optimizer.init(place.get(params))
            if run.step > stage.start:
                opt_state = checkpoint.restore(run.arrays, opt_state, cfg.out, under="opt")
            opt_state, run.arrays = place.copies(opt_state), None
            step, rate = make_step(run.model, optimizer, cfg.seed, cfg.accum, place.pmap), schedule(stage)
            run.enter(stage)
            behind = None

            def look(at: int, metrics: dict, stage: Stage = stage, rate: optax.Schedule = rate) -> None:
                run.note(at, *(float(place.get(metrics[k])) for k in ("loss", "grad_norm")), float(rate(at - stage.start - 1)))

            with contextlib.closing(run.batches(stage)) as feed:
                for at in range(run.step + 1, stage.end + 1):
                    asked = time.time()
                    batch = next(feed)
                    run.waited += time.time() - asked
                    params, opt_state, metrics = step(params, opt_state, batch)
                    if behind:
                        look(*behind)  # at the step before: the device is never waited for while it could work
                    behind = at, metrics
                    measure = at % cfg.eval_every == 0 or at == stage.end
                    stop = interrupt.signal
                    save = at % cfg.save_every == 0 or at == run.plan[-1].end or stop
                    if measure or save:
                        look(*behind)
                        behind = None
                        if measure:
                            run.measure(params)
                        if save:
                            run.save(params, opt_state)
                    if stop:
                        run.bar.close()
                        print(f"{Signals(stop).name}: saved at step {at}; the same command goes on from there")
                        return 128 + stop
            run.bar.close()
        run.finish(params)
    return 0


def main(argv: list[str]) -> int:
    cfg, dry = parse(argv)
    try:
        if not dry:
            return train(cfg)
        check(cfg)
        print(describe(cfg))
        return 0
    except (ConfigError, sources.DataError, checkpoint.CheckpointError, Stop) as problem:
        print(f"error: {problem}", file=sys.stderr)
    except OSError as problem:
        if problem.strerror is None:
            raise
        print(f"error: {problem.filename or cfg.out}: {problem.strerror}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

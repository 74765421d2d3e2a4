"""Train the encoder from captions alone (paper section 2.2), through the stages of the CLIPA curriculum (2.1).

    python train.py                      the toy: embedded pictures, minutes on a laptop's CPU
    python train.py pictures --data DIR  your pictures, likewise
    python train.py l14 --data ...       the paper's L/14 recipe, on TPUs or GPUs, by this same file

The method is `method` below, and `make_step` around it is the one training step there is: on one CPU, on eight pretend
devices, on the chips of a TPU machine. What a run leaves in its folder is in runtime/run_folder.py; started again on that folder, it goes on from its last checkpoint.
"""
import contextlib
import errno
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import decoder
import vit
from config import Config, parse_args, validate
from inputs import images
from masking import keep_random_tokens
from objectives import registry
from objectives.registry import ModelSpec, init_params, param_counts, run_summary
from runtime.checkpoint import read_encoder
from runtime.cpu_tuning import enable_compilation_cache, tune_cpu
from runtime.curriculum import Stage, learning_rate, lr_schedule, parse_stages
from runtime.devices import DataParallel, all_gather, global_norm, local_shard, reduce_scatter
from runtime.distributed import (
    PEER_LOST,
    Preempted,
    PreemptionHandler,
    abort_process,
    initialize_distributed,
)
from runtime.errors import CheckpointError, ConfigError, DataError, DistributedError, TrainingError
from runtime.run_folder import FolderLock, Run


def openvision2_loss(params: dict, batch: dict, keys: jax.Array, model: ModelSpec) -> tuple[jax.Array, jax.Array]:
    """OpenVision 2: the summed caption loss of a batch, and the words in it. This, and its gradient, is all the training signal there is."""
    tokens = vit.vit(params["encoder"], batch["images"], model.encoder)["tokens"]         # every patch is encoded
    kept, _ = keep_random_tokens(keys, tokens, model.keep_ratio, model.shuffle_kept)                         # a random third is kept
    losses = decoder.caption_loss(params["decoder"], kept, batch["text"], model.decoder)  # and must tell the caption
    return losses.sum(), decoder.count_targets(batch["text"]).sum()


def objective_loss(name: str) -> Callable:
    """The loss function of an objective: the method's, above, or that of a module in objectives/."""
    return openvision2_loss if name == registry.METHOD else registry.rival(name).loss


def cast_block_params(params: dict, model: ModelSpec) -> dict:
    """The blocks' matmul weights in the dtype of the matmuls, cast before the loops over layers and not in them: XLA would
    hold these copies either way, and so the gradients too take half the bytes until they are summed, in fp32."""
    def cast(path: tuple, x: jax.Array) -> jax.Array:
        return x.astype(model.encoder.dtype) if "blocks" in (p.key for p in path) and not path[-2].key.startswith("norm") else x
    return jax.tree_util.tree_map_with_path(cast, params)


def make_step(model: ModelSpec, optimizer: optax.GradientTransformation, seed: int, accum: int = 1,
              devices: list | None = None, shard: bool = False, clip: float = 0.0) -> Callable:
    """The training step, pmapped: (params, opt_state, batch) -> (params, opt_state, metrics), all with a leading axis
    of local devices; the batch is {"images" (B,R,R,3) uint8, "text" (B,T), "sample_index" (B,)} a device, with a second caption "alt" (B,T) where one is read.

    Sums of loss and words (of what the model's objective counts) cross the devices, and the division comes after: so the update is that of the whole batch,
    however it is shared out, or cut into `accum` pieces. A row's mask is drawn from its position in the run.
    With `shard`, each device keeps the optimizer state of its own slice of the parameters, updates that, and all
    exchange the new slices (ZeRO, arXiv:1910.02054, stage 1): the same update in less memory."""
    root = jax.random.key(seed)

    def piece(params, batch):
        keys = jax.vmap(lambda row: jax.random.fold_in(root, row))(batch["sample_index"])
        sums, grads = jax.value_and_grad(objective_loss(model.objective), has_aux=True)(cast_block_params(params, model), batch, keys, model)
        return grads, sums

    def step(params, opt_state, batch):
        mine = params
        if shard:  # cut now: a late look at the old parameters would keep their bytes from the new ones
            mine, params = jax.lax.optimization_barrier((jax.tree.map(local_shard, params), params))
        if accum == 1:
            grads, sums = piece(params, batch)
        else:
            parts = jax.tree.map(lambda x: x.reshape(accum, -1, *x.shape[1:]), batch)
            none = jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), params), (jnp.float32(0), jnp.int32(0))
            (grads, sums), _ = jax.lax.scan(lambda total, part: (jax.tree.map(jnp.add, total, piece(params, part)), None), none, parts)
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)
        loss, words = jax.lax.psum(sums, "devices")
        words = jnp.maximum(words, 1)
        grads = jax.tree.map(lambda g: g / words, jax.tree.map(reduce_scatter, grads) if shard else jax.lax.psum(grads, "devices"))
        norm = global_norm(grads, params) if shard else optax.tree.norm(grads)
        if clip:
            grads = jax.tree.map(lambda g: g * jnp.minimum(1, clip / norm), grads)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, opt_state, mine)
            mine = optax.apply_updates(mine, updates)
        params = jax.tree.map(lambda x, p: all_gather(x, p.shape), mine, params) if shard else mine
        return params, opt_state, {"loss": loss / words, "grad_norm": norm}

    return jax.pmap(step, axis_name="devices", donate_argnums=(0, 1), devices=devices)


def make_optimizer(cfg: Config, stage: Stage) -> optax.GradientTransformation:
    """AdamW (b1 0.9, as released) with decay on matrices alone: not on biases, norms, or the word table."""
    def matrices(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)
    return optax.adamw(lr_schedule(stage), b1=0.9, b2=cfg.adam_b2, mu_dtype=cfg.mu_dtype, weight_decay=cfg.weight_decay, mask=matrices)


def initial_params(cfg: Config, model: ModelSpec) -> dict:
    """What a new run starts from: fresh parameters, or --init-encoder's encoder with a fresh decoder. ConfigError where it does not fit."""
    params = init_params(cfg, model)
    if cfg.init_encoder:
        params["encoder"], found, _ = read_encoder(cfg.init_encoder)
        sizes = ((name, getattr(found, name), getattr(model.encoder, name)) for name in ("depth", "width", "num_heads", "mlp_dim", "patch_size", "cls_token", "learned_pos_grid"))
        if differ := [f"{name} {theirs}, not {ours}" for name, theirs, ours in sizes if theirs != ours]:
            raise ConfigError(f"--init-encoder {cfg.init_encoder} has {'; '.join(differ)}: change --encoder, --cls-token or --learned-pos-grid to suit it")
    return params


def train(cfg: Config) -> int:
    """A whole run, or what is left of it. Returns the exit status: 0, or 128 + the signal that stopped it."""
    sys.setswitchinterval(0.0005)  # seconds that a thread which makes batches may hold Python while the loop wants it; 0.005 is what it was
    validate(cfg)
    tune_cpu(sum(param_counts(cfg).values()), [] if cfg.distributed else [stage.batch // cfg.grad_accum for stage in parse_stages(cfg.stages)], cfg.num_devices)
    initialize_distributed(cfg.distributed, cfg.workdir)
    try:
        parallel = DataParallel(cfg.num_devices)
    except ValueError as problem:
        raise ConfigError(f"--num-devices: {problem}") from None
    validate(cfg, parallel.num_devices)
    with contextlib.closing(FolderLock(cfg.workdir)) as lock:
        return train_run(cfg, parallel, Run(cfg, parallel, lock=lock))


def train_run(cfg: Config, parallel: DataParallel, run: Run) -> int:
    """What is left of a run whose folder is open, and the exit status."""
    if run.finished:
        print(f"{cfg.workdir} is finished: look at {run.path('samples.png')}; delete the folder or name another --workdir to train anew")
        return 0
    shapes = jax.eval_shape(lambda: init_params(cfg, run.model))
    params = parallel.replicate(run.restore(shapes, "params") if run.step else initial_params(cfg, run.model))

    with PreemptionHandler(parallel) as interrupt:
        try:
            for stage in run.plan:
                pending = run.step == stage.end and run.state["unmeasured"]  # at its own resolution
                if run.step < stage.end or pending or stage is run.plan[-1]:
                    params = train_stage(cfg, run, stage, params, interrupt)
            run.finish(params)
        except Preempted as found:
            run.bar.close()
            if parallel.is_main:
                print(f"{found}: saved at step {run.step}; the same command goes on from there")
            return 128 + found.signal
        finally:
            run.close()  # before an error is told, or the bar is drawn over it
    return 0


def train_stage(cfg: Config, run: Run, stage: Stage, params: Any, interrupt: PreemptionHandler) -> Any:
    """The stage's steps from the run's on, and the parameters after it."""
    parallel, optimizer = run.parallel, make_optimizer(cfg, stage)
    step = make_step(run.model, optimizer, cfg.seed, cfg.grad_accum, parallel.pmap_devices, cfg.zero1, cfg.grad_clip)
    like = jax.eval_shape(optimizer.init, jax.eval_shape(lambda: init_params(cfg, run.model)))
    if run.step > stage.start:
        opt_state = (parallel.shard if cfg.zero1 else parallel.replicate)(run.restore(like, "opt"))
    else:
        opt_state = jax.pmap(lambda p: optimizer.init(jax.tree.map(local_shard, p) if cfg.zero1 else p), "devices", devices=parallel.pmap_devices)(params)
    run.arrays = None  # all that is used of a checkpoint is on the devices now
    run.enter(stage, interrupt.check)

    def save() -> None:
        run.save({"params": parallel.unreplicate(params), "opt": parallel.gather(opt_state, like)})

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
                now = at, lr, metrics, parallel.all_reduce_status(interrupt.signal, len(bad)), bad
                if behind:
                    stop = run.note(*behind)  # looked at a step later: the device is never waited for while it could work
                behind = now
                measure, due = at % cfg.eval_every == 0 or at == stage.end, at % cfg.save_every == 0 or at == run.plan[-1].end
                if measure or due or stop:
                    stop, behind = run.note(*now) or stop, None
                    run.state["unmeasured"] = measure
                    if stop:
                        raise Preempted(stop)
                    if measure:
                        run.measure(params)
                    if due:
                        save()
    except Preempted:  # in an evaluation too, which is then made anew
        save()
        raise
    run.bar.close()
    return params


def main(argv: list[str]) -> int:
    cfg, dry = parse_args(argv)
    try:
        if not dry:
            return train(cfg)
        validate(cfg)
        print(run_summary(cfg))
        return 0
    except (ConfigError, DataError, CheckpointError, DistributedError, TrainingError) as problem:
        print(f"error: {problem}", file=sys.stderr)
    except OSError as problem:
        if problem.strerror is None:
            raise
        full = problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        print(f"error: {problem.filename or cfg.workdir}: {problem.strerror}" + full * ": make room, and the same command will go on from the last checkpoint",
              file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped before the first step", file=sys.stderr)
        return 130
    except jax.errors.JaxRuntimeError as problem:
        if "RESOURCE_EXHAUSTED" in str(problem):
            print(f"error: out of memory: --grad-accum 4 makes the same update in four pieces; then --remat block, then a smaller batch in --stages "
                  f"({str(problem).splitlines()[0][:200]})", file=sys.stderr)
            abort_process()
            return 1
        if jax.process_count() == 1:
            raise
        print(f"error: {PEER_LOST} ({str(problem).splitlines()[0][:200]})", file=sys.stderr)
    abort_process()
    return 1


if __name__ == "__main__":
    enable_compilation_cache()
    images.silence_pillow()
    sys.exit(main(sys.argv[1:]))

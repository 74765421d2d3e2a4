"""Train the encoder from captions alone (paper section 2.2), through a CLIPA curriculum (2.1).

    python train.py                      the toy: embedded images, minutes on a laptop's CPU
    python train.py images --data DIR    your images, likewise
    python train.py l14 --data ...       the paper's L/14 recipe, on TPUs or GPUs, by this same file

The method is `openvision2_loss`. `make_step` around it is the one training step: on one CPU, on
eight simulated devices, and on the chips of a TPU pod. runtime/run_folder.py says what a run leaves
in its folder. The same command, started again on that folder, continues from the last checkpoint.

Letters: B images per device, R pixels per side, N patches, K kept patches, T text positions.
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


# ------------------------------------------------------------------------------ the method
def openvision2_loss(params: dict, batch: dict, keys: jax.Array,
                     model: ModelSpec) -> tuple[jax.Array, jax.Array]:
    """The summed caption loss of a batch, and the number of its tokens. This loss and its gradient
    are the only training signal. keys (B,): one per image, for its draw of patches."""
    tokens = vit.vit(params["encoder"], batch["images"], model.encoder)["tokens"]         # (B,N,E)
    kept, _ = keep_random_tokens(keys, tokens, model.keep_ratio, model.shuffle_kept)      # (B,K,E)
    losses = decoder.caption_loss(params["decoder"], kept, batch["text"], model.decoder)  # (B,)
    return losses.sum(), decoder.count_targets(batch["text"]).sum()


def objective_loss(name: str) -> Callable:
    """The loss function of an objective: the method's, above, or that of a module of
    objectives/."""
    if name == registry.METHOD:
        return openvision2_loss
    return registry.rival(name).loss


def cast_block_params(params: dict, model: ModelSpec) -> dict:
    """The matmul weights of the blocks in the dtype of the matmuls, cast before the scan over
    layers.

    XLA would hold these copies anyway. Cast here, the gradients too take half the memory until they
    are summed, in fp32."""
    def cast(path: tuple, x: jax.Array) -> jax.Array:
        in_block = any(entry.key == "blocks" for entry in path)
        in_norm = path[-2].key.startswith("norm") if len(path) > 1 else False
        return x.astype(model.encoder.dtype) if in_block and not in_norm else x
    return jax.tree_util.tree_map_with_path(cast, params)


# ------------------------------------------------------------------------- the training step
def make_step(model: ModelSpec, optimizer: optax.GradientTransformation, seed: int,
              grad_accum: int = 1, devices: list | None = None, zero1: bool = False,
              grad_clip: float = 0.0) -> Callable:
    """The pmapped step (params, opt_state, batch) -> (params, opt_state, metrics).

    All have a leading axis of local devices. A device's batch is {"images" (B,R,R,3) uint8, "text"
    (B,T), "sample_index" (B,)}, and "alt" (B,T) where the objective reads a second caption.

    Loss and token count are summed over all devices before one is divided by the other. So the
    update is that of the global batch, however it is divided over devices or cut into `grad_accum`
    pieces. An image's patches are drawn from the seed and its sample_index, its position in the
    run.

    With `zero1`, each device keeps the optimizer state of its own shard of the parameters and
    updates that shard; then all devices exchange the new shards (ZeRO stage 1, arXiv:1910.02054).
    The update is the same, in less memory."""
    root_key = jax.random.key(seed)
    loss_fn = jax.value_and_grad(objective_loss(model.objective), has_aux=True)

    def loss_and_grads(params: dict, batch: dict) -> tuple:
        keys = jax.vmap(lambda index: jax.random.fold_in(root_key, index))(batch["sample_index"])
        return loss_fn(cast_block_params(params, model), batch, keys, model)

    def accumulate(params: dict, batch: dict) -> tuple:
        pieces = jax.tree.map(lambda x: x.reshape(grad_accum, -1, *x.shape[1:]), batch)
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), params)

        def add(total: tuple, piece: dict) -> tuple:
            return jax.tree.map(jnp.add, total, loss_and_grads(params, piece)), None
        start = ((jnp.float32(0), jnp.int32(0)), zeros)
        return jax.lax.scan(add, start, pieces)[0]

    def step(params: dict, opt_state: Any, batch: dict) -> tuple:
        own_params = params
        if zero1:  # sharded now: a later read of the old parameters would keep their memory
            shards = jax.tree.map(local_shard, params)
            own_params, params = jax.lax.optimization_barrier((shards, params))
        sums, grads = (loss_and_grads if grad_accum == 1 else accumulate)(params, batch)
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)
        loss, num_tokens = jax.lax.psum(sums, "devices")
        num_tokens = jnp.maximum(num_tokens, 1)
        if zero1:
            grads = jax.tree.map(reduce_scatter, grads)
        else:
            grads = jax.lax.psum(grads, "devices")
        grads = jax.tree.map(lambda g: g / num_tokens, grads)
        grad_norm = global_norm(grads, params) if zero1 else optax.tree.norm(grads)
        if grad_clip:
            grads = jax.tree.map(lambda g: g * jnp.minimum(1, grad_clip / grad_norm), grads)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, opt_state, own_params)
            own_params = optax.apply_updates(own_params, updates)
        if zero1:
            own_params = jax.tree.map(lambda x, p: all_gather(x, p.shape), own_params, params)
        return own_params, opt_state, {"loss": loss / num_tokens, "grad_norm": grad_norm}

    return jax.pmap(step, axis_name="devices", donate_argnums=(0, 1), devices=devices)


def make_optimizer(cfg: Config, stage: Stage) -> optax.GradientTransformation:
    """AdamW (b1 0.9, as released). Only matrices decay: not biases, norms, or the token
    embedding."""
    def is_matrix(params: dict) -> dict:
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)
    return optax.adamw(lr_schedule(stage), b1=0.9, b2=cfg.adam_b2, mu_dtype=cfg.mu_dtype,
                       weight_decay=cfg.weight_decay, mask=is_matrix)


def initial_params(cfg: Config, model: ModelSpec) -> dict:
    """What a new run starts from: initialized parameters, or --init-encoder's encoder with an
    initialized decoder. ConfigError where that encoder does not fit."""
    params = init_params(cfg, model)
    if not cfg.init_encoder:
        return params
    params["encoder"], imported, _ = read_encoder(cfg.init_encoder)
    differences = []
    for name in ("depth", "width", "num_heads", "mlp_dim", "patch_size", "cls_token",
                 "learned_pos_grid"):
        theirs, ours = getattr(imported, name), getattr(model.encoder, name)
        if theirs != ours:
            differences.append(f"{name} {theirs}, not {ours}")
    if differences:
        raise ConfigError(f"--init-encoder {cfg.init_encoder} has {'; '.join(differences)}: change "
                          "--encoder, --cls-token or --learned-pos-grid to suit it")
    return params


# ------------------------------------------------------------------------------- the loop
def train(cfg: Config) -> int:
    """A whole run, or what is left of it. Returns the exit status: 0, or 128 + the signal that
    stopped it."""
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

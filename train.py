"""Train the encoder from captions alone (paper section 2.2), through a CLIPA curriculum (2.1).

    python train.py                      the toy: synthetic images, minutes on a laptop
    python train.py images --data DIR    your images, also with a small model
    python train.py l14 --data ...       the paper's L/14, for TPUs or GPUs, from the same file

The method is `openvision2_loss`. `make_step` around it is the one training step, for one CPU, eight
simulated devices, a GPU, and the chips of a TPU pod (docs/limits.md says what was never run). The
same command, started again on a run's folder, continues from the last checkpoint.

Letters: B images per device, R pixels per side, N patches, K kept, T text length, E encoder width.
"""
import contextlib
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
from objectives.registry import ModelSpec
from runtime import distributed
from runtime.cpu_tuning import enable_compilation_cache, tune_cpu
from runtime.curriculum import Stage, learning_rate, make_optimizer, parse_stages
from runtime.devices import DataParallel, all_gather, global_norm, local_shard, reduce_scatter
from runtime.errors import ConfigError, run_command
from runtime.monitoring import Monitor, PendingStep, check_tensorboard
from runtime.run_folder import Run, open_folder
from runtime.validation import Evaluator


# ------------------------------------------------------------------------------ the method
def openvision2_loss(params: dict, batch: dict, keys: jax.Array,
                     model: ModelSpec) -> tuple[jax.Array, jax.Array]:
    """The summed caption loss of a batch (the only training signal), and its number of tokens.
    keys (B,): one per image. vit() gets `keep`, so that its last block can skip dropped tokens."""
    def keep(tokens: jax.Array) -> jax.Array:                                  # (B,N,E) to (B,K,E)
        return keep_random_tokens(keys, tokens, model.keep_ratio, model.shuffle_kept)[0]
    kept = vit.vit(params["encoder"], batch["images"], model.encoder, select=keep)["tokens"]
    losses = decoder.caption_loss(params["decoder"], kept, batch["text"], model.decoder)  # (B,)
    return losses.sum(), decoder.count_targets(batch["text"]).sum()


def objective_loss(objective: str) -> Callable:
    """The loss function of --objective: the method's, or that of a module in objectives/."""
    module = registry.objective_module(objective)
    return openvision2_loss if module is None else module.loss


def cast_block_params(params: dict, model: ModelSpec) -> dict:
    """params, with the blocks' kernels and biases (not the norms) in the dtype of the activations,
    to which `linear` would cast them anyway. The loss is differentiated with respect to the cast
    arrays, so their gradients have this dtype too: with bfloat16, half the memory."""
    def cast(path: tuple, x: jax.Array) -> jax.Array:
        in_block = any(entry.key == "blocks" for entry in path)
        in_norm = path[-2].key.startswith("norm") if len(path) > 1 else False
        return x.astype(model.encoder.dtype) if in_block and not in_norm else x
    return jax.tree_util.tree_map_with_path(cast, params)


# ------------------------------------------------------------------------- the training step
def make_step(model: ModelSpec, optimizer: optax.GradientTransformation, seed: int,
              grad_accum: int = 1, devices: list | None = None, zero1: bool = False,
              grad_clip: float = 0.0) -> Callable:
    """The step (params, opt_state, batch) -> (params, opt_state, metrics). jax.pmap runs it on all
    devices at once: all arrays have a leading axis of local devices. A device's batch is {"images"
    (B,R,R,3) uint8, "text" (B,T) int32, "position" (B,) int32}, and "alt" (B,T) where the objective
    reads a second caption. The new params and opt_state take the memory of those passed in, which
    cannot be used again.

    Loss and count (of tokens, or of images for a contrastive loss) are summed over all devices
    before one is divided by the other. So the update is that of the global batch, however it is
    divided over devices or cut into `grad_accum` microbatches. Which patches of an image are kept
    depends on the seed and on the image's position in the run.

    With `zero1`, each device keeps the optimizer state of its own shard of the parameters, updates
    it, and all exchange the new shards (ZeRO stage 1, arXiv:1910.02054): same update."""
    root_key = jax.random.key(seed)
    value_and_grad = jax.value_and_grad(objective_loss(model.objective), has_aux=True)

    def loss_and_grads(params: dict, batch: dict) -> tuple:
        """((summed loss, count), gradients of the summed loss)."""
        keys = jax.vmap(lambda position: jax.random.fold_in(root_key, position))(batch["position"])
        return value_and_grad(cast_block_params(params, model), batch, keys, model)

    def accumulate(params: dict, batch: dict) -> tuple:
        microbatches = jax.tree.map(lambda x: x.reshape(grad_accum, -1, *x.shape[1:]), batch)
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), params)

        def add(total: tuple, microbatch: dict) -> tuple:
            return jax.tree.map(jnp.add, total, loss_and_grads(params, microbatch)), None
        return jax.lax.scan(add, ((jnp.float32(0), jnp.int32(0)), zeros), microbatches)[0]

    def step(params: dict, opt_state: Any, batch: dict) -> tuple:
        own_params = params  # those that this device updates: all, or with zero1 its shards
        if zero1:  # the barrier makes XLA slice first, to free the full arrays after the gradient
            shards = jax.tree.map(local_shard, params)
            own_params, params = jax.lax.optimization_barrier((shards, params))
        # 1. Sums over this device's images: the loss, its tokens, the gradients (to fp32).
        sums, grads = (loss_and_grads if grad_accum == 1 else accumulate)(params, batch)
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)
        # 2. Sums over all devices, divided by the number of tokens.
        loss, count = jax.lax.psum(sums, "devices")
        count = jnp.maximum(count, 1)
        grads = jax.tree.map(reduce_scatter, grads) if zero1 else jax.lax.psum(grads, "devices")
        grads = jax.tree.map(lambda g: g / count, grads)
        # 3. Clipping, and AdamW.
        grad_norm = global_norm(grads, params) if zero1 else optax.tree.norm(grads)
        if grad_clip:
            grads = jax.tree.map(lambda g: g * jnp.minimum(1, grad_clip / grad_norm), grads)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, opt_state, own_params)
            new_params = optax.apply_updates(own_params, updates)
        if zero1:
            new_params = jax.tree.map(lambda x, p: all_gather(x, p.shape), new_params, params)
        return new_params, opt_state, {"loss": loss / count, "grad_norm": grad_norm}

    return jax.pmap(step, axis_name="devices", donate_argnums=(0, 1), devices=devices)


# ------------------------------------------------------------------------------- the loop
def train(cfg: Config) -> int:
    """Trains a run, or what is left of it. Returns the exit status: 0, or 128 + the signal that
    stopped it. Raises UserError, whose message says what the user can change."""
    validate(cfg)
    microbatch_sizes = [stage.batch // cfg.grad_accum for stage in parse_stages(cfg.stages)]
    if cfg.distributed:  # one CPU device per process ([]): several processes use all cores already
        microbatch_sizes = []
    num_params, step_flops = sum(registry.param_counts(cfg).values()), registry.step_flops(cfg)
    tune_cpu(num_params, microbatch_sizes, cfg.num_devices, step_flops)
    distributed.initialize_distributed(cfg.distributed, cfg.workdir)
    try:
        parallel = DataParallel(cfg.num_devices)
    except ValueError as problem:
        raise ConfigError(f"--num-devices: {problem}") from None
    validate(cfg, parallel.num_devices)  # again, now that the number of devices is known
    if cfg.tensorboard:  # only process 0 needs the package, but its error ends all processes
        parallel.broadcast_from_main(check_tensorboard)
    # If the run is in a bucket, cfg.workdir is now a copy.
    with distributed.leave_together(parallel), open_folder(cfg) as (cfg, lock):
        try:
            return train_run(Run(cfg, parallel, lock))
        except OSError as problem:  # the error of a full disk names no file
            problem.filename = problem.filename or cfg.workdir
            raise


def train_run(run: Run) -> int:
    """Trains through the stages that are left. Returns the exit status."""
    if run.finished:
        print(f"{run.lock.workdir} is finished: see {run.path('samples.png')}; delete the folder "
              "or name another --workdir to train again")
        return 0
    if run.step:
        if run.parallel.is_main:
            print(f"continuing {run.lock.workdir} from step {run.step} of {run.stages[-1].end}")
        shapes = jax.eval_shape(lambda: registry.init_params(run.cfg, run.model))
        params = run.restore(shapes, "params")
    else:
        params = run.parallel.broadcast_arrays(registry.initial_params(run.cfg, run.model))
    if run.cfg.objective == "lit":  # the features of its frozen encoder can be cached
        run.loader = registry.objective_module("lit").training_loader(run, params)
    params = run.parallel.replicate(params)
    monitor = Monitor(run)
    evaluator = Evaluator(run, monitor, openvision2_loss)  # which another objective replaces

    with distributed.PreemptionHandler(run.parallel) as preemption:
        try:
            for stage in run.stages:
                # An evaluation that is due at a stage's end is made at that stage's resolution. The
                # last stage is always entered, because `finish` needs its validation images.
                evaluation_pending = run.step == stage.end and run.state["evaluation_pending"]
                if run.step < stage.end or evaluation_pending or stage is run.stages[-1]:
                    params = train_stage(run, monitor, evaluator, stage, params, preemption)
            evaluator.finish(params)
        except distributed.Preempted as preempted:
            monitor.bar.close()
            if run.parallel.is_main:
                print(f"{preempted}: saved at step {run.step}; the same command continues there")
            return 128 + preempted.signal
        finally:
            monitor.close()  # before an error is printed: the bar would be drawn over it
    return 0


def train_stage(run: Run, monitor: Monitor, evaluator: Evaluator, stage: Stage, params: Any,
                preemption: distributed.PreemptionHandler) -> Any:
    """Runs the remaining steps of a stage, and returns the parameters after them. If a process
    received a signal, saves and raises Preempted."""
    cfg, parallel = run.cfg, run.parallel
    optimizer = make_optimizer(cfg, stage)
    train_step = make_step(run.model, optimizer, cfg.seed, cfg.grad_accum, parallel.pmap_devices,
                           cfg.zero1, cfg.grad_clip)
    opt_shapes = jax.eval_shape(lambda: optimizer.init(registry.init_params(cfg, run.model)))
    opt_state = initial_opt_state(run, stage, optimizer, opt_shapes, params)
    run.arrays = {}  # frees the checkpoint's arrays: what is needed is on the devices now
    evaluator.start_stage(stage, preemption.check)
    monitor.start_stage(stage)

    def save() -> None:
        run.save({"params": parallel.unreplicate(params),
                  "opt": parallel.gather(opt_state, opt_shapes)})

    pending = None  # the step that runs on the device, whose metrics are not read yet
    signal = 0      # that a process received (SIGTERM, SIGINT); 0 for none
    try:
        if run.state["evaluation_pending"]:
            evaluator.evaluate(params)
            if run.step == run.stages[-1].end:  # no step follows that would save
                save()
        with contextlib.closing(run.batches(stage)) as batches:
            for step in range(run.step + 1, stage.end + 1):
                wait_start = time.monotonic()
                batch, bad = next(batches)
                monitor.data_wait += time.monotonic() - wait_start

                # This starts the step and does not wait for it.
                params, opt_state, metrics = monitor.profiler.run_step(step, train_step, params,
                                                                       opt_state, batch)
                # So that all processes stop after the same step, and count the same bad samples.
                status = parallel.all_reduce_status(preemption.signal, len(bad))
                lr = learning_rate(stage, step - 1 - stage.start)

                # Now that the device has work, read the metrics of the step before.
                if pending is not None:
                    signal = monitor.finish_step(pending)  # the signal in that step's status
                pending = PendingStep(step, lr, metrics, status, bad)

                evaluate_now = step % cfg.eval_every == 0 or step == stage.end
                save_now = step % cfg.save_every == 0 or step == run.stages[-1].end
                if evaluate_now or save_now or signal:
                    signal = monitor.finish_step(pending) or signal
                    pending = None
                    run.state["evaluation_pending"] = evaluate_now  # evaluate() clears it
                    if signal:
                        raise distributed.Preempted(signal)
                    if evaluate_now:
                        evaluator.evaluate(params)
                    if save_now:
                        save()
    except distributed.Preempted:  # also from within an evaluation, which the next start repeats
        save()
        raise
    monitor.bar.close()
    return params


def initial_opt_state(run: Run, stage: Stage, optimizer: optax.GradientTransformation,
                      opt_shapes: Any, params: Any) -> Any:
    """The optimizer state, on the devices: new at the start of a stage, else the checkpoint's. With
    --zero1, each device gets its shard."""
    zero1, parallel = run.cfg.zero1, run.parallel
    if run.step > stage.start:
        saved = run.restore(opt_shapes, "opt")
        return parallel.shard(saved) if zero1 else parallel.replicate(saved)

    def init(params: dict) -> Any:
        return optimizer.init(jax.tree.map(local_shard, params) if zero1 else params)
    return parallel.pmap(init)(params)


# ---------------------------------------------------------------------------- the command
def dry_run(cfg: Config) -> int:
    validate(cfg)
    print(registry.run_summary(cfg))
    return 0


def main(argv: list[str]) -> int:
    """The command. Returns the exit status."""
    cfg, is_dry_run = parse_args(argv)
    try:
        status = run_command(dry_run if is_dry_run else train, cfg)
    except jax.errors.JaxRuntimeError as problem:
        if "RESOURCE_EXHAUSTED" in str(problem):
            message = ("out of memory: try --zero1 (for several devices), --grad-accum 4, "
                       "--remat dots or block, --loss-chunk 16, then a smaller batch in --stages")
        elif jax.process_count() > 1:
            message = distributed.PEER_LOST
        else:
            raise
        print(f"error: {message} ({str(problem).splitlines()[0][:200]})", file=sys.stderr)
        status = 1
    if status == 1:
        distributed.abort_process()  # so that the other processes notice
    return status


if __name__ == "__main__":
    enable_compilation_cache()
    images.silence_pillow()
    sys.exit(main(sys.argv[1:]))

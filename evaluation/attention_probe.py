"""The attention-pooled probe: a linear classifier on a mixture of patch tokens.

Each task has a learned query, which says how much of each token its mixture holds. The training is
AdamW, for all tasks at once.

Letters: n images, N patches, D width, T tasks, C classes of all tasks side by side.
"""
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from evaluation.tasks import Tasks, selection_rows, standardize


def class_columns(num_classes: tuple[int, ...]) -> list[tuple[int, int]]:
    """The columns at which each task's classes begin and end."""
    return list(itertools.pairwise(np.cumsum((0, *num_classes)).tolist()))


def class_to_task(num_classes: tuple[int, ...]) -> np.ndarray:
    """(C,T) of 0 and 1: the task of each class. A sum over a task's classes is then one matmul."""
    return np.repeat(np.eye(len(num_classes), dtype=np.float32), num_classes, axis=0)


def one_hot(classes: np.ndarray, num_classes: tuple[int, ...]) -> np.ndarray:
    """Classes (n,T) to (n,C) of 0 and 1; all 0 for a task where an image has no label."""
    targets = np.zeros((len(classes), sum(num_classes)), np.float32)
    row, task = np.nonzero(classes >= 0)
    first = np.cumsum((0, *num_classes))[task]
    targets[row, first + classes[row, task]] = 1
    return targets


@jax.jit
def cross_entropy(logits: jax.Array, targets: jax.Array, to_task: jax.Array) -> jax.Array:
    """Logits and targets (n,C), to_task (C,T) to the loss of each task, summed over the images that
    have its label: (T,)."""
    shifted = logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    log_sum = jnp.log(jnp.exp(shifted) @ to_task + 1e-30)                          # (n,T)
    return ((targets @ to_task) * log_sum - (targets * shifted) @ to_task).sum(0)


def attention_logits(params: dict, x: jax.Array, to_task: jax.Array) -> jax.Array:
    """Tokens (n,N,D) to logits (n,C). Classifying every token and mixing the logits is the same as
    classifying the mixture, and faster."""
    n, N, D = x.shape
    rows = x.reshape(n * N, D)
    scores = (rows @ params["query"]).reshape(n, N, -1) * D ** -0.5                # (n,N,T)
    attention_weights = jax.nn.softmax(scores, axis=1)
    token_logits = (rows @ params["kernel"]).reshape(n, N, -1)                     # (n,N,C)
    return (attention_weights @ to_task.T * token_logits).sum(1) + params["bias"]


@jax.jit
def batched_logits(params: dict, x: jax.Array, to_task: jax.Array) -> jax.Array:
    """`attention_logits`, 256 images at a time: the logits of every token take memory."""
    def of_image(tokens: jax.Array) -> jax.Array:
        return attention_logits(params, tokens[None], to_task)[0]
    return jax.lax.map(of_image, x, batch_size=256)


@functools.partial(jax.jit, static_argnames=("rounds", "steps", "batch", "lr"))
def fit(x: jax.Array, fit_targets: jax.Array, selection_targets: jax.Array, to_task: jax.Array,
        key: jax.Array, rounds: int = 12, steps: int = 50, batch: int = 256,
        lr: float = 1e-2) -> dict:
    """{"query" (D,T), "kernel" (D,C), "bias" (C,)} for tokens x (n,N,D), trained on fit_targets
    (n,C). Each task keeps the round that had the lowest loss on selection_targets (n,C): early
    stopping prevents overfitting."""
    optimizer = optax.adamw(optax.cosine_decay_schedule(lr, rounds * steps), weight_decay=1e-2)

    def loss(params: dict, rows: jax.Array) -> jax.Array:
        targets = fit_targets[rows]
        losses = cross_entropy(attention_logits(params, x[rows], to_task), targets, to_task)
        return (losses / jnp.maximum((targets @ to_task).sum(0), 1)).sum()

    def step(state: tuple, n: jax.Array) -> tuple:
        params, opt_state = state
        rows = jax.random.randint(jax.random.fold_in(key, n), (batch,), 0, len(x))
        updates, opt_state = optimizer.update(jax.grad(loss)(params, rows), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    def one_round(state: tuple, n: jax.Array) -> tuple:
        params, opt_state, best, best_loss = state
        round_steps = n * steps + jnp.arange(steps)
        (params, opt_state), _ = jax.lax.scan(step, (params, opt_state), round_steps)
        losses = cross_entropy(batched_logits(params, x, to_task), selection_targets, to_task)
        better = losses < best_loss                                                # (T,)
        of_class = to_task @ better > 0                                            # (C,)
        masks = {"query": better, "kernel": of_class, "bias": of_class}
        best = {name: jnp.where(masks[name], params[name], best[name]) for name in best}
        return (params, opt_state, best, jnp.minimum(losses, best_loss)), None

    D, (C, T) = x.shape[-1], to_task.shape
    params = {"query": jnp.zeros((D, T)), "kernel": jnp.zeros((D, C)), "bias": jnp.zeros(C)}
    start = params, optimizer.init(params), params, jnp.full(T, jnp.inf)
    return jax.lax.scan(one_round, start, jnp.arange(rounds))[0][2]


def attention_probe(train: np.ndarray, test: np.ndarray, tasks: Tasks, seed: int = 0) -> np.ndarray:
    """Predictions (m,T) from tokens (k*n,N,D) and (m,N,D), where the k copies of the n training
    images follow one another."""
    x, z = standardize(train, test)
    n = len(tasks.train)
    classes = np.tile(tasks.train, (len(train) // n, 1))
    selection = selection_rows(len(train), n, seed)[:, None]
    num_classes = tuple(tasks.num_classes.tolist())
    to_task = class_to_task(num_classes)
    fit_targets = one_hot(np.where(selection, -1, classes), num_classes)
    selection_targets = one_hot(np.where(selection, classes, -1), num_classes)
    params = fit(x, fit_targets, selection_targets, to_task, jax.random.key(seed))
    logits = np.asarray(batched_logits(params, z, to_task))
    columns = class_columns(num_classes)
    return np.stack([logits[:, start:end].argmax(-1) for start, end in columns], 1)

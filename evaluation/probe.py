"""What can be read from frozen features: a linear probe, an attention-pooled probe, and the nearest neighbours.

The encoder stays as it is; only a reader is trained on its output, for each label: multinomial logistic regression on
the pooled feature ("pooled"), on all patch tokens side by side, each in its place ("grid"), and on the patch tokens mixed as one
learned query a label wants ("attended"); the nearest training pictures by cosine of the pooled feature ("neighbours").
What a reader finds may have been there without learning: so beside stand the same readers of an encoder with random parameters
("random") and of the raw pixels (24 x 24, RGB), which know their place as "grid" does, and the commonest label.

Where a label has one picture a class, as the names of emoji, no regression can learn from it how pictures of a class differ. What
can be had is how augmented copies of a picture differ: features are whitened by that covariance, and the nearest class mean by
cosine answers. That is Fisher's linear discriminant (1936), a linear classifier in closed form; speech calls it within-class
covariance normalisation (Hatch, Kajarekar and Stolcke, 2006). Linear readers do it for such labels, "whitened" are the nearest
neighbours by "grid" so treated, for all labels, and the raw pixels are treated alike.

Letters: n pictures, N patches, D width, T tasks (a label in one place of a scene is one), C classes of all tasks side by side.
"""
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from evaluation.labels import RAW_SIZE, LabeledImages
from inputs import images
from interop.encoder import Encoder, random_encoder
from runtime.errors import DataError

L2 = (1e-3, 1e-2, 1e-1, 1.0)  # strengths to choose from
NEIGHBOURS = (1, 3, 5, 10, 20)      # likewise
WIDEST = 2048                       # features; wider ones are narrowed. The raw pixels, 1,728, are not
COPIES, SHRINK = 16, 0.2            # of a training picture that is the only one of its class, and of their covariance towards a multiple of one
REGRESSED = 4                       # of those copies are used where a label has many pictures a class: more take long and tell little
COPY = images.Augment(min_crop_area=0.6, jitter=0.3, grayscale_prob=0.1)


def tasks(train: dict[str, np.ndarray], test: dict[str, np.ndarray]) -> tuple[list[str], tuple[int, ...], np.ndarray, np.ndarray]:
    """Labels (n,H) of str to (label name of each task, classes of each, training classes (n,T), held-out classes (m,T)); -1 where a
    picture has no label, or one that no training picture has. DataError where there is nothing to tell apart."""
    names, sizes, columns = [], [], ([], [])
    for name, told in train.items():
        kinds = sorted(set(told.ravel().tolist()) - {""})
        if len(kinds) < 2:
            continue                                     # there is nothing to tell apart
        number = {kind: i for i, kind in enumerate(kinds)}
        for head in np.flatnonzero((told != "").any(0)):  # of few scenes, none may have anything in some place
            names.append(name)
            sizes.append(len(kinds))
            for column, texts in zip(columns, (told, test[name])):
                column.append([number.get(text, -1) for text in texts[:, head].tolist()])
    if not names:
        raise DataError(f"there is nothing to tell apart: all training pictures have the same {' and the same '.join(train)}")
    return names, tuple(sizes), *(np.array(column, np.int32).T for column in columns)


def accuracy(names: list[str], right: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Of each label the share of right answers (m,T), over all its heads."""
    found = {}
    for name in dict.fromkeys(names):
        mine = [t for t, other in enumerate(names) if other == name]
        asked = truth[:, mine] >= 0
        found[name] = float(right[:, mine][asked].mean()) if asked.any() else float("nan")
    return found


def standard(train: np.ndarray, *others: np.ndarray) -> list[np.ndarray]:
    """Features over the last axis with mean 0 and deviation 1 by the training pictures."""
    flat = train.reshape(-1, train.shape[-1])
    mean, deviation = flat.mean(0), flat.std(0) + 1e-6
    return [((x - mean) / deviation).astype(np.float32) for x in (train, *others)]


def parts(sizes: tuple[int, ...]) -> list[tuple[int, int]]:
    """Columns at which each task's classes begin and end."""
    ends = np.cumsum((0, *sizes)).tolist()
    return list(itertools.pairwise(ends))


def class_to_task(sizes: tuple[int, ...]) -> np.ndarray:
    """(C,T) of 0 and 1: whose column each is. Sums over a task's classes are then one matmul, whatever their number."""
    return np.repeat(np.eye(len(sizes), dtype=np.float32), sizes, axis=0)


def targets(y: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
    """Classes (n,T) to (n,C) of 0 and 1; all 0 in the columns of a task of which a row has no label."""
    found = np.zeros((len(y), sum(sizes)), np.float32)
    row, task = np.nonzero(y >= 0)
    found[row, np.cumsum((0, *sizes))[task] + y[row, task]] = 1
    return found


def shift(scores: jax.Array, mine: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Scores (n,C) below the row's greatest, and log of each task's sum of their exponentials (n,T)."""
    below = scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    return below, jnp.log(jnp.exp(below) @ mine + 1e-30)


@jax.jit
def cross_entropy(scores: jax.Array, target: jax.Array, mine: jax.Array) -> jax.Array:
    """scores and target (n,C), mine (C,T) to the loss of each task, summed over the rows that have a label: (T,)."""
    below, log_sum = shift(scores, mine)
    return ((target @ mine) * log_sum - (target * below) @ mine).sum(0)


def predict(scores: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
    """The likeliest class of each task: (n,T)."""
    return np.stack([scores[:, a:b].argmax(-1) for a, b in parts(sizes)], 1)


def split(y: np.ndarray, pictures: int, seed: int) -> np.ndarray:
    """(n,1) bool, True for what chooses strengths instead of training: a fifth of the pictures, whose copies follow one another."""
    return np.tile(np.random.default_rng((seed, 6)).random(pictures) < 0.2, len(y) // pictures)[:, None]


def one_shot(y: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
    """(T,) bool: of which tasks the classes have less than two of the training pictures (n,T) each, by the mean."""
    return (y >= 0).sum(0) < 2 * np.array(sizes)


def some_tasks(y: np.ndarray, sizes: tuple[int, ...], wanted: np.ndarray) -> tuple[np.ndarray, tuple[int, ...]]:
    """Classes (n,T) and sizes of the wanted tasks (T,) bool alone."""
    return y[:, wanted], tuple(np.array(sizes)[wanted].tolist())


@functools.partial(jax.jit, static_argnames="steps")
def fit(x: jax.Array, target: jax.Array, l2: jax.Array, mine: jax.Array, steps: int = 100) -> jax.Array:
    """Multinomial logistic regression for all tasks at once: weights (D,C) that make mean cross-entropy + l2/2 |weights|^2 least.
    x (n,D) with orthogonal columns, the last one constant (the bias, which l2 leaves alone); target (n,C); l2 (T,); mine (C,T).

    The second derivative of the softmax is at most 1/2 (Böhning, 1992), so with orthogonal columns the step to the least of a bound from above is
    a division by column, without a line search; momentum (Nesterov), begun anew where it goes uphill, makes it fast."""
    counts = jnp.maximum((target @ mine).sum(0), 1)                                              # (T,)
    labelled = (target @ mine / counts) @ mine.T                                                 # (n,C)
    strength = (mine @ l2) * jnp.ones((x.shape[1], 1)).at[-1].set(0)                             # (D,C)
    bound = 0.5 * jnp.square(x).sum(0)[:, None] / (mine @ counts) + strength + 1e-9
    wanted = target / (mine @ counts)

    def step(state, _):
        w, before, age = state
        ahead = w + (mine @ (age / (age + 3))) * (w - before)
        below, log_sum = shift(x @ ahead, mine)
        slope = x.T @ (jnp.exp(below - log_sum @ mine.T) * labelled - wanted) + strength * ahead
        new = ahead - slope / bound
        uphill = (slope * (new - w)).sum(0) @ mine > 0
        return (new, w, jnp.where(uphill, 0, age + 1)), None
    zero = jnp.zeros((x.shape[1], target.shape[1]))
    return jax.lax.scan(step, (zero, zero, jnp.zeros(len(l2))), None, steps)[0][0]


def wide(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (n,N,D), (m,N,D) or pixels to features (n,N*D), (m,N*D); or, where there would be very many, to those along the WIDEST directions that
    hold about the most of the training ones: the range of a random sketch (Halko, Martinsson and Tropp, 2011)."""
    train, test = (x.reshape(len(x), -1).astype(np.float32) for x in (train, test))
    if train.shape[1] <= WIDEST:
        return train, test
    sketch = np.random.default_rng(0).standard_normal((train.shape[1], WIDEST), np.float32)
    basis, _ = np.linalg.qr(train.T @ (train @ sketch))
    return train @ basis, test @ basis


def rotate(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features along their principal directions, and a column of ones. The regression is the same in any rotation. Directions that
    single precision cannot tell from none are left out: there are never more than pictures."""
    values, directions = np.linalg.eigh(train.T @ train / len(train))
    there = directions[:, values > 1e-7 * values.max()]
    return tuple(np.concatenate([x @ there, np.ones((len(x), 1), np.float32)], 1) for x in (train, test))


def linear(train: np.ndarray, test: np.ndarray, y: np.ndarray, sizes: tuple[int, ...], pictures: int, seed: int = 0) -> np.ndarray:
    """Features (n,D), (m,D) and classes (n,T) to answers (m,T): by Fisher's discriminant for lonely tasks, by regression for the others. Each
    one's l2 is that which answers a part of the training pictures best. Copies of the `pictures` follow one another."""
    few, found = one_shot(y[:pictures], sizes), np.zeros((len(test), len(sizes)), np.int32)
    if few.any():
        found[:, few] = nearest(*whiten(train, test, pictures), *some_tasks(y[:pictures], sizes, few))
    if not few.all():
        some = slice(REGRESSED * pictures)
        found[:, ~few] = regress(train[some], test, *some_tasks(y[some], sizes, ~few), pictures, seed)
    return found


def regress(train: np.ndarray, test: np.ndarray, y: np.ndarray, sizes: tuple[int, ...], pictures: int, seed: int) -> np.ndarray:
    x, z = rotate(*standard(train, test))
    held = split(y, pictures, seed)
    some, rest, mine = targets(np.where(held, -1, y), sizes), targets(np.where(held, y, -1), sizes), class_to_task(sizes)
    losses = [cross_entropy(x @ fit(x, some, np.full(len(sizes), l2, np.float32), mine), rest, mine) for l2 in L2]
    best = np.array(L2, np.float32)[np.argmin(losses, 0)]
    return predict(z @ np.asarray(fit(x, some + rest, best, mine)), sizes)


def read(params: dict, x: jax.Array, mine: jax.Array) -> jax.Array:
    """Tokens (n,N,D) to scores (n,C): each task's query says how much of each token it wants, and its linear classifier reads the
    mixture; or, which is the same and faster, reads every token, and the answers are mixed."""
    n, N, D = x.shape
    rows = x.reshape(n * N, D)
    looks = jax.nn.softmax((rows @ params["query"]).reshape(n, N, -1) * D ** -0.5, axis=1)       # (n,N,T)
    said = (rows @ params["kernel"]).reshape(n, N, -1)                                           # (n,N,C)
    return (looks @ mine.T * said).sum(1) + params["bias"]


@functools.partial(jax.jit, static_argnames=("rounds", "steps", "batch", "rate"))
def fit_attended(x: jax.Array, some: jax.Array, rest: jax.Array, mine: jax.Array, key: jax.Array, rounds: int = 12, steps: int = 50,
                 batch: int = 256, rate: float = 1e-2) -> dict:
    """{"query" (D,T), "kernel" (D,C), "bias" (C,)} by AdamW on x (n,N,D) and the targets `some` (n,C). After each round the targets `rest`
    are tried, and each task keeps its best round: the early end is what keeps it from learning by heart."""
    optimizer = optax.adamw(optax.cosine_decay_schedule(rate, rounds * steps), weight_decay=1e-2)

    def loss(params, rows):
        return (cross_entropy(read(params, x[rows], mine), some[rows], mine) / jnp.maximum((some[rows] @ mine).sum(0), 1)).sum()

    def step(state, n):
        params, memory = state
        rows = jax.random.randint(jax.random.fold_in(key, n), (batch,), 0, len(x))
        change, memory = optimizer.update(jax.grad(loss)(params, rows), memory, params)
        return (optax.apply_updates(params, change), memory), None

    def one_round(state, n):
        params, memory, best, least = state
        (params, memory), _ = jax.lax.scan(step, (params, memory), n * steps + jnp.arange(steps))
        now = cross_entropy(scores_of(params, x, mine), rest, mine)
        better = now < least
        pick = {"query": better, "kernel": mine @ better > 0, "bias": mine @ better > 0}
        return (params, memory, {k: jnp.where(pick[k], params[k], best[k]) for k in best}, jnp.minimum(now, least)), None
    D, (C, T) = x.shape[-1], mine.shape
    params = {"query": jnp.zeros((D, T)), "kernel": jnp.zeros((D, C)), "bias": jnp.zeros(C)}
    start = params, optimizer.init(params), params, jnp.full(T, jnp.inf)
    return jax.lax.scan(one_round, start, jnp.arange(rounds))[0][2]


@jax.jit
def scores_of(params: dict, x: jax.Array, mine: jax.Array) -> jax.Array:
    """As `read`, a piece at a time: what it reads of every token is large."""
    return jax.lax.map(lambda one: read(params, one[None], mine)[0], x, batch_size=256)


def attended(train: np.ndarray, test: np.ndarray, y: np.ndarray, sizes: tuple[int, ...], pictures: int, seed: int = 0) -> np.ndarray:
    """Tokens (n,N,D), (m,N,D) and classes (n,T) to answers (m,T)."""
    x, z = standard(train, test)
    held, mine = split(y, pictures, seed), class_to_task(sizes)
    params = fit_attended(x, targets(np.where(held, -1, y), sizes), targets(np.where(held, y, -1), sizes), mine, jax.random.key(seed))
    return predict(np.asarray(scores_of(params, z, mine)), sizes)


def vote(similar: np.ndarray, y: np.ndarray, size: int, k: int) -> np.ndarray:
    """similar (m,n) by cosine, y (n,) to the class (m,) with the most votes of the k most similar, nearer ones weighing a little more."""
    k = min(k, len(y))
    near = np.argpartition(-similar, k - 1, axis=1)[:, :k]
    weight = np.exp(np.take_along_axis(similar, near, 1) / 0.07)
    votes = np.zeros((len(similar), size))
    np.add.at(votes, (np.arange(len(similar))[:, None], y[near]), weight)
    return votes.argmax(1)


def nearest(train: np.ndarray, test: np.ndarray, y: np.ndarray, sizes: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Features (n,D), (m,D) and classes (n,T) to answers (m,T) of the nearest by cosine. Each task's k is the best for 500 training pictures
    among the others; 1 for lonely ones."""
    x, z = (a / (np.linalg.norm(a, axis=1, keepdims=True) + 1e-9) for a in (train, test))
    drawn = np.random.default_rng((seed, 7)).choice(len(x), min(500, len(x)), replace=False)
    among = x[drawn] @ x.T
    among[np.arange(len(drawn)), drawn] = -2                # not itself
    similar, few, found = z @ x.T, one_shot(y, sizes), []
    for t, size in enumerate(sizes):
        has = np.flatnonzero(y[:, t] >= 0)
        asked = np.flatnonzero(y[drawn, t] >= 0)
        k = 1 if few[t] or not len(asked) else max(
            NEIGHBOURS, key=lambda k, t=t, has=has, asked=asked, size=size: (vote(among[np.ix_(asked, has)], y[has, t], size, k) == y[drawn[asked], t]).mean())
        found.append(vote(similar[:, has], y[has, t], size, k))
    return np.stack(found, 1)


def neighbours(train: np.ndarray, test: np.ndarray, y: np.ndarray, sizes: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """The nearest by features of mean 0 and deviation 1."""
    return nearest(*standard(train, test), y, sizes, seed)


def whiten(train: np.ndarray, test: np.ndarray, pictures: int) -> tuple[np.ndarray, np.ndarray]:
    """Features of COPIES of the pictures (n,D), which follow one another, and (m,D), to the mean of each picture's copies (pictures,D), and (m,D),
    both whitened: turned and stretched so that copies of a picture differ alike in all directions."""
    copies = (train - train.mean(0)).reshape(-1, pictures, train.shape[1])
    mean = copies.mean(0)
    spread = (copies - mean).reshape(len(train), -1)
    covariance = spread.T @ spread / len(train)
    values, directions = np.linalg.eigh((1 - SHRINK) * covariance + SHRINK * np.trace(covariance) / len(covariance) * np.eye(len(covariance), dtype=np.float32))
    stretch = directions / np.sqrt(values)
    return mean @ stretch, (test - train.mean(0)) @ stretch


def euclid(train: np.ndarray, test: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Features (n,D), (m,D) and classes (n,T) to those of the one nearest picture by plain distance (m,T)."""
    return y[(np.square(train).sum(1) - 2 * test @ train.T).argmin(1)]


def measure(encoder: Encoder, train: LabeledImages, test: LabeledImages, readers: tuple[str, ...] = ("pooled", "grid", "attended", "neighbours", "whitened"),
            baselines: bool = True, seed: int = 0) -> dict[str, dict[str, float]]:
    """{row: {label: share of right answers}} on labelled pictures. Rows are the readers, and with baselines those of "random" and "pixels",
    and "commonest". "whitened" is there if a label has about one picture a class, and "attended" does not read such a label. A held-out
    picture whose label no training picture has is not asked about."""
    names, sizes, y, truth = tasks(train.labels, test.labels)
    n, few, found = len(train), one_shot(y, sizes), {}
    readers = tuple(r for r in readers if (r != "whitened" or few.any()) and (r != "attended" or not few.all()))
    if few.any():
        train = train.augmented(COPIES, COPY)                    # whose first n are the pictures as they are
    y_all = np.tile(y, (len(train) // n, 1))

    def note(row: str, said: np.ndarray, some: slice | np.ndarray = slice(None)) -> None:
        found[row] = accuracy(np.array(names)[some].tolist(), said == truth[:, some], truth[:, some])
    for title, model in (("", encoder), *((("random ", random_encoder(encoder, seed)),) if baselines else ())):
        x, z = train.features(model), test.features(model)
        grid = wide(x.tokens, z.tokens) if {"grid", "whitened"} & set(readers) else ()
        if "pooled" in readers:
            note(title + "pooled", linear(x.pooled, z.pooled, y_all, sizes, n, seed))
        if "grid" in readers:
            note(title + "grid", linear(*grid, y_all, sizes, n, seed))
        if "attended" in readers:
            note(title + "attended", attended(x.tokens[:REGRESSED * n], z.tokens, *some_tasks(y_all[:REGRESSED * n], sizes, ~few), n, seed), ~few)
        if "neighbours" in readers:
            note(title + "neighbours", neighbours(x.pooled[:n], z.pooled, y, sizes, seed))
        if "whitened" in readers:
            note(title + "whitened", nearest(*whiten(*grid, n), y, sizes, seed))
    if baselines:
        plain = [pictures.pixels(RAW_SIZE).reshape(len(pictures), -1).astype(np.float32) for pictures in (train, test)]
        x, z = wide(*plain)
        if {"pooled", "grid", "attended"} & set(readers):
            note("pixels linear", linear(x, z, y_all, sizes, n, seed))
        if "neighbours" in readers:
            note("pixels neighbours", neighbours(plain[0][:n], plain[1], y, sizes, seed))
            note("pixels nearest", euclid(plain[0][:n], plain[1], y))
        if "whitened" in readers:
            note("pixels whitened", nearest(*whiten(x, z, n), y, sizes, seed))
        commonest = [np.bincount(y[y[:, t] >= 0, t]).argmax() for t in range(len(sizes))]
        note("commonest", np.broadcast_to(commonest, truth.shape))
    return found

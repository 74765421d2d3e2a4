"""Linear probes: multinomial logistic regression, or Fisher's discriminant for one-shot labels.

A label with one image per class, such as the name of an emoji, does not say how images of a class
differ. How augmented copies of an image differ is known: features are whitened by that covariance,
and the class of the most similar image, by cosine, is the prediction. This is Fisher's linear
discriminant (1936), a linear classifier in closed form. Speech recognition calls it within-class
covariance normalization (Hatch, Kajarekar and Stolcke, 2006).

Letters: n training images, m validation images, N patches, D width, T tasks.
"""
import warnings
from typing import Any

import numpy as np

from evaluation.neighbors import nearest_neighbors
from evaluation.tasks import Tasks, import_module, progress, selection_rows, standardize
from objectives.fisher import shrink

L2 = (1.0, 1e-1, 1e-2, 1e-3)   # regularization strengths to choose from
MAX_WIDTH = 2048               # wider features are projected. The raw pixels, 1,728, are not
MIN_DEVIATION = 1e-4           # of a projected feature, relative to the largest
MAX_STEPS = 100                # of L-BFGS
REGRESSION_COPIES = 4          # copies of each image that regression uses; more only take time


def flatten_features(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (n,N,D) and (m,N,D), or pixels, to features (n,N*D) and (m,N*D). Wider ones than
    MAX_WIDTH become their coordinates in a subspace that holds most of the training features: the
    range of a random sketch (Halko, Martinsson and Tropp, 2011). It has at most n dimensions, and
    none in which the training features differ by rounding alone."""
    train = train.reshape(len(train), -1).astype(np.float32)
    test = test.reshape(len(test), -1).astype(np.float32)
    if train.shape[1] <= MAX_WIDTH:
        return train, test
    width = min(MAX_WIDTH, len(train))
    sketch = np.random.default_rng(0).standard_normal((train.shape[1], width), np.float32)
    basis, _ = np.linalg.qr(train.T @ (train @ sketch))
    projected = train @ basis
    deviation = projected.std(0)
    used = deviation > MIN_DEVIATION * deviation.max()
    return projected[:, used], test @ basis[:, used]


def linear_probe(train: np.ndarray, test: np.ndarray, tasks: Tasks, seed: int = 0) -> np.ndarray:
    """Predictions (m,T) from features (k*n,D) and (m,D), where the k copies of the n training
    images follow one another."""
    n = len(tasks.train)
    predictions = np.zeros(tasks.test.shape, np.int32)
    if tasks.one_shot.any():
        one_shot_tasks = tasks.subset(tasks.one_shot)
        predictions[:, tasks.one_shot] = nearest_neighbors(*whiten(train, test, n), one_shot_tasks)
    if tasks.one_shot.all():
        return predictions
    train, test = standardize(train[:REGRESSION_COPIES * n], test)
    selection = selection_rows(len(train), n, seed)
    for t in progress(np.flatnonzero(~tasks.one_shot), "linear probes"):
        classes = np.tile(tasks.train[:, t], len(train) // n)
        predictions[:, t] = logistic_regression(train, classes, selection, test)
    return predictions


def logistic_regression(x: np.ndarray, classes: np.ndarray, selection: np.ndarray,
                        test: np.ndarray) -> np.ndarray:
    """Predictions (m,) for test (m,D). The strength is the one with the lowest cross-entropy on the
    rows `selection` after training on the others; then all labeled rows train."""
    labeled = classes >= 0
    if len(set(classes[labeled].tolist())) == 1:  # which scikit-learn refuses
        return np.full(len(test), classes[labeled][0])
    fit_rows, select_rows = labeled & ~selection, labeled & selection
    best_l2, best_loss = L2[-1], np.inf
    if len(set(classes[fit_rows].tolist())) > 1 and select_rows.any():
        model = make_model()
        for l2 in L2:  # each fit starts from the one before
            fit(model, x[fit_rows], classes[fit_rows], l2)
            loss = cross_entropy(model, x[select_rows], classes[select_rows])
            if loss < best_loss:
                best_l2, best_loss = l2, loss
    return fit(make_model(), x[labeled], classes[labeled], best_l2).predict(test)


def make_model() -> Any:
    linear_model = import_module("sklearn.linear_model")
    return linear_model.LogisticRegression(max_iter=MAX_STEPS, warm_start=True)


def fit(model: Any, x: np.ndarray, classes: np.ndarray, l2: float) -> Any:
    """The model with the least mean cross-entropy + l2/2 |weights|^2 over x (n,D) and classes (n,),
    or the one after MAX_STEPS. One thread: faster for matrices of this size."""
    model.set_params(C=1 / (l2 * len(x)))
    with import_module("threadpoolctl").threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", import_module("sklearn.exceptions").ConvergenceWarning)
        return model.fit(x, classes)


def cross_entropy(model: Any, x: np.ndarray, classes: np.ndarray) -> float:
    """Mean over rows. A class that the model was not trained on has probability 0."""
    probabilities = np.zeros((len(x), max(classes.max(), model.classes_.max()) + 1))
    probabilities[:, model.classes_] = model.predict_proba(x)
    return float(-np.log(probabilities[np.arange(len(x)), classes] + 1e-30).mean())


def whiten(train: np.ndarray, test: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Features (k*n,D) of k copies of n images, and (m,D), to the mean of each image's copies (n,D)
    and (m,D), both whitened: copies of one image then differ alike in all directions."""
    mean = train.mean(0)
    copies = (train - mean).reshape(-1, n, train.shape[1])
    image_means = copies.mean(0)
    differences = (copies - image_means).reshape(len(train), -1)
    covariance = differences.T @ differences / len(train)
    values, directions = np.linalg.eigh(shrink(covariance))
    scaling = directions / np.sqrt(values)
    return image_means @ scaling, (test - mean) @ scaling

"""Nearest neighbors: the training images with the largest cosine similarity vote on the class.

Letters: n training images, m validation images, D width, T tasks, q queries, k neighbors that vote,
K neighbors that are searched.
"""
import numpy as np

from evaluation.tasks import Tasks, import_module, progress

NUM_NEIGHBORS = (1, 3, 5, 10, 20)  # k to choose from
TEMPERATURE = 0.07                 # the weight of a vote is exp(cosine / TEMPERATURE)


def nearest_neighbors(train: np.ndarray, test: np.ndarray, tasks: Tasks,
                      seed: int = 0) -> np.ndarray:
    """Predictions (m,T) from features (n,D) and (m,D). Each task has its own k: the one with the
    best leave-one-out accuracy on 500 training images. One-shot tasks have k = 1."""
    train, test = l2_normalize(train), l2_normalize(test)
    num_queries = min(500, len(train))
    drawn = np.random.default_rng((seed, 7)).choice(len(train), num_queries, replace=False)
    predictions = np.zeros(tasks.test.shape, np.int32)
    for t in progress(range(len(tasks.names)), "nearest neighbors"):
        classes, num_classes = tasks.train[:, t], tasks.num_classes[t]
        labeled = np.flatnonzero(classes >= 0)
        queries = drawn[classes[drawn] >= 0]
        k = 1
        if not tasks.one_shot[t] and len(queries):
            cosines, rows = search(train[labeled], train[queries])
            cosines, rows = cosines[:, 1:], rows[:, 1:]  # without the query itself, the nearest
            neighbor_classes = classes[labeled][rows]
            accuracies = []
            for candidate in NUM_NEIGHBORS:
                voted = vote(cosines, neighbor_classes, num_classes, candidate)
                accuracies.append((voted == classes[queries]).mean())
            k = NUM_NEIGHBORS[int(np.argmax(accuracies))]
        cosines, rows = search(train[labeled], test)
        predictions[:, t] = vote(cosines, classes[labeled][rows], num_classes, k)
    return predictions


def search(train: np.ndarray, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(cosines, rows of train) of each query's K neighbors, nearest first: (q,K) each. All vectors
    have length 1. K is the largest k plus 1, because a training image finds itself, and at most
    n."""
    module = import_module("sklearn.neighbors")
    num_searched = min(max(NUM_NEIGHBORS) + 1, len(train))
    index = module.NearestNeighbors(n_neighbors=num_searched, algorithm="brute").fit(train)
    distances, rows = index.kneighbors(queries)
    return 1 - np.square(distances) / 2, rows  # the cosines of vectors of length 1


def vote(cosines: np.ndarray, classes: np.ndarray, num_classes: int, k: int) -> np.ndarray:
    """The class (q,) with the most votes of the first k neighbors. cosines and classes (q,K)."""
    votes = np.zeros((len(cosines), num_classes))
    weights = np.exp(cosines[:, :k] / TEMPERATURE)
    np.add.at(votes, (np.arange(len(votes))[:, None], classes[:, :k]), weights)
    return votes.argmax(1)


def l2_normalize(x: np.ndarray) -> np.ndarray:
    return x / (np.linalg.norm(x, axis=1, keepdims=True) + 1e-9)


def nearest_image(train: np.ndarray, test: np.ndarray, tasks: Tasks) -> np.ndarray:
    """The classes (m,T) of the one nearest training image by Euclidean distance, of those that
    have a class."""
    # Without the squared length of the test vector, which is the same for all training images.
    distances = np.square(train).sum(1) - 2 * test @ train.T
    predictions = np.zeros(tasks.test.shape, np.int32)
    for t, classes in enumerate(tasks.train.T):
        labeled = classes >= 0
        predictions[:, t] = classes[labeled][distances[:, labeled].argmin(1)]
    return predictions

"""From labels to classification tasks, and what all readers of features share.

A task is one label at one position: the color of the top left object is a task of its own. Classes
are integers, -1 where an image has no label, or one that no training image has.

Letters: n training images, m validation images, T tasks, D width.
"""
import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from runtime.errors import DataError, MissingExtra


class Tasks(NamedTuple):
    names: list[str]            # the label of each task
    num_classes: np.ndarray     # (T,)
    train: np.ndarray           # (n,T) int32 classes
    test: np.ndarray            # (m,T) int32 classes

    @property
    def one_shot(self) -> np.ndarray:
        """(T,) bool: tasks with fewer than two training images per class, by the mean."""
        return (self.train >= 0).sum(0) < 2 * self.num_classes

    def subset(self, wanted: np.ndarray) -> "Tasks":
        """The tasks where wanted (T,) bool is True."""
        names = [name for name, is_wanted in zip(self.names, wanted) if is_wanted]
        return Tasks(names, self.num_classes[wanted], self.train[:, wanted], self.test[:, wanted])


def make_tasks(train: dict[str, np.ndarray], test: dict[str, np.ndarray]) -> Tasks:
    """The tasks of labels {name: (n,H) or (m,H) of str}, where H is the number of positions.
    DataError if no label has two classes."""
    names, num_classes, train_columns, test_columns = [], [], [], []
    for name, texts in train.items():
        classes = sorted(set(texts.ravel().tolist()) - {""})
        if len(classes) < 2:
            continue
        index = {text: i for i, text in enumerate(classes)}
        for position in np.flatnonzero((texts != "").any(0)):  # in few scenes one may stay empty
            names.append(name)
            num_classes.append(len(classes))
            train_columns.append([index.get(text, -1) for text in texts[:, position].tolist()])
            test_columns.append([index.get(text, -1) for text in test[name][:, position].tolist()])
    if not names:
        raise DataError("there is nothing to tell apart: all training images have the same "
                        + " and the same ".join(train))
    return Tasks(names, np.array(num_classes), np.array(train_columns, np.int32).T,
                 np.array(test_columns, np.int32).T)


def accuracy(tasks: Tasks, predictions: np.ndarray) -> dict[str, float]:
    """The share of right predictions (m,T) of each label, over all its positions. Images without
    the label do not count; NaN if there is no other."""
    shares = {}
    for name in dict.fromkeys(tasks.names):
        columns = [t for t, other in enumerate(tasks.names) if other == name]
        truth = tasks.test[:, columns]
        labeled = truth >= 0
        right = (predictions[:, columns] == truth)[labeled]
        shares[name] = float(right.mean()) if labeled.any() else float("nan")
    return shares


def standardize(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features (...,D) with mean 0 and deviation 1 over the training images, as fp32."""
    rows = train.reshape(-1, train.shape[-1])
    mean, deviation = rows.mean(0), rows.std(0) + 1e-6
    return (((train - mean) / deviation).astype(np.float32),
            ((test - mean) / deviation).astype(np.float32))


def selection_rows(num_rows: int, num_images: int, seed: int) -> np.ndarray:
    """(num_rows,) bool, True where a training row chooses strengths and does not train: a fifth of
    the images. num_rows is a multiple of num_images: copies of all images follow one another."""
    chosen = np.random.default_rng((seed, 6)).random(num_images) < 0.2
    return np.tile(chosen, num_rows // num_images)


def progress(items: Sequence, title: str) -> tqdm:
    """The items, with a progress bar on stderr if they last longer than two seconds."""
    return tqdm(items, desc=title, leave=False, delay=2, dynamic_ncols=True)


def import_module(name: str) -> ModuleType:
    """A module of scikit-learn or of what it needs. MissingExtra if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise MissingExtra("linear probes and nearest neighbors need scikit-learn: pip install -e "
                           "'.[eval]'") from None

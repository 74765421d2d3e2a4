"""What can be read from frozen features: linear probes, an attention-pooled probe, neighbors.

The encoder does not change. For each label a reader is trained on its output:

pooled          linear, on the pooled feature
grid            linear, on all patch tokens side by side
attended        linear, on a mixture of the patch tokens by a learned query (attention_probe.py)
neighbors       the nearest training images by cosine of the pooled feature
grid neighbors  the nearest by cosine of all patch tokens side by side
whitened        the nearest by "grid", whitened by how augmented copies of an image differ

Features of a random network already hold a lot. So the same readers are measured on an encoder with
random parameters ("random") and on the raw pixels (24 x 24, RGB). "commonest" is the most frequent
class.

Where a label has one image per class, the linear readers are Fisher's discriminant
(linear_probe.py), and there is no attended one.

Letters: n training images, m validation images, D width, T tasks.
"""
import numpy as np

from evaluation.attention_probe import attention_probe
from evaluation.labels import RAW_SIZE, LabeledImages
from evaluation.linear_probe import REGRESSION_COPIES, flatten_features, linear_probe, whiten
from evaluation.neighbors import nearest_image, nearest_neighbors
from evaluation.tasks import Tasks, accuracy, import_module, make_tasks, standardize
from inputs import images
from interop.encoder import Encoder, random_encoder

COPIES = 16  # of each training image, if a label is one-shot: itself, and augmented ones
AUGMENT = images.Augment(min_crop_area=0.6, jitter=0.3, grayscale_prob=0.1)
LINEAR = ("pooled", "grid", "attended")
NEIGHBORS = ("neighbors", "grid neighbors", "whitened")
READERS = (*LINEAR, *NEIGHBORS)


def measure(encoder: Encoder, train: LabeledImages, test: LabeledImages,
            readers: tuple[str, ...] = READERS, baselines: bool = True,
            seed: int = 0) -> dict[str, dict[str, float]]:
    """{row: {label: accuracy}}. The rows are the readers and, with baselines, those of "random" and
    "pixels", and "commonest". "whitened" exists if a label is one-shot, and "attended" leaves such
    labels out. Validation images whose label no training image has do not count."""
    if set(readers) - {"attended"}:
        import_module("sklearn")  # before the features are computed
    tasks = make_tasks(train.labels, test.labels)
    if not tasks.one_shot.any():
        readers = tuple(name for name in readers if name != "whitened")
    if tasks.one_shot.all():
        readers = tuple(name for name in readers if name != "attended")
    if tasks.one_shot.any():
        train = train.augmented(COPIES, AUGMENT)  # whose first n are the images themselves
    rows = read_features(encoder, train, test, tasks, readers, seed)
    if baselines:
        random = random_encoder(encoder, seed)
        for name, row in read_features(random, train, test, tasks, readers, seed).items():
            rows[f"random {name}"] = row
        rows |= read_pixels(train, test, tasks, readers, seed)
        rows["commonest"] = accuracy(tasks, commonest_classes(tasks))
    return rows


def read_features(encoder: Encoder, train: LabeledImages, test: LabeledImages, tasks: Tasks,
                  readers: tuple[str, ...], seed: int) -> dict[str, dict[str, float]]:
    """{reader: {label: accuracy}} on an encoder's features."""
    n = len(tasks.train)
    x, z = train.features(encoder), test.features(encoder)
    if {"grid", "whitened"} & set(readers):
        grid_x, grid_z = flatten_features(x.tokens, z.tokens)
    rows = {}
    for reader in readers:
        read = tasks
        if reader == "pooled":
            predictions = linear_probe(x.pooled, z.pooled, tasks, seed)
        elif reader == "grid":
            predictions = linear_probe(grid_x, grid_z, tasks, seed)
        elif reader == "attended":
            read = tasks.subset(~tasks.one_shot)
            tokens = x.tokens[:REGRESSION_COPIES * n]
            predictions = attention_probe(tokens, z.tokens, read, seed)
        elif reader == "neighbors":
            features = standardize(x.pooled[:n], z.pooled)
            predictions = nearest_neighbors(*features, tasks, seed)
        elif reader == "grid neighbors":
            train_tokens = x.tokens[:n].reshape(n, -1)
            features = standardize(train_tokens, z.tokens.reshape(len(z.tokens), -1))
            predictions = nearest_neighbors(*features, tasks, seed)
        else:
            predictions = nearest_neighbors(*whiten(grid_x, grid_z, n), tasks, seed)
        rows[reader] = accuracy(read, predictions)
    return rows


def read_pixels(train: LabeledImages, test: LabeledImages, tasks: Tasks, readers: tuple[str, ...],
                seed: int) -> dict[str, dict[str, float]]:
    """The same on raw pixels, one row for each kind of reader."""
    n = len(tasks.train)
    x, z = flatten_features(train.pixels(RAW_SIZE), test.pixels(RAW_SIZE))
    predictions = {}
    if set(LINEAR) & set(readers):
        predictions["pixels linear"] = linear_probe(x, z, tasks, seed)
    if "neighbors" in readers:
        predictions["pixels neighbors"] = nearest_neighbors(*standardize(x[:n], z), tasks, seed)
        predictions["pixels nearest"] = nearest_image(x[:n], z, tasks)
    if "whitened" in readers:
        predictions["pixels whitened"] = nearest_neighbors(*whiten(x, z, n), tasks, seed)
    return {name: accuracy(tasks, classes) for name, classes in predictions.items()}


def commonest_classes(tasks: Tasks) -> np.ndarray:
    """Predictions (m,T) that are each task's most frequent training class."""
    classes = [np.bincount(column[column >= 0]).argmax() for column in tasks.train.T]
    return np.broadcast_to(classes, tasks.test.shape)

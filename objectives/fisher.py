"""Fisher's linear discriminant (1936) of images of which each is a class of its own.

Differences between augmented copies of one image are noise. The discriminant is the linear map to
the directions in which the variation between images is largest relative to that noise. Each
direction is divided by the square root of its ratio, so that the first ones do not outweigh the
rest. LiT's --image-pool grid reads
the patch tokens through it (lit.py). It is computed, not trained: gradient steps from random
weights overfit, because an image's tokens are more numbers than there are images.

Letters: n images, F numbers per image, K directions.
"""
from collections.abc import Callable

import numpy as np

SHRINK = 0.2  # of the covariance towards a multiple of the identity


def shrink(covariance: np.ndarray) -> np.ndarray:
    """The covariance (F,F), mixed with the multiple of the identity that has the same trace."""
    level = np.trace(covariance) / len(covariance)
    return (1 - SHRINK) * covariance + SHRINK * level * np.eye(len(covariance), dtype=np.float32)


def discriminant(features: Callable[[int], np.ndarray], copies: int,
                 num_directions: int) -> dict[str, np.ndarray]:
    """{"mean": (F,), "matrix": (F,K)} fp32, to use as (x - mean) @ matrix. features(c): (n,F) of
    copy c of all images. Directions for which there are too few different images are 0."""
    # Tokens may be bf16, in which sums over copies and images would be rounded too much.
    image_means = sum(features(c).astype(np.float32) for c in range(copies)) / np.float32(copies)
    n, F = image_means.shape
    covariance = np.zeros((F, F), np.float32)
    for c in range(copies):
        differences = features(c).astype(np.float32) - image_means
        covariance += differences.T @ differences / np.float32(n * copies)
    mean = image_means.mean(0)
    root = np.linalg.cholesky(shrink(covariance))
    whitened = np.linalg.solve(root, (image_means - mean).T)                   # (F,n)
    ratios, directions = singular_vectors(whitened)
    rank = min(num_directions, n - 1, len(ratios))
    matrix = np.zeros((F, num_directions), np.float32)
    matrix[:, :rank] = np.linalg.solve(root.T, directions[:, :rank] / np.sqrt(ratios[:rank]))
    return {"mean": mean, "matrix": matrix}


def singular_vectors(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The singular values (r,) of x (F,n), largest first, without those that are rounding alone,
    and the left singular vectors (F,r). They are computed from the smaller of x @ x.T (F,F) and
    x.T @ x (n,n), whose eigenvalues are their squares."""
    is_wide = x.shape[1] > x.shape[0]
    values, vectors = np.linalg.eigh(x @ x.T if is_wide else x.T @ x)
    used = values > 1e-6 * values[-1]
    ratios, vectors = np.sqrt(values[used][::-1]), vectors[:, used][:, ::-1]
    return ratios, vectors if is_wide else x @ (vectors / ratios)

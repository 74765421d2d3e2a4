"""The kept patches: their number, their distribution, and what they depend on."""
import jax
import numpy as np
import pytest

import masking


def sample(num_images, num_tokens, num_kept, seed=1, shuffled=False):
    keys = jax.random.split(jax.random.key(seed), num_images)
    return np.asarray(masking.sample_keep_indices(keys, num_tokens, num_kept, shuffled))


@pytest.mark.parametrize("n,ratio", [(1, 0.35), (2, 0.1), (16, 0.35), (256, 0.35), (100, 0.9),
                                     (36, 1.0)])
def test_exactly_k_distinct_patches_in_image_order(n, ratio):
    k = masking.num_kept_tokens(n, ratio)
    assert k == max(1, int(n * ratio))
    keys = jax.random.split(jax.random.key(0), 200)
    draw = jax.jit(masking.sample_keep_indices, static_argnums=(1, 2))
    keep_indices = np.asarray(draw(keys, n, k))
    assert keep_indices.shape == (200, k) and keep_indices.dtype == np.int32
    assert keep_indices.min() >= 0 and keep_indices.max() < n
    assert (np.diff(keep_indices, axis=1) > 0).all()


def test_every_subset_of_patches_is_equally_likely():
    """Chi-square over all 20 subsets of 3 out of 6, and over single patches; 99.99% bounds."""
    keep_indices = sample(20_000, 6, 3)
    _, counts = np.unique(keep_indices @ [36, 6, 1], return_counts=True)
    assert len(counts) == 20
    assert ((counts - 1000) ** 2 / 1000).sum() < 52.4  # 19 degrees of freedom
    single_counts = np.bincount(keep_indices.ravel(), minlength=6)
    assert ((single_counts - 10_000) ** 2 / 10_000).sum() < 25.7


def test_every_order_of_shuffled_patches_is_equally_likely():
    """Chi-square over the 6 x 5 x 4 orders of 3 out of 6; 99.99% bound, 119 degrees of freedom."""
    shuffled = sample(20_000, 6, 3, shuffled=True)
    _, counts = np.unique(shuffled @ [36, 6, 1], return_counts=True)
    expected = 20_000 / 120
    assert len(counts) == 120
    assert ((counts - expected) ** 2 / expected).sum() < 183
    assert (np.sort(shuffled, axis=1) == sample(20_000, 6, 3)).all()  # only the order differs


def test_kept_tokens_are_those_of_the_indices_in_any_batch():
    tokens = jax.random.normal(jax.random.key(0), (5, 12, 3))
    keys = jax.random.split(jax.random.key(7), 5)
    kept, keep_indices = masking.keep_random_tokens(keys, tokens, 0.35)
    for b in range(5):
        np.testing.assert_array_equal(kept[b], tokens[b, keep_indices[b]])
        _, alone = masking.keep_random_tokens(keys[b:b + 1], tokens[b:b + 1], 0.35)
        np.testing.assert_array_equal(alone[0], keep_indices[b])
    assert (masking.keep_random_tokens(keys, tokens, 1.0)[0] == tokens).all()


@pytest.mark.parametrize("ratio", [0, -0.1, 1.01, float("nan")])
def test_impossible_keep_ratio_is_refused(ratio):
    with pytest.raises(ValueError, match="keep_ratio"):
        masking.num_kept_tokens(16, ratio)

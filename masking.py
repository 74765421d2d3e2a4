"""Random token keep: the decoder reads K of an image's N patch tokens (paper section 2.2, Table 7).

The encoder reads all patches. After it, a random draw, new in each step, keeps the tokens for the
decoder. The decoder costs less on the shorter sequence. In the paper the features also get better
(Table 7): the model must rely on fewer tokens, so any third of them must describe the image.

Letters: B images, N patches, K kept patches, D width.

    python masking.py        prints the kept patches of one image at several keep ratios
"""
import jax
import jax.numpy as jnp


def num_kept_tokens(num_tokens: int, keep_ratio: float) -> int:
    """K = max(1, int(N * keep_ratio)), as released. ValueError for a ratio outside (0, 1]."""
    if not 0 < keep_ratio <= 1:
        raise ValueError(f"keep_ratio {keep_ratio} must be above 0 and at most 1")
    return max(1, int(num_tokens * keep_ratio))


def sample_keep_indices(keys: jax.Array, num_tokens: int, num_kept: int,
                        shuffled: bool = False) -> jax.Array:
    """(B,K) int32: for each image K distinct patches, every subset equally likely.

    keys (B,) holds one key per image, so that an image's draw does not depend on its device or its
    row in the batch. The indices are sorted, or in random order if `shuffled` (released).
    """
    # The patches with the K largest of N random numbers are a uniform random subset. top_k returns
    # them by the size of their numbers, which is a random order.
    noise = jax.vmap(lambda key: jax.random.uniform(key, (num_tokens,)))(keys)     # (B,N)
    _, keep_indices = jax.lax.top_k(noise, num_kept)                               # (B,K)
    if not shuffled:
        keep_indices = jnp.sort(keep_indices, axis=-1)
    return keep_indices.astype(jnp.int32)


@jax.named_scope("keep")
def keep_random_tokens(keys: jax.Array, tokens: jax.Array, keep_ratio: float,
                       shuffled: bool = False) -> tuple[jax.Array, jax.Array]:
    """tokens (B,N,D) to the kept ones (B,K,D) and their indices (B,K). keys (B,)."""
    N = tokens.shape[1]
    keep_indices = sample_keep_indices(keys, N, num_kept_tokens(N, keep_ratio), shuffled)
    return jnp.take_along_axis(tokens, keep_indices[:, :, None], axis=1), keep_indices


if __name__ == "__main__":
    grid = 8
    for ratio in (1.0, 0.75, 0.5, 0.35, 0.1):
        K = num_kept_tokens(grid * grid, ratio)
        keys = jax.random.split(jax.random.key(0), 1)
        kept = sample_keep_indices(keys, grid * grid, K)[0].tolist()
        print(f"keep ratio {ratio}: the decoder reads {K} of {grid * grid} tokens (#)")
        for row in range(grid):
            patches = range(row * grid, (row + 1) * grid)
            print("    " + " ".join("#" if patch in kept else "." for patch in patches))

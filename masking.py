"""Random token keep: of an image's N patch tokens, the decoder gets to see K (paper section 2.2; Table 7).

The whole image goes through the encoder; the draw comes after it and before the decoder, anew each step. It makes the
decoder's sequence shorter, and, as Table 7 finds, the features better: any third of the tokens must carry the picture.

Letters: B images, N patches, K kept patches, D width.

    python masking.py        draws kept patches on a picture, in kept.png
"""
import jax
import jax.numpy as jnp


def kept_count(n: int, keep_ratio: float) -> int:
    """K = max(1, int(N * keep_ratio)), as released."""
    if not 0 < keep_ratio <= 1:
        raise ValueError(f"keep_ratio {keep_ratio} must be above 0 and at most 1")
    return max(1, int(n * keep_ratio))


def keep_indices(keys: jax.Array, n: int, k: int, shuffled: bool = False) -> jax.Array:
    """keys (B,), one an image, so that an image's draw does not depend on which device or batch row it lands on.
    Returns (B,K) int32: k distinct patches of n, every subset equally likely, in the order of the picture, or in any order."""
    noise = jax.vmap(lambda key: jax.random.uniform(key, (n,)))(keys)           # (B,N)
    _, chosen = jax.lax.top_k(noise, k)
    return (chosen if shuffled else jnp.sort(chosen, axis=-1)).astype(jnp.int32)


@jax.named_scope("keep")
def keep(keys: jax.Array, tokens: jax.Array, keep_ratio: float, shuffled: bool = False) -> tuple[jax.Array, jax.Array]:
    """tokens (B,N,D) to the kept ones (B,K,D) and which they are (B,K)."""
    N = tokens.shape[1]
    chosen = keep_indices(keys, N, kept_count(N, keep_ratio), shuffled)
    return jnp.take_along_axis(tokens, chosen[:, :, None], axis=1), chosen


if __name__ == "__main__":
    import numpy as np
    from PIL import Image

    import scenes
    side, patch, ratios = 256, 32, (1.0, 0.75, 0.5, 0.35, 0.1)
    sheet = Image.new("RGB", (len(ratios) * (side + 8), 2 * (side + 8)), "white")
    for row in range(2):
        picture = np.asarray(scenes.paint(scenes.record(0, "train", row + 2)).resize((side, side)))
        for column, ratio in enumerate(ratios):
            n = (side // patch) ** 2
            chosen = keep_indices(jax.random.split(jax.random.key(row), 1), n, kept_count(n, ratio))[0]
            seen = np.zeros(n, bool)
            seen[np.asarray(chosen)] = True
            seen = seen.reshape(side // patch, -1).repeat(patch, 0).repeat(patch, 1)[..., None]
            sheet.paste(Image.fromarray(np.where(seen, picture, 255)), (column * (side + 8), row * (side + 8)))
    sheet.save("kept.png")
    print(f"kept.png: the patches that the decoder sees at keep ratios {ratios}")

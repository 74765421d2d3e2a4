"""LiT (arXiv:2111.07991): the encoder of an earlier run stays frozen, and a text encoder learns to
match it. So an encoder that was trained on captions alone can do zero-shot classification and
retrieve images by text.

The text encoder and the loss are CLIP's. CLIP's mean of the patch tokens was never trained by the
caption loss, so here learned queries pool the tokens by attention. --image-pool map takes SigLIP's
head instead (one query and an MLP, arXiv:2303.15343), which other libraries have too; --image-pool
mean takes the mean. All these discard positions. --image-pool grid keeps them, which suits aligned
images of one size, such as icons: the vector is Fisher's discriminant of all tokens side by side
(fisher.py), computed before the first step. Only the text encoder is trained, with an MLP that maps
its feature to the discriminant's width.

No gradient reaches the encoder, and the optimizer does not update it. Its tokens are computed once
per image (FeatureLoader) if training augments nothing and the tokens fit in memory. With
--feature-copies C, they are computed once for each of C augmented copies of an image.

Letters: B images, N patches, R pixels per side, P patch size, E encoder width, H heads, Dh = E/H,
M MLP width of the encoder, Q queries, K directions, F = N*E, D width of the text encoder.
"""
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

import data
import vit
from decoder import count_targets
from inputs.images import Augment
from layers import (
    ParamSpec,
    dense_specs,
    dot_product_attention,
    gelu_linear,
    layer_norm,
    linear,
    norm_specs,
)
from objectives import clip
from objectives.contrastive import contrastive_loss, encode_text, l2_normalize, logit_scale
from objectives.fisher import discriminant
from runtime.errors import ConfigError

NUM_QUERIES = {"attention": 8, "map": 1}  # Q: each can read another part of the image
NUM_DIRECTIONS = 384                       # K, of Fisher's discriminant
MAX_GRID = 1 << 13                         # the most numbers N*E for Fisher's discriminant
CACHE_BYTES = 4 << 30                      # of the tokens of all training images, per process

blind_loss = clip.blind_loss


# ------------------------------------------------------------------------------- parameters
def param_specs(model: Any) -> dict:
    """CLIP's text encoder, projection and temperature, and the pool."""
    if model.image_pool == "mean":
        return clip.param_specs(model)
    if model.image_pool == "grid":
        F, specs = model.num_patches * model.encoder.width, clip.param_specs(model)
        K, D = NUM_DIRECTIONS, model.decoder.width
        specs["pair"].pop("image")
        return specs | {
            "head": {"fc1": dense_specs(D, 4 * D), "fc2": dense_specs(4 * D, K)},
            "discriminant": {"mean": ParamSpec((F,), 0.0), "matrix": ParamSpec((F, K), 1.0)}}
    E, M, Q = model.encoder.width, model.encoder.mlp_dim, NUM_QUERIES[model.image_pool]
    pool = {"norm": norm_specs(E), "query": {"embedding": ParamSpec((Q, E), 1.0)},
            "memory": dense_specs(E, E, copies=2), "out": dense_specs(Q * E, E)}
    if model.image_pool == "map":
        pool |= {"norm2": norm_specs(E), "fc1": dense_specs(E, M), "fc2": dense_specs(M, E)}
    return clip.param_specs(model) | {"pool": pool}


def flops(model: Any, resolution: int, text_len: int) -> dict[str, float]:
    enc, pool = model.encoder, 0.0
    N, E = (resolution // enc.patch_size) ** 2, enc.width
    if model.image_pool == "grid":
        K, D = NUM_DIRECTIONS, model.decoder.width
        pool = 2 * N * E * K + 8 * D * (D + K)  # discriminant, MLP
        pool -= 2 * E * D                       # CLIP's projection, which is not used
    elif model.image_pool != "mean":
        pool = 4 * N * E * E                                               # keys and values
        pool += NUM_QUERIES[model.image_pool] * (4 * N * E + 2 * E * E)    # attention, output
    if model.image_pool == "map":
        pool += 4 * E * enc.mlp_dim
    parts = clip.flops(model, resolution, text_len)
    return parts | {"text": parts["text"] + pool}  # the pool is counted as text


# ------------------------------------------------------------------------------------ model
def attention_pool(tokens: jax.Array, w: dict, num_heads: int) -> jax.Array:
    """tokens (B,N,E) to (B,E): what Q learned queries read from them, by multi-head attention. With
    an MLP in w: x + mlp(norm(x)) of that."""
    B, N, E = tokens.shape
    Q = len(w["query"]["embedding"])
    memory = linear(layer_norm(tokens, w["norm"]), w["memory"])                    # (B,N,2E)
    k, v = (a.reshape(B, N, num_heads, E // num_heads) for a in jnp.split(memory, 2, axis=-1))
    q = w["query"]["embedding"].astype(k.dtype).reshape(1, Q, num_heads, -1)
    attended, _ = dot_product_attention(jnp.broadcast_to(q, (B, *q.shape[1:])), k, v, None)
    x = linear(attended.reshape(B, Q * E), w["out"])
    if "fc1" not in w:
        return x
    return x + gelu_linear(linear(layer_norm(x, w["norm2"]), w["fc1"]), w["fc2"], exact=True)


def embed_images(params: dict, images: jax.Array, model: Any) -> jax.Array:
    """images (B,R,R,3), or their tokens (B,N,E), to vectors of length 1, (B,D), or (B,K) for the
    grid."""
    encoder, tokens = jax.lax.stop_gradient(params["encoder"]), images
    if images.ndim == 4:
        tokens = vit.vit(encoder, images, model.encoder)["tokens"]
    if model.image_pool == "grid":
        fixed = jax.lax.stop_gradient(params["discriminant"])
        flat = tokens.reshape(len(tokens), -1)
        return l2_normalize((flat - fixed["mean"]) @ fixed["matrix"])
    if model.image_pool == "mean":
        pooled = layer_norm(tokens.mean(1), encoder["norm"])
    else:
        pooled = attention_pool(tokens, params["pool"], model.encoder.num_heads)
    return l2_normalize(linear(pooled, params["pair"]["image"]))


def embed_texts(params: dict, text: jax.Array, model: Any) -> jax.Array:
    """text (B,T) to vectors of length 1, (B,D), or (B,K) for the grid."""
    if model.image_pool != "grid":
        return clip.embed_texts(params, text, model)
    head, feature = params["head"], encode_text(params["text"], text, model.decoder)[1]
    return l2_normalize(gelu_linear(linear(feature, head["fc1"]), head["fc2"], exact=False))


def loss(params: dict, batch: dict, keys: jax.Array, model: Any) -> tuple[jax.Array, jax.Array]:
    image = embed_images(params, batch["images"], model)
    text = embed_texts(params, batch["text"], model)
    has_caption = count_targets(batch["text"]) > 0  # False in the rows that pad a batch
    losses = contrastive_loss(image, text, has_caption, logit_scale(params))
    return losses.sum(), has_caption.sum()


# --------------------------------------------------------------------------- frozen features
class FeatureLoader(data.Loader):
    """A loader that gives the frozen encoder's tokens (N,E) in place of an image's pixels. Each
    copy of an image is encoded alone and once, when a batch first needs it."""

    def __init__(self, params: dict, model: Any, copies: int, *args: Any, **options: Any):
        """params: the encoder's. copies: per image; epoch e uses copy e mod copies. args, options:
        those of data.Loader."""
        super().__init__(*args, **options)
        params = jax.device_put(params, jax.local_devices()[0])
        encode = jax.jit(lambda params, images: vit.vit(params, images, model.encoder)["tokens"])
        self.encode = lambda pixels: np.asarray(encode(params, pixels[None]))[0]
        self.copies = copies
        self.features: dict[tuple[int, int], np.ndarray] = {}

    def decode(self, position: int, i: int, image: Image.Image, resolution: int) -> np.ndarray:
        size = len(self.source)
        epoch = position // size % self.copies  # the first epoch that uses the same copy
        first_position = epoch * size + i       # its augmentation is that of this position
        if (resolution, first_position) not in self.features:
            pixels = super().decode(first_position, i, image, resolution)
            self.features[resolution, first_position] = self.encode(pixels)
        return self.features[resolution, first_position]


def stores_tokens(cfg: Any) -> bool:
    """Whether training computes the tokens of each image, or of its copies, once: with these
    settings it does if they fit in memory (training_loader)."""
    augment = Augment(*[getattr(cfg, name) for name in Augment._fields])
    return cfg.feature_copies > 0 or augment == Augment(min_crop_area=1.0)


def check_grid(cfg: Any, model: Any, resolutions: set[int]) -> None:
    """ConfigError for settings with which --image-pool grid cannot be computed."""
    if len(resolutions) > 1:
        raise ConfigError("--image-pool grid has a weight for each patch, so that all --stages "
                          f"need one resolution, not {min(resolutions)} and {max(resolutions)}")
    is_augmented = cfg.min_crop_area < 1 or cfg.jitter or cfg.hue or cfg.grayscale_prob
    if cfg.feature_copies < 2 or not is_augmented:
        raise ConfigError("--image-pool grid is computed from how augmented copies of an image "
                          "differ: set --feature-copies 16, and --min-crop-area below 1 or "
                          "--jitter")
    F = model.num_patches * model.encoder.width
    if F > MAX_GRID:
        raise ConfigError(f"--image-pool grid: an image has {F:,} numbers in its patch tokens, and "
                          f"at most {MAX_GRID:,} are allowed: take a lower resolution or a smaller "
                          "encoder, or --image-pool attention")


def training_loader(run: Any, params: dict) -> data.Loader:
    """The run's loader, or a FeatureLoader if the features can be computed once. ConfigError if the
    --feature-copies do not fit in memory. With --image-pool grid, a new run's `params` also get the
    discriminant, computed from these features."""
    loader, enc, num_bytes = run.loader, run.model.encoder, 0
    copies = run.cfg.feature_copies
    if not copies and not loader.has_random_augment:
        copies = 1  # all epochs see the same pixels
    for stage in run.stages:
        num_tokens = (stage.resolution // enc.patch_size) ** 2
        num_bytes += copies * len(loader.source) * num_tokens * enc.width * 4
    if run.cfg.feature_copies and num_bytes > CACHE_BYTES:
        raise ConfigError(f"--feature-copies {copies} takes {num_bytes / 2**30:.1f} GiB, and at "
                          f"most {CACHE_BYTES / 2**30:.0f} are allowed: make it smaller, or 0")
    if not copies or num_bytes > CACHE_BYTES:
        return loader
    cached = FeatureLoader(params["encoder"], run.model, copies, loader.source, loader.tokenizer,
                           loader.max_text_len, loader.seed, loader.augment, run.cfg.workers,
                           caption_field=run.cfg.caption_field)
    if run.model.image_pool == "grid" and run.step == 0:
        if run.parallel.is_main:
            print(f"computing the features of {copies} copies of {len(loader.source):,} images")
        params["discriminant"] = grid_discriminant(cached, run.stages[0].resolution)
    return cached


def grid_discriminant(loader: FeatureLoader, resolution: int) -> dict[str, np.ndarray]:
    """Fisher's discriminant of the tokens of all copies. An image that cannot be read is left
    out."""
    n = len(loader.source)

    def tokens_of_copy(copy: int) -> np.ndarray:
        tokens = {}  # by sample: a replacement for a bad image appears twice
        for start in range(0, n, 256):
            stop = min(start + 256, n)
            batch = loader.batch(range(copy * n + start, copy * n + stop), resolution)
            tokens.update(zip(batch["sample"].tolist(), batch["images"]))
        return np.stack([tokens[i].ravel() for i in sorted(tokens)])
    return discriminant(tokens_of_copy, loader.copies, NUM_DIRECTIONS)


# -------------------------------------------------------------------------------- baseline
def pixel_encoder(params: dict, cfg: vit.ViTConfig) -> dict:
    """Encoder parameters (--init-encoder pixels) whose tokens are the pixels of the patches, plus
    positions: the patch kernel copies, the blocks add nothing. Pixels are averaged in the smallest
    squares whose means fit in the width E."""
    P, E = cfg.patch_size, cfg.width
    side = next(side for side in range(1, P + 1) if P % side == 0 and 3 * (P // side)**2 <= E)
    y, x, color = np.mgrid[:P, :P, :3].reshape(3, -1)
    kernel = np.zeros((P * P * 3, E), np.float32)
    column = (y // side * (P // side) + x // side) * 3 + color
    kernel[np.arange(len(column)), column] = 1 / side**2
    silent = {name: jax.tree.map(jnp.zeros_like, params["blocks"][name]) for name in ("out", "fc2")}
    return params | {"patch": {"kernel": kernel}, "blocks": params["blocks"] | silent}

"""The encoder: a plain ViT that turns an image into patch tokens (paper section 2.2, Table 1).

This file's parameters are the product: OpenVision 2 keeps nothing else after pretraining. The file
does not depend on captions, masking, devices or data. The transformer block is here too; the
decoder uses the same one with a causal mask. "Released" means the code and the weights that the
paper's authors published; docs/fidelity.md compares them with this code.

Letters: B images, R pixels per side, P patch size, G = R/P grid side, N = G*G patches, S = N (+1
with a CLS token), Q tokens in a block's input, D width, M MLP width, H heads, Dh = D/H, L layers.
Parameters are nested dicts of fp32 arrays; those of the blocks have a leading L.

    python vit.py            prints the family: sizes, parameters, tokens and FLOPs per image
"""
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layers import (
    ParamSpec,
    count_params,
    dense_specs,
    dot_product_attention,
    gelu_linear,
    init_params,
    layer_norm,
    linear,
    norm_specs,
)

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of pixels in 0..1, as released
IMAGENET_STD = (0.229, 0.224, 0.225)
ENCODER_SIZES = {  # depth, width, num_heads, mlp_dim
    "micro": (4, 96, 3, 256),          # ours: the toy trains it in minutes
    "Ti": (12, 192, 3, 768),
    "S": (12, 384, 6, 1536),
    "B": (12, 768, 12, 3072),
    "L": (24, 1024, 16, 4096),
    "So400m": (27, 1152, 16, 4304),
    "H": (32, 1280, 16, 5120),
    "g": (40, 1408, 16, 6144),
}
REMAT = {  # what a block saves for the backward pass, which computes the rest again
    "none": None,                                                      # all activations
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # those of linear layers
    "block": jax.checkpoint_policies.nothing_saveable,                 # only the block's input
}
RELEASED_INIT = {  # --init-scale released: {layer: (distribution, std from (fan_in, fan_out))}
    "patch": ("uniform", lambda fan_in, fan_out: math.sqrt(2 / fan_in)),
    "cls": ("normal", lambda fan_in, fan_out: 1e-6),
    "qkv": ("normal", lambda fan_in, fan_out: 0.02),
    "out": ("normal", lambda fan_in, fan_out: 0.02),
    "fc1": ("normal", lambda fan_in, fan_out: 0.02),
    "fc2": ("truncated", lambda fan_in, fan_out: 0.02 * math.sqrt(768 / fan_out)),  # 768: B's width
}

Grid = int | tuple[int, int]  # patches per side, or rows and columns


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    depth: int
    width: int
    num_heads: int
    mlp_dim: int
    patch_size: int
    cls_token: bool = False      # the released weights have one; nothing reads its output
    learned_pos_grid: int = 0    # grid side of an imported encoder's position table; 0: sin-cos
    gated_attention: bool = False  # for objectives/genlip.py: gates on the attention outputs
    norm_tokens: bool = False    # for objectives/genlip.py: "tokens" come after the final norm
    dtype: str = "float32"       # of activations and matmul inputs; parameters stay fp32
    remat: str = "none"          # a key of REMAT
    scan_unroll: int = 1         # layers per scan step; more can run faster and compile longer


def vit_config(name: str, **changes: Any) -> ViTConfig:
    """The encoder "SIZE/PATCH", such as "L/14" or "S/8". ValueError for any other text."""
    size, _, patch = name.partition("/")
    if size not in ENCODER_SIZES or not patch.isdecimal() or int(patch) < 1:
        raise ValueError(f"unknown encoder {name!r}: write SIZE/PATCH with SIZE one of "
                         f"{', '.join(ENCODER_SIZES)}, as in L/14")
    return ViTConfig(*ENCODER_SIZES[size], patch_size=int(patch), **changes)


# ------------------------------------------------------------------------------ parameters
def block_specs(depth: int, width: int, mlp_dim: int, gated: bool = False) -> dict:
    """The arrays of `depth` transformer blocks, stacked, for the encoder or the decoder."""
    stack = (depth,)
    gate = {"gate": dense_specs(width, width, stack)} if gated else {}
    return gate | {
        "norm1": norm_specs(width, stack),
        "qkv": dense_specs(width, width, stack, copies=3),
        "out": dense_specs(width, width, stack),
        "norm2": norm_specs(width, stack),
        "fc1": dense_specs(width, mlp_dim, stack),
        "fc2": dense_specs(mlp_dim, width, stack),
    }


def param_specs(cfg: ViTConfig) -> dict:
    """Every array of the encoder. The patch kernel is (P*P*3, D) with rows in (y, x, color) order
    and no bias (released)."""
    specs = {
        "patch": dense_specs(cfg.patch_size * cfg.patch_size * 3, cfg.width, bias=False),
        "blocks": block_specs(cfg.depth, cfg.width, cfg.mlp_dim, cfg.gated_attention),
        "norm": norm_specs(cfg.width),
    }
    if cfg.cls_token:
        specs["cls"] = {"embedding": ParamSpec((1, cfg.width), 0.02)}
    if cfg.learned_pos_grid:
        specs["positions"] = {"table": ParamSpec((cfg.learned_pos_grid**2, cfg.width), 0.02)}
    return specs


def init(key: jax.Array, cfg: ViTConfig) -> dict:
    return init_params(key, param_specs(cfg))


# ----------------------------------------------------------------------- transformer block
def transformer_block(x: jax.Array, w: dict, num_heads: int, mask: jax.Array | None = None,
                      exact_gelu: bool = True, cache: tuple | None = None,
                      select: Callable | None = None) -> tuple[jax.Array, dict]:
    """x = x + attention(norm(x)); x = x + mlp(norm(x)). x (B,Q,D) in and out. With a "gate" in w,
    the attention outputs are multiplied by sigmoid(linear(norm(x))) (arXiv:2505.06708).

    mask: broadcastable to (B,H,Q,S), as in dot_product_attention. cache, in generation: (keys,
    values, position). keys and values (B,S,H,Dh) have room for the whole sequence, in which x
    begins at `position`. select, in the last block: select(array) picks tokens on axis 1, and only
    their outputs are computed; a mask must then be (Q,S), and the picked tokens the same in all
    images. Also returns {"keys", "values", "attention_weights"}."""
    B, _, D = x.shape
    normed = layer_norm(x, w["norm1"])
    q, k, v = jnp.split(linear(normed, w["qkv"]), 3, axis=-1)                   # (B,Q,D) each
    if select is not None:
        x, normed, q = select(x), select(normed), select(q)    # Q is the number picked from here on
        mask = None if mask is None else select(mask[None])    # the same rows, behind a batch axis
    q, k, v = (a.reshape(B, -1, num_heads, D // num_heads) for a in (q, k, v))
    if cache is not None:
        keys, values, position = cache
        k = jax.lax.dynamic_update_slice_in_dim(keys, k, position, axis=1)
        v = jax.lax.dynamic_update_slice_in_dim(values, v, position, axis=1)
    attended, attention_weights = dot_product_attention(q, k, v, mask)          # (B,Q,H,Dh)
    attended = attended.reshape(x.shape)
    if "gate" in w:
        attended = attended * jax.nn.sigmoid(linear(normed, w["gate"]))
    x = x + linear(attended, w["out"])
    hidden = linear(layer_norm(x, w["norm2"]), w["fc1"])                        # (B,Q,M)
    x = x + gelu_linear(hidden, w["fc2"], exact_gelu)
    return x, {"keys": k, "values": v, "attention_weights": attention_weights}


def transformer_stack(x: jax.Array, blocks: dict, cfg: Any, extra_names: tuple[str, ...] = (),
                      block: Callable = transformer_block, select: Callable | None = None,
                      **options: Any) -> tuple[jax.Array, dict]:
    """All L blocks: one compiled body, scanned over the leading axis of the parameters. cfg gives
    depth, num_heads, remat and scan_unroll; `options` go to `block`. Returns x (B,Q,D) and, without
    `select`, the extras named in extra_names, of all blocks, with a leading L.
    With `select`, x has only the tokens that it picks on axis 1. The last block computes only these
    if the scan is fully unrolled: a shorter scan would make XLA copy the weights of its blocks."""
    def run_block(x: jax.Array, w: dict, **last_options: Any) -> tuple[jax.Array, dict]:
        x, extras = block(x, w, cfg.num_heads, **options, **last_options)
        return x, {name: extras[name] for name in extra_names}
    if cfg.remat != "none":
        # Never unrolled: XLA would merge the forward and backward passes of unrolled blocks, which
        # undoes remat. It does not merge the two loops of a scan, so prevent_cse is not needed.
        run_again = jax.checkpoint(run_block, policy=REMAT[cfg.remat], prevent_cse=False)
        x, extras = jax.lax.scan(run_again, x, blocks)
    elif select is None or cfg.scan_unroll < cfg.depth:
        x, extras = jax.lax.scan(run_block, x, blocks, unroll=min(cfg.scan_unroll, cfg.depth))
    else:  # unrolled: the last block runs on its own, for the picked tokens
        x, _ = jax.lax.scan(run_block, x, jax.tree.map(lambda a: a[:-1], blocks), unroll=cfg.depth)
        return run_block(x, jax.tree.map(lambda a: a[-1], blocks), select=select)
    return (x if select is None else select(x)), extras


# --------------------------------------------------------------------------------- encoder
def sincos_position_embedding(grid: Grid, width: int) -> np.ndarray:
    """2-D sin-cos table (N,D) fp32, as released: columns [sin x, cos x, sin y, cos y], omega_i =
    10000^(-i/(D/4-1)), where MoCo v3 has no -1. The formula fits any grid, so a change of
    resolution needs no resized table. ValueError for a width that cannot hold it."""
    rows, columns = np.broadcast_to(grid, 2)
    if width % 4 or width < 8:
        raise ValueError(f"a sin-cos table's width is a multiple of 4, at least 8, not {width}")
    omega = 10000.0 ** (-np.arange(width // 4) / (width // 4 - 1))
    y, x = np.mgrid[:rows, :columns].reshape(2, -1, 1) * omega               # (N,D/4) each
    table = np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)
    return table.astype(np.float32)


def position_embedding(params: dict, grid: Grid, cfg: ViTConfig) -> Any:
    """The table (N,D) that is added to the patches: sin-cos, or a learned one, resized (cubic)."""
    if not cfg.learned_pos_grid:
        return sincos_position_embedding(grid, cfg.width)
    table, learned_grid = params["positions"]["table"], cfg.learned_pos_grid
    rows, columns = np.broadcast_to(grid, 2)
    if rows == columns == learned_grid:
        return table
    square = table.reshape(learned_grid, learned_grid, cfg.width)
    resized = jax.image.resize(square, (rows, columns, cfg.width), "cubic")
    return resized.reshape(rows * columns, cfg.width)


def normalize(images: jax.Array) -> jax.Array:
    """uint8 pixels to fp32, minus ImageNet's mean and divided by its standard deviation. This runs
    on the device, so that bytes are transferred, not floats."""
    mean, std = np.array(IMAGENET_MEAN, np.float32), np.array(IMAGENET_STD, np.float32)
    return (images.astype(jnp.float32) / 255 - mean) / std


def patchify(images: jax.Array, patch_size: int) -> jax.Array:
    """(B,R,R,3), or rectangles, to (B,N,P*P*3): a matmul on these is the patch convolution.
    Pixels at the right and bottom that fill no patch are dropped, as released: 384 px hold 27 x 27
    patches of 14. ValueError for an image below one patch."""
    B, height, width, C = images.shape
    rows, columns, P = height // patch_size, width // patch_size, patch_size
    if min(rows, columns) < 1:
        raise ValueError(f"resolution {min(height, width)} is below the patch size {patch_size}")
    tiles = images[:, :rows * P, :columns * P].reshape(B, rows, P, columns, P, C)
    return tiles.swapaxes(2, 3).reshape(B, rows * columns, P * P * C)


def embed_patches(params: dict, images: jax.Array, cfg: ViTConfig) -> jax.Array:
    """images (B,R,R,3) to the input (B,S,D) of the first block: patches with positions, and the CLS
    token before them if the config has one."""
    if images.dtype == jnp.uint8:
        images = normalize(images)
    patches = patchify(images.astype(cfg.dtype), cfg.patch_size)                # (B,N,P*P*3)
    x = linear(patches, params["patch"])                                        # (B,N,D)
    grid = images.shape[1] // cfg.patch_size, images.shape[2] // cfg.patch_size
    x = x + position_embedding(params, grid, cfg).astype(cfg.dtype)
    if not cfg.cls_token:
        return x
    cls = params["cls"]["embedding"].astype(x.dtype)       # it gets no position embedding
    cls = jnp.broadcast_to(cls, (x.shape[0], 1, cfg.width))
    return jnp.concatenate([cls, x], axis=1)                                    # (B,1+N,D)


@jax.named_scope("encoder")
def vit(params: dict, images: jax.Array, cfg: ViTConfig, attention: bool = False,
        mask: jax.Array | None = None, select: Callable | None = None) -> dict:
    """images (B,R,R,3), or rectangles, uint8 or already normalized floats. mask, broadcastable to
    (B,H,S,S): which tokens may attend to which; None (OpenVision 2): all to all. Returns by name:

    tokens (B,N,D)         patch tokens before the final norm (after it with cfg.norm_tokens): what
                           the decoder reads, and what a multimodal model should read
    pooled (B,D)           mean of the patch tokens, then the final norm, as released. The caption
                           loss does not train that norm: the decoder reads what comes before it
    cls (B,D)              the CLS token before the final norm, if the config has one
    attention (L,B,H,S,S)  on request: row i holds the attention weights of token i
    With `select`, it returns only "tokens": those that select(tokens) picks on axis 1."""
    x = embed_patches(params, images, cfg)
    first_patch = int(cfg.cls_token)  # the CLS token is before it
    if select is not None:
        x, _ = transformer_stack(x, params["blocks"], cfg, mask=mask,
                                 select=lambda x: select(x[:, first_patch:]))
        return {"tokens": layer_norm(x, params["norm"]) if cfg.norm_tokens else x}
    extra_names = ("attention_weights",) if attention else ()
    x, extras = transformer_stack(x, params["blocks"], cfg, extra_names, mask=mask)
    tokens = x[:, first_patch:]
    out = {"tokens": tokens, "pooled": layer_norm(tokens.mean(1), params["norm"])}
    if cfg.norm_tokens:
        out["tokens"] = layer_norm(tokens, params["norm"])
    if cfg.cls_token:
        out["cls"] = x[:, 0]
    if attention:
        out["attention"] = extras["attention_weights"]
    return out


# ----------------------------------------------------------------------------------- costs
def block_flops(num_tokens: float, width: int, mlp_dim: int, depth: int,
                gated: bool = False) -> float:
    """Forward FLOPs of `depth` blocks on one sequence: 2 per multiply-add, matmuls only."""
    squares = 5 if gated else 4  # matrices (width, width): q, k, v, out and the gate
    linear_layers = num_tokens * (2 * squares * width * width + 4 * width * mlp_dim)
    attention = 4 * num_tokens * num_tokens * width
    return depth * (linear_layers + attention)


def flops(cfg: ViTConfig, resolution: int) -> float:
    """Forward FLOPs of the encoder for one image."""
    N = (resolution // cfg.patch_size) ** 2
    patch_embedding = 2 * N * cfg.patch_size**2 * 3 * cfg.width
    return patch_embedding + block_flops(N + cfg.cls_token, cfg.width, cfg.mlp_dim, cfg.depth,
                                         cfg.gated_attention)


if __name__ == "__main__":
    print("   encoder  depth  width  heads  mlp_dim    params   patch tokens and GFLOPs per image")
    for size in ENCODER_SIZES:
        patch_size = {"micro": 4, "Ti": 16, "S": 16, "B": 16}.get(size, 14)
        resolutions = [patch_size * grid for grid in (6, 16, 32)]
        c = vit_config(f"{size}/{patch_size}")
        costs = [f"{r}px {(r // patch_size) ** 2:4d} {flops(c, r) / 1e9:8.3f}" for r in resolutions]
        print(f"{f'{size}/{patch_size}':>10} {c.depth:6d} {c.width:6d} {c.num_heads:6d} "
              f"{c.mlp_dim:8d} {count_params(param_specs(c)) / 1e6:8.1f}M   {'   '.join(costs)}")

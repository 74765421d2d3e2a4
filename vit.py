"""The encoder: a plain ViT that turns an image into patch tokens (paper section 2.2; sizes of Table 1).

What OpenVision 2 keeps after pretraining is this file's parameters and nothing else. It knows nothing of captions,
masks, devices or data. The transformer block lives here too; the decoder uses the same one with a causal mask.

Letters: B images, R pixels a side, P patch, G = R/P grid side, N = G*G patches, S = N (+1 with a CLS token),
D width, H heads, M mlp, L layers. Parameters are nested dicts of fp32 arrays; a block's weights carry a leading L.

    python vit.py            prints the family: layers, width, parameters, tokens and FLOPs an image
"""
import dataclasses
import math
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from layers import dot_product_attention, gelu_linear, layer_norm, linear

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # ImageNet statistics, of pixels in 0..1 (released preprocessing)
IMAGENET_STD = (0.229, 0.224, 0.225)
#           layers, width, heads, mlp
ENCODER_SIZES = {
    "micro": (4, 96, 3, 384),  # ours: what the toy trains in minutes
    "Ti": (12, 192, 3, 768),
    "S": (12, 384, 6, 1536),
    "B": (12, 768, 12, 3072),
    "L": (24, 1024, 16, 4096),
    "So400m": (27, 1152, 16, 4304),
    "H": (32, 1280, 16, 5120),
    "g": (40, 1408, 16, 6144),
}
REMAT = {  # what the backward pass keeps of each block; the rest is computed again
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "block": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    depth: int
    width: int
    num_heads: int
    mlp_dim: int
    patch_size: int
    cls_token: bool = False          # the released weights carry a CLS token; nothing in the method reads it
    learned_pos_grid: int = 0         # grid side of a learned position table, which foreign weights may bring; 0: the sin-cos formula
    dtype: str = "float32"     # of activations and matmul inputs; parameters stay fp32
    remat: str = "none"        # a key of REMAT
    scan_unroll: int = 1            # layers a scan step: more compile time, fewer copies around the loop


def vit_config(name: str, **changes: Any) -> ViTConfig:
    """The family member "SIZE/PATCH", such as "L/14" or "S/8". ValueError names what is wrong with any other text."""
    size, slash, patch = name.partition("/")
    if size not in ENCODER_SIZES or not slash or not patch.isdecimal() or int(patch) < 1:
        raise ValueError(f"unknown encoder {name!r}: write SIZE/PATCH with SIZE one of {', '.join(ENCODER_SIZES)}, as in L/14")
    return ViTConfig(*ENCODER_SIZES[size], patch_size=int(patch), **changes)


class ParamSpec(NamedTuple):
    """One array, declared once: init and counts derive from these."""
    shape: tuple[int, ...]
    std: float | None    # standard deviation of the draw; 0 gives zeros, None gives ones
    law: str = "normal"  # distribution of the draw: a key of DRAW


DISTRIBUTIONS = {  # samples with standard deviation 1, from (key, shape)
    "normal": jax.random.normal,
    "uniform": lambda key, shape: jax.random.uniform(key, shape, minval=-(3**0.5), maxval=3**0.5),
    # a normal that is cut at two standard deviations, and then has 0.87962566 of its own
    "truncated": lambda key, shape: jax.random.truncated_normal(key, -2, 2, shape) / 0.87962566,
}
RELEASED_INIT = {  # --init-scale released: law and std of a layer's weights, from its (inputs, outputs)
    "patch": ("uniform", lambda inputs, outputs: math.sqrt(2 / inputs)),
    "cls": ("normal", lambda inputs, outputs: 1e-6),
    "qkv": ("normal", lambda inputs, outputs: 0.02),
    "out": ("normal", lambda inputs, outputs: 0.02),
    "fc1": ("normal", lambda inputs, outputs: 0.02),
    "fc2": ("truncated", lambda inputs, outputs: math.sqrt(0.3072 / outputs)),
}


def dense_specs(fan_in: int, fan_out: int, stack: tuple[int, ...] = (), copies: int = 1, bias: bool = True) -> dict:
    """A matmul's weights with Xavier scale. `copies` matrices side by side (q, k, v) are each scaled on their own."""
    kernel = ParamSpec((*stack, fan_in, copies * fan_out), math.sqrt(2 / (fan_in + fan_out)))
    return {"kernel": kernel} | ({"bias": ParamSpec((*stack, copies * fan_out), 0.0)} if bias else {})


def norm_specs(width: int, stack: tuple[int, ...] = ()) -> dict:
    return {"scale": ParamSpec((*stack, width), None), "bias": ParamSpec((*stack, width), 0.0)}


def block_specs(layers: int, width: int, mlp: int) -> dict:
    """One transformer block, stacked `layers` deep: the layout of encoder and decoder alike."""
    stack = (layers,)
    return {
        "norm1": norm_specs(width, stack),
        "qkv": dense_specs(width, width, stack, copies=3),
        "out": dense_specs(width, width, stack),
        "norm2": norm_specs(width, stack),
        "fc1": dense_specs(width, mlp, stack),
        "fc2": dense_specs(mlp, width, stack),
    }


def param_specs(cfg: ViTConfig) -> dict:
    """Every array of the encoder. The patch kernel is (P*P*3, D): rows in (y, x, colour) order, no bias (released)."""
    declared = {
        "patch": dense_specs(cfg.patch_size * cfg.patch_size * 3, cfg.width, bias=False),
        "blocks": block_specs(cfg.depth, cfg.width, cfg.mlp_dim),
        "norm": norm_specs(cfg.width),
    }
    if cfg.cls_token:
        declared["cls"] = {"embedding": ParamSpec((1, cfg.width), 0.02)}
    if cfg.learned_pos_grid:
        declared["positions"] = {"table": ParamSpec((cfg.learned_pos_grid**2, cfg.width), 0.02)}
    return declared


def is_spec(x: Any) -> bool:
    return isinstance(x, ParamSpec)


def init_params(key: jax.Array, declared: dict) -> dict:
    """fp32 arrays for declared weights. A key per name: adding a weight disturbs no other."""
    def draw(path, w: ParamSpec) -> jax.Array:
        if not w.std:
            return (jnp.ones if w.std is None else jnp.zeros)(w.shape, jnp.float32)
        own = jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()))
        return w.std * DISTRIBUTIONS[w.law](own, w.shape)
    return jax.tree_util.tree_map_with_path(draw, declared, is_leaf=is_spec)


def with_init_scales(declared: dict, scales: dict) -> dict:
    """Declared weights with other initial scales. `scales` has the form of RELEASED. Biases, norms,
    position tables and layers that it does not name stay as they are."""
    def other(path: tuple, w: ParamSpec) -> ParamSpec:
        layer = path[-2].key if len(path) > 1 else ""
        if path[-1].key not in ("kernel", "embedding") or layer not in scales:
            return w
        law, std = scales[layer]
        return ParamSpec(w.shape, std(*w.shape[-2:]), law)
    return jax.tree_util.tree_map_with_path(other, declared, is_leaf=is_spec)


def init(key: jax.Array, cfg: ViTConfig) -> dict:
    return init_params(key, param_specs(cfg))


def count_params(declared: dict) -> int:
    """Parameters in a tree of declared weights."""
    return sum(math.prod(w.shape) for w in jax.tree.leaves(declared, is_leaf=is_spec))


def transformer_block(x: jax.Array, w: dict, heads: int, mask: jax.Array | None = None, exact_gelu: bool = True,
          cache: tuple[jax.Array, jax.Array, jax.Array] | None = None) -> tuple[jax.Array, dict]:
    """x = x + attention(norm(x)); x = x + mlp(norm(x)). x (B,Q,D) in and out.

    cache: (keys, values, place) of a sequence being written, (B,S,H,Dh) twice and where this x's first token goes;
    the mask then covers S. Also returns {"keys", "values", "looks"}; what the caller drops is never computed.
    """
    B, Q, D = x.shape
    qkv = linear(layer_norm(x, w["norm1"]), w["qkv"])                                 # (B,Q,3D)
    q, k, v = (a.reshape(B, Q, heads, D // heads) for a in jnp.split(qkv, 3, axis=-1))
    if cache is not None:
        keys, values, place = cache
        k = jax.lax.dynamic_update_slice_in_dim(keys, k, place, axis=1)
        v = jax.lax.dynamic_update_slice_in_dim(values, v, place, axis=1)
    mixed, looks = dot_product_attention(q, k, v, mask)
    x = x + linear(mixed.reshape(B, Q, D), w["out"])
    x = x + gelu_linear(linear(layer_norm(x, w["norm2"]), w["fc1"]), w["fc2"], exact_gelu)
    return x, {"keys": k, "values": v, "looks": looks}


def transformer_stack(x: jax.Array, blocks: dict, cfg: Any, wanted: tuple[str, ...] = (), layer: Any = transformer_block, **how: Any) -> tuple[jax.Array, dict]:
    """Run all L blocks: one compiled body scanned over the leading axis of the weights. cfg gives heads, remat and
    unroll; `how` goes to `layer`. Returns x and the wanted by-products, each with a leading L."""
    def body(x, w):
        x, extra = layer(x, w, cfg.num_heads, **how)
        return x, {name: extra[name] for name in wanted}
    if cfg.remat != "none":
        body = jax.checkpoint(body, policy=REMAT[cfg.remat], prevent_cse=False)
    return jax.lax.scan(body, x, blocks, unroll=min(cfg.scan_unroll, cfg.depth))


def sincos_position_embedding(grid: int, width: int) -> np.ndarray:
    """2-D sin-cos table (N, D) fp32, columns [sin x, cos x, sin y, cos y], omega_i = 10000^(-i/(D/4-1)): MoCo-v3's
    form, as released. It is computed for any grid, so a change of resolution needs no surgery."""
    if width % 4 or width < 8:
        raise ValueError(f"width {width} cannot hold a sin-cos table: it must be a multiple of 4, and at least 8")
    omega = 10000.0 ** (-np.arange(width // 4) / (width // 4 - 1))
    y, x = np.mgrid[:grid, :grid].reshape(2, -1, 1) * omega                     # (N, D/4) each
    return np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1).astype(np.float32)


def position_embedding(params: dict, grid: int, cfg: ViTConfig) -> Any:
    """The table (N, D) that is added to the patches: the formula's, or the learned one, resized (cubic) for another grid."""
    if not cfg.learned_pos_grid:
        return sincos_position_embedding(grid, cfg.width)
    table, learned = params["positions"]["table"], (cfg.learned_pos_grid, cfg.learned_pos_grid, cfg.width)
    if grid == cfg.learned_pos_grid:
        return table
    return jax.image.resize(table.reshape(learned), (grid, grid, cfg.width), "cubic").reshape(grid * grid, cfg.width)


def normalize(images: jax.Array) -> jax.Array:
    """uint8 pixels to fp32 with ImageNet mean 0 and deviation 1; done on the device, so that bytes travel."""
    return (images.astype(jnp.float32) / 255 - np.array(IMAGENET_MEAN, np.float32)) / np.array(IMAGENET_STD, np.float32)


def patchify(images: jax.Array, patch: int) -> jax.Array:
    """(B,R,R,3) to (B,N,P*P*3), row by row: a matmul on these is the patch convolution. A rest at the right and bottom is not
    seen, as by the released models' convolution: 384 px hold 27 x 27 patches of 14."""
    B, R, _, C = images.shape
    G = R // patch
    if G < 1:
        raise ValueError(f"resolution {R} is below the patch size {patch}")
    tiles = images[:, :G * patch, :G * patch].reshape(B, G, patch, G, patch, C).swapaxes(2, 3)             # (B,G,G,P,P,C)
    return tiles.reshape(B, G * G, patch * patch * C)


@jax.named_scope("encoder")
def vit(params: dict, images: jax.Array, cfg: ViTConfig, attention: bool = False, mask: jax.Array | None = None) -> dict:
    """images (B,R,R,3), uint8 or already normalised floats; mask, broadcastable to (B,H,S,S): who may look at whom (None: all at
    all, which is the method). Returns by name:

    tokens (B,N,D)         patch tokens before the final norm: what the decoder eats, and a multimodal model should
    pooled (B,D)           mean of the patch tokens, then the final norm (released pooling; CLS left out). The caption loss gives
                           that norm no gradient, for the decoder eats what comes before it
    cls (B,D)              the CLS token before the final norm, if the config has one
    attention (L,B,H,S,S)  on request; row i says where token i looked
    """
    if images.dtype == jnp.uint8:
        images = normalize(images)
    x = linear(patchify(images.astype(cfg.dtype), cfg.patch_size), params["patch"])  # (B,N,D)
    x = x + position_embedding(params, images.shape[1] // cfg.patch_size, cfg).astype(cfg.dtype)
    if cfg.cls_token:                                                                 # its row of the table is zeros
        cls = jnp.broadcast_to(params["cls"]["embedding"].astype(x.dtype), (x.shape[0], 1, cfg.width))
        x = jnp.concatenate([cls, x], axis=1)                                   # (B,1+N,D)
    x, extra = transformer_stack(x, params["blocks"], cfg, wanted=("looks",) if attention else (), mask=mask)
    tokens = x[:, int(cfg.cls_token):]
    out = {"tokens": tokens, "pooled": layer_norm(tokens.mean(1), params["norm"])}
    if cfg.cls_token:
        out["cls"] = x[:, 0]
    if attention:
        out["attention"] = extra["looks"]
    return out


def block_flops(tokens: float, width: int, mlp: int, layers: int) -> float:
    """Forward FLOPs of `layers` blocks on one sequence, 2 a multiply-add, matmuls alone."""
    return layers * (tokens * (8 * width * width + 4 * width * mlp) + 4 * tokens * tokens * width)


def flops(cfg: ViTConfig, resolution: int) -> float:
    """Forward FLOPs of the encoder for one image."""
    N = (resolution // cfg.patch_size) ** 2
    return block_flops(N + cfg.cls_token, cfg.width, cfg.mlp_dim, cfg.depth) + 2 * N * cfg.patch_size**2 * 3 * cfg.width


if __name__ == "__main__":
    print(f"{'encoder':>10} {'layers':>6} {'width':>6} {'heads':>6} {'mlp':>6} {'params':>9}   tokens and GFLOPs an image")
    for size in ENCODER_SIZES:
        p, sides = {"micro": (8, (32, 64))}.get(size, (16, (160, 224, 384)) if size in ("Ti", "S", "B") else (14, (84, 224, 448)))
        c = vit_config(f"{size}/{p}")
        costs = "   ".join(f"{s}px {(s // p)**2:4d} {flops(c, s) / 1e9:8.3f}" for s in sides)
        print(f"{size + '/' + str(p):>10} {c.depth:6d} {c.width:6d} {c.num_heads:6d} {c.mlp_dim:6d} {count_params(param_specs(c)) / 1e6:8.1f}M   {costs}")

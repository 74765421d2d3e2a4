"""Where other libraries keep an encoder's arrays: one table, from which writing, reading and checking follow.

Letters: D width, M mlp, P patch, G grid side, N = G*G patches, L layers.

    python -m interop.layouts        prints the table
"""
import dataclasses
import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import layers
import vit
from runtime.errors import LayoutError


class Layout(NamedTuple):
    """A library's names. * stands for weight and bias, {} for a layer's number; torch keeps matrices (out, in)."""
    patch: str              # (D,3,P,P); with a * there is a bias, which is zeros here
    cls: str                # "" where there can be none
    positions: str          # (1+N,D), row 0 for CLS, where there is one
    norm: str
    norm1: str
    qkv: tuple[str, ...]    # one matrix (3D,D), or three (D,D)
    out: str
    norm2: str
    fc1: str
    fc2: str
    batched: bool = False   # cls is (1,1,D) and positions (1,...,D), not (D,) and (...,D)


LAYOUTS = {
    "open_clip": Layout("conv1.weight", "class_embedding", "positional_embedding", "ln_post.*", "transformer.resblocks.{}.ln_1.*",
                        ("transformer.resblocks.{}.attn.in_proj_*",), "transformer.resblocks.{}.attn.out_proj.*",
                        "transformer.resblocks.{}.ln_2.*", "transformer.resblocks.{}.mlp.c_fc.*", "transformer.resblocks.{}.mlp.c_proj.*"),
    "siglip": Layout("embeddings.patch_embedding.*", "", "embeddings.position_embedding.weight", "post_layernorm.*", "encoder.layers.{}.layer_norm1.*",
                     tuple(f"encoder.layers.{{}}.self_attn.{x}_proj.*" for x in "qkv"), "encoder.layers.{}.self_attn.out_proj.*",
                     "encoder.layers.{}.layer_norm2.*", "encoder.layers.{}.mlp.fc1.*", "encoder.layers.{}.mlp.fc2.*"),
    "vit": Layout("embeddings.patch_embeddings.projection.*", "embeddings.cls_token", "embeddings.position_embeddings", "layernorm.*",
                  "encoder.layer.{}.layernorm_before.*", tuple(f"encoder.layer.{{}}.attention.attention.{x}.*" for x in ("query", "key", "value")),
                  "encoder.layer.{}.attention.output.dense.*", "encoder.layer.{}.layernorm_after.*", "encoder.layer.{}.intermediate.dense.*",
                  "encoder.layer.{}.output.dense.*", True),
    "timm": Layout("patch_embed.proj.*", "cls_token", "pos_embed", "fc_norm.*", "blocks.{}.norm1.*", ("blocks.{}.attn.qkv.*",), "blocks.{}.attn.proj.*",
                   "blocks.{}.norm2.*", "blocks.{}.mlp.fc1.*", "blocks.{}.mlp.fc2.*", True),
}
FOREIGN = re.compile(r"(ln_pre|norm_pre|pre_layrnorm|attn_pool|reg_token|register_tokens)\b")  # what changes the tokens, and is not in this encoder


def to_library(params: dict, cfg: vit.ViTConfig, grid: int, layout: Layout) -> dict[str, np.ndarray]:
    """Parameters by a library's names, at a grid: views of them, for the most part."""
    D, P, out = cfg.width, cfg.patch_size, {}

    def put(name: str, weight: np.ndarray, bias: np.ndarray) -> None:
        out[name.replace("*", "weight")], out[name.replace("*", "bias")] = weight, bias

    patch = np.asarray(params["patch"]["kernel"]).reshape(P, P, 3, D).transpose(3, 2, 0, 1)      # (D,3,P,P)
    out[layout.patch.replace("*", "weight")] = patch
    if "*" in layout.patch:
        out[layout.patch.replace("*", "bias")] = np.zeros(D, np.float32)
    table = np.asarray(vit.position_embedding(params, grid, cfg))
    if cfg.cls_token:
        out[layout.cls] = np.asarray(params["cls"]["embedding"]).reshape((1, 1, D) if layout.batched else (D,))
        table = np.concatenate([np.zeros((1, D), np.float32), table])
    out[layout.positions] = table[None] if layout.batched else table
    put(layout.norm, *(np.asarray(params["norm"][x]) for x in ("scale", "bias")))
    blocks = {name: {leaf: np.asarray(x) for leaf, x in child.items()} for name, child in params["blocks"].items()}
    for i in range(cfg.depth):
        for name in ("norm1", "norm2"):
            put(getattr(layout, name).format(i), blocks[name]["scale"][i], blocks[name]["bias"][i])
        for name in ("out", "fc1", "fc2"):
            put(getattr(layout, name).format(i), blocks[name]["kernel"][i].T, blocks[name]["bias"][i])
        thirds = (np.split(blocks["qkv"][x][i].T, len(layout.qkv)) for x in ("kernel", "bias"))
        for name, weight, bias in zip(layout.qkv, *thirds):
            put(name.format(i), weight, bias)
    return out


def from_library(arrays: dict[str, np.ndarray], cfg: vit.ViTConfig, layout: Layout) -> dict:
    """What `arrange` took apart, put together again; arrays whose names and shapes are right."""
    def get(names: str | tuple[str, ...], leaf: str) -> np.ndarray:
        """All layers of a name (or of names side by side); matrices (in, out)."""
        names = (names,) if isinstance(names, str) else names
        each = [np.concatenate([arrays[n.format(i).replace("*", leaf)] for n in names]).T for i in range(cfg.depth)]
        return np.stack(each)
    params = {
        "patch": {"kernel": np.ascontiguousarray(arrays[layout.patch.replace("*", "weight")].transpose(2, 3, 1, 0)).reshape(-1, cfg.width)},
        "blocks": {name: {ours: get(getattr(layout, name), theirs) for ours, theirs in (("scale" if "norm" in name else "kernel", "weight"), ("bias", "bias"))}
                   for name in ("norm1", "qkv", "out", "norm2", "fc1", "fc2")},
        "norm": {ours: arrays[layout.norm.replace("*", theirs)] for ours, theirs in (("scale", "weight"), ("bias", "bias"))},
    }
    table = arrays[layout.positions].reshape(-1, cfg.width)
    if cfg.cls_token:  # its row of the table is zeros in the released files; where it is not, it can as well be part of CLS
        params["cls"] = {"embedding": arrays[layout.cls].reshape(1, cfg.width) + table[:1]}
    return params | ({"positions": {"table": table[int(cfg.cls_token):]}} if cfg.learned_pos_grid else {})


def sizes(arrays: dict[str, np.ndarray], layout: Layout, heads: int) -> tuple[vit.ViTConfig, int]:
    """(config, G) from the shapes. Heads, which no shape shows, are the family's for that width, or 64 wide."""
    def shape(name: str, axes: int) -> tuple[int, ...]:
        name = name.replace("*", "weight")
        if name not in arrays:
            raise LayoutError(f"{name} is missing")
        if arrays[name].ndim != axes or 0 in arrays[name].shape:
            raise LayoutError(f"{name} is {arrays[name].shape}, and should have {axes} axes")
        return arrays[name].shape
    D, channels, P, across = shape(layout.patch, 4)
    if channels != 3 or across != P:
        raise LayoutError(f"{layout.patch.replace('*', 'weight')} is {(D, channels, P, across)}, not (width, 3, patch, patch)")
    L = next(i for i in range(len(arrays) + 1) if layout.norm1.format(i).replace("*", "weight") not in arrays)
    M = shape(layout.fc1.format(0), 2)[0]
    cls = bool(layout.cls) and (layout.cls in arrays or not layout.batched)  # open_clip's always has one
    rows = shape(layout.positions, 2 + layout.batched)[-2] - cls
    G = math.isqrt(max(rows, 0))
    if rows != G * G or not G:
        raise LayoutError(f"{layout.positions} has rows for {rows} patches, which make no square grid")
    heads = heads or next((h for _, width, h, _ in vit.ENCODER_SIZES.values() if width == D), D // 64 if D % 64 == 0 else 0)
    if not heads or D % heads:
        raise LayoutError(f"width {D} is of no known size and cannot be cut into {heads or 'heads of 64'}: say how many heads there are, with --heads")
    if D % 4 or D < 8:
        raise LayoutError(f"width {D} is no multiple of 4")
    return vit.ViTConfig(max(L, 1), D, heads, M, P, cls), G


def detect(arrays: dict[str, np.ndarray], heads: int = 0) -> tuple[dict, vit.ViTConfig, int, list[str]]:
    """(parameters, config, resolution, notes) of an encoder in any layout of the table, whatever stands before its names.
    The notes tell what was found and dropped. LayoutError if it cannot be this encoder."""
    known = {kind: layout.patch.replace("*", "weight") for kind, layout in LAYOUTS.items()}
    found = [(kind, name.removesuffix(patch)) for kind, patch in known.items() for name in arrays
             if name.endswith(patch) and name.removesuffix(patch)[-1:] in ("", ".")]
    if not found:
        raise LayoutError(f"no patch embedding among its {len(arrays)} tensors, be it " + " or ".join(f"{name} ({kind})" for kind, name in known.items()))
    kind, prefix = found[0]
    layout, inside = LAYOUTS[kind], {name.removeprefix(prefix): x for name, x in arrays.items() if name.startswith(prefix)}
    cfg, G = sizes(inside, layout, heads)
    nothing = jax.tree.map(lambda w: np.broadcast_to(np.float32(0), w.shape), vit.param_specs(cfg), is_leaf=layers.is_spec)  # takes no memory
    wanted = {name: x.shape for name, x in to_library(nothing, cfg, G, layout).items()}
    stem = layout.norm1.partition("{}")[0]
    wrong = [f"{name} is missing" if name not in inside else f"{name} is {inside[name].shape}, not {shape}"
             for name, shape in wanted.items() if name not in inside or inside[name].shape != shape]
    wrong += [f"{name} is {x.dtype}, not floats" for name, x in inside.items() if name in wanted and not jnp.issubdtype(x.dtype, jnp.floating)]
    wrong += [f"{name} has no place in this encoder" for name in inside if name not in wanted and (name.startswith(stem) or FOREIGN.match(name))]
    bias = layout.patch.replace("*", "bias")
    if not wrong and "*" in layout.patch and np.any(inside[bias]):
        wrong = [f"{bias} is not zero, and this encoder's patches have no bias"]
    if wrong:
        raise LayoutError(f"not this encoder, read as {kind}'s layout of {cfg.depth} layers, width {cfg.width}, patch {cfg.patch_size}: {'; '.join(wrong[:4])}"
                          + (f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""))

    table = inside[layout.positions].reshape(-1, cfg.width)[int(cfg.cls_token):]
    off = np.abs(np.asarray(table, np.float32) - vit.sincos_position_embedding(G, cfg.width)).max()
    learned = not off <= max(1e-5, float(jnp.finfo(table.dtype).eps))  # sines of the fp32 angle, and rounded to the file's numbers
    cfg = dataclasses.replace(cfg, learned_pos_grid=G if learned else 0)
    dropped = [name for name in arrays if name.removeprefix(prefix) not in wanted or not name.startswith(prefix)]
    notes = [f"{kind} layout: {cfg.depth} layers, width {cfg.width}, {cfg.num_heads} heads, mlp {cfg.mlp_dim}, patch {cfg.patch_size}, {G * cfg.patch_size} px, "
             f"{'a' if cfg.cls_token else 'no'} CLS token",
             f"its position table is not the sin-cos table (off by up to {off:.2g}) and is kept" if learned else "its position table is the sin-cos table",
             f"dropped {len(dropped)}: {', '.join(dropped[:6])}{' ...' if len(dropped) > 6 else ''}" if dropped else "nothing dropped"]
    floats = {name: np.asarray(inside[name], np.float32) for name in wanted}
    return from_library(floats, cfg, layout), cfg, G * cfg.patch_size, notes


if __name__ == "__main__":
    for part in Layout._fields[:-1]:
        print(part)
        for kind, layout in LAYOUTS.items():
            names = getattr(layout, part)
            print(f"    {kind:10} {names if isinstance(names, str) else ' '.join(names)}")

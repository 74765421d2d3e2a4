"""Where other libraries keep an encoder's arrays: one table, from which writing and reading follow.

Letters: D width, M MLP width, P patch size, G grid side, N = G*G patches, L layers.

    python -m interop.layouts        prints the table
"""
import dataclasses
import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import vit
from layers import is_spec
from runtime.errors import LayoutError, first_problems


class Layout(NamedTuple):
    """A library's names. * stands for weight and bias, {} for the number of a layer. Matrices are
    (out, in), as in PyTorch."""
    patch: str              # (D,3,P,P); with a * there is a bias, which is zero here
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
    "open_clip": Layout(
        "conv1.weight", "class_embedding", "positional_embedding", "ln_post.*",
        "transformer.resblocks.{}.ln_1.*", ("transformer.resblocks.{}.attn.in_proj_*",),
        "transformer.resblocks.{}.attn.out_proj.*", "transformer.resblocks.{}.ln_2.*",
        "transformer.resblocks.{}.mlp.c_fc.*", "transformer.resblocks.{}.mlp.c_proj.*"),
    "siglip": Layout(
        "embeddings.patch_embedding.*", "", "embeddings.position_embedding.weight",
        "post_layernorm.*", "encoder.layers.{}.layer_norm1.*",
        tuple(f"encoder.layers.{{}}.self_attn.{x}_proj.*" for x in "qkv"),
        "encoder.layers.{}.self_attn.out_proj.*", "encoder.layers.{}.layer_norm2.*",
        "encoder.layers.{}.mlp.fc1.*", "encoder.layers.{}.mlp.fc2.*"),
    "vit": Layout(
        "embeddings.patch_embeddings.projection.*", "embeddings.cls_token",
        "embeddings.position_embeddings", "layernorm.*", "encoder.layer.{}.layernorm_before.*",
        tuple(f"encoder.layer.{{}}.attention.attention.{x}.*" for x in ("query", "key", "value")),
        "encoder.layer.{}.attention.output.dense.*", "encoder.layer.{}.layernorm_after.*",
        "encoder.layer.{}.intermediate.dense.*", "encoder.layer.{}.output.dense.*", True),
    "timm": Layout(
        "patch_embed.proj.*", "cls_token", "pos_embed", "fc_norm.*", "blocks.{}.norm1.*",
        ("blocks.{}.attn.qkv.*",), "blocks.{}.attn.proj.*", "blocks.{}.norm2.*",
        "blocks.{}.mlp.fc1.*", "blocks.{}.mlp.fc2.*", True),
}
# Arrays that change the tokens, and that this encoder does not have.
UNSUPPORTED = re.compile(
    r"(ln_pre|norm_pre|pre_layrnorm|attn_pool|reg_token|register_tokens)\b")


def weight(name: str) -> str:
    return name.replace("*", "weight")


def bias(name: str) -> str:
    return name.replace("*", "bias")


# ---------------------------------------------------------------------------------- writing
def to_library(params: dict, cfg: vit.ViTConfig, grid: int, layout: Layout
               ) -> dict[str, np.ndarray]:
    """Parameters by a library's names, at a grid side. Most arrays are views."""
    D, P = cfg.width, cfg.patch_size
    arrays = {}
    patch = np.asarray(params["patch"]["kernel"]).reshape(P, P, 3, D).transpose(3, 2, 0, 1)
    arrays[weight(layout.patch)] = patch                                       # (D,3,P,P)
    if "*" in layout.patch:
        arrays[bias(layout.patch)] = np.zeros(D, np.float32)
    table = np.asarray(vit.position_embedding(params, grid, cfg))
    if cfg.cls_token:
        cls = np.asarray(params["cls"]["embedding"])
        arrays[layout.cls] = cls.reshape((1, 1, D) if layout.batched else (D,))
        table = np.concatenate([np.zeros((1, D), np.float32), table])
    arrays[layout.positions] = table[None] if layout.batched else table
    arrays[weight(layout.norm)] = np.asarray(params["norm"]["scale"])
    arrays[bias(layout.norm)] = np.asarray(params["norm"]["bias"])
    return arrays | block_arrays(params["blocks"], layout)


def block_arrays(blocks: dict, layout: Layout) -> dict[str, np.ndarray]:
    """The stacked blocks of a transformer by a library's names."""
    blocks = jax.tree.map(np.asarray, blocks)
    arrays = {}
    for i in range(len(blocks["norm1"]["scale"])):
        for part in ("norm1", "norm2"):
            name = getattr(layout, part).format(i)
            arrays[weight(name)] = blocks[part]["scale"][i]
            arrays[bias(name)] = blocks[part]["bias"][i]
        for part in ("out", "fc1", "fc2"):
            name = getattr(layout, part).format(i)
            arrays[weight(name)] = blocks[part]["kernel"][i].T
            arrays[bias(name)] = blocks[part]["bias"][i]
        kernels = np.split(blocks["qkv"]["kernel"][i].T, len(layout.qkv))
        biases = np.split(blocks["qkv"]["bias"][i], len(layout.qkv))
        for name, part_kernel, part_bias in zip(layout.qkv, kernels, biases):
            arrays[weight(name).format(i)] = part_kernel
            arrays[bias(name).format(i)] = part_bias
    return arrays


# ---------------------------------------------------------------------------------- reading
def from_library(arrays: dict[str, np.ndarray], cfg: vit.ViTConfig, layout: Layout) -> dict:
    """The inverse of `to_library`, for arrays whose names and shapes are right."""
    def stack(names: tuple[str, ...]) -> np.ndarray:
        """All layers of the arrays that these names have side by side; matrices (in, out)."""
        layers = []
        for i in range(cfg.depth):
            layers.append(np.concatenate([arrays[name.format(i)] for name in names]).T)
        return np.stack(layers)
    blocks = {}
    for part in ("norm1", "qkv", "out", "norm2", "fc1", "fc2"):
        names = layout.qkv if part == "qkv" else (getattr(layout, part),)
        kind = "scale" if part.startswith("norm") else "kernel"
        blocks[part] = {kind: stack(tuple(map(weight, names))),
                        "bias": stack(tuple(map(bias, names)))}
    patch = np.ascontiguousarray(arrays[weight(layout.patch)].transpose(2, 3, 1, 0))  # (P,P,3,D)
    params = {
        "patch": {"kernel": patch.reshape(-1, cfg.width)},
        "blocks": blocks,
        "norm": {"scale": arrays[weight(layout.norm)], "bias": arrays[bias(layout.norm)]},
    }
    table = arrays[layout.positions].reshape(-1, cfg.width)
    if cfg.cls_token:  # its row of the table, zero in the released files, is added to CLS itself
        cls = arrays[layout.cls].reshape(1, cfg.width)
        params["cls"] = {"embedding": cls + table[:1]}
        table = table[1:]
    if cfg.learned_pos_grid:
        params["positions"] = {"table": table}
    return params


def sizes(arrays: dict[str, np.ndarray], layout: Layout, heads: int) -> tuple[vit.ViTConfig, int]:
    """(config, G) from the shapes. No shape depends on the number of heads: it is `heads`, or
    `default_heads` if that is 0."""
    def shape(name: str, num_axes: int) -> tuple[int, ...]:
        if name not in arrays:
            raise LayoutError(f"{name} is missing")
        if arrays[name].ndim != num_axes or 0 in arrays[name].shape:
            raise LayoutError(f"{name} is {arrays[name].shape}, and should have {num_axes} axes")
        return arrays[name].shape
    patch = weight(layout.patch)
    D, channels, P, columns = shape(patch, 4)
    if channels != 3 or columns != P:
        raise LayoutError(f"{patch} is {arrays[patch].shape}, not (width, 3, patch, patch)")
    L = 0
    while weight(layout.norm1).format(L) in arrays:
        L += 1
    M = shape(weight(layout.fc1).format(0), 2)[0]
    # open_clip always has a CLS token
    has_cls = bool(layout.cls) and (layout.cls in arrays or not layout.batched)
    num_patches = shape(layout.positions, 2 + layout.batched)[-2] - has_cls
    G = math.isqrt(max(num_patches, 0))
    if num_patches != G * G or not G:
        raise LayoutError(f"{layout.positions} has rows for {num_patches} patches, which make no "
                          "square grid")
    depth = max(L, 1)
    heads = heads or default_heads(depth, D, M)
    if not heads:
        raise LayoutError(f"the number of heads is not known for width {D}: set it with --heads")
    if heads < 1 or D % heads:
        raise LayoutError(f"width {D} cannot be divided into {heads} heads: change --heads")
    if D % 4 or D < 8:
        raise LayoutError(f"width {D} is no multiple of 4")
    return vit.ViTConfig(depth, D, heads, M, P, has_cls), G


def default_heads(depth: int, width: int, mlp_dim: int) -> int:
    """The number of heads of the model family's size with these dimensions; else of its sizes with
    this width, if all have the same; else for heads of width 64. 0 if none of these is known."""
    of_width = set()
    for size_depth, size_width, num_heads, size_mlp_dim in vit.ENCODER_SIZES.values():
        if (size_depth, size_width, size_mlp_dim) == (depth, width, mlp_dim):
            return num_heads
        if size_width == width:
            of_width.add(num_heads)
    if of_width:
        return of_width.pop() if len(of_width) == 1 else 0
    return width // 64 if width % 64 == 0 else 0


def find_layout(arrays: dict[str, np.ndarray]) -> tuple[str, str]:
    """(layout, prefix of the encoder's names) by the name of the patch embedding."""
    for kind, layout in LAYOUTS.items():
        for name in arrays:
            prefix = name.removesuffix(weight(layout.patch))
            if prefix != name and prefix[-1:] in ("", "."):
                return kind, prefix
    known = [f"{weight(layout.patch)} ({kind})" for kind, layout in LAYOUTS.items()]
    raise LayoutError(f"no patch embedding among its {len(arrays)} tensors: expected "
                      f"{' or '.join(known)}")


def detect(arrays: dict[str, np.ndarray], heads: int = 0
           ) -> tuple[dict, vit.ViTConfig, int, list[str]]:
    """(parameters, config, resolution, notes) of an encoder in any layout of the table, with any
    prefix of its names. The notes say what was read and dropped. LayoutError if it does not fit."""
    kind, prefix = find_layout(arrays)
    layout = LAYOUTS[kind]
    inside = {name.removeprefix(prefix): x for name, x in arrays.items() if name.startswith(prefix)}
    cfg, G = sizes(inside, layout, heads)
    zeros = jax.tree.map(lambda spec: np.broadcast_to(np.float32(0), spec.shape),
                         vit.param_specs(cfg), is_leaf=is_spec)  # these take no memory
    shapes = {name: x.shape for name, x in to_library(zeros, cfg, G, layout).items()}
    problems = find_problems(inside, shapes, layout)
    if problems:
        raise LayoutError(f"not this encoder, read as {kind}'s layout of {cfg.depth} layers, width "
                          f"{cfg.width}, patch {cfg.patch_size}: {first_problems(problems, 4)}")
    table = inside[layout.positions].reshape(-1, cfg.width)[int(cfg.cls_token):]
    formula = vit.sincos_position_embedding(G, cfg.width)
    error = np.abs(np.asarray(table, np.float32) - formula).max()
    # The formula in fp32 angles differs by 1e-5; then the file's dtype rounds.
    is_learned = not error <= max(1e-5, float(jnp.finfo(table.dtype).eps))
    cfg = dataclasses.replace(cfg, learned_pos_grid=G if is_learned else 0)
    dropped = [name for name in arrays
               if not name.startswith(prefix) or name.removeprefix(prefix) not in shapes]
    notes = [f"{kind} layout: {cfg.depth} layers, width {cfg.width}, {cfg.num_heads} heads, mlp "
             f"{cfg.mlp_dim}, patch {cfg.patch_size}, {G * cfg.patch_size} px, "
             f"{'a' if cfg.cls_token else 'no'} CLS token"]
    if is_learned:
        notes.append(f"its position table is not the sin-cos table (off by up to {error:.2g}) and "
                     "is kept")
    else:
        notes.append("its position table is the sin-cos table")
    ellipsis = " ..." if len(dropped) > 6 else ""
    notes.append(f"dropped {len(dropped)}: {', '.join(dropped[:6])}{ellipsis}" if dropped
                 else "nothing dropped")
    floats = {name: np.asarray(inside[name], np.float32) for name in shapes}
    return from_library(floats, cfg, layout), cfg, G * cfg.patch_size, notes


def find_problems(arrays: dict[str, np.ndarray], shapes: dict[str, tuple], layout: Layout
                  ) -> list[str]:
    """Why these arrays are not an encoder of these shapes by name; empty if they are."""
    problems = []
    for name, shape in shapes.items():
        if name not in arrays:
            problems.append(f"{name} is missing")
        elif arrays[name].shape != shape:
            problems.append(f"{name} is {arrays[name].shape}, not {shape}")
        if name in arrays and not jnp.issubdtype(arrays[name].dtype, jnp.floating):
            problems.append(f"{name} is {arrays[name].dtype}, not floats")
    stem = layout.norm1.partition("{}")[0]
    for name in arrays:
        if name not in shapes and (name.startswith(stem) or UNSUPPORTED.match(name)):
            problems.append(f"{name} has no place in this encoder")
    patch_bias = bias(layout.patch)
    if not problems and "*" in layout.patch and np.any(arrays[patch_bias]):
        problems.append(f"{patch_bias} is not zero, and this encoder's patches have no bias")
    return problems


if __name__ == "__main__":
    for part in Layout._fields[:-1]:
        print(part)
        for kind, layout in LAYOUTS.items():
            names = getattr(layout, part)
            print(f"    {kind:10} {names if isinstance(names, str) else ' '.join(names)}")

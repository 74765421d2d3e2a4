"""Encoder and decoder once more, in eager PyTorch, from the description of the model and not from the JAX code.

Weights are the JAX parameter tree as tensors: nested dicts, a block's arrays with a leading layer axis, matmul kernels
(in, out). `cfg` is the project's ViTConfig or DecoderConfig; of it only heads, patch, prefix and dtype are read.

Letters: B images, R pixels a side, P patch, G grid side, N patches, K kept patches, T text positions, S tokens in all,
D width, H heads, V words.
"""
import functools

import numpy as np
import torch
from torch.nn import functional as F

EPS = 1e-6


def from_jax(params, device="cpu"):
    """A tree of arrays to the same tree of fp32 leaves that collect gradients."""
    if isinstance(params, dict):
        return {name: from_jax(child, device) for name, child in params.items()}
    return torch.tensor(np.asarray(params), dtype=torch.float32, device=device, requires_grad=True)


def tensor(array, device="cpu"):
    """Images, indices or ids; torch wants the last two wide."""
    t = torch.from_numpy(np.array(array)).to(device)
    return t.long() if t.dtype == torch.int32 else t


def layers(blocks):
    """Stacked weights to one dict a layer; a list of those stays."""
    if isinstance(blocks, list):
        return blocks
    parts = {name: {leaf: w.unbind(0) for leaf, w in child.items()} for name, child in blocks.items()}
    depth = len(parts["qkv"]["kernel"])
    return [{name: {leaf: w[i] for leaf, w in child.items()} for name, child in parts.items()} for i in range(depth)]


def linear(x, w):
    bias = w["bias"].to(x.dtype) if "bias" in w else None
    return F.linear(x, w["kernel"].to(x.dtype).t(), bias)


def norm(x, w):
    return F.layer_norm(x, x.shape[-1:], w["scale"].to(x.dtype), w["bias"].to(x.dtype), EPS)


def attention(x, w, heads, maps, see):
    """Self-attention of x (B,S,D). `see` are the mask arguments of torch's fused kernel; a list in `maps` collects
    (B,H,S,S), for which the softmax is written out."""
    B, S, D = x.shape
    q, k, v = linear(x, w["qkv"]).view(B, S, 3, heads, D // heads).permute(2, 0, 3, 1, 4)
    if maps is None:
        mixed = F.scaled_dot_product_attention(q, k, v, **see)
    else:
        assert not see, "maps are for the encoder, which has no mask"
        looks = F.softmax((q @ k.transpose(-1, -2)).float() / (D // heads) ** 0.5, dim=-1)
        maps.append(looks)
        mixed = looks.to(v.dtype) @ v
    return linear(mixed.transpose(1, 2).reshape(B, S, D), w["out"])


def transformer(x, blocks, heads, gelu, maps=None, **see):
    """Pre-norm blocks; gelu "none" (exact) or "tanh"."""
    for w in layers(blocks):
        x = x + attention(norm(x, w["norm1"]), w, heads, maps, see)
        x = x + linear(F.gelu(linear(norm(x, w["norm2"]), w["fc1"]), approximate=gelu), w["fc2"])
    return x


@functools.cache
def positions(grid, width, device):
    """(N, D) sin-cos table, patch by patch in reading order."""
    omega = 10000 ** -torch.linspace(0, 1, width // 4, dtype=torch.float64)
    angle = torch.outer(torch.arange(grid, dtype=torch.float64), omega)          # (G, D/4)
    across, down = angle.repeat(grid, 1), angle.repeat_interleave(grid, 0)
    return torch.cat([across.sin(), across.cos(), down.sin(), down.cos()], dim=1).float().to(device)


def encoder(params, images, cfg, maps=None, **see):
    """uint8 images (B,R,R,3) to all tokens (B,S,D), patch tokens (B,N,D) and pooled (B,D). `see` may hold an attn_mask."""
    dtype, P = getattr(torch, cfg.dtype), cfg.patch_size
    x = images.permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(s, device=x.device).view(3, 1, 1) for s in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    kernel = params["patch"]["kernel"].view(P, P, 3, -1).permute(3, 2, 0, 1)     # rows are (y, x, color)
    x = F.conv2d(((x - mean) / std).to(dtype), kernel.to(dtype), stride=P)       # (B,D,G,G)
    table = positions(x.shape[-1], x.shape[1], x.device)
    x = x.flatten(2).transpose(1, 2) + table.to(dtype)                           # (B,N,D)
    N = x.shape[1]
    if "cls" in params:
        cls = params["cls"]["embedding"].to(dtype).expand(x.shape[0], 1, -1)
        x = torch.cat([cls, x], dim=1)
    x = transformer(x, params["blocks"], cfg.num_heads, "none", maps, **see)
    tokens = x[:, -N:]
    return x, tokens, norm(tokens.mean(1), params["norm"])


def gather(tokens, chosen):
    """Of tokens (B,N,D) those at the indices chosen (B,K)."""
    return tokens.gather(1, chosen[..., None].expand(-1, -1, tokens.shape[-1]))


def sequence(params, image_tokens, text, cfg):
    """image_tokens (B,K,E) and text (B,T) to normed (B,K+T,D)."""
    dtype, K = getattr(torch, cfg.dtype), image_tokens.shape[1]
    image = linear(image_tokens.to(dtype), params["project"])
    x = torch.cat([image, F.embedding(text, params["embed"]["embedding"].to(dtype))], dim=1)
    if cfg.prefix_attention == "causal":
        see = {"is_causal": True}
    else:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        mask[:K, :K] = True
        see = {"attn_mask": mask}
    return norm(transformer(x, params["blocks"], cfg.num_heads, "tanh", **see), params["norm"])


def decoder(params, image_tokens, text, cfg):
    """image_tokens (B,K,E) and text (B,T) to logits (B,T,V)."""
    return linear(sequence(params, image_tokens, text, cfg)[:, image_tokens.shape[1]:], params["head"]).float()


def mean_loss(encoder_params, decoder_params, images, chosen, text, encoder_cfg, decoder_cfg):
    """Mean cross-entropy of a word, over every word and eos of the batch; pad (0) is no target."""
    _, tokens, _ = encoder(encoder_params, images, encoder_cfg)
    logits = decoder(decoder_params, gather(tokens, chosen), text[:, :-1], decoder_cfg)
    return F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten(), ignore_index=0)

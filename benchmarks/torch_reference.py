"""Encoder and decoder in eager PyTorch, written from the model's description and not from the JAX.

The parity tests compare with it, and bench.py times it. Parameters are the JAX tree as tensors:
nested dicts, a block's arrays with a leading layer axis, matmul kernels (in, out). `cfg` is a
ViTConfig or DecoderConfig; only num_heads, patch_size, prefix_attention, text_pos_embed and dtype
are read.

Letters: B images, R pixels per side, P patch size, G grid side, N patches, K kept patches, T text
positions, S tokens of a sequence, D width, E encoder width, H heads, V vocabulary size.
"""
import functools

import numpy as np
import torch
from torch.nn import functional as F

LAYER_NORM_EPS = 1e-6


def from_jax(params, device="cpu"):
    """A tree of arrays as the same tree of fp32 leaves that collect gradients."""
    if isinstance(params, dict):
        return {name: from_jax(child, device) for name, child in params.items()}
    array = np.asarray(params, np.float32)
    return torch.tensor(array, device=device, requires_grad=True)


def tensor(array, device="cpu"):
    """Images, indices or token ids. PyTorch wants int64 for the last two."""
    t = torch.from_numpy(np.array(array)).to(device)
    return t.long() if t.dtype == torch.int32 else t


def unstack_layers(blocks):
    """Stacked parameters as a list with one dict per layer. Such a list is returned as it is."""
    if isinstance(blocks, list):
        return blocks
    depth = len(blocks["qkv"]["kernel"])
    layers = [{name: {} for name in blocks} for _ in range(depth)]
    for name, part in blocks.items():
        for leaf, stacked in part.items():
            for layer, array in zip(layers, stacked.unbind(0)):
                layer[name][leaf] = array
    return layers


def linear(x, w):
    bias = w["bias"].to(x.dtype) if "bias" in w else None
    return F.linear(x, w["kernel"].to(x.dtype).t(), bias)


def layer_norm(x, w):
    scale, bias = w["scale"].to(x.dtype), w["bias"].to(x.dtype)
    return F.layer_norm(x, x.shape[-1:], scale, bias, LAYER_NORM_EPS)


def attention(qkv, num_heads, weights_list, mask_args):
    """Queries, keys and values side by side (B,S,3*D) to outputs (B,S,D). mask_args go to torch's
    fused kernel. If weights_list is a list, the attention weights (B,H,S,S) are appended to it;
    then the softmax is written out and takes no mask."""
    B, S, D = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    q, k, v = qkv.view(B, S, 3, num_heads, D // num_heads).permute(2, 0, 3, 1, 4)
    if weights_list is None:
        outputs = F.scaled_dot_product_attention(q, k, v, **mask_args)
    else:
        assert not mask_args, "only the encoder, which has no mask, gives its attention weights"
        scores = (q @ k.transpose(-1, -2)).float() / (D // num_heads) ** 0.5
        attention_weights = F.softmax(scores, dim=-1)
        weights_list.append(attention_weights)
        outputs = attention_weights.to(v.dtype) @ v
    return outputs.transpose(1, 2).reshape(B, S, D)


def mlp(x, w, gelu):
    return linear(F.gelu(linear(x, w["fc1"]), approximate=gelu), w["fc2"])


def transformer(x, blocks, num_heads, gelu, weights_list=None, **mask_args):
    """Pre-norm blocks. gelu: "none" for the exact one, or "tanh"."""
    for w in unstack_layers(blocks):
        qkv = linear(layer_norm(x, w["norm1"]), w["qkv"])
        x = x + linear(attention(qkv, num_heads, weights_list, mask_args), w["out"])
        x = x + mlp(layer_norm(x, w["norm2"]), w, gelu)
    return x


@functools.cache
def sincos_position_embedding(grid, width, device):
    """(N,D) table, patch by patch in reading order."""
    omega = 10000 ** -torch.linspace(0, 1, width // 4, dtype=torch.float64)
    angle = torch.outer(torch.arange(grid, dtype=torch.float64), omega)          # (G,D/4)
    x, y = angle.repeat(grid, 1), angle.repeat_interleave(grid, 0)
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1).float().to(device)


def embed_patches(params, images, cfg):
    """uint8 images (B,R,R,3) to the input (B,S,D) of the first block."""
    dtype, P = getattr(torch, cfg.dtype), cfg.patch_size
    mean = torch.tensor((0.485, 0.456, 0.406), device=images.device).view(3, 1, 1)
    std = torch.tensor((0.229, 0.224, 0.225), device=images.device).view(3, 1, 1)
    pixels = (images.permute(0, 3, 1, 2).float() / 255 - mean) / std
    kernel = params["patch"]["kernel"].view(P, P, 3, -1).permute(3, 2, 0, 1)     # from (y,x,color)
    x = F.conv2d(pixels.to(dtype), kernel.to(dtype), stride=P)                   # (B,D,G,G)
    table = sincos_position_embedding(x.shape[-1], x.shape[1], x.device)
    x = x.flatten(2).transpose(1, 2) + table.to(dtype)                           # (B,N,D)
    if "cls" in params:
        cls = params["cls"]["embedding"].to(dtype).expand(x.shape[0], 1, -1)
        x = torch.cat([cls, x], dim=1)
    return x


def encoder(params, images, cfg, weights_list=None, **mask_args):
    """uint8 images (B,R,R,3) to all tokens (B,S,D), patch tokens (B,N,D) and pooled (B,D).
    mask_args may hold an attn_mask."""
    x = embed_patches(params, images, cfg)
    x = transformer(x, params["blocks"], cfg.num_heads, "none", weights_list, **mask_args)
    tokens = x[:, int("cls" in params):]
    return x, tokens, layer_norm(tokens.mean(1), params["norm"])


def gather_tokens(tokens, keep_indices):
    """The tokens of (B,N,D) at the indices (B,K)."""
    return tokens.gather(1, keep_indices[..., None].expand(-1, -1, tokens.shape[-1]))


@functools.cache
def text_position_embedding(length, width, device):
    """(T,D) table: sines in the first half, cosines in the second."""
    omega = 10000 ** (-2 * torch.arange(width // 2, dtype=torch.float64) / width)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), omega)        # (T,D/2)
    return torch.cat([angle.sin(), angle.cos()], dim=1).float().to(device)


def embed_sequence(params, image_tokens, text, cfg):
    """image_tokens (B,K,E) and text (B,T) to the sequence (B,K+T,D)."""
    dtype = getattr(torch, cfg.dtype)
    image = linear(image_tokens.to(dtype), params["project"])
    words = F.embedding(text, params["embed"]["embedding"].to(dtype))
    if cfg.text_pos_embed:
        words = words + text_position_embedding(*words.shape[1:], words.device).to(dtype)
    return torch.cat([image, words], dim=1)


def decoder_mask(K, S, cfg, device):
    """mask_args for K image tokens in a sequence of S."""
    if cfg.prefix_attention == "causal":
        return {"is_causal": True}
    mask = torch.ones(S, S, dtype=torch.bool, device=device).tril()
    mask[:K, :K] = True
    return {"attn_mask": mask}


def hidden_states(params, image_tokens, text, cfg):
    """image_tokens (B,K,E) and text (B,T) to (B,K+T,D), after the final norm."""
    x = embed_sequence(params, image_tokens, text, cfg)
    mask_args = decoder_mask(image_tokens.shape[1], x.shape[1], cfg, x.device)
    x = transformer(x, params["blocks"], cfg.num_heads, "tanh", **mask_args)
    return layer_norm(x, params["norm"])


def decoder(params, image_tokens, text, cfg):
    """image_tokens (B,K,E) and text (B,T) to logits (B,T,V)."""
    text_states = hidden_states(params, image_tokens, text, cfg)[:, image_tokens.shape[1]:]
    return linear(text_states, params["head"]).float()


def token_cross_entropy(logits, targets):
    """Mean over the targets (B,T) that are not padding (0), of logits (B,T,V)."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=0)


def mean_loss(encoder_params, decoder_params, images, keep_indices, text, encoder_cfg,
              decoder_cfg):
    """Mean cross-entropy over the tokens and eos of the batch."""
    _, tokens, _ = encoder(encoder_params, images, encoder_cfg)
    kept = gather_tokens(tokens, keep_indices)
    logits = decoder(decoder_params, kept, text[:, :-1], decoder_cfg)
    return token_cross_entropy(logits, text[:, 1:])

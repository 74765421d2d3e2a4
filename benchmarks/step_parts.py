"""The parts of a training step, each as a function here and in PyTorch, with its FLOPs.

`python bench.py parts` times them (part_times.py). They are those of a step that computes all
tokens in every block; AdamW's update is added there.

Letters: B images, N patches, K kept ones, S tokens of a sequence, T text positions, D width, M MLP
width, E encoder width.
"""
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import decoder
import layers
import vit
from config import Config
from masking import keep_random_tokens
from objectives import registry


class Part(NamedTuple):
    """A part of the step. jax and torch compute (weights, inputs, batch) to an array (B, ...) or
    several. Their batch is that of the step: a dict, or a list of tensors."""
    name: str
    count: int                 # how often a step has it: layers
    jax: Callable
    torch: Callable
    weights: dict
    inputs: list[tuple]        # shapes (B, ...); their dtype is that of the matmuls
    flops: float               # of one, forward and backward, matmuls only


def block_parts(name: str, blocks: dict, cfg: Any, x_shape: tuple, mask: Any, mask_args: dict,
                reference: Any) -> list[Part]:
    """The parts of a transformer block on x (B,S,D). mask (S,S) or None; mask_args: in PyTorch."""
    B, S, D = x_shape
    M, num_heads = cfg.mlp_dim, cfg.num_heads
    exact, gelu = (True, "none") if name == "encoder" else (False, "tanh")

    def norms(library: Any) -> Callable:
        def run(w: dict, inputs: list, _: Any) -> tuple:
            x, attended, hidden = inputs
            normed = library.layer_norm(x, w["norm1"])
            x = x + attended
            return normed, library.layer_norm(x, w["norm2"]), x + hidden
        return run

    def projections(library: Any) -> Callable:
        return lambda w, x, _: (library.linear(x[0], w["qkv"]), library.linear(x[1], w["out"]))

    def attention(_: dict, inputs: list, __: Any) -> jax.Array:
        qkv = jnp.split(inputs[0], 3, axis=-1)
        q, k, v = (a.reshape(len(a), S, num_heads, D // num_heads) for a in qkv)
        return layers.dot_product_attention(q, k, v, mask)[0].reshape(-1, S, D)

    def torch_attention(_: dict, inputs: list, __: Any) -> Any:
        return reference.attention(inputs[0], num_heads, None, mask_args)

    def mlp(w: dict, inputs: list, _: Any) -> jax.Array:
        return layers.gelu_linear(layers.linear(inputs[0], w["fc1"]), w["fc2"], exact)

    def torch_mlp(w: dict, inputs: list, _: Any) -> Any:
        return reference.mlp(inputs[0], w, gelu)

    table = [
        ("layer norms, residuals", norms(layers), norms(reference), ("norm1", "norm2"),
         [x_shape] * 3, 0),
        ("qkv and out", projections(layers), projections(reference), ("qkv", "out"),
         [x_shape] * 2, 8 * B * S * D * D),
        ("attention", attention, torch_attention, (), [(B, S, 3 * D)], 4 * B * S * S * D),
        ("MLP", mlp, torch_mlp, ("fc1", "fc2"), [x_shape], 4 * B * S * D * M)]
    parts = []
    for part, ours, theirs, weights, inputs, flops in table:
        w = {layer: jax.tree.map(lambda stacked: stacked[0], blocks[layer]) for layer in weights}
        parts.append(Part(f"{name}: {part}", cfg.depth, ours, theirs, w, inputs, 3 * flops))
    return parts


def step_parts(cfg: Config, params: dict, resolution: int, B: int,
               reference: Any = None, device: str = "cpu") -> list[Part]:
    """The parts of a step but for AdamW. params: of the model; reference: the module
    benchmarks.torch_reference, which PyTorch's side of the parts needs, with PyTorch's device."""
    model = registry.model_spec(cfg)
    enc, dec = model.encoder, model.decoder
    N, T = (resolution // enc.patch_size) ** 2, cfg.max_text_len - 1
    K, E, D = registry.num_decoder_tokens(model, N), enc.width, dec.width
    root_key = jax.random.key(cfg.seed)

    def keep(w: dict, inputs: list, batch: dict) -> jax.Array:
        keys = jax.vmap(lambda p: jax.random.fold_in(root_key, p))(batch["position"])
        kept, _ = keep_random_tokens(keys, inputs[0], cfg.keep_ratio, cfg.shuffle_kept)
        return decoder.embed_sequence(w, kept, batch["text"][:, :-1], dec)

    def torch_keep(w: dict, inputs: list, batch: list) -> Any:
        kept = reference.gather_tokens(inputs[0], batch[1])
        return reference.embed_sequence(w, kept, batch[2][:, :-1], dec)

    def loss(w: dict, inputs: list, batch: dict) -> jax.Array:
        features = layers.layer_norm(inputs[0][:, K:], w["norm"])
        return decoder.token_cross_entropy(w, features, batch["text"][:, 1:], dec)

    def torch_loss(w: dict, inputs: list, batch: list) -> Any:
        features = reference.layer_norm(inputs[0], w["norm"])[:, K:]
        return reference.token_cross_entropy(reference.linear(features, w["head"]),
                                             batch[2][:, 1:])

    def choose(part: str, *names: str) -> dict:
        return {name: params[part][name] for name in names if name in params[part]}
    mask = decoder.attention_mask(K, K + T, cfg.prefix_attention)
    mask_args = reference.decoder_mask(K, K + T, dec, device) if reference else {}
    return [
        Part("patch embedding", 1, lambda w, _, batch: vit.embed_patches(w, batch["images"], enc),
             lambda w, _, batch: reference.embed_patches(w, batch[0], enc),
             choose("encoder", "patch", "cls"), [],
             2 * 2 * B * N * 3 * enc.patch_size**2 * E),  # the images need no gradient
        *block_parts("encoder", params["encoder"]["blocks"], enc, (B, N + cfg.cls_token, E), None,
                     {}, reference),
        Part("keep, project, embed text", 1, keep, torch_keep,
             choose("decoder", "project", "embed"), [(B, N, E)], 3 * 2 * B * K * E * D),
        *block_parts("decoder", params["decoder"]["blocks"], dec, (B, K + T, D), mask, mask_args,
                     reference),
        Part("head and loss", 1, loss, torch_loss, choose("decoder", "norm", "head"),
             [(B, K + T, D)], 3 * 2 * B * T * D * cfg.vocab_size)]

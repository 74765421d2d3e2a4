"""The other objectives against PyTorch: same parameters, losses and gradients."""
import dataclasses
import functools

import jax
import numpy as np
import pytest
import torch
from torch.nn import functional as F

import decoder
import layers
import vit
from benchmarks import torch_reference
from benchmarks.torch_reference import layer_norm, linear, tensor
from objectives import registry

B, T, V, RESOLUTION = 4, 12, 53, 32  # 16 patches
ENC = vit.ViTConfig(depth=2, width=64, num_heads=4, mlp_dim=112, patch_size=8)
DEC = decoder.DecoderConfig(depth=2, width=48, num_heads=3, mlp_dim=80, vocab_size=V,
                            image_width=64)


def captions(seed):
    """Of several lengths. The last image only fills up the batch and has none."""
    text = np.random.default_rng(seed).integers(3, V, (B, T))
    text[:, 0] = decoder.BOS
    for row, end in zip(text, (T - 1, 7, 3)):
        row[end], row[end + 1:] = decoder.EOS, decoder.PAD
    text[-1] = decoder.PAD
    return text.astype(np.int32)


PIXELS = np.random.default_rng(0).integers(0, 256, (B, RESOLUTION, RESOLUTION, 3), np.uint8)
BATCH = {"images": PIXELS, "text": captions(1), "alt": captions(2)}
KEYS = jax.vmap(lambda n: jax.random.fold_in(jax.random.key(7), n))(np.arange(B))
IMAGES, TEXT, ALT = tensor(PIXELS), tensor(BATCH["text"]), tensor(BATCH["alt"])
REAL = slice(0, B - 1)


@functools.cache
def jax_results(objective, cls_token=False):
    """(model, parameters, mean loss, gradients) in JAX."""
    enc = dataclasses.replace(ENC, cls_token=cls_token)
    model = registry.ModelSpec(enc, DEC, 1.0, objective, max_text_len=T)
    rng = np.random.default_rng(5)

    def draw(spec):  # no zero and no one is left
        noise = rng.standard_normal(spec.shape, np.float32)
        values = 1 + 0.1 * noise if spec.std is None else (0.05 + spec.std) * noise
        return np.asarray(values, np.float32)
    specs = {"encoder": vit.param_specs(enc)} | registry.param_specs(model)
    params = jax.tree.map(draw, specs, is_leaf=layers.is_spec)

    def mean_loss(params, batch, keys):
        total, count = registry.objective_module(objective).loss(params, batch, keys, model)
        return total / count
    arguments = jax.tree.map(lambda x: x[None], (params, BATCH, KEYS))
    step = jax.pmap(jax.value_and_grad(mean_loss), "devices", devices=jax.local_devices()[:1])
    loss, grads = step(*arguments)
    return model, params, float(loss[0]), jax.tree.map(lambda x: np.asarray(x)[0], grads)


# -------------------------------------------------------------------- the losses in PyTorch
def encode_text(params, text):
    """Tokens and feature of captions by CLIP's text encoder."""
    table = params["positions"]["table"][:text.shape[1]]
    x = F.embedding(text, params["embed"]["embedding"]) + table
    x = torch_reference.transformer(x, params["blocks"], DEC.num_heads, "tanh", is_causal=True)
    eos = x[torch.arange(len(text)), (text == decoder.EOS).int().argmax(-1)]
    return x, linear(layer_norm(eos, params["norm"]), params["project"])


def contrastive_loss(params, image, text):
    """The symmetric cross-entropy of the real images."""
    image, text = F.normalize(image[REAL], dim=-1), F.normalize(text[REAL], dim=-1)
    scale = (params["pair"]["temperature"]["log"].exp() / 0.07).clamp(max=100)
    logits = image @ text.T * scale
    matching = torch.arange(len(logits))
    return (F.cross_entropy(logits, matching) + F.cross_entropy(logits.T, matching)) / 2


def token_loss(logits):
    return F.cross_entropy(logits.flatten(0, 1), TEXT[:, 1:].flatten(), ignore_index=0)


def clip(params, model):
    pooled = torch_reference.encoder(params["encoder"], IMAGES, ENC)[2]
    text = encode_text(params["text"], TEXT)[1]
    return contrastive_loss(params, linear(pooled, params["pair"]["image"]), text)


def siglip(params, model):
    pooled = torch_reference.encoder(params["encoder"], IMAGES, ENC)[2]
    pair = params["pair"]
    image = F.normalize(linear(pooled, pair["image"])[REAL], dim=-1)
    text = F.normalize(encode_text(params["text"], TEXT)[1][REAL], dim=-1)
    logits = image @ text.T * 10 * pair["temperature"]["log"].exp() - 10 + pair["bias"]["offset"]
    return -F.logsigmoid(logits * (2 * torch.eye(B - 1) - 1)).sum() / (B - 1)


def genlip(params, model):
    w, D = params["encoder"], ENC.width
    kernel = w["patch"]["kernel"].view(8, 8, 3, D).permute(3, 2, 0, 1)
    mean, std = torch.tensor(vit.IMAGENET_MEAN), torch.tensor(vit.IMAGENET_STD)
    pixels = ((IMAGES.float() / 255 - mean) / std).permute(0, 3, 1, 2)
    patches = F.conv2d(pixels, kernel, stride=8).flatten(2).transpose(1, 2)
    patches = patches + torch_reference.sincos_position_embedding(RESOLUTION // 8, D, "cpu")
    tokens = F.embedding(TEXT[:, :-1], params["text"]["embed"]["embedding"])
    x, N = torch.cat([patches, tokens], dim=1), patches.shape[1]
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    mask[:N, :N] = True
    x = torch_reference.transformer(x, w["blocks"], ENC.num_heads, "none", attn_mask=mask)
    return token_loss(linear(layer_norm(x, w["norm"])[:, N:], params["text"]["head"]))


def openvision(params, model):
    _, tokens, pooled = torch_reference.encoder(params["encoder"], IMAGES, ENC)
    image = linear(pooled, params["pair"]["image"])
    web_tokens, web = encode_text(params["text"], ALT)
    dense = encode_text(params["text"], TEXT)[1]
    prefix = torch.cat([tokens, linear(web_tokens, params["web"])], dim=1)
    dec = dataclasses.replace(DEC, prefix_attention="bidirectional")
    logits = torch_reference.decoder(params["decoder"], prefix, TEXT[:, :-1], dec)
    pairs = contrastive_loss(params, image, web) + contrastive_loss(params, image, dense)
    return 2 * token_loss(logits) + pairs / 2


def torch_decoder_layers(params):
    """CapPa's blocks as PyTorch's own decoder layers: (layer, its parameters) of each."""
    D = DEC.width
    for w in torch_reference.unstack_layers(params["blocks"]):
        gelu = functools.partial(F.gelu, approximate="tanh")
        layer = torch.nn.TransformerDecoderLayer(D, DEC.num_heads, DEC.mlp_dim, 0, gelu, 1e-6,
                                                 batch_first=True, norm_first=True)
        layer.multihead_attn = torch.nn.MultiheadAttention(
            D, DEC.num_heads, kdim=DEC.image_width, vdim=DEC.image_width, batch_first=True)
        k, v = w["memory"]["kernel"].split(D, 1)
        values = {"self_attn.in_proj_weight": w["qkv"]["kernel"].T,
                  "self_attn.in_proj_bias": w["qkv"]["bias"],
                  "multihead_attn.q_proj_weight": w["query"]["kernel"].T,
                  "multihead_attn.k_proj_weight": k.T,
                  "multihead_attn.v_proj_weight": v.T,
                  "multihead_attn.in_proj_bias": torch.cat([w["query"]["bias"],
                                                            w["memory"]["bias"]])}
        torch_names = {"out": "self_attn.out_proj", "cross": "multihead_attn.out_proj",
                       "fc1": "linear1", "fc2": "linear2"}
        for name, torch_name in torch_names.items():
            values[f"{torch_name}.weight"] = w[name]["kernel"].T
            values[f"{torch_name}.bias"] = w[name]["bias"]
        for norm in ("norm1", "norm2", "norm3"):
            values[f"{norm}.weight"] = w[norm]["scale"]
            values[f"{norm}.bias"] = w[norm]["bias"]
        yield layer, values


def cappa(params, model):
    _, tokens, _ = torch_reference.encoder(params["encoder"], IMAGES, ENC)
    memory = layer_norm(tokens, params["encoder"]["norm"])
    parallel = [bool(jax.random.uniform(key) < 0.75) for key in KEYS]
    assert 0 < sum(parallel[REAL]) < B - 1  # the batch has both kinds
    inputs = TEXT[:, :-1].clone()
    inputs[parallel] = V
    w = params["decoder"]
    x = F.embedding(inputs, w["embed"]["embedding"]) + w["positions"]["table"][:T - 1]
    hidden_from = torch.ones(T - 1, T - 1, dtype=torch.bool).triu(1).repeat(B, 1, 1)
    hidden_from[parallel] = False
    mask = {"tgt_mask": hidden_from.repeat_interleave(DEC.num_heads, 0)}
    for layer, values in torch_decoder_layers(w):
        x = torch.func.functional_call(layer, values, (x, memory), mask, strict=True)
    return token_loss(linear(layer_norm(x, w["norm"]), w["head"]))


def aimv2(params, model):
    mean, std = torch.tensor(vit.IMAGENET_MEAN), torch.tensor(vit.IMAGENET_STD)
    pixels = ((IMAGES.float() / 255 - mean) / std).permute(0, 3, 1, 2)
    patches = F.unfold(pixels, 8, stride=8).view(B, 3, 64, -1).permute(0, 3, 2, 1)
    patches = patches.flatten(2)                                                 # (B,N,P*P*3)
    variance = patches.var(-1, keepdim=True)
    targets = (patches - patches.mean(-1, keepdim=True)) / (variance + 1e-6).sqrt()
    N, cls = targets.shape[1], int(model.encoder.cls_token)
    prefix_lens = [int(jax.random.randint(key, (), 1, N)) for key in KEYS]
    mask = torch.ones(B, 1, N + cls, N + cls, dtype=torch.bool).tril()
    for image_mask, prefix_len in zip(mask, prefix_lens):
        image_mask[..., :prefix_len + cls] = True
    tokens = torch_reference.encoder(params["encoder"], IMAGES, model.encoder, attn_mask=mask)[1]
    w = params["decoder"]
    hidden = torch_reference.hidden_states(w, tokens, TEXT[:, :-1], DEC)
    total = 0
    for b in range(B - 1):
        predicted = linear(hidden[b, :N - 1], w["pixels"])[prefix_lens[b] - 1:]
        pixel_loss = F.mse_loss(predicted, targets[b, prefix_lens[b]:])
        logits = linear(hidden[b, N:], w["head"])
        total = total + F.cross_entropy(logits, TEXT[b, 1:], ignore_index=0) + 0.4 * pixel_loss
    return total / (B - 1)


@pytest.mark.parametrize("objective, cls_token", [
    (clip, False), (siglip, False), (genlip, False), (openvision, False), (cappa, False),
    (aimv2, False), (aimv2, True)])
def test_loss_and_gradient_of_every_parameter(objective, cls_token):
    model, params, loss, grads = jax_results(objective.__name__, cls_token)
    torch_params = torch_reference.from_jax(params)
    torch_loss = objective(torch_params, model)
    torch_loss.backward()
    assert abs(loss - torch_loss.item()) <= 1e-5 * torch_loss.item()
    for (path, grad), w in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(torch_params)):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if objective is aimv2 and name.startswith("encoder/norm/"):  # only `pooled` reads it
            assert not grad.any() and w.grad is None
            continue
        size = np.linalg.norm(w.grad)
        assert size > 0, name
        assert np.linalg.norm(grad - w.grad.numpy()) <= 1e-3 * size + 1e-8, name

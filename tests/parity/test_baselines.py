"""The systems that the method is compared with, once more in PyTorch: the same weights, losses and gradients."""
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
from benchmarks.torch_reference import linear, norm, tensor
from objectives import registry

B, T, V, SIDE = 4, 12, 53, 32  # 16 patches
ENC = vit.ViTConfig(depth=2, width=64, num_heads=4, mlp_dim=112, patch_size=8)
DEC = decoder.DecoderConfig(depth=2, width=48, num_heads=3, mlp_dim=80, vocab_size=V, image_width=64)


def captions(seed):
    """Of several lengths; the last picture is one that fills up a batch, and has none."""
    text = np.random.default_rng(seed).integers(3, V, (B, T))
    text[:, 0] = decoder.BOS
    for row, end in zip(text, (T - 1, 7, 3)):
        row[end], row[end + 1:] = decoder.EOS, decoder.PAD
    text[-1] = decoder.PAD
    return text.astype(np.int32)


BATCH = {"images": np.random.default_rng(0).integers(0, 256, (B, SIDE, SIDE, 3), np.uint8), "text": captions(1), "alt": captions(2)}
KEYS = jax.vmap(lambda n: jax.random.fold_in(jax.random.key(7), n))(np.arange(B))
TEXT, ALT, REAL = tensor(BATCH["text"]), tensor(BATCH["alt"]), slice(0, B - 1)


@functools.cache
def ours(objective, cls=False):
    """(model, parameters, mean loss, gradients) in JAX."""
    model = registry.ModelSpec(dataclasses.replace(ENC, cls_token=cls), DEC, 1.0, objective, max_text_len=T)
    rng = np.random.default_rng(5)
    declared = {"encoder": vit.param_specs(model.encoder)} | registry.param_specs(model)

    def draw(w):  # no zero or one is left
        noise = rng.standard_normal(w.shape, np.float32)
        return np.asarray(1 + 0.1 * noise if w.std is None else (0.05 + w.std) * noise, np.float32)
    params = jax.tree.map(draw, declared, is_leaf=layers.is_spec)

    def mean(params, batch, keys):
        loss, count = registry.rival(objective).loss(params, batch, keys, model)
        return loss / count
    one = jax.tree.map(lambda x: x[None], (params, BATCH, KEYS))
    loss, grads = jax.pmap(jax.value_and_grad(mean), "devices", devices=jax.local_devices()[:1])(*one)
    return model, params, float(loss[0]), jax.tree.map(lambda x: np.asarray(x)[0], grads)


def images():
    return tensor(BATCH["images"])


def read(params, text):
    """Tokens and feature of captions by CLIP's text encoder."""
    x = F.embedding(text, params["embed"]["embedding"]) + params["positions"]["table"][:text.shape[1]]
    x = torch_reference.transformer(x, params["blocks"], DEC.num_heads, "tanh", is_causal=True)
    end = x[torch.arange(len(text)), (text == decoder.EOS).int().argmax(-1)]
    return x, linear(norm(end, params["norm"]), params["project"])


def clip_loss(params, image, text):
    """The symmetric cross-entropy of the real pictures."""
    image, text = F.normalize(image[REAL], dim=-1), F.normalize(text[REAL], dim=-1)
    scores = image @ text.T * (params["pair"]["temperature"]["log"].exp() / 0.07).clamp(max=100)
    right = torch.arange(len(scores))
    return (F.cross_entropy(scores, right) + F.cross_entropy(scores.T, right)) / 2


def clip(params, model):
    image = linear(torch_reference.encoder(params["encoder"], images(), ENC)[2], params["pair"]["image"])
    return clip_loss(params, image, read(params["text"], TEXT)[1])


def openvision(params, model):
    _, tokens, pooled = torch_reference.encoder(params["encoder"], images(), ENC)
    image = linear(pooled, params["pair"]["image"])
    web_tokens, web = read(params["text"], ALT)
    prefix = torch.cat([tokens, linear(web_tokens, params["web"])], dim=1)
    scores = torch_reference.decoder(params["decoder"], prefix, TEXT[:, :-1], dataclasses.replace(DEC, prefix_attention="bidirectional"))
    told = F.cross_entropy(scores.flatten(0, 1), TEXT[:, 1:].flatten(), ignore_index=0)
    return 2 * told + (clip_loss(params, image, web) + clip_loss(params, image, read(params["text"], TEXT)[1])) / 2


def cross_layers(params):
    """CapPa's blocks as torch's own decoder layers."""
    for w in torch_reference.layers(params["blocks"]):
        layer = torch.nn.TransformerDecoderLayer(DEC.width, DEC.num_heads, DEC.mlp_dim, 0, functools.partial(F.gelu, approximate="tanh"), 1e-6,
                                                 batch_first=True, norm_first=True)
        layer.multihead_attn = torch.nn.MultiheadAttention(DEC.width, DEC.num_heads, kdim=DEC.image_width, vdim=DEC.image_width, batch_first=True)
        k, v = w["memory"]["kernel"].split(DEC.width, 1)
        values = {"self_attn.in_proj_weight": w["qkv"]["kernel"].T, "self_attn.in_proj_bias": w["qkv"]["bias"],
                  "multihead_attn.q_proj_weight": w["query"]["kernel"].T, "multihead_attn.k_proj_weight": k.T, "multihead_attn.v_proj_weight": v.T,
                  "multihead_attn.in_proj_bias": torch.cat([w["query"]["bias"], w["memory"]["bias"]])}
        for theirs, mine in (("self_attn.out_proj", "out"), ("multihead_attn.out_proj", "cross"), ("linear1", "fc1"), ("linear2", "fc2")):
            values |= {f"{theirs}.weight": w[mine]["kernel"].T, f"{theirs}.bias": w[mine]["bias"]}
        values |= {f"norm{n}.{theirs}": w[f"norm{n}"][mine] for n in (1, 2, 3) for theirs, mine in (("weight", "scale"), ("bias", "bias"))}
        yield layer, values


def cappa(params, model):
    _, tokens, _ = torch_reference.encoder(params["encoder"], images(), ENC)
    memory = norm(tokens, params["encoder"]["norm"])
    at_once = [bool(jax.random.uniform(key) < 0.75) for key in KEYS]
    assert 0 < sum(at_once[REAL]) < B - 1  # both kinds are there
    words = TEXT[:, :-1].clone()
    words[at_once] = V
    x = F.embedding(words, params["decoder"]["embed"]["embedding"]) + params["decoder"]["positions"]["table"][:T - 1]
    hide = torch.ones(T - 1, T - 1, dtype=torch.bool).triu(1).repeat(B, 1, 1)
    hide[at_once] = False
    for layer, values in cross_layers(params["decoder"]):
        x = torch.func.functional_call(layer, values, (x, memory), {"tgt_mask": hide.repeat_interleave(DEC.num_heads, 0)}, strict=True)
    scores = linear(norm(x, params["decoder"]["norm"]), params["decoder"]["head"])
    return F.cross_entropy(scores.flatten(0, 1), TEXT[:, 1:].flatten(), ignore_index=0)


def aimv2(params, model):
    pictures = (images().float() / 255 - torch.tensor(vit.IMAGENET_MEAN)) / torch.tensor(vit.IMAGENET_STD)
    patches = F.unfold(pictures.permute(0, 3, 1, 2), 8, stride=8).view(B, 3, 64, -1).permute(0, 3, 2, 1).flatten(2)    # (B,N,P*P*3)
    targets = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    N, cls = targets.shape[1], int(model.encoder.cls_token)
    prefixes = [int(jax.random.randint(key, (), 1, N)) for key in KEYS]
    mask = torch.ones(B, 1, N + cls, N + cls, dtype=torch.bool).tril()
    for row, prefix in zip(mask, prefixes):
        row[..., :prefix + cls] = True
    tokens = torch_reference.encoder(params["encoder"], images(), model.encoder, attn_mask=mask)[1]
    hidden = torch_reference.sequence(params["decoder"], tokens, TEXT[:, :-1], DEC)
    total = 0
    for b in range(B - 1):
        guesses = linear(hidden[b, :N - 1], params["decoder"]["pixels"])
        picture = F.mse_loss(guesses[prefixes[b] - 1:], targets[b, prefixes[b]:])
        scores = linear(hidden[b, N:], params["decoder"]["head"])
        total = total + F.cross_entropy(scores, TEXT[b, 1:], ignore_index=0) + 0.4 * picture
    return total / (B - 1)


@pytest.mark.parametrize("objective, cls", [(clip, False), (openvision, False), (cappa, False), (aimv2, False), (aimv2, True)])
def test_loss_and_gradient_of_every_parameter(objective, cls):
    model, params, loss, grads = ours(objective.__name__, cls)
    twin = torch_reference.from_jax(params)
    theirs = objective(twin, model)
    theirs.backward()
    assert abs(loss - theirs.item()) <= 1e-5 * theirs.item()
    for (path, a), w in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(twin)):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if objective is aimv2 and name.startswith("encoder/norm/"):  # which only `pooled` reads
            assert not a.any() and w.grad is None
            continue
        size = np.linalg.norm(w.grad)
        assert size > 0 and np.linalg.norm(a - w.grad.numpy()) <= 1e-3 * size + 1e-8, name

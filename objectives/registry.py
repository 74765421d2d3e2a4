"""What is trained, by name: the method, or a system that the paper compares it with.

    python train.py --objective clip           contrastive (arXiv:2103.00020)
    python train.py --objective openvision     contrastive with two captions, and captioning
                                               (arXiv:2505.04601, 2411.16828)
    python train.py --objective cappa          captioning by cross-attention, mostly in parallel
                                               (arXiv:2306.07915)
    python train.py --objective siglip         contrastive, each pair on its own (arXiv:2303.15343)
    python train.py --objective lit --init-encoder RUN
                                               contrastive, for a frozen encoder (arXiv:2111.07991)
    python train.py --objective genlip         captioning by the encoder itself, without a decoder
                                               (arXiv:2605.00809)
    python train.py --objective aimv2          the next patch and the next token (arXiv:2411.14402)

The method's loss is `openvision2_loss` in train.py. Each other system is a module of this folder:

    loss(params, batch, keys, model) -> (sum, count)    two sums over this device's images; the step
                                                        divides one by the other across all devices
    validation_loss                                     the same, where it differs from `loss`
    generate(params, batch, model) -> (B,T) int32       greedy captions, where it makes any
    embed_images, embed_texts(params, images or text, model) -> (B,D)
                                                        vectors of length 1, where it contrasts them
    param_specs(model) -> {part: specs}                 what it trains beside the encoder
    flops(model, resolution, text_len) -> {part: FLOPs} forward, for one image
    blind_loss(facts) -> float or None                  the best possible loss without the image

All share the transformer block (no SwiGLU, no RMSNorm), the plain ViT with mean pooling, and a
decoder that reads all patch tokens. In these points they differ from their sources on purpose.

Letters: B images, N patches, S = N (+1 with a CLS token), T text positions, D decoder width,
E encoder width, H heads, V vocabulary size.
"""
import dataclasses
import importlib
import json
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np

import decoder
import layers
import masking
import vit
from inputs.files import ReadOptions, open_storage
from runtime.checkpoint import read_encoder
from runtime.curriculum import parse_stages
from runtime.errors import ConfigError

METHOD = "openvision2"
# Folded into the seed's key for the initial parameters. The random token keep folds in positions,
# which are smaller. So no key is used for both.
INIT_DOMAIN = 1 << 31
OTHER_OBJECTIVES = ("clip", "siglip", "lit", "openvision", "cappa", "aimv2", "genlip")
OBJECTIVES = (METHOD, *OTHER_OBJECTIVES)
CONTRASTIVE = ("clip", "siglip", "lit", "openvision")  # these compare the images of a batch


class BlindFacts(NamedTuple):
    """What is known of a validation set without seeing its images."""
    batch_sizes: list[int]                     # images in each batch, among which CLIP compares
    caption_nats: np.ndarray | None            # (n,) -log probability of each caption, if known
    caption_tokens: np.ndarray | None          # (n,) tokens of each caption
    pixel_targets: Callable[[], np.ndarray]    # (n,N,P*P*3), for AIMv2

    @property
    def nats_per_token(self) -> float | None:
        if self.caption_nats is None or self.caption_tokens is None:
            return None
        return float(self.caption_nats.sum() / self.caption_tokens.sum())

    @property
    def matching_nats(self) -> float:
        """The contrastive loss of a guess: log of the batch size, averaged over images."""
        total = sum(n * np.log(n) for n in self.batch_sizes)
        return float(total / sum(self.batch_sizes))


def objective_module(name: str) -> ModuleType | None:
    """The module of another objective; None for the method itself, whose loss is in train.py. Only
    the module that is used gets imported, so that reading or running the method needs no other."""
    return None if name == METHOD else importlib.import_module(f"objectives.{name}")


def param_specs(model: Any) -> dict:
    """{part: parameter specs} that the model's objective has beside the encoder."""
    module = objective_module(model.objective)
    if module is None:
        return {"decoder": decoder.param_specs(model.decoder)}
    return module.param_specs(model)


def num_decoder_tokens(model: Any, num_patches: int) -> int:
    """Patch tokens, of N, that the decoder (or the pooling) reads."""
    if model.objective == METHOD:
        return masking.num_kept_tokens(num_patches, model.keep_ratio)
    return num_patches


def flops(model: Any, resolution: int, text_len: int) -> dict[str, float]:
    """Forward FLOPs of each part for one image whose captions have `text_len` positions: 2 per
    multiply-add, matmuls only. The scores of a contrastive batch, 4 B D per image and caption, are
    left out."""
    module = objective_module(model.objective)
    if module is not None:
        return module.flops(model, resolution, text_len)
    num_patches = (resolution // model.encoder.patch_size) ** 2
    kept = num_decoder_tokens(model, num_patches)
    return {"encoder": vit.flops(model.encoder, resolution),
            "decoder": decoder.flops(model.decoder, kept, text_len - 1)}


def training_flops(cfg: Any, resolution: int, from_pixels: bool = False) -> float:
    """FLOPs of one image in a training step: forward, and twice that backward. What activation
    checkpointing computes again does not count. LiT's frozen encoder has no backward pass, and no
    forward pass either where its tokens are stored. from_pixels: as if they were not."""
    parts = flops(model_spec(cfg), resolution, cfg.max_text_len)
    total = 3 * sum(parts.values())
    if cfg.objective == "lit":
        in_step = from_pixels or not objective_module("lit").stores_tokens(cfg)
        total -= (2 if in_step else 3) * parts["encoder"]
    return total


def step_flops(cfg: Any) -> float:
    """Forward FLOPs of the largest batch (or microbatch) of all stages."""
    model = model_spec(cfg)
    sizes = []
    for stage in parse_stages(cfg.stages):
        per_image = sum(flops(model, stage.resolution, cfg.max_text_len).values())
        sizes.append(per_image * stage.batch / cfg.grad_accum)
    return max(sizes)


def blind_loss(objective: str, facts: BlindFacts) -> float | None:
    """The best possible validation loss without the image, None where it is not known."""
    module = objective_module(objective)
    return facts.nats_per_token if module is None else module.blind_loss(facts)


def can_caption(objective: str) -> bool:
    return objective == METHOD or hasattr(objective_module(objective), "generate")


class ModelSpec(NamedTuple):
    """What a training step needs to know of the networks."""
    encoder: vit.ViTConfig
    decoder: decoder.DecoderConfig
    keep_ratio: float
    objective: str = METHOD
    shuffle_kept: bool = False
    max_text_len: int = 0      # text positions, of which some objectives have a position table
    image_pool: str = "attention"  # how LiT makes one vector of the patch tokens
    num_patches: int = 0       # patch tokens per image, if a layer is as wide as all of them


def model_spec(cfg: Any) -> ModelSpec:
    """Encoder, decoder and objective of a run's Config. ValueError for an unknown size."""
    shared = {"dtype": cfg.dtype, "remat": cfg.remat, "scan_unroll": cfg.scan_unroll}
    enc = vit.vit_config(cfg.encoder, cls_token=cfg.cls_token,
                         learned_pos_grid=cfg.learned_pos_grid,
                         gated_attention=cfg.gated_attention,
                         norm_tokens=cfg.objective == "genlip", **shared)
    dec = decoder.decoder_config(cfg.decoder, cfg.vocab_size, enc.width,
                                 prefix_attention=cfg.prefix_attention,
                                 text_pos_embed=cfg.text_pos_embed, loss_chunk=cfg.loss_chunk,
                                 **shared)
    num_patches = 0
    if cfg.objective == "lit" and cfg.image_pool == "grid":
        num_patches = (parse_stages(cfg.stages)[0].resolution // enc.patch_size) ** 2
    return ModelSpec(enc, dec, cfg.keep_ratio, cfg.objective, cfg.shuffle_kept, cfg.max_text_len,
                     cfg.image_pool, num_patches)


def check_settings(cfg: Any) -> None:
    """ConfigError for settings that the objective of a Config cannot use."""
    if cfg.objective in CONTRASTIVE and cfg.grad_accum > 1:
        raise ConfigError(f"--objective {cfg.objective} contrasts all images of a batch with one "
                          f"another, which --grad-accum {cfg.grad_accum} would part: leave it at 1")
    if cfg.objective == "openvision" and not cfg.alt_field:
        raise ConfigError("--objective openvision reads a web caption beside the dense one: name "
                          "its field with --alt-field")
    if cfg.alt_field and cfg.objective != "openvision":
        raise ConfigError(f"--alt-field {cfg.alt_field} is read by --objective openvision alone: "
                          "leave it out, or take that objective")
    changed = cfg.keep_ratio != 0.35 or cfg.prefix_attention != "causal"  # the defaults
    if cfg.objective != METHOD and changed:
        raise ConfigError(f"--keep-ratio and --prefix-attention are read by --objective {METHOD} "
                          "alone: leave them out, or take that objective")
    if cfg.objective != "lit" and (cfg.feature_copies or cfg.image_pool != "attention"):
        raise ConfigError("--feature-copies and --image-pool are read by --objective lit alone: "
                          "leave them out, or take that objective")
    if cfg.objective == "lit" and not cfg.init_encoder:
        raise ConfigError("--objective lit trains a text encoder for a frozen encoder: name its "
                          "run with --init-encoder (or random or pixels, to compare with)")
    if cfg.objective == "lit" and cfg.image_pool == "grid":
        resolutions = {stage.resolution for stage in parse_stages(cfg.stages)}
        objective_module("lit").check_grid(cfg, model_spec(cfg), resolutions)
    least = 2 * vit.vit_config(cfg.encoder).patch_size
    for stage in parse_stages(cfg.stages):
        if cfg.objective == "aimv2" and stage.resolution < least:
            raise ConfigError("--objective aimv2 predicts a patch from those before it: stage "
                              f"{stage.number} needs a resolution of {least} or more")


def param_counts(cfg: Any) -> dict[str, int]:
    """Parameters of the encoder, the decoder, and what else the objective trains."""
    model = model_spec(cfg)
    parts = {"encoder": vit.param_specs(model.encoder)} | param_specs(model)
    return {name: layers.count_params(specs) for name, specs in parts.items()}


def init_params(cfg: Any, model: ModelSpec) -> dict:
    """Initialized parameters: {"encoder": ..., "decoder": ...}, or the parts of another
    objective."""
    key = jax.random.fold_in(jax.random.key(cfg.seed), INIT_DOMAIN)
    parts = {"encoder": vit.param_specs(model.encoder)} | param_specs(model)
    params = {}
    for n, (name, specs) in enumerate(parts.items()):
        if cfg.init_scale == "released":
            scales = vit.RELEASED_INIT if name == "encoder" else decoder.RELEASED_INIT
            specs = layers.with_init_scales(specs, scales)
        params[name] = layers.init_params(jax.random.fold_in(key, n), specs)
    return params


def initial_params(cfg: Any, model: ModelSpec) -> dict:
    """What a new run starts from: initialized parameters, or --init-encoder's encoder with an
    initialized decoder. ConfigError where that encoder does not fit."""
    params = init_params(cfg, model)
    if not cfg.init_encoder:
        return params
    if cfg.objective == "lit" and cfg.init_encoder in ("random", "pixels"):
        if cfg.init_encoder == "pixels":
            lit = objective_module("lit")
            params["encoder"] = lit.pixel_encoder(params["encoder"], model.encoder)
        return params
    params["encoder"], imported, _ = read_encoder(local_encoder(cfg))
    if cfg.objective == "lit" and imported.norm_tokens:
        raise ConfigError(f"--init-encoder {cfg.init_encoder} is GenLIP's, whose tokens are taken "
                          "after the final norm: --objective lit reads them before it, so name an "
                          "encoder of another objective")
    differences = []
    for name in ("depth", "width", "num_heads", "mlp_dim", "patch_size", "cls_token",
                 "learned_pos_grid", "gated_attention"):
        theirs, ours = getattr(imported, name), getattr(model.encoder, name)
        if theirs != ours:
            differences.append(f"{name} {theirs}, not {ours}")
    if differences:
        raise ConfigError(f"--init-encoder {cfg.init_encoder} has {'; '.join(differences)}: change "
                          "--encoder, --cls-token, --learned-pos-grid or --gated-attention")
    return params


def local_encoder(cfg: Any) -> str:
    """The path of --init-encoder; of an address, that of a copy in the cache."""
    if "://" not in cfg.init_encoder:
        return cfg.init_encoder
    options = ReadOptions(cache_dir=cfg.cache_dir, cache_gb=cfg.cache_gb)
    return open_storage(cfg.init_encoder, options).encoder_copy(cfg.init_encoder)


def run_summary(cfg: Any) -> str:
    """What a run is and costs: settings, parameters, and tokens, FLOPs and steps of each stage.

    OpenAI's CLIP papers count a ViT's learned position table and output projection too: with those
    the L encoder has 304 M parameters."""
    model = model_spec(cfg)
    counts = [f"{name} {count / 1e6:.1f} M" for name, count in param_counts(cfg).items()]
    lines = [json.dumps(dataclasses.asdict(cfg), indent=1), "parameters   " + ", ".join(counts)]
    total_steps = total_images = total_flops = 0
    for s in parse_stages(cfg.stages):
        patch = model.encoder.patch_size
        num_patches, rest = (s.resolution // patch) ** 2, s.resolution % patch
        unseen = f" (the last {rest} px at the right and bottom fill none)" if rest else ""
        kept = num_decoder_tokens(model, num_patches)
        parts = flops(model, s.resolution, cfg.max_text_len)
        forward = sum(parts.values())
        shares = ", ".join(f"{name} {part / 1e9:.2f}" for name, part in parts.items())
        lines.append(
            f"stage {s.number}      {s.resolution} px: {num_patches} patch tokens{unseen}, "
            f"{kept} kept, {cfg.max_text_len - 1} text positions; "
            f"{forward / 1e9:.2f} GFLOPs per image forward ({shares}); {s.steps:,} steps of "
            f"{s.batch:,} at peak lr {s.lr:g}, warm-up {s.warmup:,} steps")
        total_steps += s.steps
        total_images += s.steps * s.batch
        total_flops += training_flops(cfg, s.resolution) * s.steps * s.batch
    lines.append(f"in total     {total_steps:,} steps, {total_images:,} images, {total_flops:.3g} "
                 "FLOPs forward and backward")
    return "\n".join(lines)

"""The model card of an exported encoder: what it is, how to use it, its training, its metrics."""
import contextlib
import json
import os
from typing import Any

import layers
import vit
from config import OLD_NAMES
from runtime import plots

SETTINGS = ("objective", "data", "caption_field", "alt_field", "stages", "keep_ratio", "decoder",
            "prefix_attention", "gated_attention", "min_crop_area", "hflip", "jitter", "hue",
            "grayscale_prob", "weight_decay", "adam_b2", "dtype", "init_encoder", "seed")
PATHS = ("data", "init_encoder")  # of these settings, the card shows the last part
COUNTS = ("images_seen", "num_val_images")
LIBRARY_NAMES = {"siglip": "transformers", "vit": "transformers",
                 "transformers pair": "transformers", "open_clip pair": "open_clip"}
NORM = """The tokens are those **before** the final norm: the caption decoder reads them in
training, and a multimodal model should too. A `last_hidden_state` has the norm on each token.
`pooled` is the mean of the patch tokens, then the norm; a mean of normed tokens is different. In
transformers' LLaVA, `vision_feature_layer=-1` reads these tokens (its default, -2, those of the
block before)."""
UNTRAINED = """Captions give the norm no gradient: unless the weights were imported, it is as
initialized."""
NORM_IS_TRAINED = ("clip", "siglip", "openvision", "cappa", "genlip")  # by these objectives
NATS_PER_TOKEN = ("openvision2", "cappa", "genlip")  # their losses are those of captions alone
GENLIP = """GenLIP reads the tokens **after** the final norm, and so does `load_encoder`. The tokens
of other libraries, as above, do not have it yet."""
PAIR = """`similarity` holds cosines of images (rows) and texts (columns). A class is best described
by the kind of text that the text encoder was trained on."""
IMAGES = """Images are resized to {0} x {0} (bilinear, antialiased, no crop), then normalized with
the ImageNet mean and standard deviation. First apply the EXIF rotation and composite alpha on
white, as in training."""
USE = {  # the card's code; it defines `tokens` and `pooled`, for a pair `similarity`
    "siglip": '''from transformers import AutoImageProcessor, AutoModel
model = AutoModel.from_pretrained(".")
# torchvision's backend, the default where it is installed, rounds pixels differently
processor = AutoImageProcessor.from_pretrained(".", backend="pil")
out = model(**processor(image, return_tensors="pt"), output_hidden_states=True)
tokens = out.hidden_states[-1]                  # (1, N, D), before the final norm
pooled = getattr(model, "vision_model", model).post_layernorm(tokens.mean(1))''',
    "vit": '''from transformers import AutoImageProcessor, AutoModel
model = AutoModel.from_pretrained(".", add_pooling_layer=False)
# torchvision's backend, the default where it is installed, rounds pixels differently
processor = AutoImageProcessor.from_pretrained(".", backend="pil")
out = model(**processor(image, return_tensors="pt"), output_hidden_states=True)
tokens = out.hidden_states[-1][:, 1:]           # (1, N, D), before the final norm, without CLS
pooled = model.layernorm(tokens.mean(1))''',
    "timm": '''import timm
model = timm.create_model("local-dir:.", pretrained=True).eval()
config = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**config, is_training=False)
features = model.forward_features(transform(image)[None])
tokens = features[:, model.num_prefix_tokens:]  # (1, N, D), before the final norm
pooled = model.forward_head(features)''',
    "open_clip": '''import json, safetensors.torch
from open_clip import image_transform
from open_clip.model import CLIPVisionCfg, _build_vision_tower
config = json.load(open("open_clip_config.json"))
tower = config["model_cfg"]
model = _build_vision_tower(tower["embed_dim"], CLIPVisionCfg(**tower["vision_cfg"])).eval()
model.load_state_dict(safetensors.torch.load_file("open_clip_model.safetensors"), strict=True)
p = config["preprocess_cfg"]
transform = image_transform(p["size"], False, p["mean"], p["std"], p["resize_mode"],
                            p["interpolation"])
pixels = transform(image)[None]
out = model.forward_intermediates(pixels, indices=1, output_fmt="NLC")
tokens = out["image_intermediates"][0]          # (1, N, D), before the final norm
pooled = model(pixels)                          # the projection is the identity''',
    "transformers pair": '''from transformers import AutoImageProcessor, AutoTokenizer, pipeline
from transformers import VisionTextDualEncoderModel
model = VisionTextDualEncoderModel.from_pretrained(".").eval()
tokenizer = AutoTokenizer.from_pretrained(".")
# torchvision's backend, the default where it is installed, rounds pixels differently
processor = AutoImageProcessor.from_pretrained(".", backend="pil")
inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
out = model(**inputs, **processor(image, return_tensors="pt"))
similarity = out.image_embeds @ out.text_embeds.T
classify = pipeline("zero-shot-image-classification", model=model, tokenizer=tokenizer,
                    image_processor=processor)
best = classify(image, candidate_labels=texts, hypothesis_template="{}")[0]''',
    "open_clip pair": '''import open_clip     # which builds the encoder by timm, from this folder
model, _, transform = open_clip.create_model_and_transforms("local-dir:.")
tokenizer = open_clip.get_tokenizer("local-dir:.")
model.eval()
image_vectors = model.encode_image(transform(image)[None], normalize=True)
similarity = image_vectors @ model.encode_text(tokenizer(texts), normalize=True).T
classes = open_clip.build_zero_shot_classifier(model, tokenizer, texts, ["{}"])
best = texts[(image_vectors @ classes).argmax()]''',
    "npz": '''import sys
sys.path.append("/path/to/clone")               # of OpenVision 2, read and run
from interop.encoder import load_encoder
encoder = load_encoder("encoder.npz")
tokens, pooled = encoder(image)                 # (1, N, D), before the final norm, and (1, D)''',
}


def table(rows: dict[str, Any]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def norm_text(objective: str, settings: dict[str, str]) -> str:
    if objective == "genlip":
        return GENLIP
    if objective in NORM_IS_TRAINED or "init_encoder" in settings:  # which brought a norm
        return NORM
    return f"{NORM}\n\n{UNTRAINED}"


def model_card(kind: str, cfg: vit.ViTConfig, resolution: int, meta: dict, metrics: dict) -> str:
    """README.md of an export in the layout `kind`. meta: of checkpoint.read_encoder. metrics: of
    read_metrics."""
    front = ["---"]
    if kind != "npz":
        front.append(f"library_name: {LIBRARY_NAMES.get(kind, kind)}")
    is_pair = kind.endswith("pair")
    task = "zero-shot-image-classification" if is_pair else "image-feature-extraction"
    front += [f"pipeline_tag: {task}", "tags: [openvision2, vision-encoder]", "---", ""]
    objective = meta.get("config", {}).get("objective", "openvision2")
    origin = "trained from captions alone"
    if is_pair:
        origin = "with a text encoder"
    elif objective == "lit":
        origin = "which a run of `--objective lit` kept frozen"
    elif objective != "openvision2":
        origin = f"trained by `--objective {objective}`"
    if "source" in meta:
        origin = f"imported from `{meta['source']}`"
    encoder = "ViT with gated attention" if cfg.gated_attention else "plain ViT"
    settings = setting_rows(meta.get("config", {}))
    inputs = "a PIL image `image` and a list `texts`" if is_pair else "a PIL image `image`"
    parts = ["# Vision encoder, OpenVision 2", f"A {encoder}, {origin}.",
             table(size_rows(cfg, resolution)), "## Use",
             f"From this folder, with {inputs}:\n\n```python\n{USE[kind]}\n```",
             PAIR if is_pair else norm_text(objective, settings),
             IMAGES.format(resolution)]
    if settings:
        parts += ["## Training", table(settings)]
    rows = metric_rows(metrics)
    if rows:
        parts += ["## Metrics on validation images", table(rows),
                  f"{loss_unit(objective)} `val_loss_shuffled` is the loss with another image. "
                  "`val_loss_blind` is the best possible loss without the image, if that is known "
                  "(as for synthetic scenes), otherwise the run's lowest `val_loss_shuffled`."]
    return "\n".join(front) + "\n" + "\n\n".join(parts) + "\n"


def loss_unit(objective: str) -> str:
    if objective in NATS_PER_TOKEN:
        return "Losses are nats per token."
    return f"Losses are those of `--objective {objective}`."


def size_rows(cfg: vit.ViTConfig, resolution: int) -> dict[str, Any]:
    grid = cfg.learned_pos_grid
    return {"depth": cfg.depth, "width": cfg.width, "heads": cfg.num_heads,
            "MLP width": cfg.mlp_dim, "patch size": cfg.patch_size, "resolution": resolution,
            "patch tokens": (resolution // cfg.patch_size) ** 2,
            "CLS token": "yes, but nothing reads it" if cfg.cls_token else "no",
            "positions": f"learned, {grid} x {grid}" if grid else "2-D sin-cos",
            "parameters": f"{layers.count_params(vit.param_specs(cfg)) / 1e6:.1f} M"}


def setting_rows(settings: dict[str, Any]) -> dict[str, str]:
    """Settings of the run, which an earlier version may have saved under other names."""
    settings = {OLD_NAMES.get(name, name): value for name, value in settings.items()}
    rows = {}
    for name in SETTINGS:
        value = settings.get(name)
        if value not in (None, ""):
            rows[name] = f"`{os.path.basename(value) if name in PATHS else value}`"
    return rows


def metric_rows(metrics: dict[str, Any]) -> dict[str, Any]:
    rows = {}
    for name, value in metrics.items():
        if name in COUNTS or name.endswith(("_loss", "_accuracy", "_match", "_blind", "_shuffled")):
            rows[name] = f"{value:.4g}" if isinstance(value, float) else value
    return rows


def read_metrics(path: str, step: int | None) -> dict[str, Any]:
    """The summary of a run or, while it is not finished, its last evaluation. For a checkpoint of a
    step, the evaluation at that step, {} if there was none."""
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    is_checkpoint = os.path.basename(path).startswith("step-")
    summary = os.path.join(folder, "summary.json")
    if not is_checkpoint and os.path.exists(summary):
        with contextlib.suppress(OSError, ValueError), open(summary, encoding="utf-8") as f:
            return plots.rename_old_metrics(json.load(f))
    try:
        rows = plots.read_metrics(os.path.join(folder, "metrics.jsonl"))
    except OSError:
        return {}
    evaluations = [row for row in rows if "val_loss" in row]
    if is_checkpoint:
        evaluations = [row for row in evaluations if row["step"] == step]
    return evaluations[-1] if evaluations else {}

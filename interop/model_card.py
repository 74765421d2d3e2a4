"""The model card of an exported encoder: what it is, how it is used, what it was trained on, and how far it got."""
import json
import os
from typing import Any

import layers
import vit
from runtime import plots

SETTINGS = ("objective", "data", "caption_field", "alt_field", "stages", "keep_ratio", "decoder", "prefix_attention", "min_crop_area", "hflip", "jitter", "hue", "grayscale_prob",
            "weight_decay", "adam_b2", "dtype", "init_encoder", "seed")
NORM = """The tokens leave **before** the final norm: the caption decoder reads them so in training, and so a multimodal model should take them. A
`last_hidden_state` has the norm on each token. `pooled` is the mean of the patch tokens and then the norm; a mean of normed tokens is another
thing. In transformers' LLaVA, `vision_feature_layer=-1` reads these tokens (its default, -2, those of the block before).

Captions give the norm no gradient: unless the weights were imported, it is as initialised."""
USE = {  # how each export is used, and which of its outputs is which of ours; the card's code
    "siglip": '''from transformers import AutoImageProcessor, AutoModel
model = AutoModel.from_pretrained(".")
processor = AutoImageProcessor.from_pretrained(".", backend="pil")  # torchvision's, where it is installed, rounds pixels otherwise
out = model(**processor(image, return_tensors="pt"), output_hidden_states=True)
tokens = out.hidden_states[-1]                                      # (1, N, D), before the final norm
pooled = getattr(model, "vision_model", model).post_layernorm(tokens.mean(1))''',
    "vit": '''from transformers import AutoImageProcessor, AutoModel
model = AutoModel.from_pretrained(".", add_pooling_layer=False)
processor = AutoImageProcessor.from_pretrained(".", backend="pil")  # torchvision's, where it is installed, rounds pixels otherwise
out = model(**processor(image, return_tensors="pt"), output_hidden_states=True)
tokens = out.hidden_states[-1][:, 1:]                               # (1, N, D), before the final norm, CLS left out
pooled = model.layernorm(tokens.mean(1))''',
    "timm": '''import timm
model = timm.create_model("local-dir:.", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
found = model.forward_features(transform(image)[None])
tokens = found[:, model.num_prefix_tokens:]                         # (1, N, D), before the final norm
pooled = model.forward_head(found)''',
    "open_clip": '''import json, safetensors.torch
from open_clip import image_transform
from open_clip.model import CLIPVisionCfg, _build_vision_tower
config = json.load(open("open_clip_config.json"))
model = _build_vision_tower(config["model_cfg"]["embed_dim"], CLIPVisionCfg(**config["model_cfg"]["vision_cfg"])).eval()
model.load_state_dict(safetensors.torch.load_file("open_clip_model.safetensors"), strict=True)
look = config["preprocess_cfg"]
pixels = image_transform(look["size"], False, look["mean"], look["std"], look["resize_mode"], look["interpolation"])(image)[None]
tokens = model.forward_intermediates(pixels, indices=1, output_fmt="NLC")["image_intermediates"][0]   # (1, N, D), before the final norm
pooled = model(pixels)                                              # its projection is the identity, for this method has none''',
    "npz": '''from features import load_encoder
tokens, pooled = load_encoder("encoder.npz")(image)                 # (1, N, D), before the final norm, and (1, D)''',
}


def table(rows: dict[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def model_card(kind: str, cfg: vit.ViTConfig, resolution: int, meta: dict, figures: dict) -> str:
    """README.md of an export: what the encoder is, how to use it there, what it was trained on, and how far it got."""
    run, library = meta.get("config", {}), {"siglip": "transformers", "vit": "transformers"}.get(kind, kind)
    sizes = {"layers": cfg.depth, "width": cfg.width, "heads": cfg.num_heads, "mlp": cfg.mlp_dim, "patch": cfg.patch_size, "resolution": resolution,
             "patch tokens": (resolution // cfg.patch_size) ** 2, "CLS token": "yes, which nothing reads" if cfg.cls_token else "no",
             "positions": f"learned, {cfg.learned_pos_grid} x {cfg.learned_pos_grid}" if cfg.learned_pos_grid else "2-D sin-cos",
             "parameters": f"{layers.count_params(vit.param_specs(cfg)) / 1e6:.1f} M"}
    front = ["---", *([f"library_name: {library}"] if kind != "npz" else []), "pipeline_tag: image-feature-extraction",
             "tags: [openvision2, vision-encoder]", "---", ""]
    parts = [
        "# Vision encoder, OpenVision 2",
        f"A plain ViT, imported from `{meta['source']}`." if "source" in meta else "A plain ViT, trained from captions alone.",
        table(sizes),
        "## Use",
        f"From this folder, with a PIL picture `image`:\n\n```python\n{USE[kind]}\n```",
        NORM, f"Pictures are squashed whole to {resolution} x {resolution} (bilinear, antialiased; no crop), then normalised with ImageNet's mean and "
              "deviation. Turn photos upright and lay transparent pictures on white first, as in training."]
    if run:
        told = {k: os.path.basename(run[k]) if k in ("data", "init_encoder") else run[k] for k in SETTINGS if run.get(k) not in (None, "")}
        parts += ["## Training", table({k: f"`{v}`" for k, v in told.items()})]
    if figures := {k: v for k, v in figures.items() if k.endswith(("_loss", "_accuracy", "_match")) or k in ("images_seen", "held_out_pictures")}:
        parts += ["## Figures on held-out pictures", table({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in figures.items()}),
                  "Losses are nats a token (a word, or a piece of one); `val_loss_blind` needs no picture, `val_loss_shuffled` had another one."]
    return "\n".join(front) + "\n" + "\n\n".join(parts) + "\n"


def figures_of(path: str) -> dict:
    """What a run measured: its summary, or, while it is not finished, its last evaluation."""
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    try:
        with open(os.path.join(folder, "summary.json"), encoding="utf-8") as f:
            return json.load(f)
    except (OSError, ValueError):
        try:
            rows = [row for row in plots.read_metrics(os.path.join(folder, "metrics.jsonl")) if "val_loss" in row]
        except OSError:
            rows = []
        return rows[-1] if rows else {}

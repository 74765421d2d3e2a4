"""TODO."""
import importlib
import json
import os
import warnings
from typing import Any

import numpy as np

import vit
from interop.layouts import LAYOUTS, detect, to_library
from interop.model_card import figures_of, model_card
from layers import LAYER_NORM_EPS
from runtime import checkpoint
from runtime.checkpoint import read_encoder
from runtime.errors import ConvertError, LayoutError


def require(module: str, what: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as problem:
        raise ConvertError(f"{what} needs {module.partition('.')[0]} ({problem}): pip install -e '.[hf]'") from None


def load_arrays(path: str) -> dict[str, np.ndarray]:
    """The tensors of a .safetensors file, or of a torch file, of which nothing but tensors is ever unpickled; of a
    folder, its weights file's. ConvertError if it cannot be read."""
    if os.path.isdir(path):
        names = ("model.safetensors", "open_clip_model.safetensors", "open_clip_pytorch_model.bin", "pytorch_model.bin")
        inside = [os.path.join(path, name) for name in names if os.path.isfile(os.path.join(path, name))]
        if not inside:
            raise ConvertError(f"{path} holds none of {', '.join(names)}")
        path = inside[0]
    if not os.path.isfile(path):
        raise ConvertError(f"{path} does not exist")
    if path.endswith(".npz"):
        raise ConvertError(f"{path} is an .npz: what this project wrote needs no import")
    return load_safetensors(path) if path.endswith(".safetensors") else load_torch(path)


def load_safetensors(path: str) -> dict[str, np.ndarray]:
    safetensors = require("safetensors", f"reading {path}")
    try:
        with safetensors.safe_open(path, framework="numpy") as f:  # bfloat16 too, for jax has made it known to numpy
            return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 - no dict
    except (safetensors.SafetensorError, OSError, TypeError) as problem:
        raise ConvertError(f"{path} is damaged or no safetensors file ({problem})") from None


def load_torch(path: str) -> dict[str, np.ndarray]:
    torch = require("torch", f"reading {path}")
    try:
        with warnings.catch_warnings(action="ignore"):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:  # torch and its unpickler raise many kinds on bytes that are not theirs
        if "safe_globals" in str(problem):
            raise ConvertError(f"{path} is refused: it holds code or objects, not tensors alone, and loading those could do anything") from None
        raise ConvertError(f"{path} is damaged, or no torch file of plain tensors ({type(problem).__name__}); nothing in it was run") from None
    for wrap in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(wrap), dict):
            found = found[wrap]
    if not isinstance(found, dict):
        raise ConvertError(f"{path} holds a {type(found).__name__}, not tensors by name")

    def to_numpy(x: Any) -> np.ndarray:
        x = x.detach()
        return x.view(torch.uint16).numpy().view("bfloat16") if x.dtype == torch.bfloat16 else x.numpy()
    return {str(name): to_numpy(x) for name, x in found.items() if isinstance(x, torch.Tensor)}


def import_encoder(path: str, out: str, heads: int = 0) -> list[str]:
    """Write the encoder in a file or folder to `out` (.npz, or a folder for encoder.npz). Returns notes on what was found."""
    try:
        params, cfg, resolution, notes = detect(load_arrays(path), heads)
    except LayoutError as problem:
        raise ConvertError(f"{path}: {problem}") from None
    target = out if out.endswith(".npz") else os.path.join(out, "encoder.npz")
    os.makedirs(os.path.dirname(target) or ".", exist_ok=True)
    checkpoint.save(target, params, {"encoder": vars(cfg), "resolution": resolution, "source": os.path.basename(os.path.abspath(path))})
    return [*notes, f"written: {target}"]


def library_files(to: str, cfg: vit.ViTConfig, resolution: int) -> tuple[str, str, dict[str, dict]]:
    """(layout, name of the weights file, configuration files by name) for a library. ConvertError if it cannot hold this encoder."""
    mean, std = list(vit.IMAGENET_MEAN), list(vit.IMAGENET_STD)
    if to == "transformers":
        kind = "ViT" if cfg.cls_token else "Siglip"
        shared = {"hidden_size": cfg.width, "intermediate_size": cfg.mlp_dim, "num_hidden_layers": cfg.depth, "num_attention_heads": cfg.num_heads,
                  "image_size": resolution, "patch_size": cfg.patch_size, "num_channels": 3, "hidden_act": "gelu", "layer_norm_eps": LAYER_NORM_EPS,
                  "torch_dtype": "float32"}
        own = {"architectures": ["ViTModel"], "model_type": "vit", "qkv_bias": True} if cfg.cls_token else {
            "architectures": ["SiglipVisionModel"], "model_type": "siglip_vision_model", "vision_use_head": False}
        processor = {"image_processor_type": f"{kind}ImageProcessor", "do_convert_rgb": True, "do_resize": True,
                     "size": {"height": resolution, "width": resolution}, "resample": 2, "do_rescale": True,
                     "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": mean, "image_std": std}
        return kind.lower(), "model.safetensors", {"config.json": own | shared, "preprocessor_config.json": processor}
    if to == "timm":
        model = {"img_size": resolution, "patch_size": cfg.patch_size, "embed_dim": cfg.width, "depth": cfg.depth, "num_heads": cfg.num_heads,
                 "mlp_ratio": (cfg.mlp_dim + 0.5) / cfg.width,  # timm cuts the product to a whole number
                 "class_token": cfg.cls_token, "global_pool": "avg", "fc_norm": True, "pre_norm": False}
        look = {"input_size": [3, resolution, resolution], "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "squash", "mean": mean, "std": std,
                "num_classes": 0, "first_conv": "patch_embed.proj", "classifier": "head"}
        return "timm", "model.safetensors", {"config.json": {"architecture": "vit_base_patch16_224", "num_classes": 0, "num_features": cfg.width,
                                                             "global_pool": "avg", "model_args": model, "pretrained_cfg": look}}
    if not cfg.cls_token:
        raise ConvertError("open_clip's vision tower always has a CLS token, which this encoder has not: export to transformers or timm, or train with --cls-token")
    tower = {"image_size": resolution, "layers": cfg.depth, "width": cfg.width, "head_width": cfg.width // cfg.num_heads, "patch_size": cfg.patch_size,
             "mlp_ratio": (cfg.mlp_dim + 0.5) / cfg.width, "no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True, "norm_kwargs": {"eps": LAYER_NORM_EPS}}
    return "open_clip", "open_clip_model.safetensors", {"open_clip_config.json": {
        "model_cfg": {"embed_dim": cfg.width, "vision_cfg": tower},
        "preprocess_cfg": {"size": [resolution, resolution], "mean": mean, "std": std, "interpolation": "bilinear", "resize_mode": "squash"}}}


def export_encoder(path: str, to: str, out: str, resolution: int = 0) -> list[str]:
    """Write the encoder of a run's folder or an .npz to the folder `out` for a library. Returns the paths written."""
    params, cfg, meta = read_encoder(path)
    resolution = resolution or meta["resolution"]
    if resolution < cfg.patch_size:
        raise ConvertError(f"--resolution {resolution} is below the patch size {cfg.patch_size}")
    if to == "npz":
        kind, weights, configs = "npz", "encoder.npz", {}
    else:
        kind, weights, configs = library_files(to, cfg, resolution)
    texts = {name: json.dumps(config, indent=1) + "\n" for name, config in configs.items()}
    texts["README.md"] = model_card(kind, cfg, resolution, meta, figures_of(path) if "config" in meta else {})
    os.makedirs(out, exist_ok=True)
    target = os.path.join(out, weights)
    if to == "npz":
        checkpoint.save(target, params, meta | {"encoder": vars(cfg), "resolution": resolution})
    else:
        numpy = require("safetensors.numpy", f"writing {target}")
        arrays = to_library(params, cfg, resolution // cfg.patch_size, LAYOUTS[kind])
        if to == "open_clip":
            arrays["proj"] = np.eye(cfg.width, dtype=np.float32)
        solid = {name: np.ascontiguousarray(x, np.float32) for name, x in arrays.items()}
        if kind == "siglip":
            solid = {f"vision_model.{name}": x for name, x in solid.items()}
        numpy.save_file(solid, target + ".part", metadata={"format": "pt"})
        os.chmod(target + ".part", 0o644)  # to be shared, as the files beside it
        os.replace(target + ".part", target)
    for name, text in texts.items():
        checkpoint.atomic_write(os.path.join(out, name), lambda f, text=text: f.write(text.encode()))
    return [target, *(os.path.join(out, name) for name in texts)]

"""Import and export: read weights in any known layout, write an encoder for another library."""
import importlib
import json
import os
import warnings
from typing import Any

import numpy as np

import vit
from interop.layouts import LAYOUTS, detect, to_library
from interop.model_card import model_card, read_metrics
from layers import LAYER_NORM_EPS
from runtime import checkpoint
from runtime.errors import ConvertError, LayoutError, MissingExtra

WEIGHT_FILES = ("model.safetensors", "open_clip_model.safetensors", "open_clip_pytorch_model.bin",
                "pytorch_model.bin")  # of a folder, the first that is there
TORCH_FILE = (b"PK\x03\x04", b"\x80")  # how it begins: a zip archive, or a pickle


def require(module: str, purpose: str) -> Any:
    """An optional module. MissingExtra if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as problem:
        raise MissingExtra(f"{purpose} needs {module.partition('.')[0]} ({problem}): "
                           "pip install -e '.[hf]'") from None


def check_out_folder(folder: str) -> None:
    """ConvertError if `folder` is that of a run: the encoder would replace its encoder.npz, and
    a library's config.json its settings."""
    if checkpoint.steps(folder) or os.path.exists(os.path.join(folder, "metrics.jsonl")):
        raise ConvertError(f"--out {folder} is the folder of a run, whose files would be replaced: "
                           "name another folder")


# ---------------------------------------------------------------------------------- reading
def load_arrays(path: str) -> dict[str, np.ndarray]:
    """The tensors of a .safetensors or torch file, or of the weights file in a folder. Of a torch
    file only tensors are unpickled. ConvertError if it cannot be read."""
    if os.path.isdir(path):
        files = [os.path.join(path, name) for name in WEIGHT_FILES]
        existing = [file for file in files if os.path.isfile(file)]
        if not existing:
            raise ConvertError(f"{path} holds none of {', '.join(WEIGHT_FILES)}")
        path = existing[0]
    if not os.path.isfile(path):
        raise ConvertError(f"{path} does not exist")
    if path.endswith(".npz"):
        raise ConvertError(f"{path} is an .npz: what this project wrote needs no import")
    if path.endswith(".safetensors"):
        return load_safetensors(path)
    with open(path, "rb") as f:
        if not f.read(4).startswith(TORCH_FILE):
            raise ConvertError(f"{path} is no file of weights: give a .safetensors file, a torch "
                               "file (.bin, .pt, .pth), or a folder with one")
    return load_torch(path)


def heads_in_config(path: str) -> int:
    """The number of heads in the configuration that a library keeps beside its weights; 0 if it is
    not known."""
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    for name in ("config.json", "open_clip_config.json"):
        try:
            with open(os.path.join(folder, name), encoding="utf-8") as file:
                config = json.load(file)
            config = config.get("model_cfg", config)
            for part in ("vision_cfg", "vision_config", "model_args"):  # open_clip, SigLIP, timm
                config = config.get(part, config)
            if "head_width" in config:
                return int(config["width"]) // int(config["head_width"])
            return int(config.get("num_attention_heads", config.get("num_heads", 0)))
        except (OSError, ValueError, TypeError, LookupError, AttributeError, ZeroDivisionError):
            continue
    return 0


def load_safetensors(path: str) -> dict[str, np.ndarray]:
    safetensors = require("safetensors", f"reading {path}")
    try:
        with safetensors.safe_open(path, framework="numpy") as f:  # JAX registers bfloat16 in numpy
            return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 - no dict
    except (safetensors.SafetensorError, OSError, TypeError) as problem:
        raise ConvertError(f"{path} is damaged or no safetensors file ({problem})") from None


def load_torch(path: str) -> dict[str, np.ndarray]:
    torch = require("torch", f"reading {path}")
    try:
        with warnings.catch_warnings(action="ignore"):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:  # torch and its unpickler raise many types on broken bytes
        if "safe_globals" in str(problem):
            raise ConvertError(f"{path} is refused: it holds code or objects, not only tensors, "
                               "and loading those could do anything") from None
        raise ConvertError(f"{path} is damaged, or no torch file of plain tensors "
                           f"({type(problem).__name__}); nothing in it was run") from None
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict):
        raise ConvertError(f"{path} holds a {type(state).__name__}, not tensors by name")

    def to_numpy(x: Any) -> np.ndarray:
        x = x.detach()
        if x.dtype == torch.bfloat16:
            return x.view(torch.uint16).numpy().view("bfloat16")
        return x.numpy()
    return {str(name): to_numpy(x) for name, x in state.items() if isinstance(x, torch.Tensor)}


def import_encoder(path: str, out: str, heads: int = 0) -> list[str]:
    """Writes the encoder in a file or folder to `out` (.npz, or a folder for encoder.npz). Returns
    notes on what was read."""
    file = out if out.endswith(".npz") else os.path.join(out, "encoder.npz")
    folder = os.path.dirname(file) or "."
    check_out_folder(folder)
    try:
        arrays = load_arrays(path)
        params, cfg, resolution, notes = detect(arrays, heads or heads_in_config(path))
    except LayoutError as problem:
        raise ConvertError(f"{path}: {problem}") from None
    os.makedirs(folder, exist_ok=True)
    source = os.path.basename(os.path.abspath(path))
    meta = {"encoder": vars(cfg), "resolution": resolution, "source": source}
    checkpoint.save(file, params, meta)
    return [*notes, f"written: {file}"]


# ---------------------------------------------------------------------------------- writing
def transformers_files(cfg: vit.ViTConfig, resolution: int) -> tuple[str, str, dict[str, dict]]:
    kind = "ViT" if cfg.cls_token else "Siglip"
    if cfg.cls_token:
        model = {"architectures": ["ViTModel"], "model_type": "vit", "qkv_bias": True}
    else:
        model = {"architectures": ["SiglipVisionModel"], "model_type": "siglip_vision_model",
                 "vision_use_head": False}
    model |= {
        "hidden_size": cfg.width, "intermediate_size": cfg.mlp_dim, "num_hidden_layers": cfg.depth,
        "num_attention_heads": cfg.num_heads, "image_size": resolution,
        "patch_size": cfg.patch_size, "num_channels": 3, "hidden_act": "gelu",
        "layer_norm_eps": LAYER_NORM_EPS, "torch_dtype": "float32"}
    processor = {
        "image_processor_type": f"{kind}ImageProcessor", "do_convert_rgb": True, "do_resize": True,
        "size": {"height": resolution, "width": resolution}, "resample": 2, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": list(vit.IMAGENET_MEAN),
        "image_std": list(vit.IMAGENET_STD)}
    return kind.lower(), "model.safetensors", {"config.json": model,
                                               "preprocessor_config.json": processor}


def mlp_ratio(cfg: Any) -> float:
    return (cfg.mlp_dim + 0.5) / cfg.width  # the libraries round the product down


def timm_files(cfg: vit.ViTConfig, resolution: int) -> tuple[str, str, dict[str, dict]]:
    model = {
        "img_size": resolution, "patch_size": cfg.patch_size, "embed_dim": cfg.width,
        "depth": cfg.depth, "num_heads": cfg.num_heads, "mlp_ratio": mlp_ratio(cfg),
        "class_token": cfg.cls_token, "global_pool": "avg", "fc_norm": True, "pre_norm": False}
    preprocessing = {
        "input_size": [3, resolution, resolution], "interpolation": "bilinear", "crop_pct": 1.0,
        "crop_mode": "squash", "mean": list(vit.IMAGENET_MEAN), "std": list(vit.IMAGENET_STD),
        "num_classes": 0, "first_conv": "patch_embed.proj", "classifier": "head"}
    config = {"architecture": "vit_base_patch16_224", "num_classes": 0, "num_features": cfg.width,
              "global_pool": "avg", "model_args": model, "pretrained_cfg": preprocessing}
    return "timm", "model.safetensors", {"config.json": config}


def open_clip_files(cfg: vit.ViTConfig, resolution: int) -> tuple[str, str, dict[str, dict]]:
    if not cfg.cls_token:
        raise ConvertError("open_clip's vision tower always has a CLS token, which this encoder "
                           "does not have: export to transformers or timm, or train with "
                           "--cls-token")
    tower = {
        "image_size": resolution, "layers": cfg.depth, "width": cfg.width,
        "head_width": cfg.width // cfg.num_heads, "patch_size": cfg.patch_size,
        "mlp_ratio": mlp_ratio(cfg), "no_ln_pre": True, "pool_type": "avg",
        "final_ln_after_pool": True, "norm_kwargs": {"eps": LAYER_NORM_EPS}}
    config = {"model_cfg": {"embed_dim": cfg.width, "vision_cfg": tower},
              "preprocess_cfg": open_clip_preprocessing(resolution)}
    return "open_clip", "open_clip_model.safetensors", {"open_clip_config.json": config}


def open_clip_preprocessing(resolution: int) -> dict:
    return {"size": [resolution, resolution], "mean": list(vit.IMAGENET_MEAN),
            "std": list(vit.IMAGENET_STD), "interpolation": "bilinear", "resize_mode": "squash"}


# Functions of (config, resolution) that return (layout, weights file, {file: configuration}).
LIBRARY_FILES = {
    "transformers": transformers_files, "timm": timm_files, "open_clip": open_clip_files,
    "npz": lambda cfg, resolution: ("npz", "encoder.npz", {})}


def export_encoder(path: str, library: str, out: str, resolution: int = 0) -> list[str]:
    """Writes the encoder of a run's folder or an .npz to the folder `out`, for a library of
    LIBRARY_FILES. resolution: in pixels, 0 for the encoder's. Returns the paths written.
    ConvertError if the library cannot hold this encoder."""
    check_out_folder(out)
    params, cfg, meta = checkpoint.read_encoder(path)
    resolution = resolution or meta["resolution"]
    if cfg.gated_attention and library != "npz":
        raise ConvertError(f"{path} has gated attention, for which {library} has no place: export "
                           "it to npz")
    if resolution < cfg.patch_size:
        raise ConvertError(f"--resolution {resolution} is below the patch size {cfg.patch_size}")
    kind, weights, configs = LIBRARY_FILES[library](cfg, resolution)
    texts = {}
    for name, config in configs.items():
        texts[name] = checkpoint.to_json(config, indent=1) + "\n"
    metrics = read_metrics(path, meta.get("step")) if "config" in meta else {}
    texts["README.md"] = model_card(kind, cfg, resolution, meta, metrics)
    file = os.path.join(out, weights)
    if kind != "npz":
        require("safetensors.numpy", f"writing {file}")  # before a folder is made
    os.makedirs(out, exist_ok=True)
    if kind == "npz":
        checkpoint.save(file, params, meta | {"encoder": vars(cfg), "resolution": resolution})
    else:
        save_safetensors(file, params, cfg, resolution, kind)
    for name, text in texts.items():
        checkpoint.write_text(os.path.join(out, name), text)
    return [file, *(os.path.join(out, name) for name in texts)]


def save_safetensors(file: str, params: dict, cfg: vit.ViTConfig, resolution: int, kind: str
                     ) -> None:
    prefix = "vision_model." if kind == "siglip" else ""
    arrays = {}
    for name, x in to_library(params, cfg, resolution // cfg.patch_size, LAYOUTS[kind]).items():
        arrays[prefix + name] = x
    if kind == "open_clip":
        arrays["proj"] = np.eye(cfg.width)
    write_safetensors(file, arrays)


def write_safetensors(file: str, arrays: dict[str, np.ndarray]) -> None:
    safetensors = require("safetensors.numpy", f"writing {file}")
    arrays = {name: np.asarray(x, np.float32, order="C") for name, x in arrays.items()}
    safetensors.save_file(arrays, file + ".part", metadata={"format": "pt"})
    os.chmod(file + ".part", 0o644)  # readable for all, as the files beside it
    os.replace(file + ".part", file)

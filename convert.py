"""Encoders in and out: the released weights become an .npz of this project, and any run what other libraries load.

    python convert.py import FILE --out ENCODER.npz             open_clip_pytorch_model.bin, .safetensors, or a folder with one
    python convert.py export RUN --to transformers --out DIR    or timm, open_clip, npz

Beside the weights an export writes the library's configuration, its image processor's where it has one, and a model card.
Where each library keeps each array is in layouts.py, the card in card.py.
"""
import argparse
import importlib
import json
import os
import sys
import warnings
from typing import Any

import numpy as np

import checkpoint
import vit
from card import figures_of, model_card
from features import read
from layers import EPS
from layouts import LAYOUTS, LayoutError, arrange, recognise


class ConvertError(Exception):
    """A file cannot be read, or an encoder cannot become what is asked; the message says why."""


def need(module: str, what: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as problem:
        raise ConvertError(f"{what} needs {module.partition('.')[0]} ({problem}): pip install -e '.[hf]'") from None


# --------------------------------------------------------------------------------------------------------------- import
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
    safetensors = need("safetensors", f"reading {path}")
    try:
        with safetensors.safe_open(path, framework="numpy") as f:  # bfloat16 too, for jax has made it known to numpy
            return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 - no dict
    except (safetensors.SafetensorError, OSError, TypeError) as problem:
        raise ConvertError(f"{path} is damaged or no safetensors file ({problem})") from None


def load_torch(path: str) -> dict[str, np.ndarray]:
    torch = need("torch", f"reading {path}")
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
        params, cfg, resolution, notes = recognise(load_arrays(path), heads)
    except LayoutError as problem:
        raise ConvertError(f"{path}: {problem}") from None
    target = out if out.endswith(".npz") else os.path.join(out, "encoder.npz")
    os.makedirs(os.path.dirname(target) or ".", exist_ok=True)
    checkpoint.save(target, params, {"encoder": vars(cfg), "resolution": resolution, "source": os.path.basename(os.path.abspath(path))})
    return [*notes, f"written: {target}"]


# --------------------------------------------------------------------------------------------------------------- export
def files(to: str, cfg: vit.ViTConfig, resolution: int) -> tuple[str, str, dict[str, dict]]:
    """(layout, name of the weights file, configuration files by name) for a library. ConvertError if it cannot hold this encoder."""
    mean, std = list(vit.MEAN), list(vit.STD)
    if to == "transformers":
        kind = "ViT" if cfg.cls else "Siglip"
        shared = {"hidden_size": cfg.width, "intermediate_size": cfg.mlp, "num_hidden_layers": cfg.layers, "num_attention_heads": cfg.heads,
                  "image_size": resolution, "patch_size": cfg.patch, "num_channels": 3, "hidden_act": "gelu", "layer_norm_eps": EPS,
                  "torch_dtype": "float32"}
        own = {"architectures": ["ViTModel"], "model_type": "vit", "qkv_bias": True} if cfg.cls else {
            "architectures": ["SiglipVisionModel"], "model_type": "siglip_vision_model", "vision_use_head": False}
        processor = {"image_processor_type": f"{kind}ImageProcessor", "do_convert_rgb": True, "do_resize": True,
                     "size": {"height": resolution, "width": resolution}, "resample": 2, "do_rescale": True,
                     "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": mean, "image_std": std}
        return kind.lower(), "model.safetensors", {"config.json": own | shared, "preprocessor_config.json": processor}
    if to == "timm":
        model = {"img_size": resolution, "patch_size": cfg.patch, "embed_dim": cfg.width, "depth": cfg.layers, "num_heads": cfg.heads,
                 "mlp_ratio": (cfg.mlp + 0.5) / cfg.width,  # timm cuts the product to a whole number
                 "class_token": cfg.cls, "global_pool": "avg", "fc_norm": True, "pre_norm": False}
        look = {"input_size": [3, resolution, resolution], "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "squash", "mean": mean, "std": std,
                "num_classes": 0, "first_conv": "patch_embed.proj", "classifier": "head"}
        return "timm", "model.safetensors", {"config.json": {"architecture": "vit_base_patch16_224", "num_classes": 0, "num_features": cfg.width,
                                                             "global_pool": "avg", "model_args": model, "pretrained_cfg": look}}
    if not cfg.cls:
        raise ConvertError("open_clip's vision tower always has a CLS token, which this encoder has not: export to transformers or timm, or train with --cls")
    tower = {"image_size": resolution, "layers": cfg.layers, "width": cfg.width, "head_width": cfg.width // cfg.heads, "patch_size": cfg.patch,
             "mlp_ratio": (cfg.mlp + 0.5) / cfg.width, "no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True, "norm_kwargs": {"eps": EPS}}
    return "open_clip", "open_clip_model.safetensors", {"open_clip_config.json": {
        "model_cfg": {"embed_dim": cfg.width, "vision_cfg": tower},
        "preprocess_cfg": {"size": [resolution, resolution], "mean": mean, "std": std, "interpolation": "bilinear", "resize_mode": "squash"}}}


def export_encoder(path: str, to: str, out: str, resolution: int = 0) -> list[str]:
    """Write the encoder of a run's folder or an .npz to the folder `out` for a library. Returns the paths written."""
    params, cfg, meta = read(path)
    resolution = resolution or meta["resolution"]
    if resolution < cfg.patch:
        raise ConvertError(f"--resolution {resolution} is below the patch size {cfg.patch}")
    if to == "npz":
        kind, weights, configs = "npz", "encoder.npz", {}
    else:
        kind, weights, configs = files(to, cfg, resolution)
    texts = {name: json.dumps(config, indent=1) + "\n" for name, config in configs.items()}
    texts["README.md"] = model_card(kind, cfg, resolution, meta, figures_of(path) if "config" in meta else {})
    os.makedirs(out, exist_ok=True)
    target = os.path.join(out, weights)
    if to == "npz":
        checkpoint.save(target, params, meta | {"encoder": vars(cfg), "resolution": resolution})
    else:
        numpy = need("safetensors.numpy", f"writing {target}")
        arrays = arrange(params, cfg, resolution // cfg.patch, LAYOUTS[kind])
        if to == "open_clip":
            arrays["proj"] = np.eye(cfg.width, dtype=np.float32)
        solid = {name: np.ascontiguousarray(x, np.float32) for name, x in arrays.items()}
        if kind == "siglip":
            solid = {f"vision_model.{name}": x for name, x in solid.items()}
        numpy.save_file(solid, target + ".part", metadata={"format": "pt"})
        os.chmod(target + ".part", 0o644)  # to be shared, as the files beside it
        os.replace(target + ".part", target)
    for name, text in texts.items():
        checkpoint.write(os.path.join(out, name), lambda f, text=text: f.write(text.encode()))
    return [target, *(os.path.join(out, name) for name in texts)]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="convert.py", allow_abbrev=False, description="Encoders in and out.", epilog="Each has its own -h.")
    ways = parser.add_subparsers(dest="way", required=True)
    way = ways.add_parser("import", allow_abbrev=False, help="weights in another library's layout become an .npz")
    way.add_argument("file", help="open_clip_pytorch_model.bin, a .safetensors, or a folder with one; OpenVision, or what export wrote")
    way.add_argument("--out", required=True, metavar="DIR_OR_NPZ", help="where the encoder goes")
    way.add_argument("--heads", type=int, default=0, help="attention heads, if the width is of no known size")
    way = ways.add_parser("export", allow_abbrev=False, help="a run's encoder becomes what another library loads")
    way.add_argument("run", metavar="RUN_OR_NPZ", help="a run's folder, a checkpoint, or an encoder's .npz")
    way.add_argument("--to", required=True, choices=("transformers", "timm", "open_clip", "npz"), help="the library; open_clip for runs with --cls alone")
    way.add_argument("--out", required=True, metavar="DIR", help="where weights, configuration and model card go")
    way.add_argument("--resolution", type=int, default=0, help="pixels a side (default: what it was trained at last)")
    given = parser.parse_args(argv)
    try:
        if given.way == "import":
            print("\n".join(import_encoder(given.file, given.out, given.heads)))
        else:
            print("written: " + ", ".join(export_encoder(given.run, given.to, given.out, given.resolution)))
        return 0
    except (ConvertError, LayoutError, checkpoint.CheckpointError) as problem:
        print(f"error: {problem}", file=sys.stderr)
    except OSError as problem:
        print(f"error: {problem.filename or given.out}: {problem.strerror or problem}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

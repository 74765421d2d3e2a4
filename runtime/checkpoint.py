"""Checkpoints: one .npz file each, readable with numpy alone, written completely or not at all.

A file holds arrays by path, such as "params/encoder/blocks/qkv/kernel", and "meta", a JSON text as
bytes: the step, the settings, the vocabulary, fingerprints of the data. Nothing is pickled, so a
file from a stranger cannot run code. Each array has the CRC-32 of the zip format, which is checked
when it is read. numpy does not know bfloat16: such an array is stored as uint16 and listed in meta.
A file gets its name only after its bytes are on the disk, so a crash leaves the older ones intact.

    python -m runtime.checkpoint FILE        prints what a checkpoint holds
"""
import io
import json
import math
import os
import re
import sys
import zipfile
from collections.abc import Callable
from typing import Any, BinaryIO

import jax
import ml_dtypes
import numpy as np

import vit
from runtime.cpu_tuning import SMALL_MODEL_PARAMS
from runtime.curriculum import parse_stages
from runtime.errors import CheckpointError, ConfigError, first_problems, run_command

OLD_NAMES = {  # in meta, as earlier versions called them
    "unmeasured": "evaluation_pending", "held-out data": "validation data",
    "layers": "depth", "heads": "num_heads", "mlp": "mlp_dim", "patch": "patch_size",
    "cls": "cls_token", "positions": "learned_pos_grid", "unroll": "scan_unroll"}
EXPORT_ENDINGS = (".safetensors", ".bin")  # of weights in the layout of another library


# ---------------------------------------------------------------------------------- writing
def flatten(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def save(path: str, tree: Any, meta: dict[str, Any]) -> None:
    """Writes a pytree and meta to `path` (.npz), all or nothing. OSError if writing fails."""
    arrays, bits = {}, {}
    for name, leaf in flatten(tree).items():
        array = np.asarray(leaf)
        if array.dtype == ml_dtypes.bfloat16:
            bits[name] = "bfloat16"
            array = array.view(np.uint16)
        arrays[name] = array
    arrays["meta"] = np.frombuffer(to_json(meta | {"bits": bits}).encode(), np.uint8)
    atomic_write(path, lambda f: np.savez(f, **arrays))


def to_json(value: Any, **layout: Any) -> str:
    """JSON text of a value. JSON has no NaN and no infinity: such a number becomes null."""
    return json.dumps(without_nan(value), allow_nan=False, **layout)


def without_nan(value: Any) -> Any:
    """The value with None in place of each number that is not finite."""
    if isinstance(value, dict):
        return {key: without_nan(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(x) for x in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def atomic_write(path: str, write: Callable[[BinaryIO], Any]) -> None:
    """A complete file or none: write(file) under another name, then flush and rename."""
    part = f"{path}.part"
    try:
        with open(part, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except BaseException:
        if os.path.exists(part):
            os.remove(part)
        raise
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    try:
        os.fsync(folder)  # so that the new name is on the disk too
    finally:
        os.close(folder)


def write_text(path: str, text: str) -> None:
    atomic_write(path, lambda f: f.write(text.encode()))


def save_step(folder: str, step: int, tree: Any, meta: dict[str, Any], keep: int = 2,
              keep_every: int = 0) -> str:
    """Writes step-N.npz, then deletes older ones but keep - 1 and the multiples of keep_every."""
    path = os.path.join(folder, f"step-{step:08d}.npz")
    save(path, tree, meta | {"step": step})
    older = [(number, old) for number, old in steps(folder) if number < step]
    for number, old in older[:max(0, len(older) + 1 - keep)]:
        if not keep_every or number % keep_every:
            os.remove(old)
    return path


# ---------------------------------------------------------------------------------- reading
def read_header(path: str) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[str, Any]]:
    """(shapes and dtypes by path, meta), without the arrays. A file that claims more than it holds
    is refused before memory is allocated. CheckpointError if the file is missing or damaged."""
    try:
        with zipfile.ZipFile(path) as f:
            shapes = {m.filename.removesuffix(".npy"): read_shape(f, m) for m in f.infolist()}
            del shapes["meta"]
            meta = json.loads(np.load(io.BytesIO(f.read("meta.npy")), allow_pickle=False).tobytes())
        for name, dtype in meta.pop("bits").items():
            shapes[name] = jax.ShapeDtypeStruct(shapes[name].shape, getattr(ml_dtypes, dtype))
        return shapes, with_new_names(meta)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except Exception as problem:  # zip, npy and json parsers raise many types on broken bytes
        raise CheckpointError(f"{path} is damaged or no checkpoint ({problem})") from None


def read_shape(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> jax.ShapeDtypeStruct:
    """From the array's header. ValueError unless the array has the size that the header says."""
    with archive.open(member) as f:
        if np.lib.format.read_magic(f) == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(f)
        else:
            shape, _, dtype = np.lib.format.read_array_header_2_0(f)
        size = f.tell() + math.prod(shape) * dtype.itemsize
    if dtype.hasobject or member.compress_type != zipfile.ZIP_STORED or size != member.file_size:
        raise ValueError(f"{member.filename} is not what its header says")
    return jax.ShapeDtypeStruct(shape, dtype)


def load(path: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(arrays by path, meta). CheckpointError if the file is missing or damaged."""
    shapes, meta = read_header(path)
    arrays = {}
    try:
        with zipfile.ZipFile(path) as f:
            for name, spec in shapes.items():  # reading to the end checks the CRC
                content = io.BytesIO(f.read(name + ".npy"))
                arrays[name] = np.load(content, allow_pickle=False).view(spec.dtype)
    except Exception as problem:  # as in read_header
        raise CheckpointError(f"{path} is damaged or no checkpoint ({problem})") from None
    return arrays, meta


def check_shapes(shapes: dict[str, Any], target: Any, origin: str = "the checkpoint",
                 prefix: str = "") -> None:
    """CheckpointError unless each array of `target` is there, under the path `prefix`. It names the
    first ones that are missing or have another shape. `origin` names the file in the message."""
    problems = []
    for name, leaf in flatten(target).items():
        stored = shapes.get(os.path.join(prefix, name))
        if stored is None:
            problems.append(f"{name} is missing")
        elif stored.shape != leaf.shape:
            problems.append(f"{name} is {stored.shape}, not {leaf.shape}")
    if problems:
        raise CheckpointError(f"{origin} does not fit this model: {first_problems(problems, 3)}")


def restore(arrays: dict[str, np.ndarray], target: Any, origin: str = "the checkpoint",
            prefix: str = "") -> Any:
    """The arrays under the path `prefix`, in the structure of `target` (arrays or
    ShapeDtypeStructs). CheckpointError as in check_shapes."""
    check_shapes(arrays, target, origin, prefix)
    leaves = [arrays[os.path.join(prefix, name)] for name in flatten(target)]
    return jax.tree.unflatten(jax.tree.structure(target), leaves)


# --------------------------------------------------------------------------- a run's folder
def steps(folder: str) -> list[tuple[int, str]]:
    """(step, path) of the checkpoints in a run's folder, oldest first."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    matches = [re.fullmatch(r"step-(\d+)\.npz", name) for name in names]
    return sorted((int(m[1]), os.path.join(folder, m[0])) for m in matches if m)


def latest(folder: str, check: Callable[[str, dict, dict], None] = lambda *_: None,
           workdir: str = "") -> tuple[str, dict[str, np.ndarray], dict[str, Any]] | None:
    """(path, arrays, meta) of a run's newest checkpoint, None if there is none. If it is damaged,
    the previous one is loaded, with a warning; CheckpointError if all are. check(path, shapes,
    meta) may raise before the arrays are read. workdir: what the folder is a copy of, if it is."""
    paths = [path for _, path in steps(folder)]
    for path in reversed(paths):
        try:
            header = read_header(path)
        except CheckpointError as problem:
            print(f"warning: {problem}; trying the checkpoint before it", flush=True)
            continue
        check(path, *header)  # an error here means another run or model, not damage
        try:
            return path, *load(path)
        except CheckpointError as problem:
            print(f"warning: {problem}; trying the checkpoint before it", flush=True)
    if paths:
        raise CheckpointError(f"every checkpoint in {workdir or folder} is damaged: delete the "
                              "folder to start again, or restore one")
    return None


def load_last(path: str) -> tuple[str, dict[str, np.ndarray], dict[str, Any]]:
    """(path, arrays, meta) of the last checkpoint in a run's folder, or of the file that is named.
    CheckpointError if there is none, or it cannot be read."""
    if not os.path.isdir(path):
        return path, *load(path)
    if any(name.endswith(EXPORT_ENDINGS) for name in os.listdir(path)):
        raise CheckpointError(f"{path} holds an export: run python convert.py import {path} --out "
                              "encoder.npz, and name that file")
    checkpoint = latest(path)
    if checkpoint is None:
        raise CheckpointError(f"{path} has no checkpoint: name the folder of a run that "
                              "train.py saved")
    return checkpoint


# ---------------------------------------------------------------------- encoders and sizes
def read_encoder(path: str) -> tuple[dict, vit.ViTConfig, dict[str, Any]]:
    """(parameters, config, meta) of an encoder's .npz, of a checkpoint, or of a run's folder (its
    encoder.npz, or else its last checkpoint). meta has "resolution" (pixels) and, where they are
    known, the "config" and "step" of the run or the "source" of the import. CheckpointError says
    what is wrong with the file."""
    in_folder = os.path.join(path, "encoder.npz")
    path, arrays, meta = load_last(in_folder if os.path.exists(in_folder) else path)
    try:
        cfg, resolution = encoder_config(meta)
    except (TypeError, LookupError, ValueError, ConfigError):
        raise CheckpointError(f"{path} is no encoder: name a run's folder, its encoder.npz, or "
                              "what convert.py imported") from None
    target = jax.eval_shape(lambda: vit.init(jax.random.key(0), cfg))
    of_run = any(name.startswith("params/") for name in arrays)
    params = restore(arrays, target, path, "params/encoder" if of_run else "")
    known = {name: meta[name] for name in ("config", "step", "source") if name in meta}
    return params, cfg, known | {"resolution": resolution}


def encoder_config(meta: dict[str, Any]) -> tuple[vit.ViTConfig, int]:
    """(config, resolution) that meta has. Checkpoints of earlier versions have neither: there both
    follow from the run's settings."""
    if "encoder" in meta:
        return vit.ViTConfig(**meta["encoder"]), int(meta["resolution"])
    settings = meta["config"]
    options = ("cls_token", "learned_pos_grid", "dtype", "remat", "scan_unroll")
    changes = {name: settings[name] for name in options if name in settings}
    remaining = [s for s in parse_stages(settings["stages"]) if meta["step"] <= s.end]
    return vit.vit_config(settings["encoder"], **changes), remaining[0].resolution


def with_new_names(meta: Any) -> Any:
    if not isinstance(meta, dict):
        return meta
    return {OLD_NAMES.get(name, name): with_new_names(value) for name, value in meta.items()}


def model_size(path: str) -> int:
    """Parameters of the model in a run's folder, a checkpoint, an encoder's .npz or an export. Only
    headers are read, and JAX is not started, so that cpu_tuning.tune_cpu can be called after it."""
    if not os.path.isdir(path):
        return num_params_in_file(path)
    files = [file for _, file in steps(path)[-1:]]
    for name in os.listdir(path):
        if name == "encoder.npz" or name.endswith(EXPORT_ENDINGS):
            files.append(os.path.join(path, name))
    return max(map(num_params_in_file, files), default=SMALL_MODEL_PARAMS)  # counts as large


def num_params_in_file(path: str) -> int:
    """Parameters in a file. One that cannot be read counts as large: opening it gives the error."""
    try:
        if path.endswith(EXPORT_ENDINGS):
            return os.path.getsize(path) // 2  # an upper bound: a number takes 16 bits or more
        shapes, _ = read_header(path)
    except (CheckpointError, OSError):
        return SMALL_MODEL_PARAMS  # only models below this number are small
    sizes = {name: math.prod(spec.shape) for name, spec in shapes.items()}
    model_sizes = [size for name, size in sizes.items() if name.startswith("params/")]
    return sum(model_sizes or sizes.values())  # an encoder.npz has no such prefix


def main(argv: list[str]) -> int:
    if len(argv) != 1:
        sys.exit("usage: python -m runtime.checkpoint FILE")
    arrays, meta = load(argv[0])
    for name, array in arrays.items():
        print(f"{name:60s} {array.dtype!s:9s} {array.shape}")
    print({name: value for name, value in meta.items() if name != "vocabulary"})
    print(f"{sum(array.size for array in arrays.values()) / 1e6:.2f} M numbers")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))

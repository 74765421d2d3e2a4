"""Save and continue: one .npz a checkpoint, readable with numpy alone, and never half of one.

A file holds arrays by path, such as "params/encoder/blocks/qkv/kernel", and "meta", a JSON text as bytes: step, stage,
config, vocabulary, what the data was. Nothing in it is pickled, so a file from a stranger cannot run code. Each array
carries the zip format's CRC-32, checked as it is read. bfloat16, which numpy does not know, is stored as its bits in
uint16 and named in meta. A save goes to a temporary name, is flushed to the disk and then renamed: a crash at any
moment leaves the former checkpoints whole.

    python -m runtime.checkpoint FILE        prints what a checkpoint holds
"""
import io
import json
import math
import os
import re
import zipfile
from collections.abc import Callable
from typing import Any

import jax
import ml_dtypes
import numpy as np

import vit
from config import Config
from objectives.registry import model_spec
from runtime.cpu_tuning import SMALL_MODEL_PARAMS
from runtime.curriculum import parse_stages
from runtime.errors import CheckpointError


def flatten(tree: Any) -> dict[str, np.ndarray]:
    """A pytree's arrays by path."""
    def name(entry: Any) -> str:
        return str(getattr(entry, "key", getattr(entry, "idx", getattr(entry, "name", entry))))
    return {"/".join(map(name, path)): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def save(path: str, tree: Any, meta: dict[str, Any]) -> None:
    """Write a pytree and meta to `path` (.npz), all or nothing. OSError when the disk refuses."""
    arrays, bits = {}, {}
    for name, leaf in flatten(tree).items():
        array = np.asarray(leaf)
        if array.dtype == ml_dtypes.bfloat16:
            bits[name], array = "bfloat16", array.view(np.uint16)
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


def atomic_write(path: str, fill: Any) -> None:
    """A file that is there whole or not at all: fill(file) under another name, then flush and rename."""
    part = f"{path}.part"
    try:
        with open(part, "wb") as f:
            fill(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except BaseException:
        if os.path.exists(part):
            os.remove(part)
        raise
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself reaches the disk
    finally:
        os.close(folder)


def read_header(path: str) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[str, Any]]:
    """(shapes and dtypes by path, meta), of which only meta and the arrays' heads are read: a file that claims more than it
    holds is found out before memory is filled. CheckpointError if the file is missing or damaged."""
    try:
        with zipfile.ZipFile(path) as f:
            shapes = {}
            for member in f.infolist():
                with f.open(member) as head:
                    version = np.lib.format.read_magic(head)
                    shape, _, dtype = (np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0)(head)
                    if dtype.hasobject or member.compress_type != zipfile.ZIP_STORED or head.tell() + math.prod(shape) * dtype.itemsize != member.file_size:
                        raise ValueError(f"{member.filename} is not what its head says")
                shapes[member.filename.removesuffix(".npy")] = jax.ShapeDtypeStruct(shape, dtype)
            del shapes["meta"]
            meta = json.loads(np.load(io.BytesIO(f.read("meta.npy")), allow_pickle=False).tobytes())
        for name, kind in meta.pop("bits").items():
            shapes[name] = jax.ShapeDtypeStruct(shapes[name].shape, getattr(ml_dtypes, kind))
        return shapes, meta
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except Exception as problem:  # zip, header and json parsers raise what they like on broken bytes
        raise CheckpointError(f"{path} is damaged or no checkpoint ({problem})") from None


def load(path: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(arrays by path, meta). CheckpointError if the file is missing or damaged."""
    shapes, meta = read_header(path)
    try:
        with zipfile.ZipFile(path) as f:  # a member is read whole, for its CRC is checked at its end
            arrays = {name: np.load(io.BytesIO(f.read(name + ".npy")), allow_pickle=False) for name in shapes}
        return {name: array.view(shapes[name].dtype) for name, array in arrays.items()}, meta
    except Exception as problem:  # zip, header and json parsers raise what they like on broken bytes
        raise CheckpointError(f"{path} is damaged or no checkpoint ({problem})") from None


def check_shapes(shapes: dict[str, Any], like: Any, origin: str = "the checkpoint", under: str = "") -> None:
    """CheckpointError, naming the first arrays that are missing or of another shape, unless everything in `like` is there below the path `under`."""
    prefix = under + "/" if under else ""
    wrong = [f"{name} is missing" if prefix + name not in shapes else f"{name} is {shapes[prefix + name].shape}, not {leaf.shape}"
             for name, leaf in flatten(like).items() if prefix + name not in shapes or shapes[prefix + name].shape != leaf.shape]
    if wrong:
        raise CheckpointError(f"{origin} does not fit this model: {'; '.join(wrong[:3])}"
                              + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""))


def restore(arrays: dict[str, np.ndarray], like: Any, origin: str = "the checkpoint", under: str = "") -> Any:
    """Arrays put in the structure of `like` (arrays or ShapeDtypeStructs), taken from below the path `under`.
    CheckpointError where `fit` says so."""
    check_shapes(arrays, like, origin, under)
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[f"{under}/{name}" if under else name] for name in flatten(like)])


def steps(folder: str) -> list[tuple[int, str]]:
    """(step, path) of the checkpoints in a run's folder, oldest first."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    found = [(int(m[1]), os.path.join(folder, m[0])) for n in names if (m := re.fullmatch(r"step-(\d+)\.npz", n))]
    return sorted(found)


def save_step(folder: str, step: int, tree: Any, meta: dict[str, Any], keep: int = 2, milestone: int = 0) -> str:
    """Write step-N.npz, and then drop all but the last `keep` and the multiples of `milestone`."""
    path = os.path.join(folder, f"step-{step:08d}.npz")
    save(path, tree, meta | {"step": step})
    for number, old in steps(folder)[:-keep]:
        if not milestone or number % milestone:
            os.remove(old)
    return path


def latest(folder: str, fits: Callable[[str, dict, dict], None] = lambda *_: None) -> tuple[str, dict[str, np.ndarray], dict[str, Any]] | None:
    """The newest whole checkpoint of a run (path, arrays, meta), or None if it has none. A damaged one is passed over
    with a warning for the one before; CheckpointError if all are damaged. fits(path, shapes, meta) may refuse one before its arrays are read."""
    problem = None
    for _, path in reversed(steps(folder)):
        try:
            heads = read_header(path)
        except CheckpointError as found:
            problem = found
        else:
            fits(path, *heads)
            try:
                return path, *load(path)
            except CheckpointError as found:
                problem = found
        print(f"warning: {problem}; trying the checkpoint before it", flush=True)
    if problem:
        raise CheckpointError(f"every checkpoint in {folder} is damaged: delete them to start anew, or restore one")
    return None


def load_run_checkpoint(folder: str) -> tuple[Config, dict[str, np.ndarray], dict]:
    """A run's settings, and the arrays and meta of its last checkpoint, or of the one that is named. CheckpointError if there is none to be read."""
    if os.path.isdir(folder) and any(n.endswith((".safetensors", ".bin")) for n in os.listdir(folder)):
        raise CheckpointError(f"{folder} holds what was exported: python convert.py import {folder} --out encoder.npz, and name that")
    found = latest(folder) if not os.path.isfile(folder) else (folder, *load(folder))
    if found is None:
        raise CheckpointError(f"{folder} has no checkpoint: name the folder of a run that train.py has saved"
                                         if os.path.isdir(folder) else f"{folder} does not exist")
    path, arrays, meta = found
    try:
        _ = meta["step"]  # which an encoder alone has not
        return Config(**meta["config"]), arrays, meta
    except (TypeError, LookupError):
        raise CheckpointError(f"{path} holds an encoder alone: name the run's folder, or one of its checkpoints step-N.npz" if "encoder" in meta
                                         else f"{path} is no checkpoint of a run of this version") from None


def read_encoder(path: str) -> tuple[dict, vit.ViTConfig, dict]:
    """(parameters, config, meta) of an encoder's .npz, of a checkpoint, or of the last state of a run's folder. meta holds at least
    "resolution", in pixels. CheckpointError says what is wrong with the file."""
    under, origin = "", path
    if not os.path.exists(os.path.join(path, "encoder.npz")) if os.path.isdir(path) else "step" in read_header(path)[1]:
        settings, arrays, meta = load_run_checkpoint(path)
        cfg, under = model_spec(settings)[:2][0], "params/encoder"
        resolution = next(s.resolution for s in parse_stages(settings.stages) if meta["step"] <= s.end)
        meta = {"resolution": resolution, "config": meta["config"], "step": meta["step"]}
    else:
        origin = os.path.join(path, "encoder.npz") if os.path.isdir(path) else path
        arrays, meta = load(origin)
        try:
            cfg, _ = vit.ViTConfig(**meta["encoder"]), int(meta["resolution"])
        except (TypeError, LookupError, ValueError):
            raise CheckpointError(f"{origin} is no encoder: name a run's folder, its encoder.npz, or what convert.py imported") from None
    like = jax.eval_shape(lambda: vit.init(jax.random.key(0), cfg))
    return restore(arrays, like, origin, under), cfg, meta


def size_of_file(path: str) -> int:
    """How many parameters a file holds, from its head alone. What cannot be read counts as large: whoever opens it says what is wrong."""
    try:
        if path.endswith((".safetensors", ".bin")):
            return os.path.getsize(path) // 2  # at most, because a number takes 16 bits or more
        shapes, _ = read_header(path)
    except (CheckpointError, OSError):
        return SMALL_MODEL_PARAMS
    of_run = [shape for name, shape in shapes.items() if name.startswith("params/")]
    return sum(math.prod(x.shape) for x in of_run or shapes.values())


def model_size(path: str) -> int:
    """How many parameters the model at `path` has: a run's folder, a checkpoint, an encoder's .npz or an export. Nothing is loaded and
    jax need not have started, so that memory can be tuned by it (devices.hasten)."""
    if not os.path.isdir(path):
        return size_of_file(path)
    files = [file for _, file in steps(path)[-1:]]
    files += [os.path.join(path, n) for n in os.listdir(path) if n == "encoder.npz" or n.endswith((".safetensors", ".bin"))]
    return max(map(size_of_file, files), default=SMALL_MODEL_PARAMS)


if __name__ == "__main__":
    import sys
    if len(sys.argv) != 2:
        sys.exit("usage: python -m runtime.checkpoint FILE")
    try:
        arrays, meta = load(sys.argv[1])
    except CheckpointError as problem:
        sys.exit(f"error: {problem}")
    for name, array in arrays.items():
        print(f"{name:60s} {array.dtype!s:9s} {array.shape}")
    print({k: v for k, v in meta.items() if k != "vocabulary"}, f"\n{sum(a.size for a in arrays.values()) / 1e6:.2f} M numbers")

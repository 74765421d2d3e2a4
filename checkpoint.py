"""Save and continue: one .npz a checkpoint, readable with numpy alone, and never half of one.

A file holds arrays by path, such as "params/encoder/blocks/qkv/kernel", and "meta", a JSON text as bytes: step, stage,
config, vocabulary, what the data was. Nothing in it is pickled, so a file from a stranger cannot run code. Each array
carries the zip format's CRC-32, checked as it is read. bfloat16, which numpy does not know, is stored as its bits in
uint16 and named in meta. A save goes to a temporary name, is flushed to the disk and then renamed: a crash at any
moment leaves the former checkpoints whole.

    python checkpoint.py FILE        prints what a checkpoint holds
"""
import io
import json
import os
import re
import zipfile
import zlib
from typing import Any

import jax
import ml_dtypes
import numpy as np


class CheckpointError(Exception):
    """A checkpoint is missing, damaged, or not of this model; the message says which."""


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
    arrays["meta"] = np.frombuffer(json.dumps(meta | {"bits": bits}).encode(), np.uint8)
    write(path, lambda f: np.savez(f, **arrays))


def write(path: str, fill: Any) -> None:
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


def load(path: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(arrays by path, meta). CheckpointError if the file is missing or damaged."""
    try:
        with zipfile.ZipFile(path) as f:  # a member is read whole, for its CRC is checked at its end
            arrays = {name.removesuffix(".npy"): np.load(io.BytesIO(f.read(name)), allow_pickle=False) for name in f.namelist()}
        meta = json.loads(arrays.pop("meta").tobytes())
        for name, kind in meta.pop("bits").items():
            arrays[name] = arrays[name].view(getattr(ml_dtypes, kind))
        return arrays, meta
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (OSError, ValueError, LookupError, EOFError, TypeError, AttributeError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error) as problem:
        raise CheckpointError(f"{path} is damaged or no checkpoint ({problem})") from None


def restore(arrays: dict[str, np.ndarray], like: Any, origin: str = "the checkpoint", under: str = "") -> Any:
    """Arrays put in the structure of `like` (arrays or ShapeDtypeStructs), taken from below the path `under`.
    CheckpointError names the first arrays that are missing or of another shape."""
    prefix = under + "/" if under else ""
    wanted = flatten(like)
    wrong = [f"{name} is missing" if prefix + name not in arrays else
             f"{name} is {arrays[prefix + name].shape}, not {leaf.shape}"
             for name, leaf in wanted.items() if prefix + name not in arrays or arrays[prefix + name].shape != leaf.shape]
    if wrong:
        raise CheckpointError(f"{origin} does not fit this model: {'; '.join(wrong[:3])}"
                              + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""))
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[prefix + name] for name in wanted])


def steps(folder: str) -> list[tuple[int, str]]:
    """(step, path) of the checkpoints in a run's folder, oldest first."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    found = [(int(m[1]), os.path.join(folder, m[0])) for n in names if (m := re.fullmatch(r"step-(\d+)\.npz", n))]
    return sorted(found)


def save_step(folder: str, step: int, tree: Any, meta: dict[str, Any], keep: int = 2) -> str:
    """Write step-N.npz and then drop all but the last `keep`."""
    path = os.path.join(folder, f"step-{step:08d}.npz")
    save(path, tree, meta | {"step": step})
    for _, old in steps(folder)[:-keep]:
        os.remove(old)
    return path


def latest(folder: str) -> tuple[str, dict[str, np.ndarray], dict[str, Any]] | None:
    """The newest whole checkpoint of a run (path, arrays, meta), or None if it has none. A damaged one is passed over
    with a warning for the one before; CheckpointError if all are damaged."""
    problem = None
    for _, path in reversed(steps(folder)):
        try:
            return path, *load(path)
        except CheckpointError as found:
            problem = found
            print(f"warning: {found}; trying the checkpoint before it", flush=True)
    if problem:
        raise CheckpointError(f"every checkpoint in {folder} is damaged: delete them to start anew, or restore one")
    return None


if __name__ == "__main__":
    import sys
    if len(sys.argv) != 2:
        sys.exit("usage: python checkpoint.py FILE")
    try:
        arrays, meta = load(sys.argv[1])
    except CheckpointError as problem:
        sys.exit(f"error: {problem}")
    for name, array in arrays.items():
        print(f"{name:60s} {array.dtype!s:9s} {array.shape}")
    print({k: v for k, v in meta.items() if k != "vocabulary"}, f"\n{sum(a.size for a in arrays.values()) / 1e6:.2f} M numbers")

"""Torch libraries that build the same encoder, and what the tests need around them."""
import re
import sys

import numpy as np
import torch
from PIL import Image

try:
    import torchvision  # noqa: F401 - timm and open_clip want it
except RuntimeError:    # its wheel was built for another torch (CUDA's, beside a CPU's): its own operators are not there. None is
    for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:  # used here, but two names must be known
        del sys.modules[name]
    operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def photograph(path):
    """640x480 with shading, edges, texture and noise, as JPEG: what a camera's picture asks of a decoder and a resize."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:480, :640]
    light = np.stack([130 + 60 * np.sin(x / 97 + y / 53 + c) + 30 * np.cos(x / 7 - y * c / 31) for c in range(3)], axis=-1)
    for _ in range(12):
        cx, cy, r = rng.integers(0, 640), rng.integers(0, 480), rng.integers(10, 90)
        light[(x - cx) ** 2 + (y - cy) ** 2 < r * r] = rng.integers(0, 256, 3)
    Image.fromarray((light + rng.normal(0, 10, light.shape)).clip(0, 255).astype(np.uint8)).save(path, quality=92)
    return path


def card_code(folder):
    """The python of an exported model card."""
    return re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)[1]

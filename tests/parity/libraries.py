"""What the tests with timm, transformers and open_clip share."""
import re

import numpy as np
from PIL import Image


def photograph(path):
    """A 640x480 JPEG with shading, edges, texture and noise, as a camera's image has them."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:480, :640]
    shading = [130 + 60 * np.sin(x / 97 + y / 53 + c) + 30 * np.cos(x / 7 - y * c / 31)
               for c in range(3)]
    pixels = np.stack(shading, axis=-1)
    for _ in range(12):
        cx, cy, r = rng.integers(0, 640), rng.integers(0, 480), rng.integers(10, 90)
        pixels[(x - cx) ** 2 + (y - cy) ** 2 < r * r] = rng.integers(0, 256, 3)
    noisy = (pixels + rng.normal(0, 10, pixels.shape)).clip(0, 255).astype(np.uint8)
    Image.fromarray(noisy).save(path, quality=92)
    return path


def card_code(folder):
    """The Python code of an exported model card."""
    return re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)[1]

"""Setup of all parity tests."""
import sys

import jax
import pytest
import torch

# timm and open_clip import torchvision. A wheel of it that was built for another torch (CUDA's
# beside a CPU's) lacks its own operators. None is used here, but two names must exist.
try:
    import torchvision  # noqa: F401
except RuntimeError:
    for name in list(sys.modules):
        if name.partition(".")[0] == "torchvision":
            del sys.modules[name]
    operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


@pytest.fixture(autouse=True)
def full_precision():
    """fp32 matmuls stay fp32 on devices that would round them."""
    with jax.default_matmul_precision("highest"):
        yield

"""Parameters and FLOP counts for tests of the models."""
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import layers


def noisy_params(specs: dict, seed: int = 0) -> dict:
    """Initial parameters plus noise: none is 0 or 1, so each affects the result. NumPy draws them,
    because jax.random compiles a program per shape."""
    rng = np.random.default_rng(seed)

    def draw(spec: layers.ParamSpec) -> np.ndarray:
        noise = 0.1 * rng.standard_normal(spec.shape)
        initial = 1 if spec.std is None else spec.std * rng.standard_normal(spec.shape)
        return np.float32(initial + noise)
    return jax.device_put(jax.tree.map(draw, specs, is_leaf=layers.is_spec))


def matmul_flops(f: Callable, *args: Any) -> float:
    """2 per multiply-add over all matmuls of the traced f(*args): independent of our formulas."""
    return jaxpr_flops(jax.make_jaxpr(f)(*args).jaxpr)


def jaxpr_flops(jaxpr: Any) -> float:
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            inner = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * inner * math.prod(eqn.outvars[0].aval.shape)
        repeats = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(value):
                total += repeats * jaxpr_flops(getattr(value, "jaxpr", value))
    return total


def is_jaxpr(x: Any) -> bool:
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")

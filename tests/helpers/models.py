"""Parameters and FLOP counts for tests of the models."""
import math
from collections.abc import Callable
from typing import Any

import jax


def perturbed(params: dict, seed: int = 0) -> dict:
    """The parameters plus noise: none stays at its initial 0 or 1, so each affects the result."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noisy = [x + 0.1 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys)]
    return jax.tree.unflatten(tree, noisy)


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

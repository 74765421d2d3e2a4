"""TODO."""
import math

import jax


def shaken(params: dict, seed: int = 0) -> dict:
    """Parameters with no zero or one left, so that each of them matters."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(tree, [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)])


def matmul_flops(f, *args) -> float:
    """2 a multiply-add over every matmul in the traced program: an independent count."""
    def walk(jaxpr, times=1):
        total = 0
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                (contract, _), _ = eqn.params["dimension_numbers"]
                total += times * 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(eqn.invars[0].aval.shape[i] for i in contract)
            inner = times * eqn.params["length"] if eqn.primitive.name == "scan" else times
            for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
                if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                    total += walk(getattr(value, "jaxpr", value), inner)
        return total
    return walk(jax.make_jaxpr(f)(*args).jaxpr)

"""The optimizer's state in slices: ZeRO, stage 1 (arXiv:1910.02054), for use inside a pmapped step.

Every device holds all parameters, for it computes with them; but AdamW's two moments are only needed where an update is
computed, and each device can do that for a slice of its own. So gradients are summed to slices (a reduce-scatter), the
slice is updated, and the new slices are joined (an all-gather): together the traffic of the plain sum, and the optimizer's
bytes divided by the devices.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python zero.py        how the toy's arrays are cut over eight devices
"""
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


def axis(shape: Sequence[int], devices: int) -> int | None:
    """The first axis that the devices share evenly; None where there is none: such an array stays whole on each."""
    return next((i for i, n in enumerate(shape) if n and n % devices == 0), None)


def own(x: jax.Array) -> jax.Array:
    """This device's slice of an array that all have."""
    n = jax.lax.axis_size("devices")
    at = axis(x.shape, n)
    return x if at is None else jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index("devices") * (x.shape[at] // n), x.shape[at] // n, at)


def sum_slice(x: jax.Array) -> jax.Array:
    """This device's slice of the sum over all devices (a reduce-scatter: half the traffic of a sum that all receive). Several processes
    on CPUs sum the whole array and take their slice of it: gloo, which connects them, is reported to give wrong sums now and then
    when it scatters chunks of 4 MiB."""
    at = axis(x.shape, jax.lax.axis_size("devices"))
    if at is None:
        return jax.lax.psum(x, "devices")
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        return own(jax.lax.psum(x, "devices"))
    return jax.lax.psum_scatter(x, "devices", scatter_dimension=at, tiled=True)


def join(x: jax.Array, shape: Sequence[int]) -> jax.Array:
    """The whole array of this shape, from every device's slice."""
    at = axis(shape, jax.lax.axis_size("devices"))
    return x if at is None else jax.lax.all_gather(x, "devices", axis=at, tiled=True)


def norm(tree: Any, shapes: Any) -> jax.Array:
    """The global norm of arrays that lie in slices; `shapes` has the whole ones."""
    n = jax.lax.axis_size("devices")
    squares = jax.tree.map(lambda x, s: jnp.sum(x * x) / (n if axis(s.shape, n) is None else 1), tree, shapes)
    return jnp.sqrt(jax.lax.psum(sum(jax.tree.leaves(squares)), "devices"))


if __name__ == "__main__":
    import checkpoint
    import config
    from run import init
    cfg, n = config.PRESETS["toy"], jax.device_count()
    shapes = jax.eval_shape(lambda: init(cfg, config.model(cfg)))
    held = 0
    for name, leaf in checkpoint.flatten(shapes).items():
        at = axis(leaf.shape, n)
        held += leaf.size // (1 if at is None else n)
        print(f"{name:45s} {leaf.shape!s:18s} {'whole on each' if at is None else f'axis {at} cut in {n}'}")
    print(f"of {sum(x.size for x in jax.tree.leaves(shapes)):,} numbers a device keeps the moments of {held:,}")

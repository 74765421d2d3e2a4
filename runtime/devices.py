"""Data parallelism: how batches, parameters and optimizer states lie on devices.

The same code serves one CPU, several CPU devices, GPUs, and the chips of a TPU pod with one process
per host. How arrays are divided over devices is decided in this file alone.

    python -m runtime.devices        lists the devices; for eight CPU devices, set
                                     XLA_FLAGS=--xla_force_host_platform_device_count=8
"""
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from runtime.errors import DistributedError

STEP_KEYS = ("images", "text", "alt", "position")  # what a training step reads of a batch


# ------------------------------------------------------------------------------------ zero1
# The ZeRO-1 optimizer state (arXiv:1910.02054): each device keeps a slice of each array. These
# functions run inside pmap, whose axis is "devices".
def shard_axis(shape: Sequence[int], num_devices: int) -> int | None:
    """The first axis that the devices can share evenly, or None: such an array is replicated."""
    for axis, size in enumerate(shape):
        if size and size % num_devices == 0:
            return axis
    return None


def local_shard(x: jax.Array) -> jax.Array:
    """This device's slice of an array that all devices have."""
    n = jax.lax.axis_size("devices")
    axis = shard_axis(x.shape, n)
    if axis is None:
        return x
    size = x.shape[axis] // n
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index("devices") * size, size, axis)


def reduce_scatter(x: jax.Array) -> jax.Array:
    """This device's slice of the sum over all devices, with half the traffic of an all-reduce.
    Several CPU processes sum the full array instead: gloo, their transport, is reported to give
    wrong sums now and then when it scatters chunks of 4 MiB."""
    axis = shard_axis(x.shape, jax.lax.axis_size("devices"))
    if axis is None:
        return jax.lax.psum(x, "devices")
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        return local_shard(jax.lax.psum(x, "devices"))
    return jax.lax.psum_scatter(x, "devices", scatter_dimension=axis, tiled=True)


def all_gather(x: jax.Array, shape: Sequence[int]) -> jax.Array:
    """The full array, of this shape, from the slices of all devices."""
    axis = shard_axis(shape, jax.lax.axis_size("devices"))
    return x if axis is None else jax.lax.all_gather(x, "devices", axis=axis, tiled=True)


def global_norm(tree: Any, full: Any) -> jax.Array:
    """The global L2 norm of arrays that are sharded; `full` has the shapes of the full arrays."""
    n = jax.lax.axis_size("devices")

    def sum_of_squares(x: jax.Array, full: Any) -> jax.Array:
        copies = n if shard_axis(full.shape, n) is None else 1
        return jnp.sum(x * x) / copies
    squares = jax.tree.leaves(jax.tree.map(sum_of_squares, tree, full))
    return jnp.sqrt(jax.lax.psum(sum(squares), "devices"))


# -------------------------------------------------------------------------------- processes
class DataParallel:
    """A global batch is divided equally, first among processes, then among their devices."""

    def __init__(self, num_devices: int = 0):
        """num_devices: local devices to use, 0 for all. ValueError if there are fewer."""
        available = jax.local_device_count()
        if num_devices > available:
            raise ValueError(f"{num_devices} devices requested, but there are {available}")
        if num_devices and jax.process_count() > 1:
            raise ValueError("several processes use all of their devices: leave it out")
        self.local_devices = jax.local_devices()[:num_devices or None]
        self.num_processes = jax.process_count()
        self.pmap_devices = self.local_devices if self.num_processes == 1 else None  # None: all
        self.num_devices = len(self.local_devices) * self.num_processes
        self.is_main = jax.process_index() == 0  # this process writes the run's folder, shows bars
        mesh = jax.sharding.Mesh(np.array(self.local_devices), ("devices",))
        self.sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("devices"))
        self.reduce_status = self.pmap(
            lambda signal, bad: (jax.lax.pmax(signal, "devices"), jax.lax.psum(bad, "devices")))

    def pmap(self, function: Callable, **options: Any) -> Callable:
        return jax.pmap(function, "devices", devices=self.pmap_devices, **options)

    # ---- batches
    def local_rows(self, batch: int) -> range:
        """This process's rows of a global batch."""
        size = batch // self.num_processes
        return range(jax.process_index() * size, (jax.process_index() + 1) * size)

    def shard_batch(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """A process's rows to its devices: (B, ...) becomes (devices, B/devices, ...)."""
        n = len(self.local_devices)
        rows = {key: batch[key] for key in STEP_KEYS if key in batch}
        parts = {key: x.reshape(n, -1, *x.shape[1:]) for key, x in rows.items()}
        return jax.device_put(parts, self.sharding)

    # ---- parameters
    def replicate(self, tree: Any) -> Any:
        """The same arrays on every device, with a leading axis of local devices. It must have the
        name that the training step gives it, or the step would be compiled twice."""
        copy = self.pmap(lambda _, x: x, in_axes=(0, None))
        return copy(np.zeros(len(self.local_devices)), tree)

    def shard(self, tree: Any) -> Any:
        """Each array cut over all devices, one slice per device. One array at a time, because a
        device may not have the memory for all."""
        cut = self.pmap(lambda _, x: local_shard(x), in_axes=(0, None))
        return jax.tree.map(lambda x: cut(np.zeros(len(self.local_devices)), x), tree)

    @staticmethod
    def unreplicate(tree: Any) -> Any:
        """numpy arrays of what is the same on all devices."""
        return jax.tree.map(lambda x: np.asarray(x.addressable_shards[0].data)[0], tree)

    def gather(self, tree: Any, full: Any) -> Any:
        """numpy arrays of what may be sharded; `full` has the shapes of the full arrays."""
        gather = self.pmap(lambda x, shape: all_gather(x, shape), static_broadcasted_argnums=1)

        def to_numpy(x: jax.Array, full: Any) -> np.ndarray:
            is_full = x.shape[1:] == full.shape
            return self.unreplicate(x if is_full else gather(x, full.shape))
        return jax.tree.map(to_numpy, tree, full)

    # ---- communication
    def all_reduce_status(self, signal: int, bad: int) -> Any:
        """(the largest `signal`, the sum of `bad`) of all processes: device arrays, not yet waited
        for."""
        n = len(self.local_devices)
        signals = np.full(n, signal, np.int32)
        counts = np.array([bad] + [0] * (n - 1), np.int32)
        return self.reduce_status(*jax.device_put((signals, counts), self.sharding))

    def broadcast_from_main(self, make: Callable[[], Any]) -> Any:
        """What make() returns in process 0 (JSON values), in all processes. If it raises there, it
        raises in all."""
        if self.num_processes == 1:
            return make()
        error, text = None, b""
        if self.is_main:
            try:
                text = json.dumps([make()]).encode()
            except Exception as problem:
                error, text = problem, json.dumps(f"process 0: {problem}").encode()
        size = int(multihost_utils.broadcast_one_to_all(np.int64(len(text))))
        padded = np.frombuffer(text or bytes(size), np.uint8)
        message = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())
        if error:
            raise error
        if isinstance(message, str):
            raise DistributedError(message)
        return message[0]

    def broadcast_arrays(self, tree: Any) -> Any:
        """Process 0's numpy arrays in all processes; the others pass arrays of the same shapes."""
        if self.num_processes == 1:
            return tree
        return jax.tree.map(lambda x: np.asarray(multihost_utils.broadcast_one_to_all(x)), tree)

    def all_gather(self, x: np.ndarray) -> np.ndarray:
        """(processes, ...): every process's array, all of the same shape."""
        if self.num_processes == 1:
            return x[None]
        return np.asarray(multihost_utils.process_allgather(x))

    def gather_lines(self, lines: Sequence[str]) -> list[str]:
        """Every process's lines, in the order of the processes."""
        text = "\n".join(lines).encode(errors="replace")
        size = int(self.all_gather(np.array(len(text))).max())
        texts = self.all_gather(np.frombuffer(text.ljust(size), np.uint8))
        all_lines: list[str] = []
        for row in texts:
            all_lines += row.tobytes().decode().strip(" ").split("\n")
        return [line for line in all_lines if line]


if __name__ == "__main__":
    parallel = DataParallel()
    print(f"{parallel.num_devices} device(s) of {parallel.num_processes} process(es), here: "
          f"{', '.join(map(str, parallel.local_devices))}")

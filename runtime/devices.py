"""Where arrays lie: this process's devices, and all that share a batch. The same for one CPU, eight pretend devices, GPUs
or the chips of a TPU pod with a process a host; nothing else in the project asks what it runs on.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m runtime.devices        lists them: here eight pretend ones
"""
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from runtime.errors import DistributedError


class DataParallel:
    """Global batches are cut in rows: each process takes its share, and spreads it over its devices."""

    def __init__(self, count: int = 0):
        """count: local devices to use, 0 for all. ValueError if there are fewer."""
        if count > jax.local_device_count():
            raise ValueError(f"{count} devices asked for, and there are {jax.local_device_count()}")
        if count and jax.process_count() > 1:
            raise ValueError("several processes use all of their devices: leave it out")
        self.local_devices = jax.local_devices()[:count or None]
        self.num_processes = jax.process_count()
        self.pmap_devices = self.local_devices if self.num_processes == 1 else None       # what pmap is told; None means all, everywhere
        self.num_devices = len(self.local_devices) * self.num_processes
        self.is_main = jax.process_index() == 0                         # the process that reads and writes the run's folder and shows bars
        mesh = jax.sharding.Mesh(np.array(self.local_devices), ("devices",))
        self.sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("devices"))
        self.reduce_status = jax.pmap(lambda most, count: (jax.lax.pmax(most, "devices"), jax.lax.psum(count, "devices")), "devices", devices=self.pmap_devices)

    # ---------------------------------------------------------------------------------------------------------- batches
    def local_rows(self, batch: int) -> range:
        """This process's rows of a global batch."""
        mine = batch // self.num_processes
        return range(jax.process_index() * mine, (jax.process_index() + 1) * mine)

    def shard_batch(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """A process's rows to its devices: (B, ...) becomes (devices, B/devices, ...). Only what the step reads goes."""
        wanted = {k: batch[k].reshape(len(self.local_devices), -1, *batch[k].shape[1:]) for k in ("images", "text", "alt", "sample_index") if k in batch}
        return jax.device_put(wanted, self.sharding)

    # ------------------------------------------------------------------------------------------------------- parameters
    def replicate(self, tree: Any) -> Any:
        """The same arrays on every device, with a leading axis of local devices. The axis has the name that the training step gives it, or
        the step would be compiled twice: for these, and for what it returns itself."""
        return jax.pmap(lambda _, x: x, "devices", in_axes=(0, None), devices=self.pmap_devices)(np.zeros(len(self.local_devices)), tree)

    def shard(self, tree: Any) -> Any:
        """Each array cut over all devices, one slice a device (runtime/devices.py). One array at a time, for a device need not hold all."""
        cut = jax.pmap(lambda _, x: local_shard(x), "devices", in_axes=(0, None), devices=self.pmap_devices)
        return jax.tree.map(lambda x: cut(np.zeros(len(self.local_devices)), x), tree)

    @staticmethod
    def unreplicate(tree: Any) -> Any:
        """What the first local device holds, as numpy arrays: of things that are the same on all."""
        return jax.tree.map(lambda x: np.asarray(x.addressable_shards[0].data)[0], tree)

    def gather(self, tree: Any, like: Any) -> Any:
        """numpy arrays of what may lie in slices; `like` has the whole shapes."""
        gather = jax.pmap(lambda x, shape: all_gather(x, shape), "devices", static_broadcasted_argnums=1, devices=self.pmap_devices)
        return jax.tree.map(lambda x, l: self.unreplicate(x if x.shape[1:] == l.shape else gather(x, l.shape)), tree, like)

    # -------------------------------------------------------------------------------------------------------- processes
    def all_reduce_status(self, most: int, count: int) -> Any:
        """(the largest of the processes' first numbers, the sum of their second), as arrays on the devices: not waited for."""
        n = len(self.local_devices)
        mine = np.full(n, most, np.int32), np.array([count] + [0] * (n - 1), np.int32)
        return self.reduce_status(*jax.device_put(mine, self.sharding))

    def broadcast_from_main(self, make: Callable[[], Any]) -> Any:
        """What make() gives in the first process (JSON values), in all; an error there is an error in all."""
        if self.num_processes == 1:
            return make()
        problem, text = None, b""
        if self.is_main:
            try:
                text = json.dumps([make()]).encode()
            except Exception as found:
                problem, text = found, json.dumps(f"process 0: {found}").encode()
        size = int(multihost_utils.broadcast_one_to_all(np.int64(len(text))))
        padded = np.frombuffer(text or bytes(size), np.uint8)
        answer = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())
        if problem:
            raise problem
        if isinstance(answer, str):
            raise DistributedError(answer)
        return answer[0]

    def broadcast_arrays(self, tree: Any) -> Any:
        """The first process's numpy arrays in all; the others give arrays of the same shapes."""
        return tree if self.num_processes == 1 else jax.tree.map(lambda x: np.asarray(multihost_utils.broadcast_one_to_all(x)), tree)

    def all_gather(self, x: np.ndarray) -> np.ndarray:
        """(processes, ...) of an array that each has one of, of the same shape."""
        return x[None] if self.num_processes == 1 else np.asarray(multihost_utils.process_allgather(x))

    def gather_lines(self, mine: Sequence[str]) -> list[str]:
        """Every process's lines, in the order of the processes."""
        text = "\n".join(mine).encode()
        size = int(self.all_gather(np.array(len(text))).max())
        found = self.all_gather(np.frombuffer(text.ljust(size), np.uint8))
        return [line for row in found for line in row.tobytes().decode().strip(" ").split("\n") if line]


def shard_axis(shape: Sequence[int], devices: int) -> int | None:
    """The first axis that the devices share evenly; None where there is none: such an array stays whole on each."""
    return next((i for i, n in enumerate(shape) if n and n % devices == 0), None)


def local_shard(x: jax.Array) -> jax.Array:
    """This device's slice of an array that all have."""
    n = jax.lax.axis_size("devices")
    at = shard_axis(x.shape, n)
    return x if at is None else jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index("devices") * (x.shape[at] // n), x.shape[at] // n, at)


def reduce_scatter(x: jax.Array) -> jax.Array:
    """This device's slice of the sum over all devices (a reduce-scatter: half the traffic of a sum that all receive). Several processes
    on CPUs sum the whole array and take their slice of it: gloo, which connects them, is reported to give wrong sums now and then
    when it scatters chunks of 4 MiB."""
    at = shard_axis(x.shape, jax.lax.axis_size("devices"))
    if at is None:
        return jax.lax.psum(x, "devices")
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        return local_shard(jax.lax.psum(x, "devices"))
    return jax.lax.psum_scatter(x, "devices", scatter_dimension=at, tiled=True)


def all_gather(x: jax.Array, shape: Sequence[int]) -> jax.Array:
    """The whole array of this shape, from every device's slice."""
    at = shard_axis(shape, jax.lax.axis_size("devices"))
    return x if at is None else jax.lax.all_gather(x, "devices", axis=at, tiled=True)


def global_norm(tree: Any, shapes: Any) -> jax.Array:
    """The global norm of arrays that lie in slices; `shapes` has the whole ones."""
    n = jax.lax.axis_size("devices")
    squares = jax.tree.map(lambda x, s: jnp.sum(x * x) / (n if shard_axis(s.shape, n) is None else 1), tree, shapes)
    return jnp.sqrt(jax.lax.psum(sum(jax.tree.leaves(squares)), "devices"))


if __name__ == "__main__":
    parallel = DataParallel()
    print(f"{parallel.num_devices} device(s) of {parallel.num_processes} process(es), here: {', '.join(map(str, parallel.local_devices))}")

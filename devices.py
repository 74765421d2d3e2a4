"""Where a batch goes: this process's devices, and all that share it. The same for one CPU, eight pretend devices,
GPUs or the chips of a TPU machine; nothing else in the project asks what it runs on.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python devices.py        lists them: here eight pretend ones
"""
from typing import Any

import jax
import numpy as np


class Place:
    """Global batches are cut in rows: each process takes its share, and spreads it over its devices."""

    def __init__(self, count: int = 0):
        """count: local devices to use, 0 for all. ValueError if there are fewer."""
        if count > jax.local_device_count():
            raise ValueError(f"{count} devices asked for, and there are {jax.local_device_count()}")
        self.local = jax.local_devices()[:count or None]
        self.pmap = self.local if jax.process_count() == 1 else None  # what pmap is told; None means all, everywhere
        self.total = len(self.local) * jax.process_count()
        self.first = jax.process_index() == 0                         # the process that writes files and shows bars
        mesh = jax.sharding.Mesh(np.array(self.local), ("devices",))
        self.rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("devices"))

    def share(self, batch: int) -> range:
        """This process's rows of a global batch."""
        mine = batch // jax.process_count()
        return range(jax.process_index() * mine, (jax.process_index() + 1) * mine)

    def put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """A process's rows to its devices: (B, ...) becomes (devices, B/devices, ...). Only what the step reads goes."""
        wanted = {k: batch[k].reshape(len(self.local), -1, *batch[k].shape[1:]) for k in ("images", "text", "row")}
        return jax.device_put(wanted, self.rows)

    def copies(self, tree: Any) -> Any:
        """The same arrays on every device, with a leading axis of local devices."""
        return jax.pmap(lambda _, x: x, in_axes=(0, None), devices=self.pmap)(np.zeros(len(self.local)), tree)

    @staticmethod
    def get(tree: Any) -> Any:
        """What the first local device holds, as numpy arrays: of things that are the same on all."""
        return jax.tree.map(lambda x: np.asarray(x.addressable_shards[0].data)[0], tree)


if __name__ == "__main__":
    place = Place()
    print(f"{place.total} device(s) of {jax.process_count()} process(es), here: {', '.join(map(str, place.local))}")

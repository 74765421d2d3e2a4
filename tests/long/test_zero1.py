"""--zero1: the optimizer state divided over eight devices makes the same updates."""
import subprocess
import sys

import numpy as np

from tests.helpers.compiling import several_devices
from tests.helpers.paths import ROOT

NUM_STEPS = 50
ZERO1 = """
import dataclasses, sys
import jax, numpy as np
import config, data, train
from inputs import images, tokenizer
from inputs.sources import SceneSource
from objectives import registry
from runtime import checkpoint, curriculum, devices
num_steps = int(sys.argv[2])
cfg = dataclasses.replace(config.RECIPES["toy"], encoder="micro/8", scan_unroll=1)
source = SceneSource(0, "train")
tok = tokenizer.train_vocab([source.caption(i) for i in range(500)], 192)
reader = data.Loader(source, tok, 28, 0, images.Augment(1.0), 2)
model = registry.model_spec(cfg)
initial, parallel = registry.init_params(cfg, model), devices.DataParallel(8)
optimizer = train.make_optimizer(cfg, curriculum.parse_stages(cfg.stages)[0])
full, out = jax.eval_shape(optimizer.init, initial), {}
for zero1 in (False, True):
    def init(params):
        return optimizer.init(jax.tree.map(devices.local_shard, params) if zero1 else params)
    params = parallel.replicate(initial)
    state = parallel.pmap(init)(params)
    step = train.make_step(model, optimizer, 0, 1, parallel.pmap_devices, zero1, 1.0)
    for s in range(num_steps):
        batch = parallel.shard_batch(reader.batch(range(16 * s, 16 * s + 16), 16))
        params, state, metrics = step(params, state, batch)
        out[f"{zero1} loss {s}"] = parallel.unreplicate(metrics["loss"])
        out[f"{zero1} norm {s}"] = parallel.unreplicate(metrics["grad_norm"])
    leaves = jax.tree.leaves(state)
    out[f"{zero1} bytes"] = sum(x.addressable_shards[3].data.nbytes for x in leaves)
    gathered = parallel.gather(state, full)
    trees = {"params": parallel.unreplicate(params), "state": gathered}
    out |= {f"{zero1} {name}": x for name, x in checkpoint.flatten(trees).items()}
    again = parallel.gather(parallel.shard(gathered), full)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), again, gathered))
np.savez(sys.argv[1], **out)
"""


def without_keys(qkv_bias: np.ndarray) -> np.ndarray:
    """Query and value biases (L, 2, D). Softmax does not depend on a key's bias: its gradient is
    rounding, which AdamW scales up."""
    return qkv_bias.reshape(len(qkv_bias), 3, -1)[:, [0, 2]]


def test_zero1_makes_the_same_updates_in_50_steps(cache, tmp_path):
    """8 CPU devices, AdamW steps with clipping: losses and norms to 1e-6 relative, and 1/8 of the
    state per device."""
    path = str(tmp_path / "out.npz")
    env = several_devices(8, cache) | {"PYTHONPATH": ROOT}
    command = [sys.executable, "-c", ZERO1, path, str(NUM_STEPS)]
    subprocess.run(command, cwd=ROOT, env=env, check=True)
    out = np.load(path)
    for s in range(NUM_STEPS):
        assert abs(out[f"True loss {s}"] / out[f"False loss {s}"] - 1) < 1e-6
        assert abs(out[f"True norm {s}"] / out[f"False norm {s}"] - 1) < 1e-5
    names = [name.removeprefix("True ") for name in out.files if name.startswith("True ")]
    counts = [name for name in names if name.startswith("state/") and name.endswith("count")]
    replicated = sum(out[f"True {name}"].nbytes for name in counts)
    assert (out["True bytes"] - replicated) * 8 == out["False bytes"] - replicated

    def relative_error(name: str) -> float:
        a, b = (out[f"{kind} {name}"].astype(np.float64) for kind in ("True", "False"))
        if name.startswith("params/") and name.endswith("qkv/bias"):
            a, b = without_keys(a), without_keys(b)
        return np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)
    params = [name for name in names if name.startswith("params/")]
    assert len(params) > 20
    for name in params:
        assert relative_error(name) < 1e-6, name
    assert max(relative_error(name) for name in names if name.startswith("state/")) < 1e-5

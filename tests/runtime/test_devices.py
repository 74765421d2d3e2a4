"""What a process sets before JAX starts: memory and CPU devices."""
import dataclasses
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

import config
import evaluate
import layers
import vit
from objectives import registry
from runtime import checkpoint, cpu_tuning
from tests.helpers.compiling import several_devices
from tests.helpers.paths import ROOT, python

# ----------------------------------------------------------------------------------- memory
PAGE_FAULTS = """
import resource, sys, numpy as np
from runtime import cpu_tuning
def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(100_000_000, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for accelerator in sys.argv[1:]:
    cpu_tuning.glob.glob = lambda pattern: [accelerator] * pattern.startswith(accelerator)
    cpu_tuning.keep_freed_memory()
    page_faults()
    print(page_faults())
"""


def test_freed_memory_stays_with_the_process():
    """The same 100 MB again, after they were freed: no pages are mapped."""
    assert int(python(PAGE_FAULTS, "/dev/none")) < 100


THREADS = """
import resource, threading, numpy as np
from runtime import cpu_tuning
cpu_tuning.glob.glob = lambda pattern: []
cpu_tuning.keep_freed_memory(True)
def allocate():
    kept = np.ones(30_000_000, np.uint8)  # so that the others get a 64 MB heap of their own
    for _ in range(3):
        np.ones(50_000_000, np.uint8)
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    for _ in range(20):
        np.ones(50_000_000, np.uint8)
    print(resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before)
threads = [threading.Thread(target=allocate) for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


def test_each_thread_keeps_blocks_below_64_mb_in_an_arena_of_its_own():
    assert max(map(int, python(THREADS).split())) < 100  # one such block has 12,000 pages


def test_only_small_steps_have_an_arena_per_thread(monkeypatch):
    """Those of the toy, not those of larger models or batches; nor on one device."""
    calls = []
    monkeypatch.setattr(cpu_tuning, "keep_freed_memory", calls.append)
    monkeypatch.setattr(cpu_tuning, "split_cpu_devices", lambda batches: None)
    monkeypatch.setenv("XLA_FLAGS", "")
    for recipe in ("toy", "images", "ti16"):
        cpu_tuning.tune_cpu(1000, [32], step_flops=registry.step_flops(config.RECIPES[recipe]))
    cpu_tuning.tune_cpu(1000, [32])
    monkeypatch.setenv("XLA_FLAGS", f"--{cpu_tuning.DEVICE_FLAG}=1")
    cpu_tuning.tune_cpu(1000, [32], step_flops=1)
    assert calls == [True, False, False, False, False]


def test_freed_memory_is_returned_beside_an_accelerator():
    paths = ["/dev/nvidia", "/dev/accel", "/dev/vfio/", "/dev/kfd"]
    counts = [int(line) for line in python(PAGE_FAULTS, *paths).splitlines()]
    assert len(counts) == 4 and min(counts) > 40


FRAGMENTS = """
import ctypes, jax, jax.numpy as jnp
from runtime import cpu_tuning
cpu_tuning.glob.glob = lambda pattern: []
cpu_tuning.LONG_COMPILATION = 0
cpu_tuning.keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
large = libc.malloc(300 << 20)
blocks = [libc.malloc(50_000) for n in range(4000)]
fragments = set(blocks[::2])  # no two are neighbors
for block in [large, *fragments]:
    libc.free(block)
before = [libc.malloc(40_000) for _ in range(100)]
for block in before:
    libc.free(block)
jax.jit(lambda x: x + 1)(jnp.ones(3))
part = libc.malloc(100 << 20)
after = [libc.malloc(40_000) for _ in range(100)]
print(not fragments.isdisjoint(before), fragments.isdisjoint(after), 0 <= part - large < 300 << 20)
"""


def test_after_a_compilation_fragments_are_hidden_and_large_blocks_are_not():
    assert python(FRAGMENTS).split() == ["True"] * 3


def test_without_glibc_nothing_is_called(monkeypatch):
    monkeypatch.setattr(cpu_tuning.ctypes, "CDLL", lambda name: object())
    cpu_tuning.keep_freed_memory()


def test_large_models_spend_no_memory(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    calls = []
    monkeypatch.setattr(cpu_tuning, "keep_freed_memory", lambda *arenas: calls.append("keep"))
    monkeypatch.setattr(cpu_tuning, "split_cpu_devices", calls.append)
    cpu_tuning.tune_cpu(cpu_tuning.SMALL_MODEL_PARAMS, [64])
    assert not calls
    cpu_tuning.tune_cpu(1000)
    cpu_tuning.tune_cpu(1000, [64])
    assert calls == ["keep", "keep", [64]]


@pytest.fixture
def run_files(tmp_path) -> tuple:
    """(a run's folder with a checkpoint and its encoder, the run's number of parameters, the
    encoder's); all parameters are zero."""
    cfg = config.RECIPES["toy"]
    model = registry.model_spec(cfg)
    shapes = jax.eval_shape(lambda: registry.init_params(cfg, model))
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    tree = {"params": params, "opt": {"mu": params}}
    checkpoint.save_step(str(tmp_path), 2, tree, {"config": dataclasses.asdict(cfg)})
    meta = {"encoder": dataclasses.asdict(model.encoder), "resolution": 16}
    checkpoint.save(str(tmp_path / "encoder.npz"), params["encoder"], meta)
    num_params = sum(registry.param_counts(cfg).values())
    return tmp_path, num_params, layers.count_params(vit.param_specs(model.encoder))


def test_model_size_is_read_from_headers(run_files, monkeypatch):
    folder, num_params, encoder_params = run_files
    (folder / "exported").mkdir()
    (folder / "exported" / "model.safetensors").write_bytes(bytes(1000))
    (folder / "damaged.npz").write_bytes(b"no zip")
    monkeypatch.setattr(checkpoint, "load", None)
    assert checkpoint.model_size(str(folder)) == num_params > encoder_params
    assert checkpoint.model_size(checkpoint.steps(str(folder))[0][1]) == num_params
    assert checkpoint.model_size(str(folder / "encoder.npz")) == encoder_params
    assert checkpoint.model_size(str(folder / "exported")) == 500  # of 16 bits each, at most
    for name in ("damaged.npz", "missing"):
        assert checkpoint.model_size(str(folder / name)) == cpu_tuning.SMALL_MODEL_PARAMS


def test_evaluation_keeps_memory_only_for_small_models(run_files, monkeypatch):
    folder, num_params, _ = run_files

    monkeypatch.setenv("XLA_FLAGS", "")
    measure = evaluate.Measure(lambda context: {"val_loss": 1.0}, "")
    monkeypatch.setattr(evaluate, "MEASURES", {"caption": measure})
    calls = []
    monkeypatch.setattr(cpu_tuning, "keep_freed_memory", lambda *arenas: calls.append("keep"))
    monkeypatch.setattr(cpu_tuning, "SMALL_MODEL_PARAMS", num_params)
    assert evaluate.main([str(folder)]) == 0 and not calls
    monkeypatch.setattr(cpu_tuning, "SMALL_MODEL_PARAMS", num_params + 1)
    assert evaluate.main([str(folder)]) == 0 and calls == ["keep"]


# ------------------------------------------------------------------------------ CPU devices
DEVICES = """
import sys
from runtime.cpu_tuning import tune_cpu
num_params, *batches = map(int, sys.argv[1:])
tune_cpu(num_params, batches)
import jax
print(jax.local_device_count())
"""
TRAIN = """
import sys
import train
class Stop(train.DataParallel):
    def __init__(self, num_devices=0):
        super().__init__(num_devices)
        print(self.num_devices)
        raise SystemExit(0)
train.DataParallel = Stop
sys.exit(train.main(sys.argv[1:]))
"""


def test_a_cpu_of_several_cores_is_two_devices_for_a_small_model():
    def num_devices(*argv: int, **env: str) -> int:
        return int(python(DEVICES, *argv, env=env))
    assert num_devices(1000, 64, 32) == min(2, os.cpu_count())
    assert num_devices(1000, 64, 25) == 1
    assert num_devices(cpu_tuning.SMALL_MODEL_PARAMS, 64, 32) == 1
    assert num_devices(1000, 64, XLA_FLAGS="--xla_force_host_platform_device_count=8") == 8
    assert num_devices(1000, 64, JAX_NUM_CPU_DEVICES="3") == 3


@pytest.mark.parametrize("encoder", ["micro/8", "L/14"])
def test_num_devices_splits_the_cpu(encoder):
    """Up to its cores, whatever the model's size."""
    cores = cpu_tuning.num_cores()
    flags = ("--encoder", encoder, "--num-devices")
    assert python(TRAIN, *flags, cores) == f"{cores}\n"
    assert python(TRAIN, *flags, 1) == "1\n"
    ended = subprocess.run([sys.executable, "-c", TRAIN, *flags, str(cores + 1)], cwd=ROOT,
                           capture_output=True, text=True)
    message = f"{cores + 1} devices requested, but there are {cores}"
    assert ended.returncode == 1 and message in ended.stderr


def test_num_devices_uses_some_of_the_devices():
    assert python(TRAIN, "--num-devices", 3, env=several_devices(8)) == "3\n"


def test_devices_stay_once_jax_has_started():
    jax.local_devices()
    before = jax.local_device_count()
    cpu_tuning.split_cpu_devices([64])
    assert jax.local_device_count() == before

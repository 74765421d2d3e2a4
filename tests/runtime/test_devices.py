"""What a process asks of the machine before jax starts: memory that stays with it."""
import dataclasses
import os
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

import config
import evaluate
import layers
import vit
from evaluation import vqa
from objectives import registry
from runtime import checkpoint, cpu_tuning, devices, distributed
from runtime.errors import DistributedError
from tests.helpers.paths import ROOT

AGAIN = """
import resource, sys, numpy as np, devices
devices.glob.glob = lambda pattern: [path for path in sys.argv[1:] if pattern.startswith(path)]
devices.keep_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(100_000_000, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def faults(*accelerators: str, prefix: tuple = ()) -> int:
    """Pages that a process maps anew for 100 MB which it had before, and freed."""
    done = subprocess.run([*prefix, sys.executable, "-c", AGAIN, *accelerators], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_memory_stays_with_the_process():
    assert faults() < 100


@pytest.mark.parametrize("path", ["/dev/nvidia", "/dev/accel", "/dev/vfio/", "/dev/kfd"])
def test_beside_an_accelerator_the_system_manages_memory(path):
    assert faults(path) > 40


def test_without_mallopt_nothing_is_asked(monkeypatch):
    monkeypatch.setattr(devices.ctypes, "CDLL", lambda name: object())
    cpu_tuning.keep_freed_memory()


PAIR = "import sys, devices; devices.hasten(int(sys.argv[1]), [int(b) for b in sys.argv[2:]]); import jax; print(jax.local_device_count())"
TRAIN = """
import train
class Place(train.Place):
    def __init__(self, count=0):
        super().__init__(count)
        print(self.total)
        raise SystemExit(0)
train.Place = Place
import sys
sys.exit(train.main(sys.argv[1:]))
"""


def found(*argv: int, **env: str) -> int:
    """Devices of a process that asked for a pair: parameters, then batches."""
    done = subprocess.run([sys.executable, "-c", PAIR, *map(str, argv)], cwd=ROOT, capture_output=True, text=True, env=os.environ | env)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_a_cpu_of_several_cores_is_two_devices_where_that_can_be():
    assert found(1000, 64, 32) == min(2, os.cpu_count())
    assert found(1000, 64, 25) == found(cpu_tuning.SMALL_MODEL_PARAMS, 64, 32) == 1
    assert found(1000, 64, XLA_FLAGS="--xla_force_host_platform_device_count=8") == 8
    assert found(1000, 64, JAX_NUM_CPU_DEVICES="3") == 3


def started(*flags: str, **env: str) -> subprocess.CompletedProcess:
    """A process that trains with these flags, up to the point where it has its devices; it prints how many."""
    return subprocess.run([sys.executable, "-c", TRAIN, *flags], cwd=ROOT, capture_output=True, text=True, env=os.environ | env)


@pytest.mark.parametrize("encoder", ["micro/8", "L/14"])
def test_a_cpu_is_as_many_devices_as_are_asked_for(encoder):
    """Up to its cores, whatever the model's size."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = started("--encoder", encoder, "--num-devices", str(cores))
    assert (found.returncode, found.stdout) == (0, f"{cores}\n"), found.stderr
    assert started("--encoder", encoder, "--num-devices", "1").stdout == "1\n"
    found = started("--encoder", encoder, "--num-devices", str(cores + 1))
    assert found.returncode == 1 and f"{cores + 1} devices asked for, and there are {cores}" in found.stderr
    found = started("--num-devices", "3", XLA_FLAGS="--xla_force_host_platform_device_count=8")
    assert found.stdout == "3\n", found.stderr


def test_once_jax_has_started_its_devices_stay():
    jax.local_devices()
    before = jax.local_device_count()
    cpu_tuning.split_cpu_devices([64])
    assert jax.local_device_count() == before


def test_large_models_spend_no_memory(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    called = []
    monkeypatch.setattr(cpu_tuning, "keep_freed_memory", lambda: called.append("kept"))
    monkeypatch.setattr(cpu_tuning, "split_cpu_devices", lambda batches: called.append(batches))
    cpu_tuning.tune_cpu(cpu_tuning.SMALL_MODEL_PARAMS, [64])
    assert not called
    cpu_tuning.tune_cpu(1000)
    cpu_tuning.tune_cpu(1000, [64])
    assert called == ["kept", "kept", [64]]


@pytest.fixture
def trained(tmp_path) -> tuple:
    """(a run's folder with a checkpoint and its encoder, parameters of the run, of its encoder); all parameters are zero."""
    cfg = config.RECIPES["toy"]
    shapes = jax.eval_shape(lambda: registry.init_params(cfg, registry.model_spec(cfg)))
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    checkpoint.save_step(str(tmp_path), 2, {"params": params, "opt": {"mu": params}}, {"config": dataclasses.asdict(cfg)})
    encoder = registry.model_spec(cfg).encoder
    checkpoint.save(str(tmp_path / "encoder.npz"), params["encoder"], {"encoder": dataclasses.asdict(encoder), "resolution": 16})
    return tmp_path, sum(registry.param_counts(cfg).values()), layers.count_params(vit.param_specs(encoder))


def test_a_models_size_is_read_from_heads_of_files(trained, monkeypatch):
    folder, whole, encoder = trained
    (folder / "exported").mkdir()
    (folder / "exported" / "model.safetensors").write_bytes(bytes(1000))
    (folder / "damaged.npz").write_bytes(b"no zip")
    monkeypatch.setattr(checkpoint, "load", None)
    assert checkpoint.model_size(str(folder)) == whole > encoder
    assert checkpoint.model_size(checkpoint.steps(str(folder))[0][1]) == whole
    assert checkpoint.model_size(str(folder / "encoder.npz")) == encoder
    assert checkpoint.model_size(str(folder / "exported")) == 500  # of 16 bits each, at most
    assert checkpoint.model_size(str(folder / "damaged.npz")) == checkpoint.model_size(str(folder / "missing")) == cpu_tuning.SMALL_MODEL_PARAMS


@pytest.mark.parametrize("command", [evaluate.main, vqa.main])
def test_evaluation_spends_memory_on_small_models_alone(trained, command, monkeypatch, capsys):
    folder, whole, _ = trained
    def end(*_) -> None:
        raise ValueError("the measurement itself")
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(vqa, "table", end)
    monkeypatch.setattr(evaluate, "MEASURES", {"caption": (end, "")})
    monkeypatch.setattr(vqa, "load_encoder", lambda path: None)
    called = []
    monkeypatch.setattr(cpu_tuning, "keep_freed_memory", lambda: called.append("kept"))
    monkeypatch.setattr(cpu_tuning, "SMALL_MODEL_PARAMS", whole)
    assert command([str(folder)]) == 1 and not called
    monkeypatch.setattr(cpu_tuning, "SMALL_MODEL_PARAMS", whole + 1)
    assert command([str(folder)]) == 1 and called == ["kept"]
    assert capsys.readouterr().err.count("the measurement itself") == 2


FILTERED = """
import os, sys, devices
devices.plainly(sys.argv[1])
os.write(2, b"I0000 an early line\\n")
print("from python", file=sys.stderr)
os.write(2, b"F0000 Terminating process: the service detected fatal errors\\n")
for n in range(3000):
    os.write(2, b"a later diagnosis, not UTF-8: \\xff %d\\n" % n)
os._exit(3)
"""


@pytest.mark.parametrize("there", [True, False])
def test_what_is_said_after_a_lost_process_goes_to_a_file(tmp_path, there):
    """In the run's folder, or in a temporary one where the run has none here; the terminal gets one sentence that names it."""
    folder = tmp_path / "run"
    if there:
        folder.mkdir()
    env = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": ROOT}
    done = subprocess.run([sys.executable, "-c", FILTERED, str(folder)], cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.returncode == 3
    lines = done.stderr.splitlines()
    assert "I0000 an early line" in lines and "from python" in lines and len(lines) == 3, done.stderr
    [sentence] = [line for line in lines if line.startswith("error: ")]
    assert distributed.PEER_LOST in sentence
    file = sentence.rpartition(" ")[2]
    assert os.path.dirname(file) == str(folder if there else tmp_path)
    logged = open(file, "rb").read().splitlines()
    assert logged[0] == b"I0000 an early line" and logged[1].endswith(b"fatal errors")
    assert logged[2:] == [b"a later diagnosis, not UTF-8: \xff %d" % n for n in range(3000)]


PLATFORMS = """
import devices
devices.glob.glob = lambda pattern: ["/dev/accel0"] * pattern.startswith("/dev/accel")
devices.importlib.util.find_spec = lambda name: object()
devices.plainly = lambda folder="": None
devices.single_host = lambda: False
devices.jax.distributed.initialize = lambda **how: print("initialized")
devices.join(False)
"""


@pytest.mark.parametrize(("platforms", "starts"), [("tpu", True), ("tpu,cpu", True), ("", True), ("cpu", False), ("cuda,cpu", False)])
def test_which_platforms_let_tpu_hosts_meet(platforms, starts):
    env = os.environ | {"JAX_PLATFORMS": platforms, "PYTHONPATH": ROOT}
    done = subprocess.run([sys.executable, "-c", PLATFORMS], cwd=ROOT, capture_output=True, text=True, env=env)
    assert (done.returncode, done.stdout) == (0, "initialized\n" if starts else ""), done.stderr


def test_without_chips_that_jax_sees_nothing_is_started():
    """Files that look like chips can be of other devices: then jax, which nobody told the platforms, names none itself."""
    env = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"} | {"PYTHONPATH": ROOT}
    done = subprocess.run([sys.executable, "-c", PLATFORMS], cwd=ROOT, capture_output=True, text=True, env=env)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.fixture
def tpu(monkeypatch) -> list:
    """A TPU host, as jax and its environment show one; what jax is asked to start, which fails as it does on a pod."""
    asked = []

    def initialize(**how) -> None:
        asked.append(how)
        raise RuntimeError("DEADLINE_EXCEEDED: Barrier timed out\nand more")
    for name in list(os.environ):
        if name.startswith(("TPU_", "JAX_NUM", "JAX_COORD", "JAX_PROCESS", "MEGASCALE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    monkeypatch.setattr(devices.glob, "glob", lambda pattern: ["/dev/accel0"] * pattern.startswith("/dev/accel"))
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(distributed, "filter_stderr", lambda folder="": None)
    fake = types.SimpleNamespace(config=types.SimpleNamespace(jax_platforms="tpu,cpu"), distributed=types.SimpleNamespace(initialize=initialize))
    monkeypatch.setattr(devices, "jax", fake)
    return asked


@pytest.mark.parametrize("env", [
    {}, {"TPU_WORKER_HOSTNAMES": "t0,t1"}, {"TPU_PROCESS_ADDRESSES": "t0:8476,t1:8476", "TPU_WORKER_HOSTNAMES": "t0"},
    {"TPU_WORKER_HOSTNAMES": ""}, {"TPU_PROCESS_BOUNDS": "2,2,1"}, {"TPU_WORKER_HOSTNAMES": "t0,t1", "TPU_PROCESS_BOUNDS": "1,1,1"},
    {"TPU_WORKER_HOSTNAMES": "t0", "MEGASCALE_NUM_SLICES": "2"}, {"TPU_WORKER_HOSTNAMES": "t0", "MEGASCALE_COORDINATOR_ADDRESS": "t9"},
    {"TPU_WORKER_HOSTNAMES": "t0", "JAX_NUM_PROCESSES": "2"}, {"TPU_WORKER_HOSTNAMES": "t0", "JAX_COORDINATOR_ADDRESS": "t9:1"}])
def test_tpu_hosts_that_do_not_meet_end(tpu, env, monkeypatch):
    """Each alone, they would all train into one folder."""
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DistributedError, match=r"DEADLINE_EXCEEDED: Barrier timed out\).*JAX_NUM_PROCESSES=1") as found:
        distributed.initialize_distributed(False)
    assert "\n" not in str(found.value) and len(tpu) == 1


@pytest.mark.parametrize("env", [
    {"JAX_NUM_PROCESSES": "1"}, {"TPU_WORKER_HOSTNAMES": "localhost"}, {"TPU_PROCESS_ADDRESSES": "local"}, {"TPU_PROCESS_BOUNDS": "1,1,1"},
    {"TPU_HOST_BOUNDS": "1,1,1"}, {"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "1"}])
def test_a_single_tpu_host_starts_by_itself(tpu, env, monkeypatch):
    """Nothing is waited for, where the environment proves that nobody else can come; unless it is asked for."""
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    distributed.initialize_distributed(False)
    assert not tpu
    with pytest.raises(DistributedError, match="--distributed"):
        distributed.initialize_distributed(True)
    assert len(tpu) == 1


def test_a_tpu_host_without_what_jax_needs_to_find_others(tpu, monkeypatch):
    def initialize(**how) -> None:
        raise ModuleNotFoundError("No module named 'requests'")
    monkeypatch.setattr(devices.jax.distributed, "initialize", initialize)
    with pytest.raises(DistributedError, match="No module named 'requests'"):
        distributed.initialize_distributed(False)

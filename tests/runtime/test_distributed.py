"""What one process does about others: TPU hosts that connect, and a lost process.
tests/runtime/test_hosts.py has several processes."""
import os
import subprocess
import sys
import types

import numpy as np
import pytest

import config
from runtime import distributed
from runtime.devices import DataParallel
from runtime.errors import ConfigError, DistributedError
from runtime.run_folder import Run
from tests.helpers.paths import ROOT, python
from tests.helpers.runs import SMALL_RUN

# --------------------------------------------------------------------------- a lost process
FILTERED = """
import os, sys
from runtime import distributed
distributed.filter_stderr(sys.argv[1])
os.write(2, b"I0000 an early line\\n")
print("from python", file=sys.stderr)
os.write(2, b"F0000 Terminating process: the service detected fatal errors\\n")
for n in range(3000):
    os.write(2, b"a later diagnosis, not UTF-8: \\xff %d\\n" % n)
os._exit(3)
"""


@pytest.mark.parametrize("has_folder", [True, False])
def test_the_report_of_a_lost_process_goes_to_a_file(tmp_path, has_folder):
    """In the run's folder, or a temporary file if this host has none. The terminal gets one
    sentence that names the file."""
    folder = tmp_path / "run"
    if has_folder:
        folder.mkdir()
    env = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": ROOT}
    ended = subprocess.run([sys.executable, "-c", FILTERED, str(folder)], cwd=tmp_path, env=env,
                           capture_output=True, text=True)
    assert ended.returncode == 3
    lines = ended.stderr.splitlines()
    assert len(lines) == 3, ended.stderr
    assert "I0000 an early line" in lines and "from python" in lines
    [sentence] = [line for line in lines if line.startswith("error: ")]
    assert distributed.PEER_LOST in sentence
    path = sentence.rpartition(" ")[2]
    assert os.path.dirname(path) == str(folder if has_folder else tmp_path)
    logged = open(path, "rb").read().splitlines()
    assert logged[0] == b"I0000 an early line" and logged[1].endswith(b"fatal errors")
    assert logged[2:] == [b"a later diagnosis, not UTF-8: \xff %d" % n for n in range(3000)]


# -------------------------------------------------------------------------------- TPU hosts
PLATFORMS = """
from runtime import distributed
distributed.glob.glob = lambda pattern: ["/dev/accel0"] * pattern.startswith("/dev/accel")
distributed.importlib.util.find_spec = lambda name: object()
distributed.filter_stderr = lambda folder="": None
distributed.is_single_host = lambda: False
distributed.jax.distributed.initialize = lambda **options: print("initialized")
distributed.initialize_distributed(False)
"""


@pytest.mark.parametrize(("platforms", "connects"), [
    ("tpu", True), ("tpu,cpu", True), ("", True), ("cpu", False), ("cuda,cpu", False)])
def test_platforms_that_let_tpu_hosts_connect(platforms, connects):
    env = {"JAX_PLATFORMS": platforms, "PYTHONPATH": ROOT}
    assert python(PLATFORMS, env=env) == ("initialized\n" if connects else "")


def test_without_chips_that_jax_sees_nothing_connects(monkeypatch):
    """Files that look like chips can belong to other devices: then JAX, to which no platforms were
    given, names none itself."""
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert python(PLATFORMS, env={"PYTHONPATH": ROOT}) == ""


@pytest.fixture
def tpu(monkeypatch) -> list:
    """A TPU host, as JAX and its environment show one. The list gets each call of JAX's
    initialize, which fails as it does on a pod."""
    calls = []

    def initialize(**options) -> None:
        calls.append(options)
        raise RuntimeError("DEADLINE_EXCEEDED: Barrier timed out\nand more")
    prefixes = ("TPU_", "JAX_NUM", "JAX_COORD", "JAX_PROCESS", "MEGASCALE_")
    for name in list(os.environ):
        if name.startswith(prefixes):
            monkeypatch.delenv(name)
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    monkeypatch.setattr(distributed.glob, "glob",
                        lambda pattern: ["/dev/accel0"] * pattern.startswith("/dev/accel"))
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(distributed, "filter_stderr", lambda folder="": None)
    fake = types.SimpleNamespace(config=types.SimpleNamespace(jax_platforms="tpu,cpu"),
                                 distributed=types.SimpleNamespace(initialize=initialize))
    monkeypatch.setattr(distributed, "jax", fake)
    return calls


@pytest.mark.parametrize("env", [
    {},
    {"TPU_WORKER_HOSTNAMES": "t0,t1"},
    {"TPU_PROCESS_ADDRESSES": "t0:8476,t1:8476", "TPU_WORKER_HOSTNAMES": "t0"},
    {"TPU_WORKER_HOSTNAMES": ""},
    {"TPU_PROCESS_BOUNDS": "2,2,1"},
    {"TPU_WORKER_HOSTNAMES": "t0,t1", "TPU_PROCESS_BOUNDS": "1,1,1"},
    {"TPU_WORKER_HOSTNAMES": "t0", "MEGASCALE_NUM_SLICES": "2"},
    {"TPU_WORKER_HOSTNAMES": "t0", "MEGASCALE_COORDINATOR_ADDRESS": "t9"},
    {"TPU_WORKER_HOSTNAMES": "t0", "JAX_NUM_PROCESSES": "2"},
    {"TPU_WORKER_HOSTNAMES": "t0", "JAX_COORDINATOR_ADDRESS": "t9:1"}])
def test_tpu_hosts_that_do_not_meet_end(tpu, env, monkeypatch):
    """Each alone, they would all train into one folder."""
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    message = r"DEADLINE_EXCEEDED: Barrier timed out\).*JAX_NUM_PROCESSES=1"
    with pytest.raises(DistributedError, match=message) as problem:
        distributed.initialize_distributed(False)
    assert "\n" not in str(problem.value) and len(tpu) == 1


@pytest.mark.parametrize("env", [
    {"JAX_NUM_PROCESSES": "1"},
    {"TPU_WORKER_HOSTNAMES": "localhost"},
    {"TPU_PROCESS_ADDRESSES": "local"},
    {"TPU_PROCESS_BOUNDS": "1,1,1"},
    {"TPU_HOST_BOUNDS": "1,1,1"},
    {"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "1"}])
def test_a_single_tpu_host_does_not_wait_for_others(tpu, env, monkeypatch):
    """Where the environment proves that there are none, and --distributed is not given."""
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    distributed.initialize_distributed(False)
    assert not tpu
    with pytest.raises(DistributedError, match="--distributed"):
        distributed.initialize_distributed(True)
    assert len(tpu) == 1


def test_a_tpu_host_that_lacks_a_package_to_find_the_others(tpu, monkeypatch):
    def initialize(**options) -> None:
        raise ModuleNotFoundError("No module named 'requests'")
    monkeypatch.setattr(distributed.jax.distributed, "initialize", initialize)
    with pytest.raises(DistributedError, match="No module named 'requests'"):
        distributed.initialize_distributed(False)


def test_lines_of_all_processes_are_gathered_whatever_their_lengths(monkeypatch):
    other = b"b.tar/7\tcut"

    def all_gather(x):
        x = np.asarray(x)
        if not x.ndim:
            return np.array([x, len(other)])
        return np.stack([x, np.frombuffer(other.ljust(len(x)), np.uint8)])
    data_parallel = DataParallel(1)
    monkeypatch.setattr(data_parallel, "all_gather", all_gather)
    assert data_parallel.gather_lines(["a", "é"]) == ["a", "é", other.decode()]
    assert data_parallel.gather_lines([]) == [other.decode()]


class Second(DataParallel):
    """A process whose main process sees other training data."""

    def __init__(self):
        super().__init__(1)
        self.is_main = False

    def broadcast_from_main(self, make):
        value = make()
        if isinstance(value, dict) and "training data" in value:
            return value | {"training data": "9 samples (0)"}
        return value


def test_a_process_that_sees_other_data_than_the_main_one_is_refused(tmp_path):
    cfg = config.parse_args([*SMALL_RUN, "--workdir", str(tmp_path / "run")])[0]
    message = "training data here is .*all processes must read the same"
    with pytest.raises(ConfigError, match=message):
        Run(cfg, Second())

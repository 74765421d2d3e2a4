"""How the tests compile: each program once for all tests, xdist workers and subprocesses of a
session. Nothing is kept for the next one.

With QUICK_COMPILE=1 in the environment, XLA's optimizations are off, and most programs compile in a
fifth of the time. Tests that are about the compiler's results ask for what users get: with
`optimized` (helpers/compiling.py), and all of tests/parity."""
import os

import jax
import pytest

from tests.helpers.compiling import QUICK_FLAGS

SLOWEST = ("test_survive.py", "test_hosts.py", "test_objectives.py", "test_train.py",
           "test_numerics.py", "test_loop.py", "test_tutorial.py", "test_command.py",
           "test_bench.py", "test_losses.py", "test_vqa.py", "test_fidelity.py",
           "test_monitoring.py", "test_remote_folder.py", "test_docs.py", "test_encoder.py")


def pytest_configure(config):
    """Before JAX starts, in every worker too."""
    quick = os.environ.get("QUICK_COMPILE") == "1"
    if quick and not any("parity" in arg for arg in config.args):
        os.environ["XLA_FLAGS"] = QUICK_FLAGS


def pytest_collection_modifyitems(items):
    """The slowest files first, so that no worker has one left at the end."""
    ranks = {name: rank for rank, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(SLOWEST)))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory) -> dict[str, str]:
    """The environment of subprocesses."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # a worker's folder is inside that of the session
        base = base.parent
    folder = base / "compiled"
    folder.mkdir(exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    return dict(os.environ)


@pytest.fixture(scope="module", autouse=True)
def release_programs():
    """Compiled programs take memory maps, 20,000 in some files. Linux allows a process 65,530, and
    beyond them XLA ends with a segmentation fault."""
    yield
    jax.clear_caches()

"""What the tests share: one folder of compiled programs, for all workers of pytest-xdist and the processes that they start, which compile the same ones."""
import os

import jax
import pytest


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory) -> dict[str, str]:
    """The environment of subprocesses."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a folder of its own in that of the session
        base = base.parent
    folder = base / "compiled"
    folder.mkdir(exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    return os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}

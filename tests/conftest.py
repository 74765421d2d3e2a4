"""What the tests share: one folder of compiled programs, for this process and the many that it starts, which compile the same ones."""
import os

import jax
import pytest


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory) -> dict[str, str]:
    """The environment of subprocesses."""
    folder = str(tmp_path_factory.mktemp("compiled"))
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    return os.environ | {"JAX_COMPILATION_CACHE_DIR": folder, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}

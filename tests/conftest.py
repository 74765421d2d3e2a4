"""What the tests share: one folder of compiled programs, for subprocesses that compile the same ones."""
import os

import pytest


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> dict[str, str]:
    """The environment of subprocesses."""
    return os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}

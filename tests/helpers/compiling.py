"""How XLA compiles: quickly for most tests, and as for users where the result is the subject."""
import os
from collections.abc import Callable
from typing import Any

import jax

# JAX 0.10 can also do without the emitters of fused operations, which take most of the time.
EMITTERS = " --xla_cpu_use_fusion_emitters=false" if jax.__version_info__ < (0, 11) else ""
QUICK_FLAGS = ("--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
               "--xla_cpu_parallel_codegen_split_count=1" + EMITTERS)
USERS_OPTIONS = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False,
                 "xla_cpu_parallel_codegen_split_count": 32}
if EMITTERS:
    USERS_OPTIONS["xla_cpu_use_fusion_emitters"] = True


def optimized(f: Callable, *args: Any) -> Any:
    """f(*args), jitted and compiled as it is for users. f may be pmapped."""
    jitted = f if hasattr(f, "lower") else jax.jit(f)
    return jitted.lower(*args).compile(USERS_OPTIONS)(*args)


def several_devices(count: int, env: dict[str, str] | None = None) -> dict[str, str]:
    """The environment of a process whose CPU is so many devices."""
    env = dict(os.environ if env is None else env)
    flags = f"{env.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    return env | {"XLA_FLAGS": flags.strip()}

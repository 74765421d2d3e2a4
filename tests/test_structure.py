"""The import rules of CONTRIBUTING.md, checked on the import graph of the code.

Imports inside functions and demos count too, and so do the modules that are imported by name."""
import ast
import functools
import os
import subprocess
import sys

from tests.helpers.paths import ROOT

FOLDERS = ("inputs", "objectives", "runtime", "evaluation", "interop", "benchmarks")
METHOD = {"vit", "layers", "masking", "decoder"}


def modules() -> dict[str, str]:
    """{module: path} of the code without its tests."""
    paths = {}
    for folder in ("", *FOLDERS):
        for name in os.listdir(os.path.join(ROOT, folder)):
            if name.endswith(".py"):
                module = f"{folder}.{name[:-3]}".lstrip(".")
                paths[module] = os.path.join(ROOT, folder, name)
    return paths


def imported_names(path: str) -> set[str]:
    """Every module that a file imports, anywhere in it, and every name that it takes from one."""
    names = set()
    with open(path, encoding="utf-8") as f:
        tree = ast.parse(f.read())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@functools.cache
def graph() -> dict[str, set[str]]:
    """{module: the project's modules that it imports}."""
    paths = modules()
    return {module: imported_names(path) & paths.keys() for module, path in paths.items()}


def reachable(start: str) -> set[str]:
    """The modules that `import start` loads, `start` itself only in a cycle."""
    seen: set[str] = set()
    todo = [start]
    while todo:
        for module in graph()[todo.pop()] - seen:
            seen.add(module)
            todo.append(module)
    return seen


def test_there_is_no_import_cycle():
    others = {m for m in graph() if m.startswith("objectives.")} - {"objectives.registry"}
    for module, imports in graph().items():
        if module == "objectives.registry":
            imports = imports | others  # it imports them by name
        for target in imports:
            assert module not in reachable(target), f"{module} and {target} import each other"


def test_import_chains_are_short():
    @functools.cache
    def depth(module: str) -> int:
        return 1 + max(map(depth, graph()[module]), default=0)
    deepest = max(graph(), key=depth)
    assert depth(deepest) <= 11, deepest


def test_the_method_imports_nothing_but_itself_jax_and_numpy():
    standard = sys.stdlib_module_names
    for module in METHOD:
        for name in imported_names(modules()[module]):
            package = name.partition(".")[0]
            assert package in METHOD | {"jax", "numpy"} or package in standard, (module, name)


def test_inputs_import_no_jax_and_no_model():
    for module in graph():
        if module.startswith("inputs."):
            loaded = reachable(module) | {module}
            assert not loaded & METHOD, module
            for dependency in loaded:
                names = imported_names(modules()[dependency])
                packages = {name.partition(".")[0] for name in names}
                assert not packages & {"jax", "optax"}, (module, dependency)


def test_worker_processes_load_no_jax():
    for module in reachable("runtime.worker_processes"):
        packages = {name.partition(".")[0] for name in imported_names(modules()[module])}
        assert not packages & {"jax", "optax"}, module


def test_training_loads_at_most_26_modules_and_no_evaluation():
    loaded = reachable("train")
    assert len(loaded) <= 26, sorted(loaded)
    assert not [m for m in loaded if m.startswith(("evaluation.", "interop.", "benchmarks."))]


def test_nothing_imports_a_command_or_a_test():
    for module, imports in graph().items():
        assert not imports & {"evaluate", "convert", "bench", "demo"}, module
        packages = {name.partition(".")[0] for name in imported_names(modules()[module])}
        assert "tests" not in packages, module


def test_importing_every_module_changes_no_global_state():
    """No warning filters, no environment variables, no jax settings."""
    code = """
import importlib, os, sys, warnings
import jax, numpy, optax, PIL.Image, tqdm, jax.experimental.multihost_utils
before = list(warnings.filters), dict(os.environ), dict(jax.config.values)
for name in sys.argv[1:]:
    importlib.import_module(name)
assert (list(warnings.filters), dict(os.environ), dict(jax.config.values)) == before
"""
    optional = {"benchmarks.torch_reference", "benchmarks.torch_step"}  # need torch
    names = sorted(modules().keys() - optional)
    process = subprocess.run([sys.executable, "-c", code, *names], cwd=ROOT, capture_output=True,
                             text=True)
    assert process.returncode == 0, process.stderr


def test_files_are_short_and_few_are_at_the_root():
    lengths = []
    for module, path in modules().items():
        with open(path, encoding="utf-8") as f:
            lengths.append((len(f.readlines()), module))
    assert max(lengths)[0] <= 300, max(lengths)
    assert sorted(lengths)[len(lengths) // 2][0] < 200
    assert len([module for module in modules() if "." not in module]) <= 12

"""The import rules of CONTRIBUTING.md, checked on the import graph of the code itself: imports inside
functions and demos count, and so do the modules that are imported by name."""
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
    found = {}
    for folder in ("", *FOLDERS):
        for name in os.listdir(os.path.join(ROOT, folder)):
            if name.endswith(".py"):
                module = f"{folder}.{name[:-3]}".lstrip(".")
                found[module] = os.path.join(ROOT, folder, name)
    return found


def imported_names(path: str) -> set[str]:
    """Every name that a file imports, anywhere in it, with what it takes from packages."""
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
    """{module: the project's modules that it imports}. registry imports the rivals by name."""
    paths = modules()
    found = {module: imported_names(path) & paths.keys() for module, path in paths.items()}
    return found


def reachable(start: str) -> set[str]:
    seen: set[str] = set()
    todo = [start]
    while todo:
        for module in graph()[todo.pop()] - seen:
            seen.add(module)
            todo.append(module)
    return seen


def test_there_is_no_import_cycle():
    rivals = {m for m in graph() if m.startswith("objectives.")} - {"objectives.registry"}
    by_name = {"objectives.registry": graph()["objectives.registry"] | rivals}
    for module in graph():
        for target in by_name.get(module, graph()[module]):
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
            everything = reachable(module) | {module}
            assert not everything & METHOD, module
            for part in everything:
                packages = {name.partition(".")[0] for name in imported_names(modules()[part])}
                assert not packages & {"jax", "optax"}, (module, part)


def test_training_loads_little():
    loaded = reachable("train")
    assert len(loaded) <= 26, sorted(loaded)
    assert not [m for m in loaded if m.startswith(("evaluation.", "interop.", "benchmarks."))]


def test_nothing_imports_a_command():
    commands = {"evaluate", "caption", "convert", "bench"}
    for module, imports in graph().items():
        assert not imports & (commands - {"caption"}), module
        assert not any(name.partition(".")[0] == "tests" for name in imported_names(modules()[module]))


def test_importing_everything_changes_no_global_state():
    """No warning filters, no environment variables, no jax settings."""
    code = """
import importlib, os, sys, warnings
import jax, numpy, optax, PIL.Image, tqdm, jax.experimental.multihost_utils
jax.config.values
before = list(warnings.filters), dict(os.environ), dict(jax.config.values)
for name in sys.argv[1:]:
    importlib.import_module(name)
assert (list(warnings.filters), dict(os.environ), dict(jax.config.values)) == before
"""
    optional = {"benchmarks.torch_reference"}
    names = sorted(modules().keys() - optional)
    done = subprocess.run([sys.executable, "-c", code, *names], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr


def test_files_stay_short():
    lengths = []
    for module, path in modules().items():
        with open(path, encoding="utf-8") as f:
            lengths.append((len(f.readlines()), module))
    assert max(lengths)[0] <= 300, max(lengths)
    assert sorted(lengths)[len(lengths) // 2][0] < 200
    assert len([m for m in modules() if "." not in m]) <= 12

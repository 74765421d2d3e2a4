"""pyproject.toml, constraints.txt, the Makefile and .ci/run work for every supported Python."""
import os
import shutil
import stat
import subprocess
import sys
import tomllib
from importlib.metadata import version

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.helpers.paths import ROOT

with open(os.path.join(ROOT, "pyproject.toml"), "rb") as file:
    PROJECT = tomllib.load(file)["project"]
with open(os.path.join(ROOT, "constraints.txt"), encoding="utf-8") as file:
    PINS = [Requirement(line.strip()) for line in file if line.strip() and not line.startswith("#")]
EXTRAS = ("gpu", "tpu", "eval", "test", "tutorial")


def for_python(requirements: list[Requirement], python: str) -> dict[str, Requirement]:
    """{name: requirement} of those whose marker holds for that Python. No name may occur twice."""
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    by_name = {}
    for requirement in requirements:
        if requirement.marker is None or requirement.marker.evaluate(environment):
            assert requirement.name not in by_name, (python, requirement.name)
            by_name[requirement.name] = requirement
    return by_name


# ----------------------------------------------------------------------------------- versions
@pytest.mark.parametrize(("python", "jax"), [
    ("3.11", "0.10.2"), ("3.12", "0.12.0.1"), ("3.13", "0.12.0.1"), ("3.14", "0.12.0.1")])
def test_each_python_gets_its_newest_jax_pinned_within_the_bounds(python, jax):
    pins = for_python(PINS, python)
    assert str(pins["jax"].specifier) == str(pins["jaxlib"].specifier) == f"=={jax}"
    extras = [PROJECT["optional-dependencies"][extra] for extra in EXTRAS]
    for lines in (PROJECT["dependencies"], *extras):
        requirements = for_python([Requirement(line) for line in lines], python)
        assert requirements
        for name, requirement in requirements.items():
            pinned = Version(str(pins[name].specifier).removeprefix("=="))
            assert pinned in requirement.specifier, f"constraints.txt: {name} {pinned}"


def test_this_environment_has_the_pinned_versions():
    pins = for_python(PINS, f"{sys.version_info.major}.{sys.version_info.minor}")
    for name in ("jax", "jaxlib", "numpy", "optax"):
        assert str(pins[name].specifier) == f"=={version(name)}"


# ----------------------------------------------------------------------------- make, .ci/run
def write_script(path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_make_refuses_an_environment_of_another_python(tmp_path):
    """It does not ignore PYTHON= on the command line."""
    write_script(tmp_path / "bin" / "python", "echo 3.99")
    command = ["make", "install", f"VENV={tmp_path}", f"PYTHON={sys.executable}"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode != 0
    messages = [line for line in process.stdout.splitlines() if "was made with" in line]
    assert len(messages) == 1, (process.stdout, process.stderr)
    assert "3.99" in messages[0] and "VENV=" in messages[0]
    assert not (tmp_path / "core").exists()


def run_ci(folder, pythons: dict[str, str],
           failing: str = "no such target") -> tuple[int, str, list[str]]:
    """Runs .ci/run with a make that only records its arguments, and fails for those that contain
    `failing`. pythons: {path below the home folder: version that it prints, "" if it fails}.
    Returns the exit status, the output and the recorded arguments, sorted."""
    root, home, programs = folder / "project", folder / "home", folder / "programs"
    shutil.copytree(os.path.join(ROOT, ".ci"), root / ".ci")
    write_script(programs / "make", f'echo "$@" >> {folder}/arguments; '
                                    f'case "$*" in *"{failing}"*) exit 2;; esac')
    for name in ("bash", "cat", "dirname"):
        (programs / name).symlink_to(shutil.which(name))
    write_script(programs / "python3", "echo 3.11")
    for path, printed in pythons.items():
        write_script(home / path, f"echo {printed}" if printed else "exit 127")
    env = {"PATH": f"{programs}:{home / 'path'}", "HOME": str(home)}
    process = subprocess.run([str(programs / "bash"), str(root / ".ci" / "run")], env=env,
                             capture_output=True, text=True)
    arguments = sorted((folder / "arguments").read_text().splitlines())
    return process.returncode, process.stdout, arguments


USUAL = ["lint", "test", "test-long", "test-parity VENV=.venv-parity"]
PYENV = ".pyenv/versions/3.13.0/bin/python3.13"


@pytest.mark.parametrize(("pythons", "newest"), [
    ({"path/python3.13": "3.13"}, "python3.13"),
    ({"path/python3.12": "3.12"}, "python3.12"),
    ({"path/python3.13": "", PYENV: "3.13"}, PYENV),  # pyenv's launcher of a version not selected
    ({"path/python3.13": "3.11", "path/python3.12": "3.12"}, "python3.12")])
def test_ci_runs_the_light_tests_on_a_newer_python_too(tmp_path, pythons, newest):
    status, output, arguments = run_ci(tmp_path, pythons)
    again = [line for line in arguments if line.startswith("test PYTHON=")]
    assert status == 0 and sorted(USUAL + again) == arguments
    left_out = ("benchmarks", "tutorial", "evaluation", "interop", "runtime/test_survive.py",
                "runtime/test_hosts.py", "inputs/test_emoji.py")
    ending = " ".join(f"--ignore=tests/{path}" for path in left_out)
    assert len(again) == 1 and again[0].endswith(f"VENV=.venv-newer LEAVE_OUT={ending}")
    assert again[0].split()[1].endswith(newest) and newest in output


def test_ci_reports_that_there_is_no_newer_python(tmp_path):
    status, output, arguments = run_ci(tmp_path, {})
    assert status == 0 and arguments == USUAL
    assert output.splitlines()[0].startswith("no Python newer than python3 is installed")


@pytest.mark.parametrize("failing", ["lint", "test-parity", "test-long", "test PYTHON="])
def test_ci_fails_if_a_part_fails(tmp_path, failing):
    assert run_ci(tmp_path, {"path/python3.13": "3.13"}, failing)[0] != 0

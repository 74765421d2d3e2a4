"""One pyproject.toml and one constraints.txt serve every Python: which versions each gets, and what make does when asked for another."""
import os
import shutil
import stat
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
with open(os.path.join(ROOT, "pyproject.toml"), "rb") as file:
    PROJECT = tomllib.load(file)["project"]
with open(os.path.join(ROOT, "constraints.txt"), encoding="utf-8") as file:
    PINS = [Requirement(line.strip()) for line in file if line.strip() and not line.startswith("#")]
EXTRAS = ("gpu", "tpu", "test")


def for_python(requirements: list[Requirement], python: str) -> dict[str, Requirement]:
    """By name, those whose marker holds for that Python. No name may come twice."""
    found = {}
    for requirement in requirements:
        if requirement.marker is None or requirement.marker.evaluate({"python_version": python, "python_full_version": python + ".0"}):
            assert requirement.name not in found, f"two lines of {requirement.name} hold for Python {python}"
            found[requirement.name] = requirement
    return found


@pytest.mark.parametrize(("python", "jax"), [("3.11", "0.10.2"), ("3.12", "0.12.0.1"), ("3.13", "0.12.0.1"), ("3.14", "0.12.0.1")])
def test_each_python_gets_its_newest_jax_pinned_within_the_bounds(python, jax):
    pins = for_python(PINS, python)
    assert str(pins["jax"].specifier) == str(pins["jaxlib"].specifier) == f"=={jax}"
    for group in (PROJECT["dependencies"], *(PROJECT["optional-dependencies"][extra] for extra in EXTRAS)):
        needed = for_python([Requirement(line) for line in group], python)
        assert needed
        for name, requirement in needed.items():
            pinned = Version(str(pins[name].specifier).removeprefix("=="))
            assert pinned in requirement.specifier, f"{requirement} does not admit {name} {pinned}, which constraints.txt pins"


def test_this_environment_is_the_pinned_one():
    """What the tests run with is what constraints.txt says for this Python."""
    from importlib.metadata import version
    pins = for_python(PINS, f"{sys.version_info.major}.{sys.version_info.minor}")
    for name in ("jax", "jaxlib", "numpy", "optax"):
        assert str(pins[name].specifier) == f"=={version(name)}"


def test_make_refuses_an_environment_of_another_python(tmp_path):
    """PYTHON= on the command line is not ignored where the folder was made with another one."""
    program = tmp_path / "bin" / "python"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 3.99\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    done = subprocess.run(["make", "install", f"VENV={tmp_path}", f"PYTHON={sys.executable}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    told = [line for line in done.stdout.splitlines() if "was made with" in line]
    assert len(told) == 1 and "3.99" in told[0] and "VENV=" in told[0], (done.stdout, done.stderr)
    assert not (tmp_path / "core").exists()


# ------------------------------------------------------------------------------------------------------------------ .ci/run
def script(path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text + "\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def ci(folder, pythons: dict[str, str], failing: str = "no such target") -> tuple[int, str, list[str]]:
    """.ci/run with a make that only notes what it is asked for, and Pythons (path below the home folder: version they tell)."""
    root, home, programs = folder / "project", folder / "home", folder / "programs"
    shutil.copytree(os.path.join(ROOT, ".ci"), root / ".ci")
    script(programs / "make", f'echo "$@" >> {folder}/asked; case "$*" in *"{failing}"*) exit 2;; esac')
    for name in ("bash", "cat", "dirname"):
        (programs / name).symlink_to(shutil.which(name))
    script(programs / "python3", "echo 3.11")
    for path, version in pythons.items():
        script(home / path, f"echo {version}" if version else "exit 127")
    env = {"PATH": f"{programs}:{home / 'path'}", "HOME": str(home)}
    done = subprocess.run([str(programs / "bash"), str(root / ".ci" / "run")], env=env, capture_output=True, text=True)
    return done.returncode, done.stdout, sorted((folder / "asked").read_text().splitlines())


USUAL = ["lint", "test", "test-parity VENV=.venv-parity"]
PYENV = ".pyenv/versions/3.13.0/bin/python3.13"


@pytest.mark.parametrize(("pythons", "found"), [
    ({"path/python3.13": "3.13"}, "python3.13"),
    ({"path/python3.12": "3.12"}, "python3.12"),
    ({"path/python3.13": "", PYENV: "3.13"}, PYENV),                       # pyenv's stand-in for a version that is not chosen does not start
    ({"path/python3.13": "3.11", "path/python3.12": "3.12"}, "python3.12")])
def test_ci_runs_the_light_tests_on_a_newer_python_too(tmp_path, pythons, found):
    status, told, asked = ci(tmp_path, pythons)
    again = [line for line in asked if line.startswith("test PYTHON=")]
    assert status == 0 and sorted(USUAL + again) == asked
    assert len(again) == 1 and again[0].split()[1].endswith(found) and again[0].endswith("VENV=.venv-newer")
    assert found in told


def test_ci_says_that_there_is_no_newer_python(tmp_path):
    status, told, asked = ci(tmp_path, {})
    assert status == 0 and asked == USUAL
    assert told.splitlines()[-1].startswith("no Python newer than python3 is installed")


@pytest.mark.parametrize("failing", ["lint", "test-parity", "test PYTHON="])
def test_ci_fails_with_any_of_its_parts(tmp_path, failing):
    assert ci(tmp_path, {"path/python3.13": "3.13"}, failing)[0] != 0

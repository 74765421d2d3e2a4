"""The project's root, and Python processes that run in it."""
import os
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def python(code: str, *argv: object, env: dict | None = None) -> str:
    """The output of a process that runs the code. env is added to this process's environment."""
    ended = subprocess.run([sys.executable, "-c", code, *map(str, argv)], capture_output=True,
                           text=True, cwd=ROOT, env=os.environ | (env or {}))
    assert ended.returncode == 0, ended.stderr
    return ended.stdout

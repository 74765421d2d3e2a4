"""The README tells the truth: its commands run, its files exist."""
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

import train

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
README = open(os.path.join(ROOT, "README.md"), encoding="utf-8").read()
BLOCKS = "\n".join(re.sub(r"<<'END'.*?^END$", "", b, flags=re.S | re.M) for b in re.findall(r"```sh\n(.*?)```", README, re.S))
COMMANDS = [line.partition("#")[0].strip(" &") for line in BLOCKS.splitlines() if line.partition("#")[0].strip()]
SHOWS = re.findall(r"\| `python ((?:vit|masking|decoder|scenes|tokenizer|sources|data|devices|zero|layouts|baselines|questions|labels)\.py[^`]*)`", README)


def test_commands_are_of_known_kinds():
    assert len(COMMANDS) >= 10
    for command in COMMANDS:
        words = [w for w in shlex.split(command) if not re.match(r"[A-Z_]+=", w)]
        assert (words or ["export"])[0] in ("make", "python", "pip", "npm", "img2dataset", ".", "export"), command
    for target in (c.split()[1] for c in COMMANDS if c.startswith("make ")):
        assert re.search(rf"^{target}:", open(os.path.join(ROOT, "Makefile")).read(), re.M)
    for extra in re.findall(r"'\.\[(\w+)\]'", README):
        assert f"\n{extra} = [" in open(os.path.join(ROOT, "pyproject.toml")).read()


@pytest.mark.parametrize("command", [c for c in COMMANDS if "train.py" in c])
def test_training_commands_are_understood(command, capsys):
    """Each with --dry-run: recipe, flags, values and stages are read and checked."""
    words = shlex.split(command)
    assert train.main([*words[words.index("train.py") + 1:], "--dry-run"]) == 0
    assert "steps" in capsys.readouterr().out


def test_files_show_their_concept_by_themselves(tmp_path):
    assert len(SHOWS) == 13
    for name in os.listdir(ROOT):
        if name.endswith(".py"):
            shutil.copy(os.path.join(ROOT, name), tmp_path)
    run = lambda c: subprocess.run([sys.executable, *shlex.split(c)], cwd=tmp_path, capture_output=True, text=True)  # noqa: E731
    with ThreadPoolExecutor(2) as pool:
        for command, done in zip(SHOWS, pool.map(run, SHOWS)):
            assert done.returncode == 0 and done.stdout, (command, done.stderr)
    assert {"kept.png", "scenes.png", "contact.png"} <= set(os.listdir(tmp_path))


def test_encoder_snippet_runs(tmp_path):
    """On an encoder that has learned nothing."""
    import dataclasses

    import jax

    import checkpoint
    import vit
    cfg = vit.config("micro/8")
    os.makedirs(tmp_path / "runs/toy")
    checkpoint.save(str(tmp_path / "runs/toy/encoder.npz"), vit.init(jax.random.key(0), cfg), {"encoder": dataclasses.asdict(cfg), "resolution": 32})
    shutil.copytree(os.path.join(ROOT, "docs"), tmp_path / "docs")
    code = re.search(r"```python\n(.*?)```", README, re.S)[1]
    code += "print(tokens.shape, pooled.shape)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": ROOT}, capture_output=True, text=True)
    assert done.stdout.split("\n")[0] == "(2, 16, 96) (2, 96)", done.stderr


def test_tour_names_every_file_and_every_file_exists():
    tour = set(re.findall(r"^\| `(\w+\.py)`", README, re.M))
    assert tour == {n for n in os.listdir(ROOT) if n.endswith(".py")}
    with open(os.path.join(ROOT, "pyproject.toml"), encoding="utf-8") as f:
        assert tour == {f"{name}.py" for name in re.findall(r'"(\w+)"', re.search(r"py-modules = \[(.*)\]", f.read())[1])}
    for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert os.path.exists(os.path.join(ROOT, picture))

"""The documentation is true: its commands are understood, its demos run, its links resolve."""
import ast
import functools
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from runtime.errors import run_command

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PAGES = ["README.md", "CONTRIBUTING.md"]
PAGES += sorted(f"docs/{n}" for n in os.listdir(os.path.join(ROOT, "docs")) if n.endswith(".md"))
FOLDERS = ("inputs", "objectives", "runtime", "evaluation", "interop", "benchmarks")
KINDS = ("make", "python", "pip", "npm", "img2dataset", "export")
README_WORDS = 2000
# Demos need no trained run. They run in a copy of the repository, and leave these images there.
DEMOS = re.compile(r"(vit|masking|decoder|data)\.py( scenes)?$"
                   r"|bench\.py (flops|ablate --show)$"
                   r"|-m inputs\.(scene_captions|scenes|tokenizer .*|sources scenes)$"
                   r"|-m runtime\.(devices|zero1)$"
                   r"|-m interop\.layouts$"
                   r"|-m objectives\.registry$"
                   r"|-m evaluation\.(questions|labels scenes)$")
IMAGES = {"scenes.png", "contact.png"}


@functools.lru_cache
def read(page: str) -> str:
    with open(os.path.join(ROOT, page), encoding="utf-8") as f:
        return f.read()


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", read(page), re.S | re.M)


def commands(page: str) -> Iterator[str]:
    """Every command of the page's sh blocks, without comments and variables before it."""
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line, posix=False, punctuation_chars=False)
            lexer.whitespace_split = True
            words = [w for w in lexer if w != "&"]
            while words and re.match(r"[A-Z_]+=", words[0]):
                words = words[1:]
            if words:
                yield " ".join(words)


COMMANDS = [(page, command) for page in PAGES for command in commands(page)]
PYTHON = sorted({command.removeprefix("python ") for _, command in COMMANDS
                 if command.startswith("python ")})
TRAINING = [c for c in PYTHON if c.startswith("train.py") and c != "train.py -h"]
SHOWN = [c for c in PYTHON if DEMOS.match(c)]
ELSEWHERE = ("-m pytest", "tutorial/")  # tests/tutorial runs those of the tutorial
OTHER = [c for c in PYTHON if c not in (*TRAINING, *SHOWN) and not c.startswith(ELSEWHERE)]


def test_pages_have_commands_of_each_kind_that_this_file_checks():
    assert len(TRAINING) >= 12 and len(SHOWN) >= 13 and len(OTHER) >= 20


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_of_known_kinds(page):
    for command in commands(page):
        assert command.split()[0] in KINDS, command


def test_make_targets_and_extras_exist():
    targets = {c.split()[-1] for _, c in COMMANDS if c.startswith("make ")}
    assert {"run", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", read("Makefile"), re.M), target
    extras = set()
    for page in PAGES:
        for names in re.findall(r"'\.\[([\w,]+)\]'", read(page)):
            extras |= set(names.split(","))
    assert len(extras) >= 5
    for extra in extras:
        assert f"\n{extra} = [" in read("pyproject.toml"), extra


@pytest.mark.parametrize("command", TRAINING)
def test_training_commands_are_understood(command, capsys):
    """Each with --dry-run: recipe, flags, values and stages are read and checked."""
    import train
    words = [w for w in shlex.split(command)[1:] if w != "--dry-run"]
    assert train.main([*words, "--dry-run"]) == 0
    assert "steps" in capsys.readouterr().out


@pytest.mark.parametrize("command", OTHER)
def test_other_commands_are_understood(command, tmp_path, monkeypatch, capsys):
    """Their files are missing here: they must say so, and must not refuse a flag."""
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)
    if words[0] == "-m":
        script, *arguments = words[1:]
        assert os.path.exists(os.path.join(ROOT, *script.split(".")) + ".py")
    else:
        script, *arguments = words
        assert os.path.exists(os.path.join(ROOT, script))
    module = importlib.import_module(script.removesuffix(".py"))
    if "-h" in arguments:
        with pytest.raises(SystemExit) as end:
            (module.parse if script == "bench.py" else module.main)(arguments)
        assert end.value.code in (0, None) and "usage:" in capsys.readouterr().out
    elif script == "bench.py":
        assert module.parse(arguments).command == arguments[0]
    elif hasattr(module, "main"):
        assert run_command(module.main, arguments) == 1
        assert capsys.readouterr().err.startswith("error: ")
    else:  # a demo of a file that is missing here
        env = os.environ | {"PYTHONPATH": ROOT}
        done = subprocess.run([sys.executable, *words], cwd=tmp_path, env=env,
                              capture_output=True, text=True)
        assert "Traceback" not in done.stderr and "usage" not in done.stderr


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The repository's code and results, where a demo may write."""
    folder = tmp_path_factory.mktemp("copy")
    for name in os.listdir(ROOT):
        if name.endswith(".py"):
            shutil.copy(os.path.join(ROOT, name), folder)
    for name in (*FOLDERS, "results", "docs"):
        shutil.copytree(os.path.join(ROOT, name), folder / name)
    return folder


def test_demos_run(copy, cache):
    def run(command):
        return subprocess.run([sys.executable, *shlex.split(command)], cwd=copy, env=cache,
                              capture_output=True, text=True)
    with ThreadPoolExecutor(2) as pool:
        for command, done in zip(SHOWN, pool.map(run, SHOWN)):
            assert done.returncode == 0 and done.stdout, (command, done.stderr)
    assert set(os.listdir(copy)) >= IMAGES


def write_untrained_encoder(folder) -> None:
    """A run's encoder.npz with the toy's shapes, which has learned nothing."""
    import dataclasses

    import jax

    import vit
    from runtime import checkpoint
    cfg = vit.vit_config("micro/4")
    os.makedirs(folder)
    meta = {"encoder": dataclasses.asdict(cfg), "resolution": 32}
    params = vit.init(jax.random.key(0), cfg)
    checkpoint.save(str(folder / "encoder.npz"), params, meta)


@pytest.mark.parametrize("own_modules", [(), ("data", "config", "train")])
def test_encoder_snippets_run_from_another_folder(own_modules, tmp_path, cache):
    """Also where that folder has modules of the same names as this project."""
    write_untrained_encoder(tmp_path / "runs/toy")
    shutil.copytree(os.path.join(ROOT, "docs"), tmp_path / "docs")
    for name in own_modules:
        (tmp_path / f"{name}.py").write_text(f"mine = 'my own {name}'\n")
    code = "".join(blocks("docs/encoder.md", "python")).replace("/path/to/clone", ROOT)
    checks = [f"import {name}; assert {name}.mine" for name in own_modules]
    checks.append("print(tokens.shape, pooled.shape, maps.shape)")
    done = subprocess.run([sys.executable, "-c", "\n".join([code, *checks])], cwd=tmp_path,
                          env=cache, capture_output=True, text=True)
    assert done.stdout.strip() == "(2, 64, 96) (2, 96) (4, 1, 3, 64, 64)", done.stderr


def test_readme_shows_the_loss_as_it_is():
    """Its first Python block is the body of train.openvision2_loss, without comments."""
    tree = ast.parse(read("train.py"))
    loss = next(node for node in tree.body
                if isinstance(node, ast.FunctionDef) and node.name == "openvision2_loss")
    body = [ast.unparse(statement) for statement in loss.body[1:]]
    shown = "def f():\n" + re.sub("^", "    ", blocks("README.md", "python")[0], flags=re.M)
    assert [ast.unparse(statement) for statement in ast.parse(shown).body[0].body] == body


def anchors(page: str) -> set[str]:
    """The anchors that GitHub gives to the page's headings."""
    text = re.sub(r"^```.*?^```", "", read(page), flags=re.S | re.M)
    found = set()
    for heading in re.findall(r"^#+ (.*)$", text, re.M):
        kept = re.sub(r"[^\w\- ]", "", heading.replace("`", "")).strip().lower()
        found.add(kept.replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES)
def test_links_and_images_resolve(page):
    text = re.sub(r"^```.*?^```", "", read(page), flags=re.S | re.M)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        there = os.path.normpath(os.path.join(os.path.dirname(page), path)) if path else page
        assert os.path.exists(os.path.join(ROOT, there)), target
        if anchor:
            assert anchor in anchors(there), target


def test_readme_names_every_script_folder_and_page():
    text = read("README.md")
    scripts = {n for n in os.listdir(ROOT) if n.endswith(".py")}
    assert set(re.findall(r"^(\w+\.py) ", text, re.M)) == scripts
    assert {f"{n}/" for n in FOLDERS} <= set(re.findall(r"^(\w+/) ", text, re.M))
    for page in PAGES[1:]:
        assert f"({page})" in text, page


def test_named_files_and_functions_exist():
    """`folder/file.py`: `name` in a table or a sentence: the file exists and defines the name."""
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", read(page), flags=re.S | re.M)
        for path in re.findall(r"`((?:\w+/)*\w+\.py)[` ]", text):
            if "/" in path and path.split("/")[0] not in (*FOLDERS, "tests"):
                continue  # a file of another project
            assert os.path.exists(os.path.join(ROOT, path)), (page, path)
        for path, names in re.findall(r"`((?:\w+/)*\w+\.py)`: ((?:`\w+`(?:, )?)+)", text):
            for name in re.findall(r"`(\w+)`", names):
                defined = rf"^( *def {name}\b|class {name}\b|{name}\b.*=)"
                assert re.search(defined, read(path), re.M), (page, path, name)


def test_readme_is_one_page_and_prose_lines_are_short():
    assert len(read("README.md").split()) <= README_WORDS
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", read(page), flags=re.S | re.M)
        for line in text.splitlines():
            assert len(line) <= 100 or line.startswith(("|", "![")), (page, line)


def source_texts() -> Iterator[str]:
    """Every string of the code, an f-string as its parts."""
    paths = [n for n in os.listdir(ROOT) if n.endswith(".py")]
    for folder in FOLDERS:
        paths += [os.path.join(folder, n) for n in os.listdir(os.path.join(ROOT, folder))
                  if n.endswith(".py")]
    for path in paths:
        for node in ast.walk(ast.parse(read(path))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_messages_of_the_troubleshooting_page_are_those_of_the_code():
    texts = list(source_texts())
    page = read("docs/troubleshooting.md")
    messages = re.findall(r"^\| `(.+?)` \|", page, re.M)
    assert len(messages) >= 30
    for message in messages:
        for part in message.split("..."):
            part = part.strip(" :;,(")
            known = any(part in text for text in texts)
            assert known, (message, part)

"""Bad input gets one sentence that names the flag or file, an exit status other than 0, and never a
stack trace."""
import dataclasses
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

import config
import train
from config import RECIPES
from runtime import checkpoint
from runtime.errors import run_command
from tests.helpers.compiling import several_devices
from tests.helpers.samples import members, photo, put, spill

TINY = "resolution=16 steps=1 batch=8 lr=1e-3"


def refusal(argv, capsys):
    """The last line that a refused command prints, checked to be one sentence of this project."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        status = run_command(train.main, argv)
    except SystemExit as end:
        status = end.code
    out, err = capsys.readouterr()
    assert status in (1, 2), (status, out, err)
    lines = [line for line in err.splitlines() if "error:" in line]
    assert lines == err.splitlines()[-1:], err
    assert "Traceback" not in out + err, err
    assert lines[0].startswith("error: "), err
    assert handlers == {s: signal.getsignal(s) for s in handlers}
    return lines[0]


@pytest.fixture
def refuse(tmp_path, capsys, monkeypatch):
    """The refusal of a command line, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *argv: refusal(list(argv), capsys)


def test_the_home_folder_is_found_where_the_shell_leaves_a_tilde(monkeypatch):
    monkeypatch.setenv("HOME", r"/home/a\1-b")
    argv = ["--data=~/a.tar,~/b~/c.tar", "--val", "~/photos", "--workdir", "runs/~/x"]
    cfg, _ = config.parse_args(argv)
    assert cfg.data == r"/home/a\1-b/a.tar,/home/a\1-b/b~/c.tar"
    assert cfg.val == r"/home/a\1-b/photos" and cfg.workdir == "runs/~/x"


@pytest.mark.parametrize("argv, message", [
    ("--color red", "unknown flag --color"),
    ("--see 1", "unknown flag --see: is --seed meant?"),
    ("--lr 3", r"unknown flag --lr \("),  # no flag is like it
    ("pictures", "the recipe pictures is now images"),
    ("l15", "invalid choice: 'l15'"),
    ("toy toy", "unrecognized arguments: toy"),
    ("--seed one", "--seed: invalid int value: 'one'"),
    ("--seed 1.5", "--seed: invalid int"),
    ("--seed", "--seed: expected one argument"),
    ("--hflip=yes", "--hflip.*ignored explicit argument 'yes'"),
    ("--hflip perhaps", "invalid choice: 'perhaps'"),
    ("--dtype float64", "--dtype: invalid choice: 'float64'"),
    ("--decoder huge", "--decoder: invalid choice"),
    ("--min-crop-area big", "--min-crop-area: invalid float"),
    ("--seed -1", "--seed -1 is out of range: at least 0"),
    ("--min-crop-area 0", "--min-crop-area 0.0 is out of range: above 0"),
    ("--min-crop-area 1.5", "--min-crop-area 1.5 is out of range"),
    ("--min-crop-area nan", "--min-crop-area nan is out of range"),
    ("--keep-ratio 0", "--keep-ratio 0.0 is out of range"),
    ("--keep-ratio 1.01", "--keep-ratio 1.01"),
    ("--max-text-len 2", "--max-text-len 2"),
    ("--workers 0", "--workers 0"),
    ("--grad-accum 0", "--grad-accum 0"),
    ("--val-samples 0", "--val-samples 0"),
    ("--weight-decay inf", "--weight-decay inf"),
    ("--grad-clip -1", "--grad-clip -1.0"),
    ("--save-every 0", "--save-every 0"),
    ("--encoder L", "--encoder.*L"),
    ("--encoder L/x", "--encoder.*L/x"),
    ("--encoder L/0", "--encoder.*L/0"),
    ("--encoder XXL/14", "--encoder.*XXL"),
    ("--num-devices 9999", "9999 devices"),
    ("--vocab-size 20", "--vocab-size"),
    ("--feature-copies 8", "--feature-copies and --image-pool are read by --objective lit alone"),
    ("--objective clip --keep-ratio 0.5", "--keep-ratio and --prefix-attention are read by"),
    ("--objective cappa --prefix-attention bidirectional", "read by --objective openvision2 alone"),
    ("--image-pool mean", "--feature-copies and --image-pool are read by --objective lit alone"),
])
def test_a_bad_flag_is_named(refuse, argv, message):
    assert re.search(message, refuse(*argv.split())), argv
    if not re.search("devices|vocab-size", argv):  # a dry run knows no devices and no captions
        assert re.search(message, refuse(*argv.split(), "--dry-run")), argv
    assert not os.path.exists("runs/toy/metrics.jsonl")


@pytest.mark.parametrize("stages, message", [
    ("", "lacks resolution, batch, lr"),
    ("  ", "lacks resolution, batch, lr"),
    ("resolution=32", "lacks batch, lr"),
    ("resolution=32 batch=8 lr=1e-3", r"lacks steps or images \(one of the two\)"),
    ("resolution=32 batch=8 lr=1e-3 steps=5 images=40", "both steps and images: give one"),
    (TINY + ",", "lacks resolution"),
    (TINY + " color=3", "'color=3' is not one of resolution="),
    (TINY + " steps=4", "'steps=4' is not one of .* each once"),
    ("32 px", "'32' is not one of"),
    (TINY.replace("=16", "=sixteen"), "'resolution=sixteen' wants a whole number"),
    (TINY.replace("=16", "=16.5"), "wants a whole number"),
    (TINY.replace("=16", "="), "'resolution=' wants a whole number"),
    (TINY.replace("=16", "=-16"), "not negative"),
    (TINY.replace("1e-3", "nan"), "'lr=nan' wants a number"),
    (TINY.replace("1e-3", "inf"), "'lr=inf' wants a number"),
    (TINY.replace("steps=1", "steps=1e400"), "'steps=1e400' wants a whole number"),
    (TINY.replace("batch=8", "batch=0"), "'batch=0' must be above 0$"),
    (TINY.replace("1e-3", "0"), "'lr=0' must be above 0$"),
    (TINY.replace("1e-3", "-1e-3"), "'lr=-1e-3' wants a number that is not negative$"),
    (TINY.replace("=16", "=0"), "'resolution=0' must be above 0$"),
    (TINY.replace("steps=1", "steps=0"), "'steps=0' must be above 0$"),
    (TINY + " images=0", "'images=0' must be above 0$"),
    (TINY + " warmup=1", r"warm-up .* must be shorter than the stage \(1 steps\)"),
    (TINY.replace("=16", "=3"),
     "resolution 3 of stage 1 is below the patch size 4 of micro/4: take 4"),
])
def test_a_bad_curriculum_is_refused_by_its_words(refuse, stages, message):
    for dry in ([], ["--dry-run"]):
        line = refuse("--stages", stages, *dry)
        assert line.startswith("error: --stages: ")
        assert re.search(message, line)


def test_a_batch_that_cannot_be_divided_is_refused(refuse):
    line = refuse("--stages", TINY, "--grad-accum", "3")
    assert re.search("batch 8 of stage 1 cannot be shared by 1 devices x 3 microbatches", line)
    assert "multiple of 3" in line


@pytest.mark.parametrize("argv, message", [
    ("l14", "--data is missing"),
    ("--data absent", "absent is no data: .*nothing of that name exists"),
    ("--data none/*.tar", r"no file matches none/\*.tar"),
    ("--data bare.tar", r"no captioned image in bare.tar: 2 without a .txt"),
    ("--data good.tar --caption-field absent",
     r"no field 'absent' \(it has re_caption, n\); name one with --caption-field"),
    ("--data good.tar --val absent.tar",
     "absent.tar cannot be read as an uncompressed tar: No such file"),
    ("--data one", "one holds 1 sample: give at least three, or validation images with --val"),
    ("--data note.txt", "note.txt is no data"),
    ("--data note.tar", "note.tar cannot be read as an uncompressed tar"),
    ("--vocab absent.txt", "--vocab: .*absent.txt"),
    ("--vocab good.tar", "--vocab: good.tar is no WordPiece vocab.txt"),
    ("--vocab note.txt", "--vocab: note.txt is no WordPiece vocab.txt: its first line must be"),
    ("--vocab one", "--vocab: one is a folder"),
    ("--vocab twice.txt", "--vocab: twice.txt lists 'a' more than once"),
    ("--vocab long.txt --vocab-size 100",
     "--vocab-size 100 is less than the 304 pieces of long.txt"),
    ("--workdir note.txt", "note.txt"),
    ("--workdir note.txt/run", "note.txt"),
    ("--workdir /proc/run", "/proc/run"),
])
def test_a_bad_file_is_named(refuse, tmp_path, argv, message):
    put("good.tar", members(4))
    put("bare.tar", [(name, content) for name, content in members(2) if name.endswith("jpg")])
    spill("one", members(1))
    for name in ("note.txt", "note.tar"):
        (tmp_path / name).write_text("a note, and no data " * 100)
    special = "[PAD]\n[BOS]\n[EOS]\n[UNK]\n"
    (tmp_path / "twice.txt").write_text(special + "a\na\n")
    (tmp_path / "long.txt").write_text(special + "\n".join(f"w{i}" for i in range(300)))
    recipe = [] if argv == "l14" else ["--stages", TINY]
    line = refuse(*argv.split(), *recipe)
    assert re.search(message, line)
    assert len(line) < 400


def test_a_run_with_other_settings_or_broken_checkpoints_is_not_changed(refuse, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    path = folder / "step-00000001.npz"
    path.write_bytes(b"PK damaged")
    line = refuse("--stages", TINY, "--workdir", "run")
    assert "every checkpoint in run is damaged: delete the folder" in line
    settings = dataclasses.asdict(RECIPES["toy"]) | {"stages": TINY, "seed": 3}
    meta = {"step": 1, "config": settings, "data": {"training data": "scenes"}}
    checkpoint.save(str(path), {}, meta)
    line = refuse("--stages", TINY, "--workdir", "run")
    assert "run holds a run with other settings: --seed is 0, was 3" in line
    assert os.listdir(folder) == [path.name]


@pytest.mark.parametrize("num_tars", [16, 17])
def test_a_run_with_another_order_of_samples_is_not_continued(refuse, tmp_path, num_tars):
    """A checkpoint without the name of its order is from when more than 16 tars were shuffled in
    windows."""
    for n in range(num_tars):
        put(tmp_path / f"{n:02}.tar", members(2, start=2 * n))
    (tmp_path / "run").mkdir()
    meta = {"step": 1, "config": {}, "data": {"held-out data": "other"}}
    checkpoint.save(str(tmp_path / "run" / "step-00000001.npz"), {}, meta)
    line = refuse("images", "--stages", TINY, "--data", "*.tar", "--workdir", "run")
    assert re.search("run holds a run with other settings: .*the validation data is .*, "
                     "was other", line)
    moved = "the order of the training data is shuffled whole, was shuffled in windows of 16 tars"
    assert (moved in line) == (num_tars > 16)


def test_bad_input_in_a_process_of_its_own(tmp_path):
    """Neither jax, tqdm nor threads add a stack trace, or hang, at the end of the process."""
    files = []
    for i in range(4):
        files += [(f"{i}.png", b"no image"), (f"{i}.txt", b"a cat")]
    spill(tmp_path / "broken", files)
    photo().save(tmp_path / "photo.png")
    twelve = TINY.replace("batch=8", "batch=12")
    commands = [  # arguments, CPU devices, status, message
        (["--stages", twelve], 8, 1, "batch 12 of stage 1 cannot be shared by 8"),
        (["--stages", TINY, "--data", "broken"], 1, 1, "no sample in the data can be used"),
        (["--data", "photo.png"], 1, 1, "photo.png is no data"),
        (["--flavor", "sweet"], 1, 2, "unknown flag --flavor"),
    ]

    def run(command):
        argv, num_devices, _, _ = command
        argv = [*argv, "--workdir", f"run-{commands.index(command)}"]  # one process per folder
        env = several_devices(num_devices) | {"JAX_PLATFORMS": "cpu"}
        script = os.path.abspath(train.__file__)
        return subprocess.run([sys.executable, script, *argv], cwd=tmp_path, env=env,
                              capture_output=True, text=True, timeout=120)

    with ThreadPoolExecutor(2) as pool:
        for (_, _, status, message), done in zip(commands, pool.map(run, commands)):
            assert done.returncode == status, done.stderr
            assert message in done.stderr.splitlines()[-1], done.stderr
            assert done.stderr.count("error:") == 1
            assert "Traceback" not in done.stderr + done.stdout


def test_a_run_continues_only_with_settings_that_change_no_number():
    assert {
        "grad_accum", "remat", "loss_chunk", "scan_unroll", "zero1", "num_devices", "distributed",
        "workdir", "cache_dir", "cache_gb", "workers", "worker_processes", "log_every",
        "eval_every", "save_every", "keep_checkpoints", "keep_every", "max_bad_fraction",
        "tensorboard", "profile"} == config.RESUMABLE

"""Any bytes as a vocabulary or a checkpoint, any text, any command line: only documented errors, no
hang, and little memory whatever sizes they claim."""
import contextlib
import io
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import config
from inputs import tokenizer
from inputs.tokenizer import BOS, EOS, PAD
from objectives import registry
from runtime import checkpoint
from runtime.errors import CheckpointError, ConfigError
from tests.helpers.properties import EVERY, FEW, MORE, at_most_a_gigabyte, file, mutated
from tests.helpers.samples import TOK

pytestmark = pytest.mark.usefixtures(at_most_a_gigabyte.__name__)

HARD_CHARACTERS = st.sampled_from("aé.猫 \n\t\r\u0301\u2028\x85\ud800ςΣİ##[]")
ANY_TEXT = st.text(st.characters(), max_size=80) | st.text(HARD_CHARACTERS, max_size=80)


@MORE
@given(ANY_TEXT, st.integers(3, 40))
def test_any_text_is_encoded_and_a_vocabulary_built_of_it_gives_it_back(text, length):
    ids = TOK.encode(text, length)
    end = ids.tolist().index(EOS)
    assert ids.shape == (length,)
    assert ids[0] == BOS
    assert (ids[end + 1:] == PAD).all()
    assert ids.max() < len(TOK)
    own = tokenizer.train_vocab([text], 5000)
    words = tokenizer.basic_tokenize(text)
    if all(len(w) <= tokenizer.MAX_WORD_CHARS for w in words):
        assert "".join(own.decode(own.encode(text, 400)).split()) == "".join(words)
    with file(b"", ".txt") as path:
        own.save(path)
        assert tokenizer.load(path).pieces == own.pieces


@EVERY
@given(st.lists(st.integers(0, 1 << 20), max_size=30))
def test_any_ids_are_decoded(ids):
    assert isinstance(TOK.decode(ids), str)


@EVERY
@given(st.binary(max_size=200) | mutated(b"[PAD]\n[BOS]\n[EOS]\n[UNK]\na\n##b\n\xe7\x8c\xab\n")
       | st.lists(ANY_TEXT).map(lambda t: "\n".join(t).encode("utf-8", "replace")))
def test_any_bytes_as_a_vocabulary(content):
    with file(content, ".txt") as path, contextlib.suppress(ValueError):
        tokenizer.load(path).encode("a cab", 9)


FLAGS = [config.flag(name) for name in config.FIELDS]
FLAGS += ["--dry-run", "--no-hflip", "--nothing", "-x", "--"]
VALUES = (st.text(max_size=12) | st.integers().map(str) | st.floats().map(str)
          | st.sampled_from([*config.RECIPES, "L/14", "micro/8", "true", "1e999"]))
FLAG_VALUES = st.builds("{}={}".format, st.sampled_from(FLAGS), VALUES)
NUMBERS = (st.integers(-9, 1 << 70).map(str) | st.floats().map(str)
           | st.text("0123456789.e+-_ nafi", max_size=8))
SETTINGS = ["resolution", "steps", "images", "batch", "lr", "warmup", "x"]
WORDS = st.builds("{}={}".format, st.sampled_from(SETTINGS), NUMBERS)
STAGES = st.lists(st.lists(WORDS, max_size=7).map(" ".join), max_size=3).map(",".join)


@EVERY
@given(st.lists(st.sampled_from(FLAGS) | VALUES | FLAG_VALUES, max_size=6))
def test_any_command_line(argv):
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            cfg, _ = config.parse_args(argv)
            config.validate(cfg)
        except SystemExit as end:
            assert end.code == 0 or (end.code == 2 and "error: " in errors.getvalue())
        except ConfigError as problem:
            assert str(problem).strip()


@MORE
@given(STAGES | st.text(max_size=60))
def test_any_curriculum(text):
    with contextlib.suppress(ConfigError):
        cfg = config.Config(stages=text)
        config.validate(cfg)
        registry.run_summary(cfg)


def saved():
    with file(b"", ".npz") as path:
        arrays = {"a": np.arange(300, dtype=np.float32), "b": {"c": np.ones((3, 4), np.int32)}}
        checkpoint.save(path, arrays, {"step": 3})
        with open(path, "rb") as f:
            return f.read()


def bundle(**arrays):
    target = io.BytesIO()
    np.savez(target, **arrays)
    return target.getvalue()


CHECKPOINT = saved()
META = np.frombuffer(b'{"step": 1, "bits": {}}', np.uint8)


ANY_META = (st.binary(max_size=60)
            | st.text(max_size=30).map(lambda text: f'{{"bits": {text}}}'.encode()))
BUNDLES = ANY_META.map(lambda meta: bundle(meta=np.frombuffer(meta, np.uint8)))


@MORE
@given(mutated(CHECKPOINT) | st.binary(max_size=300) | BUNDLES)
def test_any_bytes_as_a_checkpoint(content):
    with file(content, ".npz") as path:
        try:
            arrays, meta = checkpoint.load(path)
        except CheckpointError as problem:
            assert path in str(problem)
            return
        assert isinstance(arrays, dict) and isinstance(meta, dict)


@FEW
@given(st.integers(1 << 28, 1 << 62), st.sampled_from(["f4", "O", "U9", "V3", "i8,f4"]))
def test_a_checkpoint_that_claims_to_be_huge_is_refused_in_little_memory(count, kind):
    claim = io.BytesIO()
    dtype = np.lib.format.dtype_to_descr(np.dtype(kind))
    fields = {"descr": dtype, "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(claim, fields)
    real, forged = bundle(a=np.zeros(0, np.float32), meta=META), io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(real)) as old, zipfile.ZipFile(forged, "w") as new:
        for name in old.namelist():
            new.writestr(name, claim.getvalue() + bytes(64) if name == "a.npy" else old.read(name))
    with file(forged.getvalue(), ".npz") as path, pytest.raises(CheckpointError):
        checkpoint.load(path)

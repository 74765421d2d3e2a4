"""Whatever the bytes: the documented errors and no others, no hang, and no memory that a few bytes have asked for."""
import contextlib
import io
import itertools
import json
import os
import resource
import tempfile
import zipfile
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import config
from data import LaneShuffle
from decoder import BOS, EOS, PAD
from inputs import files, sources, tar_headers, tar_index, tokenizer
from inputs.images import decode_and_augment
from objectives import registry
from runtime import checkpoint
from runtime.errors import BadSample, CheckpointError, ConfigError, DataError
from tests.helpers.samples import AT, BOMB, HEADER, TAR, TOK, J, encoded, mended, photo

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
EVERY = settings(derandomize=True, database=None, deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
MORE, FEW = settings(EVERY, max_examples=400), settings(EVERY, max_examples=40)


@pytest.fixture(autouse=True)
def no_more_than_a_gigabyte():
    """What is asked for beyond that fails, and so do the tests where it is no documented error."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as f:
        now = int(f.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + (1 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@st.composite
def mutated(draw, whole, first=0, last=None):
    """`whole` with some bytes changed, cut out or put in, all within first..last."""
    last = len(whole) if last is None else last
    for _ in range(draw(st.integers(1, 4))):
        if last <= first:  # all of it has been cut out
            break
        at = draw(st.integers(first, last - 1))
        new, kind = draw(st.binary(min_size=1, max_size=40)), draw(st.sampled_from(["over", "over", "out", "in"]))
        gone = min({"over": len(new), "out": draw(st.integers(1, 2000)), "in": 0}[kind], last - at)
        new = b"" if kind == "out" else new[:gone] if kind == "over" else new
        whole, last = whole[:at] + new + whole[at + gone:], last + len(new) - gone
    return whole


@contextlib.contextmanager
def file(content, suffix=".tar"):
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "x" + suffix)
        with open(path, "wb") as f:
            f.write(content)
        yield path


HEADERS = st.builds(lambda name, size, kind: mended(mended(mended(HEADER, 0, name.ljust(100, b"\0")), 124, size.ljust(12, b"\0")), 156, kind),
                    st.sampled_from([b"0.jpg", b"0.txt", b"1.png", b"1.json", b"", b"x"]) | st.binary(max_size=100),
                    st.integers(0, 3000).map(lambda n: b"%o" % n) | st.integers(0, 1 << 90).map(lambda n: b"\x80" + n.to_bytes(12, "big")[1:])
                    | st.binary(max_size=12),
                    st.sampled_from([bytes([b]) for b in b"0\x001234567xgLKSZ"]))
RECORDS = st.binary(max_size=60) | st.builds(lambda n, k, v: b"%d %s=%s\n" % (n, k, v),
                                             st.integers(0, 99), st.sampled_from([b"path", b"size"]), st.binary(max_size=9))
BLOCKS = st.lists(HEADERS | st.just(bytes(512)) | st.lists(RECORDS, max_size=9).map(lambda r: b"".join(r)[:512].ljust(512, b"\0"))
                  | st.binary(max_size=700), max_size=12)


@MORE
@given(st.binary(max_size=3000) | mutated(TAR) | BLOCKS.map(b"".join))
def test_any_bytes_as_a_tar(content):
    with file(content) as path:
        try:
            found = tar_index.scan_tar(path)
        except ValueError:
            return
        rows = found.rows.reshape(-1, 3, 2)
        assert rows.min(initial=0) >= 0 and (rows.sum(-1) <= len(content)).all()
        assert (rows[:, 0, 0] > 0).all() and found.meta["pairs"]["txt"][0] == (rows[:, 1, 0] > 0).sum()
        assert all(n > 0 for n in found.meta["skipped"].values())
        try:
            source = sources.open_source(path)
        except DataError as problem:
            assert "\n" not in str(problem)
            return
        for i in range(len(source)):
            with contextlib.suppress(BadSample):
                assert source.caption(i).strip()
                decode_and_augment(source.image(i), 8)


@MORE
@given(mutated(TAR, J.offset, AT["000000003.jpg"].offset))
def test_damage_inside_one_sample_costs_no_other(content):
    with file(content) as path:
        found = tar_index.scan_tar(path).rows
    images = {content[at:at + size] for at, size in found[:, :2].tolist()}
    texts = {content[at:at + size] for at, size in found[:, 2:4].tolist()}
    for i in (0, 1, 3, 4):
        member = AT[f"{i:09d}.jpg"]
        assert TAR[member.offset_data:member.offset_data + member.size] in images and b"a cat %d" % i in texts


@EVERY
@given(st.binary(max_size=400) | st.lists(RECORDS, max_size=9).map(b"".join))
def test_any_bytes_as_an_extended_header(content):
    assert all(len(k) + len(v) < len(content) for k, v in tar_headers.parse_pax(content).items())


@EVERY
@given(st.data())
def test_any_bytes_as_an_index(data):
    with file(TAR) as path:
        os.utime(path, (0, 0))
        whole = tar_index.scan_tar(path)
        tar_index.save_index(path, whole)
        with open(path + tar_index.INDEX_SUFFIX, "rb") as f:
            index = f.read()
        with open(path + tar_index.INDEX_SUFFIX, "wb") as f:
            f.write(data.draw(mutated(index) | st.binary(max_size=300)))
        source = sources.open_source(path)
        assert [source.caption(i) for i in range(len(source))] == [f"a cat {i}" for i in range(5)]


LEAVES = st.none() | st.booleans() | st.floats() | st.integers() | st.text(st.characters(), max_size=9)
VALUES_OF_JSON = LEAVES | st.lists(LEAVES, max_size=3) | st.dictionaries(st.sampled_from("cd"), LEAVES | st.dictionaries(st.sampled_from("cd"), LEAVES))
PICTURES = [encoded(photo(), kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")] + [BOMB]


@MORE
@given(st.sampled_from(PICTURES).flatmap(mutated) | st.binary(max_size=200), st.booleans())
def test_any_bytes_as_a_picture(content, head):
    with file(encoded(photo())[:8] + content if head else content, ".jpg") as path:
        with open(path.replace(".jpg", ".txt"), "w") as f:
            f.write("a cat")
        source = sources.open_source(os.path.dirname(path))
        with contextlib.suppress(BadSample):
            assert decode_and_augment(source.image(0), 8).shape == (8, 8, 3)


@EVERY
@given(st.binary(max_size=60) | st.text(max_size=20).map(str.encode) | VALUES_OF_JSON.map(lambda x: json.dumps(x).encode()), st.sampled_from(["txt", "c"]))
def test_any_bytes_as_a_caption(content, field):
    with file(encoded(photo()), ".png") as path:
        with open(path.replace(".png", ".txt" if field == "txt" else ".json"), "wb") as f:
            f.write(content)
        with contextlib.suppress(DataError):
            caption = sources.open_source(os.path.dirname(path), field).caption(0)
            assert caption.strip() and caption.encode()


SIZES = st.lists(st.integers(0, 9), min_size=1, max_size=60).filter(any)


@EVERY
@given(SIZES, st.integers(0, 99), st.integers(0, 3), st.integers(1, 9), st.integers(0, 5))
def test_every_epoch_is_a_permutation_with_few_runs_in_use(sizes, seed, epoch, lanes, run):
    starts = np.cumsum([0, *sizes])
    n, run_of = int(starts[-1]), None

    def in_runs(samples):
        return (samples - starts[np.searchsorted(starts, samples, side="right") - 1]) // run
    if run:
        run_of = in_runs
    with mock.patch("inputs.tars.NUM_LANES", lanes):
        order = LaneShuffle(starts, seed, run_of)
        found = [order(epoch * n + i) for i in range(n)]
        assert found == [LaneShuffle(starts, seed, run_of)(epoch * n + i) for i in range(n)]
    assert sorted(found) == list(range(n))
    if run:
        samples = np.array(found)
        shard = np.searchsorted(starts, samples, side="right") - 1
        used = list(zip(shard.tolist(), in_runs(samples).tolist()))
        for lane in range(lanes):  # each lane leaves a run when it has used it
            turns = [key for key, _ in itertools.groupby(used[lane::lanes])]
            assert len(turns) == len(set(turns))
            tars = [key for key, _ in itertools.groupby(s for s, _ in turns)]
            assert len(tars) == len(set(tars))
        reads = sum(len(set(used[lane::lanes])) for lane in range(lanes))
        assert reads <= len(set(used)) + lanes - 1  # only a run that two lanes share is read twice


@EVERY
@given(SIZES, st.data())
def test_what_is_left_out_and_the_rest_are_the_whole(sizes, data):
    whole = files.FileSource("x", "txt")
    whole.starts = np.cumsum([0, *sizes])
    out = np.array(data.draw(st.lists(st.integers(0, len(whole) - 1), unique=True)), np.int64)
    rest = sources.Complement(whole, out)
    kept = [rest.source_index(i) for i in range(len(rest))]
    assert kept == sorted(set(range(len(whole))) - set(out.tolist()))
    assert np.diff(rest.starts).tolist() == [sum(a <= k < b for k in kept) for a, b in zip(whole.starts, whole.starts[1:])]


ANY_TEXT = st.text(st.characters(), max_size=80) | st.text(st.sampled_from("aé.猫 \n\t\r\u0301\u2028\x85\ud800ςΣİ##[]"), max_size=80)


@MORE
@given(ANY_TEXT, st.integers(3, 40))
def test_any_text_is_encoded_and_a_vocabulary_built_of_it_gives_it_back(text, length):
    ids = TOK.encode(text, length)
    end = ids.tolist().index(EOS)
    assert ids.shape == (length,) and ids[0] == BOS and (ids[end + 1:] == PAD).all() and ids.max() < len(TOK)
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


FLAGS = ["--" + name.replace("_", "-") for name in config.Config.__dataclass_fields__] + ["--dry-run", "--no-hflip", "--nothing", "-x", "--"]
VALUES = st.text(max_size=12) | st.integers().map(str) | st.floats().map(str) | st.sampled_from([*config.RECIPES, "L/14", "micro/8", "true", "1e999"])
NUMBERS = st.integers(-9, 1 << 70).map(str) | st.floats().map(str) | st.text("0123456789.e+-_ nafi", max_size=8)
WORDS = st.builds("{}={}".format, st.sampled_from(["resolution", "steps", "images", "batch", "lr", "warmup", "x"]), NUMBERS)
STAGES = st.lists(st.lists(WORDS, max_size=7).map(" ".join), max_size=3).map(",".join)


@EVERY
@given(st.lists(st.sampled_from(FLAGS) | VALUES | st.builds("{}={}".format, st.sampled_from(FLAGS), VALUES), max_size=6))
def test_any_command_line(argv):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            cfg, _ = config.parse_args(argv)
            config.validate(cfg)
        except SystemExit as end:
            assert end.code == 0 or (end.code == 2 and "error: " in said.getvalue())
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
        checkpoint.save(path, {"a": np.arange(300, dtype=np.float32), "b": {"c": np.ones((3, 4), np.int32)}}, {"step": 3})
        with open(path, "rb") as f:
            return f.read()


def bundle(**arrays):
    held = io.BytesIO()
    np.savez(held, **arrays)
    return held.getvalue()


CHECKPOINT = saved()
META = np.frombuffer(b'{"step": 1, "bits": {}}', np.uint8)


@MORE
@given(mutated(CHECKPOINT) | st.binary(max_size=300) | st.binary(max_size=60).map(lambda b: bundle(meta=np.frombuffer(b, np.uint8)))
       | st.text(max_size=30).map(lambda t: bundle(meta=np.frombuffer(f'{{"bits": {t}}}'.encode(), np.uint8))))
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
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": np.lib.format.dtype_to_descr(np.dtype(kind)), "fortran_order": False, "shape": (count,)})
    real = bundle(a=np.zeros(0, np.float32), meta=META)
    held = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(real)) as old, zipfile.ZipFile(held, "w") as new:
        for name in old.namelist():
            new.writestr(name, head.getvalue() + bytes(64) if name == "a.npy" else old.read(name))
    with file(held.getvalue(), ".npz") as path, pytest.raises(CheckpointError):
        checkpoint.load(path)

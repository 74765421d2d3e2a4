"""Parquet: the same samples as in tars, row groups of any size in bounded memory, a cache that can
be deleted at any time, and broken files and rows that cost no good sample."""
import contextlib
import dataclasses
import io
import itertools
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given

from config import RECIPES
from data import Loader
from inputs import opening, order, parquet, parquet_groups, tars
from inputs.files import ReadOptions, choose_first
from inputs.opening import vocab_captions
from inputs.sources import open_source, train_val_split
from runtime.errors import BadSample, ConfigError, DataError
from tests.helpers.paths import ROOT, python
from tests.helpers.properties import FEW, file, mutated
from tests.helpers.samples import (
    TOK,
    TRAINING,
    encoded,
    members,
    photo,
    put,
    reader,
    sample,
    spill,
)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def row(i):
    return {"image": {"bytes": sample(i)["jpg"], "path": f"{i}.jpg"}, "caption": f"a cat {i}",
            "all": [f"a cat {i}{n}" for n in range(4)],
            "turns": [{"user": "what?", "answer": f"a cat {i}"}]}


def write(path, rows, group_size=20, **options):
    path.parent.mkdir(exist_ok=True)
    table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows)
    pq.write_table(table, path, row_group_size=group_size, **options)
    return str(path)


def used(source, count=None):
    return sorted(reader(source).batch(range(count or len(source)), 8)["sample"].tolist())


# ---------------------------------------------------------------------------------- what is read
def test_parquet_and_tars_give_the_same_batches(tmp_path):
    """Where groups and tars divide the samples equally, so that the order is the same."""
    for n in range(3):
        numbers = range(20 * n, 20 * n + 20)
        write(tmp_path / f"{n}.parquet", [row(i) for i in numbers])
        put(tmp_path / f"{n}.tar", members(20, 20 * n))
    a = reader(open_source(str(tmp_path / "{0..2}.parquet"), "caption"))
    b = reader(open_source(str(tmp_path / "*.tar")))
    for start in (0, 60, 150):
        first, second = (loader.batch(range(start, start + 60), 16) for loader in (a, b))
        assert not first["bad"]
        assert all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("field, image", [("caption", "image"), ("turns.answer", "image"),
                                          ("caption", "image.bytes"), ("all", "image")])
def test_columns_are_found_by_dotted_name(tmp_path, field, image):
    where = write(tmp_path / "a.parquet", [row(i) for i in range(30)])
    source = open_source(where, field, options=ReadOptions(image))
    assert source.caption(25).startswith("a cat 25")
    assert used(source) == list(range(30))
    assert source.name(25) == f"{where} row 25"


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view(),
                                  pa.list_(pa.binary())])
def test_plain_bytes_and_other_types_of_columns(tmp_path, kind):
    images = [sample(i)["jpg"] for i in range(9)]
    values = [[image] for image in images] if pa.types.is_list(kind) else images
    captions = pa.array([f"a cat {i % 2}" for i in range(9)]).dictionary_encode()
    table = pa.table({"jpg": pa.array(values, kind), "my.caption": captions})
    source = open_source(write(tmp_path / "a.parquet", table), "my.caption",
                         options=ReadOptions("jpg"))
    assert [source.caption(i) for i in range(2)] == ["a cat 0", "a cat 1"]
    assert used(source) == list(range(9))
    assert source.image(3).size == (48, 36)


def test_one_caption_of_a_list_is_drawn_in_each_epoch(tmp_path):
    source = open_source(write(tmp_path / "a.parquet", [row(i) for i in range(6)]), "all")
    assert source.caption(2) == "a cat 20"
    numbers = {TOK.encode(f"a cat {i}{n}", 12).tobytes(): n for i in range(6) for n in range(4)}
    drawn = [numbers[text.tobytes()] for text in reader(source).batch(range(120), 8)["text"]]
    assert set(drawn) == {0, 1, 2, 3}
    again = reader(source, workers=4).batch(range(60, 120), 8)
    assert [numbers[text.tobytes()] for text in again["text"]] == drawn[60:]
    both = Loader(open_source(source.where, "caption", options=ReadOptions(alt_field="all")), TOK,
                  12, 0, TRAINING, 2, alt_field="all").batch(range(24), 8)
    assert len({text.tobytes() for text in both["alt"]}) > 12


def test_fingerprints_follow_the_content_and_not_the_name(tmp_path):
    rows = [row(i) for i in range(9)]
    first = open_source(write(tmp_path / "a.parquet", rows), "caption").fingerprint()
    assert open_source(write(tmp_path / "b.parquet", rows), "caption").fingerprint() == first
    rows[4]["caption"] = "a dog"
    assert open_source(write(tmp_path / "a.parquet", rows), "caption").fingerprint() != first


def test_captions_are_read_without_images(tmp_path, monkeypatch):
    where = write(tmp_path / "a.parquet", [row(i) for i in range(50)])
    monkeypatch.setattr(parquet_groups, "unpack", None)
    source = open_source(where, "caption")
    assert list(vocab_captions(source)) == [f"a cat {i}" for i in range(50)]
    monkeypatch.undo()
    monkeypatch.setattr(parquet, "MAX_CAPTION_BYTES", 0)  # then they come with the images
    assert list(vocab_captions(open_source(where, "caption"))) == [f"a cat {i}" for i in range(50)]


# ------------------------------------------------------------------------- order, memory, cache
def open_large(tmp_path, monkeypatch, **options):
    """600 samples in row groups of 50 that do not fit in the memory for reading: 4 lanes."""
    monkeypatch.setattr(tars, "MAX_SHUFFLE_BYTES", 1 << 18)
    monkeypatch.setattr(order, "NUM_LANES", 4)
    if not (tmp_path / "0.parquet").exists():
        for n in range(3):
            rows = [row(i) for i in range(200 * n, 200 * n + 200)]
            write(tmp_path / f"{n}.parquet", rows, 50)
    return open_source(str(tmp_path / "*.parquet"), "caption", options=ReadOptions(**options))


def test_each_group_is_unpacked_once_per_epoch_and_each_sample_used_once(tmp_path, monkeypatch):
    source = open_large(tmp_path, monkeypatch)
    unpacked = []
    plain = parquet_groups.unpack

    def counting(storage, path, footer, group, *args):
        unpacked.append((path, group))
        plain(storage, path, footer, group, *args)
    monkeypatch.setattr(parquet_groups, "unpack", counting)
    assert 1 < source.chunk_length < 50
    assert used(source) == list(range(600))
    assert len(unpacked) == len(set(unpacked)) == 12
    train, _ = train_val_split(open_large(tmp_path, monkeypatch), 60)
    shares = [reader(train).batch(range(k, 540, 2), 8)["sample"] for k in range(2)]
    assert sorted(itertools.chain(*shares)) == list(range(540))
    assert len(unpacked) == 12  # it is all in the cache


def test_a_small_cache_is_kept_to_its_limit_and_costs_no_sample(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"keeps 4 of them in the cache: set --cache-gb"):
        open_large(tmp_path, monkeypatch, cache_gb=1e-6)
    limit = 450_000  # six of the twelve groups
    source = open_large(tmp_path, monkeypatch, cache_gb=limit / 1e9)
    loader = reader(source)
    for start in range(0, 600, 50):
        batch = loader.batch(range(start, start + 50), 8)
        assert not batch["bad"]
        sizes = [size for _, size, _ in source.disk.entries()]
        assert sum(sizes) <= limit
    assert sorted(loader.bad) == []


def test_the_cache_may_vanish_or_be_damaged_at_any_time(tmp_path, monkeypatch):
    source = open_large(tmp_path, monkeypatch)
    expected = reader(source).batch(range(300), 8)
    for damage in (os.remove, lambda path: os.truncate(path, 99)):
        again = open_large(tmp_path, monkeypatch)
        loader = reader(again)
        parts = []
        for start in range(0, 300, 50):
            parts.append(loader.batch(range(start, start + 50), 8))
            for _, _, path in again.disk.entries():
                damage(path)
            again.rows.cache_clear()
        assert not loader.bad
        images = np.concatenate([part["images"] for part in parts])
        assert np.array_equal(images, expected["images"])


def test_two_processes_may_delete_the_same_damaged_group(tmp_path, monkeypatch):
    source = open_source(write(tmp_path / "in" / "a.parquet", [row(0), row(1)]), "caption")
    read_rows = parquet_groups.read_rows

    def read_and_lose(path):
        """As if it were damaged, and another process were faster."""
        os.remove(path)
        monkeypatch.setattr(parquet_groups, "read_rows", read_rows)
    source.unpack(0)
    monkeypatch.setattr(parquet_groups, "read_rows", read_and_lose)
    assert len(source.load_rows(0)) == 2


def test_full_or_forbidden_cache_is_one_sentence(tmp_path, monkeypatch):
    where = write(tmp_path / "a.parquet", [row(i) for i in range(9)])
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "a" / "b", "/proc/cache"):
        source = open_source(where, "caption", options=ReadOptions(cache_dir=str(folder)))
        with pytest.raises(DataError, match=r"cannot be written to .*--cache-dir"):
            source.image(0)
    source = open_source(where, "caption", options=ReadOptions(cache_dir=str(tmp_path / "full")))

    def fail(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(parquet_groups, "unpack", fail)
    with pytest.raises(DataError, match="is full: make room"):
        source.image(0)


def test_what_a_killed_process_left_is_deleted_later(tmp_path):
    source = open_source(write(tmp_path / "a.parquet", [row(i) for i in range(9)]), "caption")
    source.image(0)
    left = f"{source.disk.path(source.key(0))}.{'0' * 32}.part"
    photo().save(tmp_path / "cache" / "openvision2" / "mine.png")
    for age, remains in ((10, True), (9999, False)):
        with open(left, "w") as file:
            file.write("half")
        os.utime(left, (os.stat(left).st_mtime - age,) * 2)
        source.disk.entries()
        assert os.path.exists(left) == remains
    source.disk.limit = source.disk.added = 0
    source.disk.delete_oldest(1, "")
    assert source.disk.entries() == []
    assert os.listdir(tmp_path / "cache" / "openvision2").count("mine.png") == 1


def test_a_group_of_any_size_takes_little_memory(tmp_path):
    """One row group of 120 MB in pages of 4 MB."""
    blob = np.random.default_rng(0).bytes(120_000)
    image = encoded(photo(), "JPEG") + blob
    table = pa.table({"image": pa.array([image] * 1000), "caption": ["a cat"] * 1000})
    where = write(tmp_path / "a.parquet", table, 1000, use_dictionary=False, write_batch_size=32,
                  data_page_size=1 << 20)
    code = """
import resource, sys
from inputs import parquet_groups
from inputs.sources import open_source
source = open_source(sys.argv[1], "caption")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
source.image(500).load()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    assert int(python(code, where)) < 50_000  # kB


# ---------------------------------------------------------------------------------------- faults
GOOD = [0, 1, 3, 4]
# kind: (changes to row 2, reason)
ROWS = {
    "null image": ({"image": None}, "no image: image is null"),
    "image without bytes": ({"image": {"bytes": None, "path": "x.jpg"}}, "no image"),
    "noise": ({"image": {"bytes": b"\0\1" * 99, "path": ""}}, "image cannot be opened"),
    "empty image": ({"image": {"bytes": b"", "path": ""}}, "image cannot be opened"),
    "null caption": ({"caption": None}, "caption is empty"),
    "blank caption": ({"caption": " \n"}, "caption is empty"),
}


@pytest.mark.parametrize("kind", ROWS)
def test_a_broken_row_is_replaced_and_counted(tmp_path, kind):
    change, reason = ROWS[kind]
    rows = [row(i) | (change if i == 2 else {}) for i in range(5)]
    loader = reader(open_source(write(tmp_path / "a.parquet", rows), "caption"))
    batch = loader.batch(range(10), 8)
    assert set(batch["sample"].tolist()) == set(GOOD)
    assert list(batch["bad"]) == [2] and reason in batch["bad"][2]


@pytest.mark.parametrize("caption", [[], [None], [" "], None])
def test_a_list_without_text_is_counted(tmp_path, caption):
    rows = [row(i) | ({"all": caption} if i == 2 else {}) for i in range(5)]
    source = open_source(write(tmp_path / "a.parquet", rows), "all")
    assert "caption" in reader(source).batch(range(5), 8)["bad"][2]


def test_text_that_is_not_utf8_is_counted(tmp_path):
    captions = pa.array([b"a cat", b"a cat", b"\xff\xfe", b"a cat", b"a cat"]).view("string")
    table = pa.table({"image": [sample(i)["jpg"] for i in range(5)], "caption": captions})
    source = open_source(write(tmp_path / "a.parquet", table), "caption")
    assert reader(source).batch(range(5), 8)["bad"] == {2: "caption is not UTF-8 text"}


def test_damage_in_a_row_group_costs_only_its_rows(tmp_path):
    where = write(tmp_path / "a.parquet", [row(i) for i in range(60)], 20, compression="none")
    content = bytearray(open(where, "rb").read())
    chunk = pq.read_metadata(where).row_group(1).column(0)
    content[chunk.data_page_offset:chunk.data_page_offset + 40] = b"\xff" * 40
    (tmp_path / "a.parquet").write_bytes(content)
    loader = reader(open_source(where, "caption"))
    batch = loader.batch(range(60), 8)
    assert {0, 19, 40, 59} <= set(batch["sample"].tolist())
    assert set(batch["bad"]) == set(range(20, 40))
    assert all("row group is damaged" in why for why in batch["bad"].values())


def changed(where, change):
    with open(where, "rb") as file:
        content = file.read()
    with open(where, "wb") as file:
        file.write(change(content))


FILES = {
    "empty": (lambda b: b"", "the file is empty"),
    "cut off": (lambda b: b[:-200], "no parquet footer at its end"),
    "two bytes": (lambda b: b[:2], "the file is cut off"),
    "footer too long": (lambda b: b[:-8] + b"\xff\xff\xff\x7fPAR1", "its footer is damaged"),
    "footer of noise": (lambda b: b[:-300] + bytes(range(100)) * 2 + b[-100:-8] + b[-8:],
                        "its footer is damaged"),
    "encrypted": (lambda b: b[:-4] + b"PARE", "it is encrypted"),
    "html": (lambda b: b"<html>404</html>" * 9, "no parquet footer"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_broken_file_is_counted_and_alone_refused(tmp_path, kind):
    change, reason = FILES[kind]
    write(tmp_path / "0.parquet", [row(i) for i in range(9)])
    changed(write(tmp_path / "1.parquet", [row(i) for i in range(9)]), change)
    source = open_source(str(tmp_path / "*.parquet"), "caption")
    assert len(source) == 9
    why, = source.skipped
    assert reason in why and "1.parquet" in why
    with pytest.raises(DataError, match=reason) as problem:
        open_source(str(tmp_path / "1.parquet"), "caption")
    assert "\n" not in str(problem.value)


def small_file():
    file = io.BytesIO()
    rows = [{"image": sample(i)["jpg"], "caption": [f"a cat {i}"]} for i in range(4)]
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=2)
    return file.getvalue()


SMALL = small_file()
FOOTER = len(SMALL) - 8 - int.from_bytes(SMALL[-8:-4], "little")


@FEW
@given(mutated(SMALL) | mutated(SMALL, FOOTER))
def test_any_bytes_as_a_parquet_file(content):
    """Only documented errors, of one line."""
    with file(content, ".parquet") as path:
        options = ReadOptions(cache_dir=os.path.join(os.path.dirname(path), "cache"))
        try:
            source = open_source(path, "caption", options=options)
            for i in range(min(len(source), 99)):
                with contextlib.suppress(BadSample):
                    source.sample(i, [""], choose_first)
        except DataError as problem:
            assert "\n" not in str(problem)


REFUSED = [
    ("absent", "image", r"no column 'absent' \(it has image, caption, all, turns, n\)"),
    ("n", "image", "'n' holds int64, not text"),
    ("image", "image", "not text"),
    ("turns.none", "image", r"no field 'none' .*user, answer"),
    ("caption", "absent", "no column 'absent' .*--image-field"),
    ("caption", "caption", "holds string, not the bytes of images"),
    ("caption:0", "image", "weights above 0"),
]


@pytest.mark.parametrize("field, image, message", REFUSED)
def test_wrong_columns_are_one_sentence(tmp_path, field, image, message):
    where = write(tmp_path / "a.parquet", [row(i) | {"n": i} for i in range(3)])
    with pytest.raises(Exception, match=message) as problem:
        open_source(where, field, options=ReadOptions(image))
    assert "\n" not in str(problem.value)


def test_no_rows_no_files_and_a_folder_of_parquet_are_one_sentence(tmp_path):
    table = pa.Table.from_pylist([row(0)])
    with pytest.raises(DataError, match="has no rows"):
        open_source(write(tmp_path / "a" / "0.parquet", table[:0]), "caption")
    with pytest.raises(DataError, match="no file matches"):
        open_source(str(tmp_path / "none*.parquet"), "caption")
    with pytest.raises(DataError, match=r"parquet files: name those, as '.*\*\.parquet'"):
        open_source(str(tmp_path / "a"), "caption")


def test_a_file_that_changes_during_a_run_stops_it(tmp_path):
    where = write(tmp_path / "a.parquet", [row(i) for i in range(40)])
    source = open_source(where, "caption")
    write(tmp_path / "a.parquet", [row(i) for i in range(41)])
    source.footer.cache_clear()
    with pytest.raises(DataError, match="has changed since it was opened"):
        source.image(0)


# ------------------------------------------------------------------------------- the extra
def test_the_five_packages_are_enough_without_parquet(tmp_path):
    """What training imports needs neither pyarrow nor fsspec, and the lack is one sentence."""
    where = write(tmp_path / "a.parquet", [row(0)])
    code = """
import sys
for name in ("pyarrow", "fsspec", "gcsfs", "s3fs", "huggingface_hub", "aiohttp"):
    sys.modules[name] = None
import train
raise SystemExit(train.main(["images", "--data", sys.argv[1], "--workdir", sys.argv[2]]))
"""
    done = subprocess.run([sys.executable, "-c", code, where, str(tmp_path / "run")], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "pip install -e '.[parquet]'" in done.stderr.splitlines()[-1]


def test_a_second_caption_beside_a_column_named_txt(tmp_path):
    """In a table, txt is a column as any other; of files, KEY.txt has no second caption."""
    rows = [{"image": row(i)["image"], "txt": f"a cat {i}", "web": f"cat {i}"} for i in range(9)]
    where = write(tmp_path / "a.parquet", rows)
    cfg = dataclasses.replace(RECIPES["images"], data=where, caption_field="txt", alt_field="web")
    source, _ = opening.open_data(cfg)
    assert source.caption(0, "web").startswith("cat")
    spill(tmp_path / "files", [(f"{i}.txt", b"a cat") for i in range(9)]
          + [(f"{i}.jpg", sample(i)["jpg"]) for i in range(9)])
    with pytest.raises(ConfigError, match="--alt-field web is a field of"):
        opening.open_data(dataclasses.replace(cfg, data=str(tmp_path / "files")))

"""Damaged tars, files that are no tars, and indexes: all good samples are used, and what is damaged
is counted with a reason."""
import gzip
import io
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter

import pytest

from inputs.sources import open_source
from inputs.tar_headers import list_members
from inputs.tar_index import INDEX_SUFFIX
from runtime.errors import DataError
from tests.helpers import samples
from tests.helpers.faults import JPG, TXT, UNREADABLE, check, good_files, read
from tests.helpers.paths import ROOT
from tests.helpers.samples import AT, HEADER, LAST, NEXT, TAR, J, T, members, mended, put

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about damaged EXIF


# -------------------------------------------------------------------------------- damaged tars
def over(offset, new):
    return TAR[:offset] + new + TAR[offset + len(new):]


def without(offset, count):
    return TAR[:offset] + TAR[offset + count:]


def inserted(offset, new):
    return TAR[:offset] + new + TAR[offset:]


def with_kind(kind):
    """The image's header with another type flag."""
    return over(J.offset, mended(HEADER, 156, kind))


def with_size(field):
    """The image's header with another size."""
    return over(J.offset, mended(HEADER, 124, field))


def extra(*fields_and_data):
    return samples.tar_of(extra=fields_and_data)


def with_records(records):
    """An image more, with an extended header."""
    fields = {"name": "9.jpg", "pax_headers": records}
    return samples.tar_of(tarfile.PAX_FORMAT, extra=[(fields, JPG)])


def pax(record, kind=b"x"):
    """An extended header of one block."""
    return mended(mended(HEADER, 156, kind), 124, b"%011o\0" % 512) + record.ljust(512)


DAMAGE, NO_END = "damaged places .*first .*b.tar", "without an end mark .*first .*b.tar"
NO_LINKS, NO_TEXT, NO_IMAGE = "links or sparse", r"without a \.txt", "without an image"
FOLDER = {"name": "sub", "type": tarfile.DIRTYPE}
END = LAST.offset_data + 512
# kind: (bytes, reason, whether sample 2 can be used)
TARS = {
    "bad checksum": (over(J.offset + 148, b"0000000"), DAMAGE, False),
    "no checksum": (over(J.offset + 148, bytes(8)), DAMAGE, False),
    "letters for a checksum": (over(J.offset + 148, b"zzzzzz"), DAMAGE, False),
    "header of ones": (over(J.offset, b"\xff" * 512), DAMAGE, False),
    "header of zeros": (over(J.offset, bytes(512)), DAMAGE, False),
    "header of the text": (over(T.offset, b"\xff" * 512), DAMAGE, False),
    "image and text of zeros": (over(J.offset, bytes(NEXT.offset - J.offset)), None, False),
    "data of zeros": (over(J.offset_data, bytes(512)), "image cannot be", False),
    "a sample of noise": (over(J.offset, b"\xa5" * (NEXT.offset - J.offset)), DAMAGE, False),
    "size of letters": (with_size(b"abcdefghijk\0"), DAMAGE, False),
    "size below zero": (with_size(b"\xff" * 12), DAMAGE, False),
    "size minus": (with_size(b"-0000000010\0"), DAMAGE, False),
    "size beyond the end": (with_size(b"77777777777\0"), DAMAGE, False),
    "size beyond 2^70": (with_size(b"\x80\0\0" + b"\xff" * 9), DAMAGE, False),
    "size too large": (with_size(b"%011o\0" % (J.size + 512)), DAMAGE, False),
    "size that swallows the text": (with_size(b"%011o\0" % (J.size + 1024)), NO_TEXT, False),
    "size too small": (with_size(b"%011o\0" % 5), DAMAGE, False),
    "a block is missing": (without(J.offset_data + 512, 512), DAMAGE, False),
    "100 bytes are missing": (without(J.offset_data + 100, 100), DAMAGE, False),
    "a block too many": (inserted(J.offset_data, bytes(512)), DAMAGE, False),
    "7 bytes too many": (inserted(T.offset_data, bytes(7)), DAMAGE, False),
    "header and block are missing": (without(J.offset, 1024), DAMAGE, False),
    "zeros in the middle": (inserted(J.offset, bytes(512 * 3)), None, True),
    "many zeros in the middle": (inserted(J.offset, bytes(3 << 20)), None, True),
    "two tars in one": (inserted(J.offset, bytes(10240)), None, True),
    "noise behind the end": (TAR + b"noise" * 999, None, True),
    "zeros without end": (TAR + bytes(5 << 20), None, True),
    "no end mark": (TAR[:END], NO_END, True),
    "half an end mark": (TAR[:END + 512], None, True),
    "end without padding": (TAR[:LAST.offset_data + LAST.size], NO_END, True),
    "unknown type": (with_kind(b"Z"), NO_LINKS, False),
    "hard link": (with_kind(b"1"), NO_LINKS, False),
    "soft link": (with_kind(b"2"), NO_LINKS, False),
    "device": (with_kind(b"3"), NO_LINKS, False),
    "gnu sparse": (with_kind(b"S"), NO_LINKS, False),
    "folder with an image's name": (with_kind(b"5"), NO_IMAGE, False),
    "folders": (extra((FOLDER, b""), (FOLDER | {"name": "x.jpg"}, b"")), None, True),
    "a tar inside": (extra(({"name": "inner.tar"}, TAR)), None, True),
    "same name twice": (extra(({"name": "000000002.txt"}, TXT)), "replaced by a later", True),
    "absolute name": (extra(({"name": "/etc/passwd.jpg"}, JPG)), NO_TEXT, True),
    "name that climbs": (extra(({"name": "../../x.jpg"}, JPG)), NO_TEXT, True),
    "name of no utf-8": (extra(({"name": "\udcff\udcfe.jpg"}, JPG)), NO_TEXT, True),
    "name empty": (extra(({"name": ""}, JPG)), None, True),
    "same name in a long folder":
        (extra(({"name": "d" * 120 + "/000000001.jpg"}, JPG)), NO_TEXT, True),
    "gnu long names": (samples.tar_of(tarfile.GNU_FORMAT, long="n" * 150), None, True),
    "pax long names": (samples.tar_of(tarfile.PAX_FORMAT, long="n" * 150), None, True),
    "ustar prefixes": (samples.tar_of(long="n" * 90 + "/" + "m" * 80), None, True),
    "pax names of emoji": (samples.tar_of(tarfile.PAX_FORMAT, long="😀/"), None, True),
    "pax size": (with_records({"size": "99999999999999999999999"}), NO_TEXT, True),
    "pax sparse": (with_records({"GNU.sparse.major": "1"}), NO_LINKS, True),
    "pax of noise": (inserted(J.offset, pax(b"\xa5" * 512)), None, True),
    "pax of 10^18 bytes": (inserted(J.offset, pax(b"999999999999999999 path=x")), None, True),
    "pax of the whole tar": (inserted(J.offset, pax(b"\xa5" * 512, b"g")), None, True),
}
CUTS = {
    "in a header": NEXT.offset + 100,
    "between members": NEXT.offset,
    "behind a header": NEXT.offset_data,
    "in data": NEXT.offset_data + 200,
    "one byte before data end": NEXT.offset_data + NEXT.size - 1,
    "in the text": AT["000000003.txt"].offset_data + 3,
}


@pytest.mark.parametrize("kind", TARS)
def test_a_damaged_tar_gives_all_its_good_samples(tmp_path, kind):
    data, reason, usable = TARS[kind]
    (tmp_path / "b.tar").write_bytes(data)
    first = read(tmp_path / "b.tar")
    assert os.path.exists(tmp_path / f"b.tar{INDEX_SUFFIX}")
    assert read(tmp_path / "b.tar") == first  # from the index: it keeps the counts
    check(first, reason, usable)


@pytest.mark.parametrize("kind", CUTS)
def test_a_cut_tar_gives_all_samples_that_are_left(tmp_path, kind):
    """And what img2dataset counted shows what even a clean cut has lost."""
    (tmp_path / "b.tar").write_bytes(TAR[:CUTS[kind]])
    used, counts = read(tmp_path / "b.tar")
    assert used == {"a cat 0", "a cat 1", "a cat 2"}
    assert any(re.search(NO_END, why) for why in counts)
    (tmp_path / "b_stats.json").write_text('{"successes": 5}')
    os.remove(tmp_path / f"b.tar{INDEX_SUFFIX}")
    _, counts = read(tmp_path / "b.tar")
    missing = [count for why, count in counts.items() if "_stats.json" in why]
    assert missing == [2 if CUTS[kind] < NEXT.offset_data + NEXT.size else 1]


# ------------------------------------------------------------------------- files that are no tars
def zipped(data):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as f:
        f.writestr("x.tar", data)
    return file.getvalue()


NO_TARS = {
    "all zeros": bytes(10240),
    "zero bytes": b"",
    "text": b"no tar " * 300,
    "gzip": gzip.compress(TAR),
    "zip": zipped(b"x" * 999),
    "noise": b"\xa5" * 4096,
    "short": b"\0x",
    "converted line ends": TAR[:512].replace(b"\0", b"\r\n"),
    "html": b"<html>403 Forbidden</html>",
    "tar header cut": TAR[:300],
}


@pytest.mark.parametrize("kind", [*NO_TARS, *UNREADABLE])
def test_a_file_that_is_no_tar_is_skipped_among_others(tmp_path, kind):
    files = list(good_files())
    put(tmp_path / "a.tar", [(name, content) for name, content in files if name[0] in "01"])
    put(tmp_path / "c.tar", [(name, content) for name, content in files if name[0] in "34"])
    if kind in UNREADABLE:
        UNREADABLE[kind](tmp_path / "b.tar")
    else:
        (tmp_path / "b.tar").write_bytes(NO_TARS[kind])
    for _ in range(2):  # made, and from the index
        reason = "cannot be read as uncompressed tars, first .*b.tar"
        check(read(tmp_path / "*.tar"), None if kind == "all zeros" else reason)
    reason = "b.tar cannot be read as an uncompressed tar"
    if kind in ("all zeros", "a folder"):
        reason = "no captioned image"
    with pytest.raises(DataError, match=reason):
        open_source(str(tmp_path / "b.tar"))


# ----------------------------------------------------------------------------------- indexes
STATS = {
    "not json": "{",
    "a list": "[]",
    "a text": '{"successes": "many"}',
    "below zero": '{"successes": -5}',
    "infinite": '{"successes": 1e999}',
    "right": '{"successes": 5}',
}


@pytest.mark.parametrize("kind", STATS)
def test_stats_without_a_count_are_ignored(tmp_path, kind):
    (tmp_path / "b.tar").write_bytes(TAR)
    (tmp_path / "b_stats.json").write_text(STATS[kind])
    check(read(tmp_path / "b.tar"), None, usable=True)


INDEXES = {
    "empty": lambda b: b"",
    "cut": lambda b: b[:len(b) // 2],
    "noise": lambda b: b"\xa5" * 999,
    "one bit": lambda b: b[:200] + bytes([b[200] ^ 1]) + b[201:],
    "rows hurt": lambda b: b[:-200] + bytes([b[-200] ^ 255]) + b[-199:],
}


@pytest.mark.parametrize("kind", INDEXES)
def test_a_damaged_index_is_made_again(tmp_path, kind):
    (tmp_path / "b.tar").write_bytes(TAR)
    before = read(tmp_path / "b.tar")
    index = tmp_path / f"b.tar{INDEX_SUFFIX}"
    index.write_bytes(INDEXES[kind](index.read_bytes()))
    assert read(tmp_path / "b.tar") == before


def test_an_index_belongs_to_its_tar_and_is_no_sample(tmp_path):
    tar, index = str(tmp_path / "b.tar"), str(tmp_path / f"b.tar{INDEX_SUFFIX}")
    put(tar, members(2))
    old = open_source(tar).fingerprint()
    put(tar, members(3))
    assert len(open_source(tar)) == 3
    assert open_source(tar).fingerprint() != old
    made = os.stat(index).st_mtime_ns
    for where in ("b.tar", "*", "b*", "*.tar"):
        source = open_source(str(tmp_path / where))
        assert len(source) == 3 and not source.skipped, where
    assert os.stat(index).st_mtime_ns == made
    assert sorted(os.listdir(tmp_path)) == ["b.tar", f"b.tar{INDEX_SUFFIX}"]
    samples.spill(tmp_path, [("x.jpg", JPG), ("x.txt", TXT)])
    assert len(open_source(str(tmp_path))) == 1
    source = open_source(tar)
    put(tar, members(4))
    with pytest.raises(DataError, match="has changed since it was opened"):
        source.load_rows(0)


def test_many_processes_may_make_the_same_index_at_once(tmp_path):
    for n in range(12):
        put(tmp_path / f"{n:02}.tar", members(9, start=9 * n))
    code = ("import sys; from inputs.sources import open_source\n"
            "source = open_source(sys.argv[1]); print(len(source), source.fingerprint())")
    command = [sys.executable, "-c", code, str(tmp_path / "*.tar")]
    runs = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
            for _ in range(4)]
    outputs = {run.communicate(timeout=60)[0] for run in runs}
    assert len(outputs) == 1 and outputs.pop().startswith("108 ")
    names = [f"{n:02}.tar" for n in range(12)]
    names += [name + INDEX_SUFFIX for name in names]
    assert sorted(os.listdir(tmp_path)) == sorted(names)


def test_a_tar_that_shrinks_while_it_is_indexed_ends(tmp_path):
    path = put(tmp_path / "b.tar", members(2))
    fd, skipped = os.open(path, os.O_RDONLY), Counter()
    listed = list_members(fd, os.path.getsize(path) + 4096, skipped)
    os.close(fd)
    assert len(listed) == 6


def test_a_folder_that_takes_no_index_is_read_all_the_same(tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    names = [f"{n}.tar" for n in range(3)]
    for n, name in enumerate(names):
        put(folder / name, members(2, start=2 * n))
    expected = read(folder / "*.tar")
    for name in names:
        os.remove(folder / f"{name}{INDEX_SUFFIX}")
    folder.chmod(0o555)
    capsys.readouterr()
    try:
        assert read(folder / "*.tar") == expected
        assert sorted(os.listdir(folder)) == names
    finally:
        folder.chmod(0o755)
    output = capsys.readouterr().out
    assert output.count("\n") == 1
    assert "3 of them are kept in memory" in output

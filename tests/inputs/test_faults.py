"""A corpus of broken input: each kind costs what is broken, with a reason that is counted, and not one good sample more.

Four good samples lie around one that is broken, in a folder, in a tar, or the tar itself is damaged. Kinds that other
tests hold already (test_data.py: TEXTS, JSONS, PIXELS) are not repeated.
"""
import gzip
import io
import os
import re
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib

import pytest

from inputs import tar_index
from inputs.sources import open_source
from runtime.errors import DataError
from tests.helpers.paths import ROOT
from tests.helpers.samples import (
    AT,
    HEADER,
    LAST,
    NEXT,
    TAR,
    J,
    T,
    chunk,
    encoded,
    members,
    mended,
    photo,
    put,
    reader,
    sample,
    spill,
    tar_of,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged EXIF
KEYS = (0, 1, 3, 4)  # the good ones; 2 is the victim
GOOD = {f"a cat {i}" for i in KEYS}
JPG, TXT = sample(2)["jpg"], b"a cat 2"
PNG, TIFF, GIF, WEBP, BMP = (encoded(photo(), kind) for kind in ("PNG", "TIFF", "GIF", "WEBP", "BMP"))


def read(where, field="txt"):
    """(captions used, reasons with their counts) of all samples of a source, in its order."""
    source = open_source(str(where), field)
    batch = reader(source, augment=None).batch(range(len(source)), 16)
    counted = dict(source.skipped)
    for why in batch["bad"].values():
        counted[why] = counted.get(why, 0) + 1
    return {source.caption(int(i)) for i in batch["source_index"]}, counted


def holds(found, says, victim=False):
    """That the good samples were used, the victim too if it can be, and else the reason was counted once."""
    used, counted = found
    assert used == GOOD | ({"a cat 2"} if victim else set()), (used - GOOD, GOOD - used, counted)
    if says:
        assert any(re.search(says, why) for why in counted), counted
    else:
        assert not counted
    assert all(n > 0 and "\n" not in why and len(why) < 300 for why, n in counted.items())


def png(width, height, depth=8, color=2, body=b""):
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)) + body + chunk(b"IEND", b"")


def sized(data, at, form, *size):
    return data[:at] + struct.pack(form, *size) + data[at + struct.calcsize(form):]


def jpeg_sized(height, width):
    at = JPG.index(b"\xff\xc0") + 5
    return sized(JPG, at, ">HH", height, width)


def tiff_sized(width, height):
    entries = [(256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 200), (277, 3, 1), (278, 4, height), (279, 4, 99)]
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", t, k, 1, v) for t, k, v in entries) + bytes(300)


def with_exif(body):
    return JPG[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 8) + b"Exif\0\0" + body + JPG[2:]


OPEN, DECODE = "image cannot be opened", "image cannot be (opened|decoded)"
IMAGES = {  # kind: (suffix, bytes, reason), None where it is a picture all the same
    "bomb jpeg": ("jpg", jpeg_sized(65000, 65000), DECODE), "bomb gif": ("gif", sized(GIF, 6, "<HH", 60000, 60000), DECODE),
    "bomb bmp": ("bmp", sized(BMP, 18, "<ii", 60000, 60000), DECODE), "bomb tiff": ("tiff", tiff_sized(60000, 60000), DECODE),
    "bomb of a text chunk": ("png", png(9, 9, body=chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(200 << 20)))), DECODE),
    "bomb of pixels in a small png": ("png", png(9, 9, body=chunk(b"IDAT", zlib.compress(bytes(9)))), DECODE),
    "png named jpg": ("jpg", PNG, None), "jpeg named png": ("png", JPG, None), "bmp named tif": ("tif", BMP, None), "tiff named bmp": ("bmp", TIFF, None),
    "svg named png": ("png", b"<svg xmlns='http://www.w3.org/2000/svg'/>", OPEN), "pdf named jpg": ("jpg", b"%PDF-1.7\n" + bytes(999), OPEN),
    "eps, which would start a program": ("jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", OPEN),
    "zip named jpg": ("jpg", b"PK\3\4" + bytes(99), OPEN), "gzip named png": ("png", gzip.compress(PNG), OPEN),
    "mp4 named jpg": ("jpg", b"\0\0\0\x18ftypmp42" + bytes(99), OPEN),
    "jpeg without a start": ("jpg", b"\0\0" + JPG[2:], OPEN), "jpeg of 2 bytes": ("jpg", JPG[:2], DECODE), "jpeg of 20 bytes": ("jpg", JPG[:20], DECODE),
    "jpeg without a frame": ("jpg", JPG.replace(b"\xff\xc0", b"\xff\xfe"), DECODE),
    "jpeg without tables": ("jpg", JPG.replace(b"\xff\xdb", b"\xff\xfe"), DECODE),
    "jpeg of width 0": ("jpg", jpeg_sized(36, 0), DECODE), "jpeg with cut EXIF": ("jpg", with_exif(b"II*\0\x08\0\0\0\x05\0\x12\x01"), None),
    "jpeg with EXIF of noise": ("jpg", with_exif(bytes(range(256))), None),
    "jpeg with orientation 99": ("jpg", with_exif(b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x63\0\0\0\0\0\0\0"), None),
    "jpeg with a tail": ("jpg", JPG + b"tail" * 99, None),
    "png header crc": ("png", sized(PNG, 29, ">I", 1), DECODE), "png data crc": ("png", PNG.replace(PNG[60:64], b"\0\0\0\0"), DECODE),
    "png of width 0": ("png", png(0, 9, body=chunk(b"IDAT", zlib.compress(b""))), DECODE), "png of 3 bits": ("png", png(9, 9, 3), DECODE),
    "png of no data": ("png", png(9, 9), DECODE), "png signature alone": ("png", PNG[:8], DECODE), "gif cut": ("gif", GIF[:len(GIF) // 2], DECODE),
    "gif without a frame": ("gif", GIF[:13] + b";", DECODE), "bmp of width 0": ("bmp", sized(BMP, 18, "<i", 0), DECODE), "bmp cut": ("bmp", BMP[:99], DECODE),
    "tiff cut": ("tif", TIFF[:len(TIFF) // 2], DECODE), "tiff that points beyond": ("tif", b"II*\0\xff\xff\xff\x7f", DECODE),
    "webp cut": ("webp", WEBP[:len(WEBP) // 2], DECODE), "webp without a chunk": ("webp", b"RIFF\4\0\0\0WEBP", DECODE),
}
TEXTS = {
    "50 MB": (b"a cat " * (50 << 20 >> 2), "larger than 1 MiB"), "byte-order mark alone": (b"\xef\xbb\xbf", "caption is empty"),
    "utf-16 without a mark": ("käse".encode("utf-16-be"), "not UTF-8"), "utf-32": ("käse".encode("utf-32"), "not UTF-8"),
    "wide spaces": ("\u3000\u2003\u00a0".encode(), "caption is empty"), "control characters": (b"\1\2\3\x7f", "holds no word"),
    "half a character": (b"\xed\xa0\x80", "not UTF-8"), "overlong": (b"a\xc0\xafcat", "not UTF-8"), "cut in a character": ("猫".encode()[:2], "not UTF-8"),
    "a jpeg": (JPG, "not UTF-8"), "byte-order mark": (b"\xef\xbb\xbfa cat 2", None), "NUL at the end": (b"a cat 2", None),
}
JSONS = {
    "NaN": (b'{"c": NaN}', "caption is empty"), "infinity": (b'{"c": 1e999}', "caption is empty"), "an object": (b'{"c": {"c": "x"}}', "caption is empty"),
    "an empty list": (b'{"c": []}', "caption list is empty"),
    "a list without text": (b'{"c": [1, null, " ", ["a"]]}', "caption list holds no text"),
    "true": (b'{"c": true}', "caption is empty"), "utf-16": ('{"c": "kä"}'.encode("utf-16"), "not UTF-8"),
    "a tail": (b'{"c": "a cat 2"} x', "cannot be parsed"), "two of them": (b'{"c": "a"}{"c": "b"}', "cannot be parsed"),
    "single quotes": (b"{'c': 'a'}", "cannot be parsed"),
    "control characters": (b'{"c": "a\ncat"}', "cannot be parsed"), "deep objects": (b'{"c":' * 100_000, "cannot be parsed"), "null": (b"null", "no field"),
    "50 MB": (b'{"c": "' + b"a " * (25 << 20) + b'"}', "larger than 1 MiB"), "half a character": (b'{"c": "\\ud800"}', None),
    "byte-order mark": (b'\xef\xbb\xbf{"c": "a cat 2"}', None),
    "the field twice": (b'{"c": 3, "c": "a cat 2"}', None),
}


def good(field="txt"):
    for i in KEYS:
        yield f"{i}.jpg", sample(i)["jpg"]
        yield (f"{i}.txt", b"a cat %d" % i) if field == "txt" else (f"{i}.json", b'{"c": "a cat %d"}' % i)


def both(tmp_path, files, field="txt"):
    """The same files in a folder and in a tar."""
    files = sorted([*good(field), *files])
    return read(spill(tmp_path / "all", files), field), read(put(tmp_path / "all.tar", files), field)


@pytest.mark.parametrize("kind", IMAGES)
def test_a_broken_image(tmp_path, kind):
    suffix, data, says = IMAGES[kind]
    for found in both(tmp_path, [(f"2.{suffix}", data), ("2.txt", TXT)]):
        holds(found, says, victim=says is None)


@pytest.mark.parametrize("kind", TEXTS)
def test_a_broken_text(tmp_path, kind):
    data, says = TEXTS[kind]
    for found in both(tmp_path, [("2.jpg", JPG), ("2.txt", data)]):
        holds(found, says, victim=says is None)


@pytest.mark.parametrize("kind", JSONS)
def test_a_broken_json(tmp_path, kind):
    data, says = JSONS[kind]
    for used, counted in both(tmp_path, [("2.jpg", JPG), ("2.json", data)], "c"):
        if kind == "half a character":
            used = {c.replace("?", "a cat 2") for c in used}  # nothing else can print it
        holds((used, counted), says, victim=says is None)


NAMES = {  # kind: (files, reason)
    "image alone": ([("2.jpg", JPG)], r"without a \.txt"), "text alone": ([("2.txt", TXT)], "without an image"),
    "json where txt is asked for": ([("2.jpg", JPG), ("2.json", b"{}")], r"without a \.txt"),
    "two suffixes": ([("2.mask.png", PNG)], r"without a \.txt"), "notes of macOS": ([("._2.jpg", b"\0\5\x16\7"), ("._2.txt", b"\0\5\x16\7")], "macOS"),
    "upper-case suffixes": ([("2.JPG", JPG), ("2.Txt", TXT)], None), "only a suffix": ([("2.jpg", JPG), ("2.txt", TXT), (".txt", b"")], None),
    "hidden": ([(".2.jpg", JPG), (".2.txt", TXT)], None), "backslash": ([("c:\\2.jpg", JPG), ("c:\\2.txt", TXT)], None),
    "emoji": ([("😀.jpg", JPG), ("😀.txt", TXT)], None), "tab and quote": ([("a\t'\".jpg", JPG), ("a\t'\".txt", TXT)], None),
    "long": ([("n" * 240 + ".jpg", JPG), ("n" * 240 + ".txt", TXT)], None),
    
    "long path": ([("d" * 120 + "/" + "e" * 120 + "/2." + s, c) for s, c in (("jpg", JPG), ("txt", TXT))], None),
    "looks like an index": ([("2.jpg", JPG), ("2.txt", TXT), ("00000.tar.index.npz", b"PK")], None),
    
    "other files": ([("2.jpg", JPG), ("2.txt", TXT), ("x.parquet", b"PAR1"), ("jpg", b"")], None),
}


@pytest.mark.parametrize("kind", NAMES)
def test_odd_names_and_missing_pairs(tmp_path, kind):
    files, says = NAMES[kind]
    for used, counted in both(tmp_path, files):
        counted.pop("without an image" if kind == "only a suffix" else None, None)
        holds((used, counted), says, victim=says is None)


def link(target):
    return lambda path: os.symlink(target, path)


UNREADABLE = {"a folder": os.mkdir, "a dangling link": link("nowhere"), "a pipe": os.mkfifo, "a device without end": link("/dev/zero"),
              "a link to itself": lambda path: os.symlink(os.path.basename(path), path)}


@pytest.mark.parametrize("suffix", ["jpg", "txt"])
@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_cannot_be_read_in_a_folder(tmp_path, kind, suffix):
    spill(tmp_path, [*good(), ("2.txt", TXT) if suffix == "jpg" else ("2.jpg", JPG)])
    UNREADABLE[kind](tmp_path / f"2.{suffix}")
    holds(read(tmp_path), "cannot be read|without|cannot be opened|is larger|caption is empty")


def test_linked_folders_are_followed_once_and_never_in_circles(tmp_path):
    spill(tmp_path / "far", [(n, c) for n, c in good() if n[0] in "34"])
    spill(tmp_path / "near", [(n, c) for n, c in good() if n[0] in "01"])
    for name, target in (("up", ".."), ("linked", "../far"), ("self", ".")):
        os.symlink(target, tmp_path / "near" / name)
    os.symlink("../near", tmp_path / "far" / "back")
    used, counted = read(tmp_path / "near")
    assert used == GOOD and any("links lead to again" in why for why in counted)


def over(at, new):
    return TAR[:at] + new + TAR[at + len(new):]


def without(at, count):
    return TAR[:at] + TAR[at + count:]


def extra(*fields_data, **how):
    return tar_of(extra=fields_data, **how)


HURT, ENDS = "damaged places .*first .*b.tar", "without an end mark .*first .*b.tar"
BOTH = {"victim": True}
PAX = mended(mended(HEADER, 156, b"x"), 124, b"%011o\0" % 512)
END = LAST.offset_data + 512
TARS = {  # kind: (bytes, reason, what else is so)
    "bad checksum": (over(J.offset + 148, b"0000000"), HURT), "no checksum": (over(J.offset + 148, bytes(8)), HURT),
    "letters for a checksum": (over(J.offset + 148, b"zzzzzz"), HURT),
    "header of ones": (over(J.offset, b"\xff" * 512), HURT), "header of zeros": (over(J.offset, bytes(512)), HURT),
    "header of the text": (over(T.offset, b"\xff" * 512), HURT),
    "image and text of zeros": (over(J.offset, bytes(NEXT.offset - J.offset)), None), "data of zeros": (over(J.offset_data, bytes(512)), "image cannot be"),
    "whole sample of noise": (over(J.offset, b"\xa5" * (NEXT.offset - J.offset)), HURT),
    "size of letters": (over(J.offset, mended(HEADER, 124, b"abcdefghijk\0")), HURT),
    "size below zero": (over(J.offset, mended(HEADER, 124, b"\xff" * 12)), HURT),
    "size minus": (over(J.offset, mended(HEADER, 124, b"-0000000010\0")), HURT),
    "size beyond the end": (over(J.offset, mended(HEADER, 124, b"77777777777\0")), HURT),
    "size beyond 2^70": (over(J.offset, mended(HEADER, 124, b"\x80\0\0" + b"\xff" * 9)), HURT),
    "size too large": (over(J.offset, mended(HEADER, 124, b"%011o\0" % (J.size + 512))), HURT),
    "size that swallows the text": (over(J.offset, mended(HEADER, 124, b"%011o\0" % (J.size + 1024))), r"without a \.txt"),
    "size too small": (over(J.offset, mended(HEADER, 124, b"%011o\0" % 5)), HURT),
    "a block is missing": (without(J.offset_data + 512, 512), HURT), "100 bytes are missing": (without(J.offset_data + 100, 100), HURT),
    "a block too many": (TAR[:J.offset_data] + bytes(512) + TAR[J.offset_data:], HURT),
    "7 bytes too many": (TAR[:T.offset_data] + bytes(7) + TAR[T.offset_data:], HURT),
    "header and block are missing": (without(J.offset, 1024), HURT), "zeros in the middle": (TAR[:J.offset] + bytes(512 * 3) + TAR[J.offset:], None, BOTH),
    "many zeros in the middle": (TAR[:J.offset] + bytes(3 << 20) + TAR[J.offset:], None, BOTH),
    "two tars in one": (TAR[:J.offset] + bytes(10240) + TAR[J.offset:], None, BOTH),
    "noise behind the end": (TAR + b"noise" * 999, None, BOTH), "zeros without end": (TAR + bytes(5 << 20), None, BOTH), "no end mark": (TAR[:END], ENDS, BOTH),
    "half an end mark": (TAR[:END + 512], None, BOTH), "end without padding": (TAR[:LAST.offset_data + LAST.size], ENDS, BOTH),
    "unknown type": (over(J.offset, mended(HEADER, 156, b"Z")), "links or sparse"), "hard link": (over(J.offset, mended(HEADER, 156, b"1")), "links or sparse"),
    "soft link": (over(J.offset, mended(HEADER, 156, b"2")), "links or sparse"), "device": (over(J.offset, mended(HEADER, 156, b"3")), "links or sparse"),
    "gnu sparse": (over(J.offset, mended(HEADER, 156, b"S")), "links or sparse"), "folder with an image's name": (over(J.offset, mended(HEADER, 156, b"5")),
    "without an image"),
    "folders": (extra(({"name": "sub", "type": tarfile.DIRTYPE}, b""), ({"name": "x.jpg", "type": tarfile.DIRTYPE}, b"")), None, BOTH),
    "a tar inside": (extra(({"name": "inner.tar"}, TAR)), None, BOTH), "same name twice": (extra(({"name": "000000002.txt"}, TXT)),
    "replaced by a later", BOTH),
    "absolute name": (extra(({"name": "/etc/passwd.jpg"}, JPG)), r"without a \.txt", BOTH),
    "name that climbs": (extra(({"name": "../../x.jpg"}, JPG)), r"without a \.txt", BOTH),
    "name of no utf-8": (extra(({"name": "\udcff\udcfe.jpg"}, JPG)), r"without a \.txt", BOTH), "name empty": (extra(({"name": ""}, JPG)), None, BOTH),
    "same name in another long folder": (extra(({"name": "d" * 120 + "/000000001.jpg"}, JPG)), r"without a \.txt", BOTH),
    "gnu long names": (tar_of(tarfile.GNU_FORMAT, long="n" * 150), None, BOTH), "pax long names": (tar_of(tarfile.PAX_FORMAT, long="n" * 150), None, BOTH),
    "ustar prefixes": (tar_of(long="n" * 90 + "/" + "m" * 80), None, BOTH), "pax names of emoji": (tar_of(tarfile.PAX_FORMAT, long="😀/"), None, BOTH),
    "pax size": (extra(({"name": "9.jpg", "pax_headers": {"size": "99999999999999999999999"}}, JPG), form=tarfile.PAX_FORMAT), r"without a \.txt", BOTH),
    "pax sparse": (extra(({"name": "9.jpg", "pax_headers": {"GNU.sparse.major": "1"}}, JPG), form=tarfile.PAX_FORMAT), "links or sparse", BOTH),
    "pax of noise": (TAR[:J.offset] + PAX + b"\xa5" * 512 + TAR[J.offset:], None, BOTH),
    "pax that tells 10^18 bytes": (TAR[:J.offset] + PAX + b"999999999999999999 path=x".ljust(512) + TAR[J.offset:], None, BOTH),
    "pax of the whole tar": (TAR[:J.offset] + mended(mended(HEADER, 156, b"g"), 124, b"%011o\0" % 512) + b"\xa5" * 512 + TAR[J.offset:], None, BOTH),
}
CUTS = {"in a header": NEXT.offset + 100, "between members": NEXT.offset, "behind a header": NEXT.offset_data, "in data": NEXT.offset_data + 200,
        "one byte before data end": NEXT.offset_data + NEXT.size - 1, "in the text": AT["000000003.txt"].offset_data + 3}


@pytest.mark.parametrize("kind", TARS)
def test_a_damaged_tar_gives_all_its_good_samples(tmp_path, kind):
    data, says, *how = TARS[kind]
    (tmp_path / "b.tar").write_bytes(data)
    found = [read(tmp_path / "b.tar") for _ in range(2)]
    assert found[0] == found[1] and os.path.exists(tmp_path / f"b.tar{tar_index.INDEX_SUFFIX}")  # counts are not lost with the second look
    holds(found[0], says, **(how[0] if how else {}))


@pytest.mark.parametrize("kind", CUTS)
def test_a_cut_tar_gives_all_that_it_still_holds(tmp_path, kind):
    (tmp_path / "b.tar").write_bytes(TAR[:CUTS[kind]])
    used, counted = read(tmp_path / "b.tar")
    assert used == {"a cat 0", "a cat 1", "a cat 2"} and any(re.search(ENDS, why) for why in counted)
    (tmp_path / "b_stats.json").write_text('{"successes": 5}')  # as img2dataset counts: it knows what even a clean cut has lost
    os.remove(tmp_path / f"b.tar{tar_index.INDEX_SUFFIX}")
    missing = [n for why, n in read(tmp_path / "b.tar")[1].items() if "_stats.json" in why]
    assert missing == [2 if CUTS[kind] < NEXT.offset_data + NEXT.size else 1]


def zipped(data):
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as f:
        f.writestr("x.tar", data)
    return held.getvalue()


NO_TARS = {"zero bytes": b"", "text": b"no tar " * 300, "gzip": gzip.compress(TAR), "zip": zipped(b"x" * 999), "noise": b"\xa5" * 4096, "short": b"\0x",
           "converted line ends": TAR[:512].replace(b"\0", b"\r\n"), "html": b"<html>403 Forbidden</html>", "tar header cut": TAR[:300]}


@pytest.mark.parametrize("kind", [*NO_TARS, *UNREADABLE, "all zeros"])
def test_a_file_that_is_no_tar_is_passed_over_among_others(tmp_path, kind):
    put(tmp_path / "a.tar", [(n, c) for n, c in good() if n[0] in "01"])
    put(tmp_path / "c.tar", [(n, c) for n, c in good() if n[0] in "34"])
    if kind in UNREADABLE:
        UNREADABLE[kind](tmp_path / "b.tar")
    else:
        (tmp_path / "b.tar").write_bytes(NO_TARS.get(kind, bytes(10240)))
    for _ in range(2):
        holds(read(tmp_path / "*.tar"), None if kind == "all zeros" else "cannot be read as uncompressed tars, first .*b.tar")
    with pytest.raises(DataError, match="no captioned image" if kind in ("all zeros", "a folder") else "b.tar cannot be read as an uncompressed tar"):
        open_source(str(tmp_path / "b.tar"))


STATS = {"not json": "{", "a list": "[]", "a text": '{"successes": "many"}', "below zero": '{"successes": -5}', "infinite": '{"successes": 1e999}',
         "right": '{"successes": 5}'}


@pytest.mark.parametrize("kind", STATS)
def test_stats_that_say_nothing_are_passed_over(tmp_path, kind):
    (tmp_path / "b.tar").write_bytes(TAR)
    (tmp_path / "b_stats.json").write_text(STATS[kind])
    holds(read(tmp_path / "b.tar"), None, victim=True)


INDEXES = {"empty": lambda b: b"", "cut": lambda b: b[:len(b) // 2], "noise": lambda b: b"\xa5" * 999,
           "one bit": lambda b: b[:200] + bytes([b[200] ^ 1]) + b[201:],
           "rows hurt": lambda b: b[:-200] + bytes([b[-200] ^ 255]) + b[-199:]}


@pytest.mark.parametrize("kind", INDEXES)
def test_a_damaged_index_is_made_again(tmp_path, kind):
    (tmp_path / "b.tar").write_bytes(TAR)
    whole = read(tmp_path / "b.tar")
    beside = tmp_path / f"b.tar{tar_index.INDEX_SUFFIX}"
    beside.write_bytes(INDEXES[kind](beside.read_bytes()))
    assert read(tmp_path / "b.tar") == whole


def test_an_index_is_of_its_tar_and_no_sample(tmp_path):
    put(tmp_path / "b.tar", members(2))
    print_before = open_source(str(tmp_path / "b.tar")).fingerprint()
    put(tmp_path / "b.tar", members(3))
    assert len(open_source(str(tmp_path / "b.tar"))) == 3 and open_source(str(tmp_path / "b.tar")).fingerprint() != print_before
    made = os.stat(tmp_path / f"b.tar{tar_index.INDEX_SUFFIX}").st_mtime_ns
    for where in ("b.tar", "*", "b*", "*.tar"):
        source = open_source(str(tmp_path / where))
        assert len(source) == 3 and not source.skipped, where
    assert os.stat(tmp_path / f"b.tar{tar_index.INDEX_SUFFIX}").st_mtime_ns == made and sorted(os.listdir(tmp_path)) == ["b.tar", f"b.tar{tar_index.INDEX_SUFFIX}"]
    spill(tmp_path, [("x.jpg", JPG), ("x.txt", TXT)])
    assert len(open_source(str(tmp_path))) == 1
    source = open_source(str(tmp_path / "b.tar"))
    put(tmp_path / "b.tar", members(4))
    with pytest.raises(DataError, match="has changed since it was opened"):
        source.load_rows(0)


def test_many_processes_may_make_the_same_index_at_once(tmp_path):
    for n in range(12):
        put(tmp_path / f"{n:02}.tar", members(9, start=9 * n))
    code = "import sys; from inputs import sources; s = sources.open_source(sys.argv[1]); print(len(s), s.fingerprint())"
    root = ROOT
    runs = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "*.tar")], cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    said = {run.communicate(timeout=60)[0] for run in runs}
    assert len(said) == 1 and said.pop().startswith("108 ")
    assert sorted(os.listdir(tmp_path)) == sorted(f"{n:02}.tar{s}" for n in range(12) for s in ("", tar_index.INDEX_SUFFIX))


def test_a_folder_that_takes_no_index_is_read_all_the_same(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for n in range(3):
        put(tmp_path / "in" / f"{n}.tar", members(2, start=2 * n))
    written = read(tmp_path / "in" / "*.tar")
    for n in range(3):
        os.remove(tmp_path / "in" / f"{n}.tar{tar_index.INDEX_SUFFIX}")
    (tmp_path / "in").chmod(0o555)
    capsys.readouterr()
    try:
        assert read(tmp_path / "in" / "*.tar") == written and sorted(os.listdir(tmp_path / "in")) == ["0.tar", "1.tar", "2.tar"]
    finally:
        (tmp_path / "in").chmod(0o755)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "3 of them are kept in memory" in said

"""A corpus of broken input: each kind costs the broken sample, counted with a reason, and no other.

Four good samples surround a broken one, in a folder and in a tar. Kinds that test_sources.py has
(TEXTS, JSONS, PIXELS) are not repeated. Damaged tars are in test_tar_faults.py.
"""
import gzip
import os
import struct
import zlib

import pytest

from tests.helpers.faults import GOOD, JPG, PNG, TXT, UNREADABLE, check, good_files, read
from tests.helpers.samples import PNG_SIGNATURE, chunk, encoded, photo, put, spill

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about damaged EXIF
TIFF, GIF, WEBP, BMP = (encoded(photo(), kind) for kind in ("TIFF", "GIF", "WEBP", "BMP"))


# ------------------------------------------------------------------------------------ images
def png(width, height, depth=8, color=2, body=b""):
    head = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return PNG_SIGNATURE + chunk(b"IHDR", head) + body + chunk(b"IEND", b"")


def sized(data, offset, form, *size):
    """The bytes of an image with another size in its header."""
    return data[:offset] + struct.pack(form, *size) + data[offset + struct.calcsize(form):]


def jpeg_sized(height, width):
    return sized(JPG, JPG.index(b"\xff\xc0") + 5, ">HH", height, width)


def tiff_sized(width, height):
    entries = [(256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 1), (262, 3, 1),
               (273, 4, 200), (277, 3, 1), (278, 4, height), (279, 4, 99)]
    fields = [struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries]
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(fields) + bytes(300)


def with_exif(body):
    return JPG[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 8) + b"Exif\0\0" + body + JPG[2:]


ORIENTATION_99 = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x63\0\0\0\0\0\0\0"
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
MANY_ZEROS = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(200 << 20)))
FEW_ZEROS = chunk(b"IDAT", zlib.compress(bytes(9)))
OPEN, DECODE = "image cannot be opened", "image cannot be (opened|decoded)"
# kind: (suffix, bytes, reason); the reason is None where the image can be used
IMAGES = {
    "bomb jpeg": ("jpg", jpeg_sized(65000, 65000), DECODE),
    "bomb gif": ("gif", sized(GIF, 6, "<HH", 60000, 60000), DECODE),
    "bomb bmp": ("bmp", sized(BMP, 18, "<ii", 60000, 60000), DECODE),
    "bomb tiff": ("tiff", tiff_sized(60000, 60000), DECODE),
    "bomb of a text chunk": ("png", png(9, 9, body=MANY_ZEROS), DECODE),
    "bomb of pixels in a small png": ("png", png(9, 9, body=FEW_ZEROS), DECODE),
    "png named jpg": ("jpg", PNG, None),
    "jpeg named png": ("png", JPG, None),
    "bmp named tif": ("tif", BMP, None),
    "tiff named bmp": ("bmp", TIFF, None),
    "svg named png": ("png", b"<svg xmlns='http://www.w3.org/2000/svg'/>", OPEN),
    "pdf named jpg": ("jpg", b"%PDF-1.7\n" + bytes(999), OPEN),
    "eps, which would start a program": ("jpg", EPS, OPEN),
    "zip named jpg": ("jpg", b"PK\3\4" + bytes(99), OPEN),
    "gzip named png": ("png", gzip.compress(PNG), OPEN),
    "mp4 named jpg": ("jpg", b"\0\0\0\x18ftypmp42" + bytes(99), OPEN),
    "jpeg without a start": ("jpg", b"\0\0" + JPG[2:], OPEN),
    "jpeg of 2 bytes": ("jpg", JPG[:2], DECODE),
    "jpeg of 20 bytes": ("jpg", JPG[:20], DECODE),
    "jpeg without a frame": ("jpg", JPG.replace(b"\xff\xc0", b"\xff\xfe"), DECODE),
    "jpeg without tables": ("jpg", JPG.replace(b"\xff\xdb", b"\xff\xfe"), DECODE),
    "jpeg of width 0": ("jpg", jpeg_sized(36, 0), DECODE),
    "jpeg with cut EXIF": ("jpg", with_exif(b"II*\0\x08\0\0\0\x05\0\x12\x01"), None),
    "jpeg with EXIF of noise": ("jpg", with_exif(bytes(range(256))), None),
    "jpeg with orientation 99": ("jpg", with_exif(ORIENTATION_99), None),
    "jpeg with a tail": ("jpg", JPG + b"tail" * 99, None),
    "png header crc": ("png", sized(PNG, 29, ">I", 1), DECODE),
    "png data crc": ("png", PNG.replace(PNG[60:64], b"\0\0\0\0"), DECODE),
    "png of width 0": ("png", png(0, 9, body=chunk(b"IDAT", zlib.compress(b""))), DECODE),
    "png of 3 bits": ("png", png(9, 9, 3), DECODE),
    "png of no data": ("png", png(9, 9), DECODE),
    "png signature alone": ("png", PNG[:8], DECODE),
    "gif cut": ("gif", GIF[:len(GIF) // 2], DECODE),
    "gif without a frame": ("gif", GIF[:13] + b";", DECODE),
    "bmp of width 0": ("bmp", sized(BMP, 18, "<i", 0), DECODE),
    "bmp cut": ("bmp", BMP[:99], DECODE),
    "tiff cut": ("tif", TIFF[:len(TIFF) // 2], DECODE),
    "tiff that points beyond": ("tif", b"II*\0\xff\xff\xff\x7f", DECODE),
    "webp cut": ("webp", WEBP[:len(WEBP) // 2], DECODE),
    "webp without a chunk": ("webp", b"RIFF\4\0\0\0WEBP", DECODE),
}


# ------------------------------------------------------------------------------------- texts
# kind: (bytes, reason); the reason is None where the text can be used
TEXTS = {
    "50 MB": (b"a cat " * (50 << 20 >> 2), "larger than 1 MiB"),
    "byte-order mark alone": (b"\xef\xbb\xbf", "caption is empty"),
    "utf-16 without a mark": ("käse".encode("utf-16-be"), "not UTF-8"),
    "utf-32": ("käse".encode("utf-32"), "not UTF-8"),
    "wide spaces": ("\u3000\u2003\u00a0".encode(), "caption is empty"),
    "control characters": (b"\1\2\3\x7f", "holds no word"),
    "half a character": (b"\xed\xa0\x80", "not UTF-8"),
    "overlong": (b"a\xc0\xafcat", "not UTF-8"),
    "cut in a character": ("猫".encode()[:2], "not UTF-8"),
    "a jpeg": (JPG, "not UTF-8"),
    "byte-order mark": (b"\xef\xbb\xbfa cat 2", None),
    "NUL at the end": (b"a cat 2\0", None),
}
JSONS = {
    "NaN": (b'{"c": NaN}', "caption is no text"),
    "infinity": (b'{"c": 1e999}', "caption is no text"),
    "an object": (b'{"c": {"c": "x"}}', "caption is no text"),
    "an empty list": (b'{"c": []}', "caption list is empty"),
    "a list without text": (b'{"c": [1, null, " ", ["a"]]}', "caption list holds no text"),
    "true": (b'{"c": true}', "caption is no text"),
    "utf-16": ('{"c": "kä"}'.encode("utf-16"), "not UTF-8"),
    "a tail": (b'{"c": "a cat 2"} x', "cannot be parsed"),
    "two of them": (b'{"c": "a"}{"c": "b"}', "cannot be parsed"),
    "single quotes": (b"{'c': 'a'}", "cannot be parsed"),
    "control characters": (b'{"c": "a\ncat"}', "cannot be parsed"),
    "deep objects": (b'{"c":' * 100_000, "cannot be parsed"),
    "null": (b"null", "no field"),
    "50 MB": (b'{"c": "' + b"a " * (25 << 20) + b'"}', "larger than 1 MiB"),
    "half a character": (b'{"c": "\\ud800"}', None),
    "byte-order mark": (b'\xef\xbb\xbf{"c": "a cat 2"}', None),
    "the field twice": (b'{"c": 3, "c": "a cat 2"}', None),
}


def both(tmp_path, files, field="txt"):
    """`read` of the same files in a folder and in a tar."""
    files = sorted([*good_files(field), *files])
    folder, tar = spill(tmp_path / "all", files), put(tmp_path / "all.tar", files)
    return read(folder, field), read(tar, field)


@pytest.mark.parametrize("kind", IMAGES)
def test_broken_image(tmp_path, kind):
    suffix, data, reason = IMAGES[kind]
    for result in both(tmp_path, [(f"2.{suffix}", data), ("2.txt", TXT)]):
        check(result, reason, usable=reason is None)


@pytest.mark.parametrize("kind", TEXTS)
def test_broken_text(tmp_path, kind):
    data, reason = TEXTS[kind]
    for used, counts in both(tmp_path, [("2.jpg", JPG), ("2.txt", data)]):
        used = {caption.rstrip("\0") for caption in used}
        check((used, counts), reason, usable=reason is None)


@pytest.mark.parametrize("kind", JSONS)
def test_broken_json(tmp_path, kind):
    data, reason = JSONS[kind]
    for used, counts in both(tmp_path, [("2.jpg", JPG), ("2.json", data)], "c"):
        if kind == "half a character":
            used = {caption.replace("?", "a cat 2") for caption in used}  # it cannot be printed
        check((used, counts), reason, usable=reason is None)


# ------------------------------------------------------------------------------------- names
LONG_PATH = "d" * 120 + "/" + "e" * 120
# kind: (files, reason)
NAMES = {
    "image alone": ([("2.jpg", JPG)], r"without a \.txt"),
    "text alone": ([("2.txt", TXT)], "without an image"),
    "json where txt is asked for": ([("2.jpg", JPG), ("2.json", b"{}")], r"without a \.txt"),
    "two suffixes": ([("2.mask.png", PNG)], r"without a \.txt"),
    "notes of macOS": ([("._2.jpg", b"\0\5\x16\7"), ("._2.txt", b"\0\5\x16\7")], "macOS"),
    "upper-case suffixes": ([("2.JPG", JPG), ("2.Txt", TXT)], None),
    "only a suffix": ([("2.jpg", JPG), ("2.txt", TXT), (".txt", b"")], None),
    "hidden": ([(".2.jpg", JPG), (".2.txt", TXT)], None),
    "backslash": ([("c:\\2.jpg", JPG), ("c:\\2.txt", TXT)], None),
    "emoji": ([("😀.jpg", JPG), ("😀.txt", TXT)], None),
    "tab and quote": ([("a\t'\".jpg", JPG), ("a\t'\".txt", TXT)], None),
    "long": ([("n" * 240 + ".jpg", JPG), ("n" * 240 + ".txt", TXT)], None),
    "long path": ([(LONG_PATH + "/2." + s, c) for s, c in (("jpg", JPG), ("txt", TXT))], None),
    "looks like an index": ([("2.jpg", JPG), ("2.txt", TXT), ("00000.tar.index.npz", b"PK")], None),
    "other files": ([("2.jpg", JPG), ("2.txt", TXT), ("x.parquet", b"PAR1"), ("jpg", b"")], None),
}


@pytest.mark.parametrize("kind", NAMES)
def test_odd_names_and_missing_pairs(tmp_path, kind):
    files, reason = NAMES[kind]
    for used, counts in both(tmp_path, files):
        if kind == "only a suffix":  # in a tar ".txt" is a text without an image
            counts.pop("without an image", None)
        check((used, counts), reason, usable=reason is None)


@pytest.mark.parametrize("suffix", ["jpg", "txt"])
@pytest.mark.parametrize("kind", UNREADABLE)
def test_files_in_a_folder_that_cannot_be_read(tmp_path, kind, suffix):
    spill(tmp_path, [*good_files(), ("2.txt", TXT) if suffix == "jpg" else ("2.jpg", JPG)])
    UNREADABLE[kind](tmp_path / f"2.{suffix}")
    reason = "cannot be read|without|cannot be opened|is larger|caption is empty"
    check(read(tmp_path), reason)


def test_linked_folders_are_followed_once_and_never_in_circles(tmp_path):
    files = list(good_files())
    spill(tmp_path / "far", [(name, content) for name, content in files if name[0] in "34"])
    spill(tmp_path / "near", [(name, content) for name, content in files if name[0] in "01"])
    for name, target in (("up", ".."), ("linked", "../far"), ("self", ".")):
        os.symlink(target, tmp_path / "near" / name)
    os.symlink("../near", tmp_path / "far" / "back")
    used, counts = read(tmp_path / "near")
    assert used == GOOD
    assert any("links lead to again" in why for why in counts)

"""What is damage and what is not: errors that pass, broken EXIF data, captions of other types."""
import errno
import io
import os
import struct
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, PngImagePlugin

from inputs import files, images, parquet_columns, parquet_groups, tar_index
from inputs.sources import open_source
from runtime.errors import BadSample, DataError
from tests.helpers.samples import PNG_SIGNATURE, chunk, encoded, members, photo, put, sample, spill


def test_an_error_of_the_system_is_no_damaged_row(monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(24, "Too many open files")
    monkeypatch.setattr(parquet_groups, "iter_rows", fail)
    monkeypatch.setattr(parquet_groups, "stored_bytes", lambda *_: 1)
    with pytest.raises(DataError, match="Too many open files"):
        list(parquet_groups.salvaged_rows(None, "a.parquet", None, 0, [], 5))


@pytest.mark.parametrize(("number", "raised"), [
    (errno.EMFILE, DataError), (errno.ESTALE, DataError),
    (errno.EACCES, BadSample), (errno.EIO, BadSample)])
def test_an_error_of_the_system_makes_no_sample_bad(tmp_path, monkeypatch, number, raised):
    """What says something about the file does: the rights to read it, a defect of the disk."""
    source = open_source(spill(tmp_path, members(3)))

    def fail(path, *_):
        raise OSError(number, os.strerror(number), path)
    monkeypatch.setattr(files, "read_span", fail)
    with pytest.raises(raised, match=os.strerror(number)):
        source.sample(1, [""], files.choose_first)


@pytest.mark.parametrize(("number", "raised"), [
    (errno.ESTALE, DataError), (errno.EMFILE, DataError), (errno.EACCES, BadSample)])
def test_an_error_of_the_system_loses_no_sample_of_a_tar(tmp_path, monkeypatch, number, raised):
    source = open_source(put(tmp_path / "a.tar", members(3)))
    monkeypatch.setattr(tar_index, "load_index", failing("a.tar", number))
    with pytest.raises(raised, match=os.strerror(number)):
        source.load_rows(0)


@pytest.mark.parametrize("kind", ["a folder", "a tar", "a parquet file"])
def test_an_error_of_the_system_leaves_nothing_out_when_a_source_is_opened(tmp_path, monkeypatch,
                                                                           kind):
    """One of two files, or of two folders."""
    for n, name in enumerate("ab"):
        spill(tmp_path / name, members(3, start=3 * n))
        put(tmp_path / f"{name}.tar", members(3, start=3 * n))
        rows = [{"image": sample(i)["jpg"], "txt": "a cat"} for i in range(3)]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
    module, function, name, where = {
        "a folder": (os, "scandir", "b", ""),
        "a tar": (tar_index, "load_index", "b.tar", "*.tar"),
        "a parquet file": (parquet_groups, "read_footer", "b.parquet", "*.parquet")}[kind]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, function,
                        failing(name, errno.ESTALE, getattr(module, function)))
    with pytest.raises(DataError, match=f"/{name} cannot be read.*start the same command"):
        open_source(os.path.join(tmp_path, where))


def failing(name, number, function=None):
    """A function that fails if one of its arguments is the path of the file `name`."""
    def call(*args, **options):
        if any(isinstance(arg, str) and os.path.basename(arg) == name for arg in args):
            raise OSError(number, os.strerror(number), os.path.join("/", name))
        return function(*args, **options)
    return call


@pytest.mark.parametrize("function", ["open", "load"])
def test_missing_memory_makes_no_image_bad(monkeypatch, function):
    def fail(*_, **__):
        raise MemoryError
    data = encoded(photo())
    monkeypatch.setattr(*{"open": (images.Image, "open"),
                          "load": (PngImagePlugin.PngImageFile, "load")}[function], fail)
    with pytest.raises(DataError, match="memory ran out while an image was decoded"):
        images.decode_and_augment(images.read_image(data), 8)


def test_rows_that_are_too_long_for_pillow_are_a_bad_sample():
    """It says so by a MemoryError, however much memory there is."""
    with pytest.raises(BadSample, match="cannot be decoded \\(MemoryError"):
        images.decode_and_augment(images.read_image(png_of_size(70_000_000, 1)), 8)


def png_of_size(width, height):
    """The start of an RGBA image."""
    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    return (PNG_SIGNATURE + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(9)))
            + chunk(b"IEND", b""))


def test_a_struct_with_text_that_is_not_utf8_stays_bytes():
    assert parquet_columns.pick(b"\xff", ["user"]) == b"\xff"
    assert parquet_columns.pick([{"user": "a"}, b"\xff"], ["user"]) == ["a", b"\xff"]


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_an_image_with_broken_exif_data_is_read(kind):
    file = io.BytesIO()
    Image.new("RGB", (20, 10), "red").save(file, kind, exif=b"garbage exif data!!")
    pixels = images.decode_and_augment(images.open_image(file), 8)
    assert np.abs(pixels.astype(int) - [255, 0, 0]).max() < 10


def test_a_caption_that_is_no_text_is_named():
    with pytest.raises(BadSample, match="caption is no text: 7"):
        files.json_caption({"a": 7}, "a", "--caption-field", files.choose_first)
    with pytest.raises(BadSample, match=r"no field 'a' \(it has \?\)"):  # which can be printed
        files.json_caption({"\ud83d": "a cat"}, "a", "--caption-field", files.choose_first)
    with pytest.raises(BadSample, match="caption is empty"):
        files.json_caption({"a": None}, "a", "--caption-field", files.choose_first)

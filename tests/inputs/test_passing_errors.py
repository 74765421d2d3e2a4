"""What is damage and what is not: errors that pass, broken EXIF data, captions of other types."""
import errno
import io
import os

import numpy as np
import pytest
from PIL import Image

from inputs import files, images, parquet_columns, parquet_groups
from inputs.sources import open_source
from runtime.errors import BadSample, DataError
from tests.helpers.samples import members, spill


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
    with pytest.raises(BadSample, match="caption is empty"):
        files.json_caption({"a": None}, "a", "--caption-field", files.choose_first)

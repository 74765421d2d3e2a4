"""Opening images: one function, a list of formats, a bound on pixels, no global state."""
import io
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from inputs.images import decode_and_augment
from inputs.sources import open_source
from interop.encoder import load_pixels
from runtime.errors import BadSample
from tests.helpers.paths import ROOT
from tests.helpers.samples import encoded, photo, sample, spill
from tests.inputs.test_sources import captions

EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 9 9
%%EndComments
%%Page: 1 1
showpage
%%EOF
"""


@pytest.fixture
def ghostscript(tmp_path, monkeypatch):
    """A file that appears if Pillow starts Ghostscript."""
    started = tmp_path / "started"
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {started}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # as before Pillow searched for it
    return started


@pytest.mark.parametrize("name", ["a.eps", "a.png"])
def test_no_file_starts_a_program(tmp_path, ghostscript, name):
    (tmp_path / name).write_bytes(EPS)
    with pytest.raises(BadSample) as problem:
        load_pixels(tmp_path / name, 8)
    assert not ghostscript.exists()
    assert f"{name}: image cannot be opened: it is not a complete JPEG" in str(problem.value)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_features_open_the_formats_that_training_opens(tmp_path, form):
    content = encoded(photo(), form)
    (tmp_path / "a").write_bytes(content)
    spill(tmp_path / "all", [("a.png", content), ("a.txt", b"a cat")])
    image = open_source(str(tmp_path / "all")).image(0)
    image.load()  # a JPEG's draft would differ
    assert np.array_equal(load_pixels(tmp_path / "a", 16), decode_and_augment(image, 16))


@pytest.mark.parametrize("form", ["PPM", "TGA", "ICO", "PCX"])
def test_other_formats_are_refused(tmp_path, form):
    content = encoded(photo(), form)
    (tmp_path / "a").write_bytes(content)
    spill(tmp_path / "all", [("a.png", content), ("a.txt", b"a cat")])
    with pytest.raises(BadSample, match="cannot be opened"):
        open_source(str(tmp_path / "all")).image(0)
    with pytest.raises(BadSample, match="cannot be opened"):
        load_pixels(tmp_path / "a", 16)


def test_errors_name_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(BadSample, match=r"none\.png does not exist"):
        load_pixels(tmp_path / "none.png", 8)
    with pytest.raises(BadSample, match=r"cannot be read \(Is a directory\)"):
        load_pixels(tmp_path, 8)


@pytest.mark.parametrize("filters", ["default", "error", "ignore"])
def test_a_decompression_bomb_is_a_bad_sample_whatever_the_warning_filters(tmp_path, filters):
    content = encoded(Image.new("1", (9_500, 9_500)))  # 90 million pixels in a few kB
    spill(tmp_path / "all", [("a.png", content), ("a.txt", b"a cat")])
    with warnings.catch_warnings():
        warnings.simplefilter(filters)
        with pytest.raises(BadSample):
            open_source(str(tmp_path / "all")).image(0)
        with pytest.raises(BadSample):
            load_pixels(tmp_path / "all" / "a.png", 8)


def test_the_bound_holds_where_a_program_lifts_pillows(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    (tmp_path / "a.png").write_bytes(encoded(Image.new("1", (9_500, 9_500))))
    with pytest.raises(BadSample, match="has 90,250,000 pixels, and more than 89,478,485 are not"):
        load_pixels(tmp_path / "a.png", 8)


def test_an_image_that_the_caller_opened_is_not_opened_again():
    image = Image.open(io.BytesIO(encoded(photo(), "PPM")))
    assert np.array_equal(load_pixels(image, 16), decode_and_augment(photo(), 16))


# ---------------------------------------------------------------------------------- warnings
IMPORTS = """
import warnings
import jax, numpy, optax, tqdm.auto
from PIL import Image
before = list(warnings.filters)
import caption, data, evaluate, train
import evaluation.labels, evaluation.visualize, inputs.sources, interop.encoder
assert warnings.filters == before, set(map(str, warnings.filters)) - set(map(str, before))
"""


def test_importing_changes_no_warning_filters(cache):
    done = subprocess.run([sys.executable, "-c", IMPORTS], cwd=ROOT, env=cache,
                          stderr=subprocess.PIPE)
    assert not done.returncode, done.stderr.decode()


def files_with_damaged_exif():
    """Images with damaged EXIF and TIFF tags, of which Pillow warns."""
    jpeg = sample(0)["jpg"]
    body = b"II*\0\x08\0\0\0\x05\0\x12\x01"
    head = b"\xff\xe1" + (len(body) + 8).to_bytes(2, "big") + b"Exif\0\0"
    damaged = jpeg[:2] + head + body + jpeg[2:]
    for i in range(4):
        yield f"{i}.jpg", damaged
        yield f"{i}.txt", b"a cat %d" % i


def test_commands_do_not_print_pillows_warnings(cache, tmp_path):
    where = spill(tmp_path / "all", files_with_damaged_exif())
    with pytest.warns(UserWarning):  # which a program of the user's may still see
        decode_and_augment(open_source(where).image(0), 8)
    assert len(captions(open_source(where))) == 4
    training = ["--data", where, "--vocab-size", "200", "--val-samples", "2", "--stages",
                "resolution=16 steps=2 batch=4 lr=1e-3"]
    for program, *flags in (["train.py", *training], ["caption.py", "runs/toy", "all/0.jpg"]):
        command = [sys.executable, os.path.join(ROOT, program), *flags]
        done = subprocess.run(command, cwd=tmp_path, env=cache, capture_output=True, text=True)
        assert not done.returncode and "Warning" not in done.stderr, done.stderr
    assert done.stdout.startswith("all/0.jpg: ")

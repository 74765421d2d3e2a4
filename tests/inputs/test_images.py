"""How an image enters: one opener, one list of formats, one bound, no state of the process."""
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
from interop import encoder
from interop.encoder import load_pixels
from runtime.errors import BadSample
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
    """A program that is found as Ghostscript, and the file that it makes when it is started."""
    made = tmp_path / "started"
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {made}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # as before Pillow has looked for it
    return made


@pytest.mark.parametrize("name", ["a.eps", "a.png"])
def test_no_file_starts_a_program(tmp_path, ghostscript, name):
    (tmp_path / name).write_bytes(EPS)
    with pytest.raises(BadSample) as problem:
        load_pixels(tmp_path / name, 8)
    assert not ghostscript.exists()
    assert f"{name}: image cannot be opened: it is not a whole JPEG" in str(problem.value)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_features_open_the_formats_that_training_opens(tmp_path, form):
    content = encoded(photo(), form)
    (tmp_path / "a").write_bytes(content)
    spill(tmp_path / "all", [("a.png", content), ("a.txt", b"a cat")])
    trained = open_source(str(tmp_path / "all")).image(0)
    trained.load()  # a JPEG's draft would differ
    assert np.array_equal(load_pixels(tmp_path / "a", 16), decode_and_augment(trained, 16))


@pytest.mark.parametrize("form", ["PPM", "TGA", "ICO", "PCX"])
def test_and_no_others(tmp_path, form):
    content = encoded(photo(), form)
    (tmp_path / "a").write_bytes(content)
    spill(tmp_path / "all", [("a.png", content), ("a.txt", b"a cat")])
    with pytest.raises(BadSample, match="cannot be opened"):
        open_source(str(tmp_path / "all")).image(0)
    with pytest.raises(BadSample, match="cannot be opened"):
        load_pixels(tmp_path / "a", 16)


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(BadSample, match=r"none\.png does not exist"):
        load_pixels(tmp_path / "none.png", 8)
    with pytest.raises(BadSample, match=r"cannot be read \(Is a directory\)"):
        load_pixels(tmp_path, 8)


@pytest.mark.parametrize("filters", ["default", "error", "ignore"])
def test_a_decompression_bomb_is_a_bad_sample_whatever_the_warning_filters(tmp_path, filters):
    wide = Image.new("1", (9_500, 9_500))  # 90 million pixels in a few kB
    (tmp_path / "a.png").write_bytes(encoded(wide))
    spill(tmp_path / "all", [("a.png", encoded(wide)), ("a.txt", b"a cat")])
    with warnings.catch_warnings():
        warnings.simplefilter(filters)
        with pytest.raises(BadSample):
            open_source(str(tmp_path / "all")).image(0)
        with pytest.raises(BadSample):
            load_pixels(tmp_path / "a.png", 8)


def test_a_bound_that_a_program_lifts_for_its_own_images_is_ours_still(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    (tmp_path / "a.png").write_bytes(encoded(Image.new("1", (9_500, 9_500))))
    with pytest.raises(BadSample, match="has 90,250,000 pixels, and more than 89,478,485 are not"):
        load_pixels(tmp_path / "a.png", 8)


IMPORTS = """
import warnings
import jax, numpy, optax, tqdm.auto
from PIL import Image
before = list(warnings.filters)
import caption, data, evaluate, features, look, labels, sources, train
assert warnings.filters == before, set(map(str, warnings.filters)) - set(map(str, before))
"""


def test_importing_changes_no_warning_filters(cache):
    done = subprocess.run([sys.executable, "-c", IMPORTS], env=cache, stderr=subprocess.PIPE)
    assert not done.returncode, done.stderr.decode()


def odd_samples():
    """Images with damaged EXIF and TIFF tags, of which Pillow warns."""
    jpeg = sample(0)["jpg"]
    body = b"II*\0\x08\0\0\0\x05\0\x12\x01"
    head = b"\xff\xe1" + (len(body) + 8).to_bytes(2, "big") + b"Exif\0\0"
    cut = jpeg[:2] + head + body + jpeg[2:]
    for i in range(4):
        yield f"{i}.jpg", cut
        yield f"{i}.txt", b"a cat %d" % i


def test_pillows_warnings_are_not_printed_by_the_programs(cache, tmp_path):
    where = spill(tmp_path / "all", odd_samples())
    with pytest.warns(UserWarning):  # such as a program of the user's may still see
        decode_and_augment(open_source(where).image(0), 8)
    assert len(captions(open_source(where))) == 4
    root = os.path.dirname(os.path.abspath(encoder.__file__))
    stages = "resolution=16 steps=2 batch=4 lr=1e-3"
    for program, *flags in (
            ["train.py", "--data", where, "--vocab-size", "200", "--stages", stages, "--val-samples", "2"],
            ["caption.py", "runs/toy", "all/0.jpg"]):
        done = subprocess.run([sys.executable, os.path.join(root, program), *flags], cwd=tmp_path,
                              env=cache, capture_output=True, text=True)
        assert not done.returncode and "Warning" not in done.stderr, done.stderr
    assert done.stdout.startswith("all/0.jpg: ")


def test_a_picture_of_the_callers_own_is_not_opened_again(tmp_path):
    content = encoded(photo(), "PPM")
    image = Image.open(io.BytesIO(content))
    assert np.array_equal(load_pixels(image, 16), decode_and_augment(photo(), 16))

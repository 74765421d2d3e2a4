"""Any bytes as a tar, an image, a caption or an index: only documented errors, no hang, and little
memory whatever sizes they claim. And the order of samples is a permutation."""
import contextlib
import itertools
import json
import os
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inputs import files, sources, tar_headers, tar_index
from inputs.images import decode_and_augment
from inputs.order import LaneShuffle
from runtime.errors import BadSample, DataError
from tests.helpers.properties import EVERY, MORE, at_most_a_gigabyte, file, mutated
from tests.helpers.samples import AT, BOMB, HEADER, PNG_SIGNATURE, TAR, J, encoded, mended, photo

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"),  # Pillow's, about damaged EXIF
              pytest.mark.usefixtures(at_most_a_gigabyte.__name__)]


def header(name, size, kind):
    block = mended(HEADER, 0, name.ljust(100, b"\0"))
    return mended(mended(block, 124, size.ljust(12, b"\0")), 156, kind)


def block_of(records):
    return b"".join(records)[:512].ljust(512, b"\0")


NAMES = st.sampled_from([b"0.jpg", b"0.txt", b"1.png", b"1.json", b"", b"x"])
OCTAL = st.integers(0, 3000).map(lambda n: b"%o" % n)
BASE_256 = st.integers(0, 1 << 90).map(lambda n: b"\x80" + n.to_bytes(12, "big")[1:])
KINDS = st.sampled_from([bytes([b]) for b in b"0\x001234567xgLKSZ"])
HEADERS = st.builds(header, NAMES | st.binary(max_size=100),
                    OCTAL | BASE_256 | st.binary(max_size=12), KINDS)
PAX_RECORDS = st.builds(lambda n, key, value: b"%d %s=%s\n" % (n, key, value),
                        st.integers(0, 99), st.sampled_from([b"path", b"size"]),
                        st.binary(max_size=9))
RECORDS = st.binary(max_size=60) | PAX_RECORDS
RECORD_BLOCKS = st.lists(RECORDS, max_size=9).map(block_of)
BLOCKS = st.lists(HEADERS | st.just(bytes(512)) | RECORD_BLOCKS | st.binary(max_size=700),
                  max_size=12)


@MORE
@given(st.binary(max_size=3000) | mutated(TAR) | BLOCKS.map(b"".join))
def test_any_bytes_as_a_tar(content):
    with file(content) as path:
        try:
            index = tar_index.scan_tar(path)
        except ValueError:
            return
        rows = index.rows.reshape(-1, 3, 2)
        assert rows.min(initial=0) >= 0
        assert (rows.sum(-1) <= len(content)).all()
        assert (rows[:, 0, 0] > 0).all()
        assert index.meta["pairs"]["txt"][0] == (rows[:, 1, 0] > 0).sum()
        assert all(count > 0 for count in index.meta["skipped"].values())
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
        rows = tar_index.scan_tar(path).rows
    images = {content[offset:offset + size] for offset, size in rows[:, :2].tolist()}
    texts = {content[offset:offset + size] for offset, size in rows[:, 2:4].tolist()}
    for i in (0, 1, 3, 4):
        member = AT[f"{i:09d}.jpg"]
        assert TAR[member.offset_data:member.offset_data + member.size] in images
        assert b"a cat %d" % i in texts


@EVERY
@given(st.binary(max_size=400) | st.lists(RECORDS, max_size=9).map(b"".join))
def test_any_bytes_as_an_extended_header(content):
    assert all(len(k) + len(v) < len(content) for k, v in tar_headers.parse_pax(content).items())


@EVERY
@given(st.data())
def test_any_bytes_as_an_index(data):
    with file(TAR) as path:
        os.utime(path, (0, 0))
        tar_index.save_index(path, tar_index.scan_tar(path))
        with open(path + tar_index.INDEX_SUFFIX, "rb") as f:
            index = f.read()
        with open(path + tar_index.INDEX_SUFFIX, "wb") as f:
            f.write(data.draw(mutated(index) | st.binary(max_size=300)))
        source = sources.open_source(path)
        assert [source.caption(i) for i in range(len(source))] == [f"a cat {i}" for i in range(5)]


LEAVES = (st.none() | st.booleans() | st.floats() | st.integers()
          | st.text(st.characters(), max_size=9))
KEYS = st.sampled_from("cd")
JSON_VALUES = (LEAVES | st.lists(LEAVES, max_size=3)
               | st.dictionaries(KEYS, LEAVES | st.dictionaries(KEYS, LEAVES)))
CAPTIONS = (st.binary(max_size=60) | st.text(max_size=20).map(str.encode)
            | JSON_VALUES.map(lambda value: json.dumps(value).encode()))
IMAGES = [encoded(photo(), kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")]


@MORE
@given(st.sampled_from([*IMAGES, BOMB]).flatmap(mutated) | st.binary(max_size=200), st.booleans())
def test_any_bytes_as_an_image(content, with_signature):
    with file(PNG_SIGNATURE + content if with_signature else content, ".jpg") as path:
        with open(path.replace(".jpg", ".txt"), "w") as f:
            f.write("a cat")
        source = sources.open_source(os.path.dirname(path))
        with contextlib.suppress(BadSample):
            assert decode_and_augment(source.image(0), 8).shape == (8, 8, 3)


@EVERY
@given(CAPTIONS, st.sampled_from(["txt", "c"]))
def test_any_bytes_as_a_caption(content, field):
    with file(encoded(photo()), ".png") as path:
        with open(path.replace(".png", ".txt" if field == "txt" else ".json"), "wb") as f:
            f.write(content)
        with contextlib.suppress(DataError):
            caption = sources.open_source(os.path.dirname(path), field).caption(0)
            assert caption.strip()
            assert caption.encode()


SIZES = st.lists(st.integers(0, 9), min_size=1, max_size=60).filter(any)


@EVERY
@given(SIZES, st.integers(0, 99), st.integers(0, 3), st.integers(1, 9), st.integers(0, 5))
def test_every_epoch_is_a_permutation_with_few_chunks_in_use(sizes, seed, epoch, num_lanes, length):
    starts = np.cumsum([0, *sizes])
    n = int(starts[-1])

    def shard_of(samples):
        return np.searchsorted(starts, samples, side="right") - 1

    def chunk_of(samples):
        return (samples - starts[shard_of(samples)]) // length

    def order():
        shuffle = LaneShuffle(starts, seed, chunk_of if length else None)
        return [shuffle(epoch * n + i) for i in range(n)]

    with mock.patch("inputs.order.NUM_LANES", num_lanes):
        samples = order()
        assert samples == order()
    assert sorted(samples) == list(range(n))
    if not length:
        return
    chunks = list(zip(shard_of(samples).tolist(), chunk_of(np.array(samples)).tolist()))
    num_reads = 0
    for lane in range(num_lanes):  # each lane leaves a chunk, and a tar, when it has used it
        chunks_in_turn = [chunk for chunk, _ in itertools.groupby(chunks[lane::num_lanes])]
        assert len(chunks_in_turn) == len(set(chunks_in_turn))
        tars_in_turn = [tar for tar, _ in itertools.groupby(tar for tar, _ in chunks_in_turn)]
        assert len(tars_in_turn) == len(set(tars_in_turn))
        num_reads += len(chunks_in_turn)
    assert num_reads <= len(set(chunks)) + num_lanes - 1  # only a chunk of two lanes is read twice


@EVERY
@given(SIZES, st.data())
def test_a_subset_and_its_complement_are_all_samples(sizes, data):
    source = files.FileSource("x", "txt")
    source.starts = np.cumsum([0, *sizes])
    indices = st.lists(st.integers(0, len(source) - 1), unique=True)
    excluded = np.array(data.draw(indices), np.int64)
    rest = sources.Complement(source, excluded)
    kept = [rest.source_index(i) for i in range(len(rest))]
    assert kept == sorted(set(range(len(source))) - set(excluded.tolist()))
    bounds = zip(source.starts, source.starts[1:])
    expected = [sum(start <= i < end for i in kept) for start, end in bounds]
    assert np.diff(rest.starts).tolist() == expected

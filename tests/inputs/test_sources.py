"""Sources: folders and tars give the same samples, broken ones are replaced and counted, and a
place without data is explained in one sentence."""
import hashlib
import json
import os
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image

from data import Loader
from inputs.images import decode_and_augment
from inputs.sources import Subset, open_source
from runtime.errors import DataError
from tests.helpers import samples
from tests.helpers.samples import TOK, encoded, members, opened, photo, put, reader, sample


def captions(source):
    return [source.caption(i) for i in range(len(source))]


# ---------------------------------------------------------------------------------- what is read
def test_folders_tars_globs_and_brace_lists_have_the_same_samples(tmp_path):
    samples.spill(tmp_path / "all", members(6))
    put(tmp_path / "00000.tar", members(3))
    put(tmp_path / "00001.tar", members(3, start=3))
    expected = decode_and_augment(opened(photo(seed=4), "JPEG"), 16)
    for where in ("all", "*.tar", "0000?.tar", "{00000..00001}.tar", "0000{0,1}.tar",
                  "0000{0,1}.ta[r]"):
        source = open_source(str(tmp_path / where))
        assert captions(source) == [f"a cat {i}" for i in range(6)], where
        assert source.skipped == {}, where
        other = open_source(str(tmp_path / where), "re_caption")
        assert captions(other) == [f"a cat number {i}" for i in range(6)]
        assert np.array_equal(decode_and_augment(source.image(4), 16), expected)


def test_a_second_text_comes_with_each_image(tmp_path):
    files = []
    for i in range(6):
        fields = {"re_caption": f"a cat number {i}", "caption": f"cat {i}"}
        files += [(f"{i}.jpg", sample(i)["jpg"]), (f"{i}.json", json.dumps(fields).encode())]
    source = open_source(put(tmp_path / "a.tar", files), "re_caption")
    both = Loader(source, TOK, 12, 0, None, 2, alt_field="caption").batch(range(6), 16)
    one = reader(source, augment=None).batch(range(6), 16)
    assert np.array_equal(both["text"], one["text"])
    assert np.array_equal(both["alt"], [TOK.encode(f"cat {i}", 12) for i in both["sample"]])
    with pytest.raises(DataError, match=r"no field 'none' .*--alt-field"):
        Loader(source, TOK, 12, 0, None, 2, alt_field="none").batch(range(2), 16)


def source_of_lists(tmp_path, kind):
    """Six samples, each with two lists of captions, in a tar or a folder."""
    files = []
    for i in range(6):
        captions = [f"a cat {i}{n}" for n in range(4)]
        alt = [f"cat {i}{n}" for n in range(4)]
        fields = {"c": [None, *captions, " ", 7], "alt": alt}
        files += [(f"{i}.jpg", sample(i)["jpg"]), (f"{i}.json", json.dumps(fields).encode())]
    if kind == "tar":
        return open_source(put(tmp_path / "a.tar", files), "c")
    return open_source(samples.spill(tmp_path / "all", files), "c")


@pytest.mark.parametrize("kind", ["tar", "folder"])
def test_one_caption_of_a_list_is_drawn_in_each_epoch(tmp_path, kind):
    """One string of a list is drawn from (seed, epoch, sample): the same for any number of threads
    and wherever a run starts, another in other epochs and for other seeds."""
    source = source_of_lists(tmp_path, kind)
    numbers = {}
    for i in range(6):
        numbers |= {TOK.encode(f"a cat {i}{n}", 12).tobytes(): (i, n) for n in range(4)}

    def drawn(positions, **options):
        batch = reader(source, **options).batch(positions, 8)
        pairs = [numbers[text.tobytes()] for text in batch["text"]]
        assert [i for i, _ in pairs] == batch["sample"].tolist()
        assert not batch["bad"]
        return pairs

    epochs = drawn(range(6 * 20))
    for i in range(6):
        assert {n for j, n in epochs if j == i} == {0, 1, 2, 3}
    assert drawn(range(50, 70), workers=4) == epochs[50:70]
    assert sorted(drawn(range(6 * 20), seed=1)) != sorted(epochs)
    assert len({tuple(sorted(epochs[6 * e:6 * e + 6])) for e in range(20)}) > 15
    both = Loader(source, TOK, 12, 0, samples.TRAINING, 2, alt_field="alt").batch(range(24), 8)
    assert len({text.tobytes() for text in both["alt"]}) > 12


@pytest.mark.parametrize("kind", ["tar", "folder"])
def test_validation_and_vocabulary_use_the_first_caption_of_a_list(tmp_path, kind):
    source = source_of_lists(tmp_path, kind)
    assert captions(source) == [f"a cat {i}0" for i in range(6)]
    batch = reader(source, augment=None).batch(range(12), 8)
    expected = [TOK.encode(f"a cat {i}0", 12) for i in batch["sample"]]
    assert np.array_equal(batch["text"], expected)


def test_odd_names_are_only_names(tmp_path):
    names = ["with space", "dots.in.it", "sub/folder/x", "./here", "käse", b"not-utf8-\xff",
             "new\nline"]
    files = []
    for i, name in enumerate(names):
        for suffix, content in sample(i).items():
            files.append((os.fsencode(name) + b"." + os.fsencode(suffix), content))
    folder = samples.spill(tmp_path / "all [1] {a}", files)
    tar = put(tmp_path / "odd [1] {a,b}.tar", files)
    for where in (folder, tar):
        source = open_source(where)
        assert sorted(captions(source)) == [f"a cat {i}" for i in range(len(names))]
        assert source.skipped == {}
        assert all(source.name(i).encode() for i in range(len(source)))  # they can be printed


def test_a_folder_beside_the_target_of_a_link_is_found(tmp_path):
    """LINK/.. is the folder that the link's target is in."""
    samples.spill(tmp_path / "far" / "images", members(3))
    (tmp_path / "far" / "other").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far" / "other")
    assert len(captions(open_source(f"{tmp_path}/link/../images"))) == 3


def test_incomplete_and_repeated_files_are_counted(tmp_path):
    files = [*members(2), ("x.jpg", sample(0)["jpg"]), ("y.txt", b"no image"), ("z.gif", b"GIF"),
             ("README.md", b"-"), ("000000000.png", encoded(photo()))]
    counts = {"without a .txt": 2, "without an image": 1,
              "beside another image of the same name": 1}
    assert open_source(samples.spill(tmp_path / "all", files)).skipped == counts
    twice = open_source(put(tmp_path / "a.tar", [*files, ("000000001.txt", b"the later one")]))
    assert twice.skipped == counts | {"replaced by a later file of the same name": 1}
    assert captions(twice) == ["a cat 0", "the later one"]


def test_fingerprints_differ_between_data_sets(tmp_path):
    a = samples.spill(tmp_path / "a", members(2))
    b = samples.spill(tmp_path / "b", members(2, start=1))
    tars = [put(tmp_path / f"{n}.tar", members(n)) for n in (2, 3)]
    assert len({open_source(where).fingerprint() for where in (a, b, *tars)}) == 4
    os.rename(a, tmp_path / "moved")
    again = samples.spill(a, members(2))
    moved = open_source(str(tmp_path / "moved"))
    assert moved.fingerprint() == open_source(again).fingerprint()


# ------------------------------------------------------------------------------ what is refused
NO_DATA = [
    ("absent", "txt", "nothing of that name exists"),
    ("none*.tar", "txt", "no file matches"),
    ("absent.tar", "txt", "absent.tar cannot be read .*No such file"),
    ("{0..99999999999}.tar", "txt", "too many files"),
    ("one.tar.gz", "txt", "is no data: give scenes, a folder"),
    ("one.tar.g*", "txt", "uncompressed tar"),
    ("zero.tar", "txt", "zero.tar cannot be read as an uncompressed tar: empty file"),
    ("text.tar", "txt", "text.tar cannot be read as an uncompressed"),
    ("folder*", "txt", "Is a directory"),
    ("bare.tar", "txt", r"no captioned image .*1 without a \.txt.*--caption-field"),
    ("folder", "txt", "no images at all"),
    (".", "txt", r"no captioned image in .*, but tars: name those, as '.*\*\.tar'"),
    ("good.tar", "caption",
     r"no field 'caption' \(it has re_caption, n\); name one with --caption-field"),
    ("good.tar", "n", "caption is no text: 0"),
    ("bare.tar", "re_caption", r"1 without a \.json"),
]


@pytest.mark.parametrize("where, field, message", NO_DATA)
def test_a_place_without_data_is_explained_in_one_sentence(tmp_path, where, field, message):
    put(tmp_path / "good.tar", members(2))
    put(tmp_path / "bare.tar", [("a.jpg", sample(0)["jpg"])])
    (tmp_path / "one.tar.gz").write_bytes(b"\x1f\x8b" + bytes(600))
    (tmp_path / "zero.tar").write_bytes(b"")
    (tmp_path / "text.tar").write_bytes(b"not a tar " * 200)
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=message) as problem:
        open_source(str(tmp_path / where), field)
    assert "\n" not in str(problem.value)


# --------------------------------------------------------------------------------- cut-off tars
def test_a_cut_off_tar_gives_what_it_contains_and_says_so(tmp_path):
    path, cut = tmp_path / "complete.tar", tmp_path / "cut.tar"
    put(path, members(4))
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        last = tar.getmember("000000003.jpg")
    in_header, in_data = last.offset + 100, last.offset_data + 200
    for end in (in_header, last.offset, last.offset_data, in_data):
        cut.write_bytes(content[:end])
        source = open_source(str(cut))
        assert captions(source) == [f"a cat {i}" for i in range(3)], end
        assert any("without an end mark" in why and "cut.tar" in why for why in source.skipped), end
        reader(source).batch(range(3), 8)
    hurt = tmp_path / "hurt.tar"
    hurt.write_bytes(content[:last.offset] + b"\xff" * 512 + content[last.offset + 512:])
    source = open_source(str(hurt))
    assert any("damaged places" in why and "hurt.tar" in why for why in source.skipped)
    assert captions(source) == [f"a cat {i}" for i in range(3)]


# ----------------------------------------------------------------------------------- img2dataset
def write_shard(folder, shard, num_rows, failed, with_txt):
    """One shard as img2dataset writes it for a table with re_caption. Rows that failed are only in
    the parquet and in the stats, so that the keys have gaps."""
    files = []
    rows = sorted(set(range(num_rows)) - failed)
    for n in rows:
        key, jpeg = f"{shard:05d}{n:04d}", encoded(photo(seed=n), "JPEG")
        fields = {"url": f"https://example.org/{n}.jpg", "re_caption": f"a cat number {n}",
                  "org_caption": f"IMG_{n}.jpg", "key": key, "status": "success",
                  "error_message": None, "width": 48, "height": 36, "original_width": 480,
                  "original_height": 360, "exif": "{}",
                  "sha256": hashlib.sha256(jpeg).hexdigest()}
        files.append((f"{key}.jpg", jpeg))
        if with_txt:  # with --caption_col
            fields["caption"] = fields["org_caption"]
            files.append((f"{key}.txt", fields["org_caption"].encode()))
        files.append((f"{key}.json", json.dumps(fields, indent=4).encode()))
    folder.mkdir(exist_ok=True)
    put(folder / f"{shard:05d}.tar", files)
    (folder / f"{shard:05d}.parquet").write_bytes(b"PAR1" + bytes(600) + b"PAR1")
    statuses = {"success": len(rows), "HTTP Error 404: Not Found": len(failed)}
    stats = {"count": num_rows, "successes": len(rows), "failed_to_download": len(failed),
             "failed_to_resize": 0, "duration": 1.5, "start_time": 1.0, "end_time": 2.5,
             "status_dict": statuses}
    (folder / f"{shard:05d}_stats.json").write_text(json.dumps(stats, indent=4))


@pytest.mark.parametrize("with_txt", [True, False])
def test_all_samples_that_img2dataset_wrote_are_read(tmp_path, with_txt):
    """With gaps in keys and shards, and a glob that matches parquets and stats too: nothing counts
    as missing."""
    write_shard(tmp_path / "shards", 0, 40, {0, 7, 8, 39}, with_txt)
    write_shard(tmp_path / "shards", 12, 25, {3}, with_txt)
    numbers = [n for n in range(40) if n not in (0, 7, 8, 39)] + [n for n in range(25) if n != 3]
    for where in ("shards/*.tar", "shards/{00000..00012}.tar", "shards/*"):
        source = open_source(str(tmp_path / where), "re_caption")
        assert captions(source) == [f"a cat number {n}" for n in numbers], where
        assert not any("missing" in why for why in source.skipped), where
        assert len(reader(source).batch(range(60), 8)["bad"]) == 0
    tars = str(tmp_path / "shards/*.tar")
    assert open_source(tars, "org_caption").caption(0) == "IMG_1.jpg"
    if with_txt:
        assert open_source(tars).caption(0) == "IMG_1.jpg"
        assert open_source(tars, "caption").caption(0) == "IMG_1.jpg"


# ------------------------------------------------------------------------------- broken samples
JPEG = encoded(photo(400, 300), "JPEG")
BOMB = (samples.BOMB + samples.chunk(b"IDAT", zlib.compress(bytes(99)))
        + samples.chunk(b"IEND", b""))
IMAGES = {"noise": b"\x00\x01" * 400, "empty": b"", "cut.jpeg": JPEG[:len(JPEG) // 2],
          "cut.png": encoded(photo())[:-200], "bomb": BOMB, "text": b"<html>404</html>",
          "float": encoded(Image.new("F", (9, 9), 0.5), "TIFF")}
TEXTS = {"empty": b"", "blank": b" \n\t", "latin1": "käse".encode("latin1"),
         "utf16": "a cat".encode("utf16"), "zeros": bytes(8)}
JSONS = {"broken": b'{"c": "a', "list": b'["c"]', "text": b'"c"', "number": b'{"c": 3}',
         "null": b'{"c": null}', "deep": b"[" * 200000, "empty": b"", "absent": b'{"d": "x"}',
         "blank": b'{"c": " "}', "digits": b'{"c": ' + b"9" * 5000 + b"}"}
BROKEN = [("txt", "jpg", kind, content) for kind, content in IMAGES.items()]
BROKEN += [("txt", "txt", kind, content) for kind, content in TEXTS.items()]
BROKEN += [("c", "json", kind, content) for kind, content in JSONS.items()]


@pytest.mark.parametrize("field, part, kind, content", BROKEN,
                         ids=[f"{part}-{kind}" for _, part, kind, _ in BROKEN])
def test_a_broken_sample_is_replaced_and_counted_with_a_reason(tmp_path, field, part, kind,
                                                               content):
    files = []
    for i in range(4):
        parts = sample(i) | {"json": b'{"c": "a cat %d"}' % i}
        if i == 1:
            parts[part] = content
        files += [(f"{i}.{suffix}", data) for suffix, data in parts.items()]
    source = open_source(put(tmp_path / "a.tar", files), field)
    loaders = [reader(source, workers=workers) for workers in (1, 4)]
    first, second = (loader.batch(range(8), 16) for loader in loaders)
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert set(first["sample"]) == {0, 2, 3}
    assert np.bincount(first["sample"])[2] == 4  # twice per epoch: for itself and for 1
    assert loaders[0].bad == loaders[1].bad == first["bad"]
    assert list(first["bad"]) == [1] and "\n" not in first["bad"][1]
    with pytest.raises(DataError, match="no sample in the data can be used"):
        reader(Subset(source, np.array([1, 1]))).batch(range(2), 16)


def test_odd_but_valid_samples_are_used(tmp_path):
    files = [("a.jpg", encoded(photo())), ("a.txt", b"\xef\xbb\xbfa c\0at"),
             ("b.JPG", JPEG), ("b.txt", "猫 😀 \u200b\r\n".encode()),
             ("c.gif", encoded(photo(), "WEBP")), ("c.txt", b"cat " * 5000)]
    source = open_source(samples.spill(tmp_path / "all", files))
    assert len(source) == 3
    batch = reader(source, augment=None).batch(range(3), 16)
    again = reader(source, augment=None).batch(range(3), 16)
    assert batch["text"].tolist() == again["text"].tolist()
    assert batch["text"][0].tolist() == TOK.encode("a cat", 12).tolist()
    assert batch["text"][2][-1] == 2
    (tmp_path / "all" / "b.JPG").unlink()  # during the run
    loader = reader(source, augment=None)
    assert loader.batch(range(3), 16)["sample"].tolist() == [0, 2, 2]
    assert "cannot be read" in loader.bad[1]

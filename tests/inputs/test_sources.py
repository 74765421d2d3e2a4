"""Data: every kind of place, what is wrong with one said in a sentence, and broken samples skipped in the open."""
import hashlib
import itertools
import json
import os
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image

from data import Loader
from inputs import sources
from inputs.images import decode_and_augment
from inputs.sources import open_source
from runtime.errors import DataError
from tests.helpers.samples import (
    BOMB,
    TOK,
    TRAINING,
    chunk,
    encoded,
    members,
    opened,
    photo,
    put,
    reader,
    sample,
    spill,
)


def captions(source):
    return [source.caption(i) for i in range(len(source))]


def test_folder_tars_globs_and_brace_lists_hold_the_same_samples(tmp_path):
    spill(tmp_path / "all", members(6))
    put(tmp_path / "00000.tar", members(3))
    put(tmp_path / "00001.tar", members(3, start=3))
    for where in ("all", "*.tar", "0000?.tar", "{00000..00001}.tar", "0000{0,1}.tar", "0000{0,1}.ta[r]"):
        source = open_source(str(tmp_path / where))
        assert captions(source) == [f"a cat {i}" for i in range(6)] and source.skipped == {}, where
        assert captions(open_source(str(tmp_path / where), "re_caption")) == [f"a cat number {i}" for i in range(6)]
        assert np.array_equal(decode_and_augment(source.image(4), 16), decode_and_augment(opened(photo(seed=4), "JPEG"), 16))


def test_a_second_text_comes_with_each_picture(tmp_path):
    texts = [json.dumps({"re_caption": f"a cat number {i}", "caption": f"cat {i}"}).encode() for i in range(6)]
    files = [(f"{i}.{suffix}", content) for i, text in enumerate(texts) for suffix, content in (("jpg", sample(i)["jpg"]), ("json", text))]
    source = open_source(put(tmp_path / "a.tar", files), "re_caption")
    both = Loader(source, TOK, 12, 0, None, 2, alt_field="caption").batch(range(6), 16)
    assert np.array_equal(both["text"], reader(source, augment=None).batch(range(6), 16)["text"])
    assert np.array_equal(both["alt"], [TOK.encode(f"cat {i}", 12) for i in both["source_index"]])
    with pytest.raises(DataError, match=r"no field 'none' .*--alt-field"):
        Loader(source, TOK, 12, 0, None, 2, alt_field="none").batch(range(2), 16)


def with_lists(tmp_path, kind):
    """Six samples, each with two lists of captions, in a tar or a folder."""
    files = []
    for i in range(6):
        captions = [f"a cat {i}{n}" for n in range(4)]
        fields = {"c": [None, *captions, " ", 7], "alt": [f"cat {i}{n}" for n in range(4)]}
        files += [(f"{i}.jpg", sample(i)["jpg"]), (f"{i}.json", json.dumps(fields).encode())]
    where = put(tmp_path / "a.tar", files) if kind == "tar" else spill(tmp_path / "all", files)
    return open_source(where, "c")


@pytest.mark.parametrize("kind", ["tar", "folder"])
def test_one_caption_of_a_list_is_drawn_in_each_epoch(tmp_path, kind):
    """Of the strings of a list one is drawn from (seed, epoch, sample): the same for any workers and
    wherever a run starts, another in other epochs and for other seeds."""
    source = with_lists(tmp_path, kind)
    tokens = {TOK.encode(f"a cat {i}{n}", 12).tobytes(): (i, n) for i in range(6) for n in range(4)}

    def drawn(positions, **how):
        batch = reader(source, **how).batch(positions, 8)
        found = [tokens[text.tobytes()] for text in batch["text"]]
        assert [i for i, _ in found] == batch["source_index"].tolist() and not batch["bad"]
        return found

    epochs = drawn(range(6 * 20))
    for i in range(6):
        assert {n for j, n in epochs if j == i} == {0, 1, 2, 3}
    assert drawn(range(50, 70), workers=4) == epochs[50:70]
    assert sorted(drawn(range(6 * 20), seed=1)) != sorted(epochs)
    assert len({tuple(sorted(epochs[6 * e:6 * e + 6])) for e in range(20)}) > 15
    both = Loader(source, TOK, 12, 0, TRAINING, 2, alt_field="alt").batch(range(24), 8)
    assert len({text.tobytes() for text in both["alt"]}) > 12


@pytest.mark.parametrize("kind", ["tar", "folder"])
def test_validation_and_vocabulary_take_the_first_caption_of_a_list(tmp_path, kind):
    source = with_lists(tmp_path, kind)
    assert captions(source) == [f"a cat {i}0" for i in range(6)]
    batch = reader(source, augment=None).batch(range(12), 8)
    assert np.array_equal(batch["text"], [TOK.encode(f"a cat {i}0", 12) for i in batch["source_index"]])


def test_odd_names_are_only_names(tmp_path):
    names = ["with space", "dots.in.it", "sub/folder/x", "./here", "käse", b"not-utf8-\xff", "new\nline"]
    files = [(os.fsencode(n) + b"." + os.fsencode(s), c) for n, i in zip(names, itertools.count()) for s, c in sample(i).items()]
    wheres = spill(tmp_path / "all [1] {a}", files), put(tmp_path / "odd [1] {a,b}.tar", files)
    for where in wheres:
        source = open_source(where)
        assert sorted(captions(source)) == [f"a cat {i}" for i in range(len(names))] and source.skipped == {}
        assert all(source.name(i).encode() for i in range(len(source)))  # can be printed


def test_incomplete_and_repeated_files_are_counted(tmp_path):
    files = [*members(2), ("x.jpg", sample(0)["jpg"]), ("y.txt", b"no image"), ("z.gif", b"GIF"), ("README.md", b"-"), ("000000000.png", encoded(photo()))]
    counted = {"without a .txt": 2, "without an image": 1, "beside another image of the same name": 1}
    assert open_source(spill(tmp_path / "all", files)).skipped == counted
    twice = open_source(put(tmp_path / "a.tar", [*files, ("000000001.txt", b"the later one")]))
    assert twice.skipped == counted | {"replaced by a later file of the same name": 1}
    assert captions(twice) == ["a cat 0", "the later one"]


def test_fingerprint_tells_data_sets_apart(tmp_path):
    a, b = (spill(tmp_path / n, members(2, start=s)) for n, s in (("a", 0), ("b", 1)))
    tars = [put(tmp_path / f"{n}.tar", members(n)) for n in (2, 3)]
    assert len({open_source(w).fingerprint() for w in (a, b, *tars)}) == 4
    os.rename(a, tmp_path / "moved")
    assert open_source(str(tmp_path / "moved")).fingerprint() == open_source(spill(a, members(2))).fingerprint()


@pytest.mark.parametrize("where, field, says", [
    ("absent", "txt", "nothing of that name exists"), ("none*.tar", "txt", "no file matches"),
    ("absent.tar", "txt", "absent.tar cannot be read .*No such file"),
    ("{0..99999999999}.tar", "txt", "too many files"), ("one.tar.gz", "txt", "is no data: give scenes, a folder"), ("one.tar.g*", "txt", "uncompressed tar"),
    ("zero.tar", "txt", "zero.tar cannot be read as an uncompressed tar: empty file"), ("text.tar", "txt", "text.tar cannot be read as an uncompressed"),
    ("folder*", "txt", "Is a directory"), ("bare.tar", "txt", r"no captioned image .*1 without a \.txt.*--caption-field"),
    ("folder", "txt", "no images at all"), (".", "txt", r"no captioned image in .*, but tars: name those, as '.*\*\.tar'"),
    ("good.tar", "caption", r"no field 'caption' \(it has re_caption, n\); name one with --caption-field"), ("good.tar", "n", "caption is empty"),
    ("bare.tar", "re_caption", r"1 without a \.json"),
])
def test_a_place_without_data_is_one_sentence(tmp_path, where, field, says):
    put(tmp_path / "good.tar", members(2))
    put(tmp_path / "bare.tar", [("a.jpg", sample(0)["jpg"])])
    (tmp_path / "one.tar.gz").write_bytes(b"\x1f\x8b" + bytes(600))
    (tmp_path / "zero.tar").write_bytes(b"")
    (tmp_path / "text.tar").write_bytes(b"not a tar " * 200)
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=says) as problem:
        open_source(str(tmp_path / where), field)
    assert "\n" not in str(problem.value)


def test_a_cut_off_tar_gives_what_it_holds_and_says_so(tmp_path):
    put(tmp_path / "whole.tar", members(4))
    whole = (tmp_path / "whole.tar").read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        third = tar.getmember("000000003.jpg")
    for cut in (third.offset + 100, third.offset, third.offset_data, third.offset_data + 200):  # in a header, between, in data
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        source = open_source(str(tmp_path / "cut.tar"))
        assert captions(source) == [f"a cat {i}" for i in range(3)], cut
        assert any("without an end mark" in why and "cut.tar" in why for why in source.skipped), cut
        reader(source).batch(range(3), 8)
    (tmp_path / "hurt.tar").write_bytes(whole[:third.offset] + b"\xff" * 512 + whole[third.offset + 512:])
    hurt = open_source(str(tmp_path / "hurt.tar"))
    assert any("damaged places" in why and "hurt.tar" in why for why in hurt.skipped) and captions(hurt) == [f"a cat {i}" for i in range(3)]


def recap(folder, shard, rows, failed, with_txt):
    """One shard as img2dataset leaves it for a table with re_caption: rows that failed are in the parquet and the stats alone, so keys have gaps."""
    files, made = [], 0
    for n in set(range(rows)) - failed:
        key, picture = f"{shard:05d}{n:04d}", encoded(photo(seed=n), "JPEG")
        fields = {"url": f"https://example.org/{n}.jpg", "re_caption": f"a cat number {n}", "org_caption": f"IMG_{n}.jpg", "key": key, "status": "success",
                  "error_message": None, "width": 48, "height": 36, "original_width": 480, "original_height": 360, "exif": "{}",
                  "sha256": hashlib.sha256(picture).hexdigest()}
        files += [(f"{key}.jpg", picture)]
        if with_txt:  # with --caption_col
            fields["caption"] = fields["org_caption"]
            files += [(f"{key}.txt", fields["org_caption"].encode())]
        files, made = [*files, (f"{key}.json", json.dumps(fields, indent=4).encode())], made + 1
    os.makedirs(folder, exist_ok=True)
    put(folder / f"{shard:05d}.tar", files)
    (folder / f"{shard:05d}.parquet").write_bytes(b"PAR1" + bytes(600) + b"PAR1")
    (folder / f"{shard:05d}_stats.json").write_text(json.dumps({
        "count": rows, "successes": made, "failed_to_download": len(failed), "failed_to_resize": 0, "duration": 1.5, "start_time": 1.0, "end_time": 2.5,
        "status_dict": {"success": made, "HTTP Error 404: Not Found": len(failed)}}, indent=4))


@pytest.mark.parametrize("with_txt", [True, False])
def test_what_img2dataset_leaves_is_read_whole(tmp_path, with_txt):
    """Keys with gaps, shards with gaps, and a glob that matches the parquets and stats too: all samples are found, and nothing counts as missing."""
    recap(tmp_path / "shards", 0, 40, {0, 7, 8, 39}, with_txt)
    recap(tmp_path / "shards", 12, 25, {3}, with_txt)
    wanted = [f"a cat number {n}" for n in range(40) if n not in (0, 7, 8, 39)] + [f"a cat number {n}" for n in range(25) if n != 3]
    for where in ("shards/*.tar", "shards/{00000..00012}.tar", "shards/*"):
        source = open_source(str(tmp_path / where), "re_caption")
        assert captions(source) == wanted and not any("missing" in why for why in source.skipped), where
        assert len(reader(source).batch(range(60), 8)["bad"]) == 0
    assert captions(open_source(str(tmp_path / "shards/*.tar"), "org_caption"))[0] == "IMG_1.jpg"
    if with_txt:
        assert captions(open_source(str(tmp_path / "shards/*.tar")))[0] == captions(open_source(str(tmp_path / "shards/*.tar"), "caption"))[0] == "IMG_1.jpg"


BOMB += chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")


JPEG = encoded(photo(400, 300), "JPEG")
PIXELS = {"noise": b"\x00\x01" * 400, "empty": b"", "cut.jpeg": JPEG[:len(JPEG) // 2], "cut.png": encoded(photo())[:-200], "bomb": BOMB,
          "text": b"<html>404</html>", "float": encoded(Image.new("F", (9, 9), 0.5), "TIFF")}
TEXTS = {"empty": b"", "blank": b" \n\t", "latin1": "käse".encode("latin1"), "utf16": "a cat".encode("utf16"), "zeros": bytes(8)}
JSONS = {"broken": b'{"c": "a', "list": b'["c"]', "text": b'"c"', "number": b'{"c": 3}', "null": b'{"c": null}', "deep": b"[" * 200000, "empty": b"",
         "absent": b'{"d": "x"}', "blank": b'{"c": " "}', "digits": b'{"c": ' + b"9" * 5000 + b"}"}
BROKEN = [("txt", "jpg", k, v) for k, v in PIXELS.items()] + [("txt", "txt", k, v) for k, v in TEXTS.items()] + [("c", "json", k, v) for k, v in JSONS.items()]


@pytest.mark.parametrize("field, part, kind, content", BROKEN, ids=[f"{b[1]}-{b[2]}" for b in BROKEN])
def test_a_broken_sample_is_replaced_counted_and_named(tmp_path, field, part, kind, content):
    files = {(i, s): c for i in range(4) for s, c in (sample(i) | {"json": b'{"c": "a cat %d"}' % i}).items()}
    files[1, part] = content
    source = open_source(put(tmp_path / "a.tar", [(f"{i}.{s}", c) for (i, s), c in files.items()]), field)
    found = [reader(source, workers=w) for w in (1, 4)]
    one, other = (r.batch(range(8), 16) for r in found)
    assert all(np.array_equal(one[k], other[k]) for k in one)
    assert set(one["source_index"]) == {0, 2, 3} and np.bincount(one["source_index"])[2] == 4  # twice an epoch: for itself, and for 1
    assert found[0].bad == found[1].bad and list(found[0].bad) == [1] and "\n" not in found[0].bad[1]
    assert one["bad"] == found[0].bad
    everything_broken = sources.Subset(source, np.array([1, 1]))
    with pytest.raises(DataError, match="not one usable sample"):
        reader(everything_broken).batch(range(2), 16)


def test_odd_but_whole_samples_are_used(tmp_path):
    files = [("a.jpg", encoded(photo())), ("a.txt", b"\xef\xbb\xbfa c\0at"), ("b.JPG", JPEG), ("b.txt", "猫 😀 \u200b\r\n".encode()),
             ("c.gif", encoded(photo(), "WEBP")), ("c.txt", b"cat " * 5000)]
    source = open_source(spill(tmp_path / "all", files))
    batch, plain = (reader(source, augment=None).batch(range(3), 16) for _ in "12")
    assert len(source) == 3 and batch["text"].tolist() == plain["text"].tolist()
    assert batch["text"][0].tolist() == TOK.encode("a cat", 12).tolist() and batch["text"][2][-1] == 2
    (tmp_path / "all" / "b.JPG").unlink()  # while the run goes on
    gone = reader(source, augment=None)
    assert gone.batch(range(3), 16)["source_index"].tolist() == [0, 2, 2] and "cannot be read" in gone.bad[1]

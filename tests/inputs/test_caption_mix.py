"""Several caption fields, one of which is drawn per sample and epoch."""
import json

import numpy as np
import pytest

from data import Loader
from inputs import sources
from inputs.files import caption_weights
from inputs.opening import open_tokenizer
from runtime.errors import ConfigError, DataError
from tests.helpers import samples
from tests.helpers.samples import TOK, TRAINING, put, sample


def write(path, fields_of, count=40):
    files = []
    for i in range(count):
        files += [(f"{i:03}.jpg", sample(i)["jpg"]),
                  (f"{i:03}.json", json.dumps(fields_of(i)).encode())]
    return put(path, files)


def both(i):
    return {"a": f"a cat 1{i}", "b": f"a cat 2{i}"}


def share_of_a(source, field, positions=range(1600), **options):
    loader = Loader(source, TOK, 12, 0, TRAINING, 2, caption_field=field, **options)
    batch = loader.batch(positions, 4)
    assert not batch["bad"]
    a = {TOK.encode(both(i)["a"], 12).tobytes() for i in range(40)}
    return np.array([text.tobytes() in a for text in batch["text"]])


def test_fields_are_drawn_with_their_weights_and_the_draw_is_a_function_of_the_seed(tmp_path):
    where = write(tmp_path / "a.tar", both)
    for field, expected in (("a,b", 0.5), ("a:3,b:1", 0.75), ("b:9, a", 0.1)):
        source = sources.open_source(where, field)
        drawn = share_of_a(source, field)
        assert abs(drawn.mean() - expected) < 0.05, field
        assert np.array_equal(share_of_a(source, field, range(800, 900)), drawn[800:900])


def test_validation_uses_the_first_field_and_the_vocabulary_all(tmp_path):
    source = sources.open_source(write(tmp_path / "a.tar", lambda i: {"a": "cat", "b": "dog"}),
                                 "b,a")
    batch = Loader(source, TOK, 12, 0, None, 2, caption_field="b,a").batch(range(40), 4)
    assert np.array_equal(batch["text"], [TOK.encode("dog", 12)] * 40)

    class Settings:
        vocab, vocab_size, caption_field, alt_field = "", 200, "b,a", ""
    words = open_tokenizer(Settings, source)
    assert words.decode(words.encode("cat dog", 8)) == "cat dog"


def test_a_sample_that_lacks_the_drawn_field_uses_another(tmp_path):
    where = write(tmp_path / "a.tar", lambda i: both(i) if i % 2 else {"b": f"a cat 2{i}"})
    drawn = share_of_a(sources.open_source(where, "a:9,b"), "a:9,b")
    assert 0.4 < drawn.mean() < 0.5


def test_a_field_that_a_part_of_the_source_has_may_be_in_a_mix(tmp_path):
    where = write(tmp_path / "a.tar", lambda i: both(i) if i > 250 else {"a": "a cat"}, 300)
    assert sources.open_source(where, "a,b").fields == ["a", "b"]
    with pytest.raises(DataError, match=r"from 200 samples of .*no field 'b'"):
        sources.open_source(where, "b")


def test_scenes_mix_their_kinds_of_captions():
    source = sources.open_source("scenes", "txt,web")
    loader = Loader(source, TOK, 12, 0, TRAINING, 2, caption_field="txt,web")
    fields = [loader.text_fields(i, i)[0].split(",")[0] for i in range(400)]
    assert 150 < fields.count("web") < 250


@pytest.mark.parametrize("field", ["", ",", "a,a", "a:0,b", "a:-1", "a:nan,b", "a:inf,b"])
def test_impossible_weights_are_one_sentence(field):
    with pytest.raises(ConfigError, match="--caption-field"):
        caption_weights(field)


def test_a_colon_in_a_name_is_no_weight():
    assert caption_weights("dc:title") == {"dc:title": 1.0}
    assert caption_weights("dc:title:3,x:1") == {"dc:title": 0.75, "x": 0.25}


def test_a_misspelt_field_and_txt_in_a_mix_are_refused(tmp_path):
    where = write(tmp_path / "a.tar", both)
    with pytest.raises(DataError, match=r"no field 'c' \(it has a, b\).*--caption-field"):
        sources.open_source(where, "a,c")
    with pytest.raises(DataError, match="txt cannot be mixed"):
        sources.open_source(samples.spill(tmp_path / "all", samples.members(4)), "txt,re_caption")
    with pytest.raises(DataError, match="scenes have no captions 'nope'"):
        sources.open_source("scenes", "txt,nope")


def test_a_caption_without_a_word_is_never_drawn(tmp_path):
    """If it were, the sample would be bad from then on: in one run, and not in its continuation."""
    where = write(tmp_path / "a.tar", lambda i: {"a": ["\u200b", "a cat", "\u0301"],
                                                 "b": "a cat" if i % 2 else "\u200b"})
    for field in ("a", "b:9,a"):
        source = sources.open_source(where, field)
        batch = Loader(source, TOK, 12, 0, TRAINING, 2, caption_field=field).batch(range(200), 4)
        assert not batch["bad"]
        assert np.array_equal(batch["text"], [TOK.encode("a cat", 12)] * 200)

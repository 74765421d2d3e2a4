"""tokenizer.json beside vocab.txt: BERT's lower-case kind read without a library, other kinds told apart, and what is wrong said in a sentence."""
import json
import sys

import pytest

from inputs import tokenizer
from tests.test_bad_input import TINY

PIECES = ["[PAD]", "[unused0]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz.,", *("##" + c for c in "abcdefghijklmnopqrstuvwxyz"),
          "cat", "a", "##ted"]
PIECES = list(dict.fromkeys(PIECES))
NORMALIZER = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": True}
TEXTS = ("A CAT, dotted.", "Chatéd [SEP] 猫 cat", "", "[PAD][CLS]")


def wordpiece(**changes):
    """The text of a tokenizer.json such as bert-base-uncased has."""
    model = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
             "vocab": {p: i for i, p in reversed(list(enumerate(PIECES)))}}
    added = [{"id": i, "content": PIECES[i], "special": True} for i in (0, 3, 4, 5)]
    return json.dumps({"version": "1.0", "truncation": {"max_length": 4}, "padding": None, "added_tokens": added,
                       "normalizer": NORMALIZER, "pre_tokenizer": {"type": "BertPreTokenizer"}, "post_processor": None,
                       "decoder": None, "model": model} | changes)


def test_berts_kind_is_its_vocab_txt(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)  # as where it is not installed
    (tmp_path / "tokenizer.json").write_text(wordpiece())
    (tmp_path / "vocab.txt").write_text("\n".join(PIECES))
    found, plain = (tokenizer.load(str(tmp_path / name)) for name in ("tokenizer.json", "vocab.txt"))
    assert found.pieces == plain.pieces and len(found) == len(PIECES)
    for text in TEXTS:
        assert found.encode(text, 12).tolist() == plain.encode(text, 12).tolist()
    again = tokenizer.from_state(json.loads(json.dumps(found.state)))
    assert again.pieces == found.pieces and again.decode(again.encode("A cat.", 12)) == "a cat ."
    found.save(str(tmp_path / found.filename))
    assert found.filename == "vocab.txt" and tokenizer.load(str(tmp_path / "vocab.txt")).pieces == found.pieces


@pytest.mark.parametrize("changes", [
    {"normalizer": NORMALIZER | {"lowercase": False}}, {"normalizer": NORMALIZER | {"strip_accents": False}}, {"normalizer": None},
    {"pre_tokenizer": {"type": "Whitespace"}}, {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}},
    {"model": {"type": "Unigram", "vocab": [["a", -1]]}},
    {"model": {"vocab": {"a": 0}}}, {"model": {"type": "WordPiece", "vocab": {"a": 5}}},
    {"added_tokens": [{"id": 7, "content": "b", "special": False}]}, {"added_tokens": [{"id": 99, "content": "<new>", "special": True}]},
])
def test_any_other_kind_is_the_librarys(say, tmp_path, monkeypatch, changes):  # noqa: F811
    """And where that is missing, the sentence names the extra."""
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    (tmp_path / "other.json").write_text(wordpiece(**changes))
    line = say("--stages", TINY, "--vocab", "other.json")
    assert line.startswith("error: --vocab: other.json is read by the package tokenizers") and "pip install -e '.[tokenizers]'" in line


@pytest.mark.parametrize("content", ["{", "{}", '{"model": 3}', '{"model": {"type": "WordPiece"}}', '{"model": []}', '{"a": [' + "[" * 100_000])
def test_what_is_no_tokenizer_json_is_told(say, tmp_path, content):  # noqa: F811
    (tmp_path / "bad.json").write_text(content)
    assert say("--stages", TINY, "--vocab", "bad.json").startswith("error: --vocab: bad.json is no tokenizer.json: it must be")


def test_more_pieces_than_rows_are_told(say, tmp_path):  # noqa: F811
    (tmp_path / "many.json").write_text(wordpiece())
    assert f"--vocab-size 20 is less than the {len(PIECES)} pieces of many.json" in say("--stages", TINY, "--vocab", "many.json", "--vocab-size", "20")

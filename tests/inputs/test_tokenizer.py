"""The tokenizer: special ids, threads, tokenizer.json, messages for files that are no vocabulary.
tests/parity compares its ids with those of the `tokenizers` library."""
import json
import string
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

import decoder
import train
from inputs import opening, sources, tokenizer
from tests.helpers.samples import put, sample

STAGES = "resolution=16 steps=1 batch=8 lr=1e-3"
TOK = tokenizer.train_vocab(["a cat and a dog, number 0123456789"], 200)
SPECIAL = ("[PAD]", "[unused0]", "[unused1]", "[UNK]", "[CLS]", "[SEP]")
PIECES = [*SPECIAL, *string.ascii_lowercase, ".", ",",
          *("##" + c for c in string.ascii_lowercase), "cat", "##ted"]
NORMALIZER = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
              "strip_accents": None, "lowercase": True}
TEXTS = ("A CAT, dotted.", "Chatéd [SEP] 猫 cat", "", "[PAD][CLS]")


def test_the_decoder_has_the_same_special_ids():
    ids = tokenizer.PAD, tokenizer.BOS, tokenizer.EOS
    assert ids == (decoder.PAD, decoder.BOS, decoder.EOS) == (0, 1, 2)
    assert tokenizer.SPECIAL_TOKENS[:3] == ("[PAD]", "[BOS]", "[EOS]")


# ----------------------------------------------------------------------------------- threads
class YieldingCache(dict):
    """A cache whose first look-up lets another thread run before its answer is used."""
    def __init__(self, words, other):
        super().__init__(words)
        self.other = other

    def run_other(self):
        other, self.other = self.other, None
        if other:
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()

    def __contains__(self, word):
        answer = super().__contains__(word)
        self.run_other()
        return answer

    def get(self, word, default=None):
        answer = super().get(word, default)
        self.run_other()
        return answer


def test_a_full_cache_is_emptied_while_another_thread_reads_it(monkeypatch):
    monkeypatch.setattr(tokenizer, "CACHE_WORDS", 9)
    tok = tokenizer.from_state(TOK.state)
    expected = tok.encode_pieces("cat")
    words = {f"w{n}": [9] for n in range(1 << 17)} | {"cat": expected}
    tok.cache = YieldingCache(words, lambda: tok.encode_pieces("new"))
    assert tok.encode_pieces("cat") == expected
    assert len(tok.cache) < 100


def test_many_threads_give_the_ids_of_one(monkeypatch):
    monkeypatch.setattr(tokenizer, "CACHE_WORDS", 20)
    texts = [f"a cat {n % 37} and dog {n % 91}" for n in range(4000)]
    expected = [TOK.encode_pieces(text) for text in texts]
    tok = tokenizer.from_state(TOK.state)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(tok.encode_pieces, texts)) == expected
    assert len(tok.cache) <= 20 + 8  # each thread may add one word to a full cache


# ---------------------------------------------------------------------------- tokenizer.json
def tokenizer_json(**changes):
    """The text of a tokenizer.json such as bert-base-uncased has."""
    vocab = {piece: i for i, piece in enumerate(PIECES)}
    model = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
             "max_input_chars_per_word": 100, "vocab": dict(reversed(vocab.items()))}
    added = [{"id": i, "content": PIECES[i], "special": True} for i in (0, 3, 4, 5)]
    content = {"version": "1.0", "truncation": {"max_length": 4}, "padding": None,
               "added_tokens": added, "normalizer": NORMALIZER,
               "pre_tokenizer": {"type": "BertPreTokenizer"}, "post_processor": None,
               "decoder": None, "model": model}
    return json.dumps(content | changes)


def test_a_tokenizer_json_of_berts_kind_equals_its_vocab_txt(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)  # as where it is not installed
    (tmp_path / "tokenizer.json").write_text(tokenizer_json())
    (tmp_path / "vocab.txt").write_text("\n".join(PIECES))
    from_json = tokenizer.load(str(tmp_path / "tokenizer.json"))
    from_txt = tokenizer.load(str(tmp_path / "vocab.txt"))
    assert from_json.pieces == from_txt.pieces and len(from_json) == len(PIECES)
    for text in TEXTS:
        assert from_json.encode(text, 12).tolist() == from_txt.encode(text, 12).tolist()

    again = tokenizer.from_state(json.loads(json.dumps(from_json.state)))
    assert again.pieces == from_json.pieces
    assert again.decode(again.encode("A cat.", 12)) == "a cat ."
    assert from_json.filename == "vocab.txt"
    from_json.save(str(tmp_path / "saved"))
    assert tokenizer.load(str(tmp_path / "saved")).pieces == from_json.pieces


@pytest.fixture
def error_of(tmp_path, capsys, monkeypatch):
    """The message of a training whose --vocab is a file of this name and content."""
    monkeypatch.chdir(tmp_path)

    def run(name, content, *flags):
        (tmp_path / name).write_text(content)
        assert train.main(["--stages", STAGES, "--vocab", name, *flags]) == 1
        [line] = capsys.readouterr().err.splitlines()
        return line
    return run


@pytest.mark.parametrize("changes", [
    {"normalizer": NORMALIZER | {"lowercase": False}},
    {"normalizer": NORMALIZER | {"strip_accents": False}},
    {"normalizer": None},
    {"pre_tokenizer": {"type": "Whitespace"}},
    {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}},
    {"model": {"type": "Unigram", "vocab": [["a", -1]]}},
    {"model": {"vocab": {"a": 0}}},
    {"model": {"type": "WordPiece", "vocab": {"a": 5}}},
    {"added_tokens": [{"id": 7, "content": "b", "special": False}]},
    {"added_tokens": [{"id": 99, "content": "<new>", "special": True}]},
])
def test_other_kinds_need_the_library_and_the_message_names_the_extra(
        error_of, monkeypatch, changes):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    line = error_of("other.json", tokenizer_json(**changes))
    assert line.startswith("error: --vocab: other.json is read by the package tokenizers")
    assert "pip install -e '.[tokenizers]'" in line


@pytest.mark.parametrize("content", [
    "{", "{}", '{"model": 3}', '{"model": {"type": "WordPiece"}}', '{"model": []}',
    '{"a": [' + "[" * 100_000])
def test_a_file_that_is_no_tokenizer_json_gets_a_message(error_of, content):
    line = error_of("bad.json", content)
    assert line.startswith("error: --vocab: bad.json is no tokenizer.json: it must be")


def test_a_vocabulary_larger_than_the_embedding_gets_a_message(error_of):
    line = error_of("many.json", tokenizer_json(), "--vocab-size", "20")
    assert f"--vocab-size 20 is less than the {len(PIECES)} pieces of many.json" in line


def test_the_words_of_a_vocabulary_are_the_most_frequent():
    words = [f"qu{letter}" for letter in string.ascii_lowercase]
    text = " ".join([" ".join([word] * (26 - n)) for n, word in enumerate(words)])
    alphabet = len(tokenizer.train_vocab([""], 10_000))
    pieces = tokenizer.train_vocab([text], alphabet + 16).pieces
    assert "qua" in pieces and "quz" not in pieces


def test_a_vocabulary_has_the_endings_that_words_share():
    words = " ".join(f"{letter}ating" for letter in "bcdfghjklmnp")
    alphabet = len(tokenizer.train_vocab([""], 10_000))
    pieces = tokenizer.train_vocab([words], alphabet + 5).pieces
    assert {"##ating", "##ting", "##ing"} & set(pieces)


def test_the_vocabulary_reads_every_caption_of_a_small_set(tmp_path):
    files = []
    for i in range(40):
        files += [(f"{i:03}.jpg", sample(i)["jpg"]), (f"{i:03}.txt", b"a cat")]
    source = sources.open_source(put(tmp_path / "a.tar", files))
    assert len(list(opening.vocab_captions(source))) == 40

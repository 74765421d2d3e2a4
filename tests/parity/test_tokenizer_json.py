"""tokenizer.json through the `tokenizers` library: its ids shifted by three, its text, and a run
that no longer needs the file."""
import json

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

import train
from caption import load_captioner
from inputs import tokenizer
from tests.parity.test_wordpiece import NORMALIZER, PRE_TOKENIZER, TEXTS

CAPTIONS = [text for text in TEXTS if text.isascii() and text.isprintable()][:2000]


def train_library_tokenizer(kind):
    """A tokenizer of a kind that large models have."""
    settings = {"vocab_size": 500, "show_progress": False}
    if kind == "bpe":
        built = tokenizers.Tokenizer(models.BPE())
        built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        built.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            **settings)
    else:
        built = tokenizers.Tokenizer(models.Unigram())
        built.pre_tokenizer = pre_tokenizers.Metaspace()
        built.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(special_tokens=["<s>", "</s>", "<unk>"],
                                          unk_token="<unk>", **settings)
    built.train_from_iterator(CAPTIONS, trainer)
    return built


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def library_tokenizer(request):
    return train_library_tokenizer(request.param)


def with_extras(built):
    """The file's text, with special tokens, padding and truncation that a caption must not get."""
    copy = tokenizers.Tokenizer.from_str(built.to_str())
    copy.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    copy.enable_padding(length=50, pad_token="<s>")
    copy.enable_truncation(3)
    return copy.to_str()


def test_ids_and_text_are_the_librarys(library_tokenizer, tmp_path):
    (tmp_path / "tokenizer.json").write_text(with_extras(library_tokenizer))
    tok = tokenizer.load(str(tmp_path / "tokenizer.json"))
    assert isinstance(tok, tokenizer.HFTokenizer)
    assert len(tok) == library_tokenizer.get_vocab_size() + 3
    for text in CAPTIONS[:500]:
        library_ids = library_tokenizer.encode(text, add_special_tokens=False).ids
        ids = [i + 3 for i in library_ids]
        assert tok.encode_pieces(text) == ids and max(ids, default=3) < len(tok)
        row = tok.encode(text, len(ids) + 4).tolist()
        assert row == [1, *ids, 2, 0, 0]
        assert tok.decode(row) == library_tokenizer.decode(library_ids).strip()
        assert tok.encode(text, 5).tolist()[-1] in (0, 2)


def test_a_caption_cannot_contain_special_tokens(library_tokenizer):
    tok = tokenizer.HFTokenizer(with_extras(library_tokenizer))
    ids = tok.encode_pieces("a </s> and <s>")
    assert not {0, 1, 2} & set(ids) and "and" in tok.decode([1, *ids, 2])
    if isinstance(library_tokenizer.model, models.BPE):  # Unigram has <s> among its pieces
        assert not {3, 4} & set(ids) and tok.decode([1, *ids, 2]) == "a </s> and <s>"
    assert tok.decode([1, 3, 4, len(tok), 10**6, 2, 9]) == ""


def test_the_state_restores_the_tokenizer(library_tokenizer):
    tok = tokenizer.HFTokenizer(with_extras(library_tokenizer))
    again = tokenizer.from_state(json.loads(json.dumps(tok.state)))
    assert again.encode_pieces("two small cats") == tok.encode_pieces("two small cats")


def test_a_tokenizer_json_of_berts_kind_is_read_without_the_library_and_has_its_ids(tmp_path):
    built = tokenizer.train_vocab(TEXTS[::3], 4000)
    library = tokenizers.Tokenizer(
        models.WordPiece(built.ids, unk_token="[UNK]", max_input_chars_per_word=100))
    library.normalizer, library.pre_tokenizer = NORMALIZER, PRE_TOKENIZER
    library.save(str(tmp_path / "tokenizer.json"))
    tok = tokenizer.load(str(tmp_path / "tokenizer.json"))
    assert type(tok) is tokenizer.WordPiece
    encodings = library.encode_batch(TEXTS[:3000], add_special_tokens=False)
    assert [tok.encode_pieces(text) for text in TEXTS[:3000]] == [e.ids for e in encodings]


def test_a_file_that_the_library_refuses_gets_a_message(tmp_path):
    (tmp_path / "t.json").write_text('{"model": {"type": "Fancy", "vocab": {}}}')
    message = r"t\.json is no tokenizer.json that this version of tokenizers reads"
    with pytest.raises(ValueError, match=message):
        tokenizer.load(str(tmp_path / "t.json"))


def test_a_run_keeps_its_tokenizer(tmp_path, capsys):
    """After a step the file is deleted: the run's folder has a copy, captions are written, and the
    run continues without the file."""
    vocab, run = tmp_path / "t.json", tmp_path / "run"
    vocab.write_text(with_extras(train_library_tokenizer("bpe")))
    argv = ["--vocab", str(vocab), "--vocab-size", "600", "--val-samples", "4", "--stages",
            "resolution=16 steps=1 batch=4 lr=1e-3", "--workdir", str(run)]
    assert train.main(argv) == 0
    vocab.unlink()
    (run / "summary.json").unlink()
    assert train.main(argv) == 0 and "continuing" in capsys.readouterr().out
    assert tokenizer.load(str(run / "tokenizer.json")).state
    assert not (run / "vocab.txt").exists()
    assert isinstance(load_captioner(str(run))(str(run / "curve.png")), str)

"""tokenizer.json through the `tokenizers` library: its ids three higher, its text back, and a run that needs the file no longer."""
import json

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

import train
from caption import load_captioner
from inputs import tokenizer
from tests.parity.test_wordpiece import NORMALIZER, PRE_TOKENIZER, TEXTS

CAPTIONS = [text for text in TEXTS if text.isascii() and text.isprintable()][:2000]


def made(kind):
    """A tokenizer of a kind that large models have, trained on some captions, with its own marks, padding and cutting."""
    if kind == "bpe":
        found = tokenizers.Tokenizer(models.BPE())
        found.pre_tokenizer, found.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    else:
        found = tokenizers.Tokenizer(models.Unigram())
        found.pre_tokenizer, found.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=500, special_tokens=["<s>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False)
    found.train_from_iterator(CAPTIONS, trainer)
    return found


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def theirs(request):
    return made(request.param)


def marked(theirs):
    """The file's text, with marks, padding and cutting that a caption must not get."""
    dressed = tokenizers.Tokenizer.from_str(theirs.to_str())
    dressed.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    dressed.enable_padding(length=50, pad_token="<s>")
    dressed.enable_truncation(3)
    return dressed.to_str()


def test_ids_and_text(theirs, tmp_path):
    (tmp_path / "tokenizer.json").write_text(marked(theirs))
    ours = tokenizer.load(str(tmp_path / "tokenizer.json"))
    assert isinstance(ours, tokenizer.HFTokenizer) and len(ours) == theirs.get_vocab_size() + 3
    for text in CAPTIONS[:500]:
        wanted = [i + 3 for i in theirs.encode(text, add_special_tokens=False).ids]
        assert ours.encode_pieces(text) == wanted
        row = ours.encode(text, len(wanted) + 4).tolist()
        assert row == [1, *wanted, 2, 0, 0] and ours.decode(row) == theirs.decode([i - 3 for i in wanted]).strip()
        assert ours.encode(text, 5).tolist()[-1] in (0, 2) and max(wanted, default=3) < len(ours)
    spelled = ours.encode_pieces("a </s> and <s>")
    assert not {0, 1, 2} & set(spelled) and "and" in ours.decode([1, *spelled, 2])  # no caption can end itself
    if isinstance(theirs.model, models.BPE):  # (a Unigram model has its marks among its pieces)
        assert not {3, 4} & set(spelled) and ours.decode([1, *spelled, 2]) == "a </s> and <s>"
    assert ours.decode([1, 3, 4, len(ours), 10**6, 2, 9]) == ""
    again = tokenizer.from_state(json.loads(json.dumps(ours.state)))
    assert again.encode_pieces("two small cats") == ours.encode_pieces("two small cats")


def test_native_wordpiece_equals_the_library(tmp_path):
    """A BERT tokenizer.json, written by the library, is read without it, and gives its ids."""
    built = tokenizer.train_vocab(TEXTS[::3], 4000)
    library = tokenizers.Tokenizer(models.WordPiece(built.ids, unk_token="[UNK]", max_input_chars_per_word=100))
    library.normalizer, library.pre_tokenizer = NORMALIZER, PRE_TOKENIZER
    library.save(str(tmp_path / "tokenizer.json"))
    ours = tokenizer.load(str(tmp_path / "tokenizer.json"))
    assert type(ours) is tokenizer.WordPiece
    assert [ours.encode_pieces(t) for t in TEXTS[:3000]] == [e.ids for e in library.encode_batch(TEXTS[:3000], add_special_tokens=False)]


def test_a_file_that_the_library_refuses_is_told(tmp_path):
    (tmp_path / "t.json").write_text('{"model": {"type": "Fancy", "vocab": {}}}')
    with pytest.raises(ValueError, match=r"t\.json is no tokenizer.json that this version of tokenizers reads"):
        tokenizer.load(str(tmp_path / "t.json"))


def test_a_run_carries_its_tokenizer(tmp_path, capsys):
    """Trained a step, the file deleted: the finished run's folder has it, captions are written, and more steps would need no file."""
    (tmp_path / "t.json").write_text(marked(made("bpe")))
    argv = ["--vocab", str(tmp_path / "t.json"), "--vocab-size", "600", "--stages", "resolution=16 steps=1 batch=4 lr=1e-3", "--val-samples", "4",
            "--workdir", str(tmp_path / "run")]
    assert train.main(argv) == 0
    (tmp_path / "t.json").unlink()
    (tmp_path / "run" / "summary.json").unlink()
    assert train.main(argv) == 0 and "continuing" in capsys.readouterr().out  # its last measurements, made again
    assert tokenizer.load(str(tmp_path / "run" / "tokenizer.json")).state
    assert not (tmp_path / "run" / "vocab.txt").exists()
    assert isinstance(load_captioner(str(tmp_path / "run"))(str(tmp_path / "run" / "curve.png")), str)

"""A run's tokenizer as files that transformers' AutoTokenizer loads, which gives the same ids in
another order: [EOS] gets the highest one, because CLIP's text encoder in transformers looks for the
highest id if that of [EOS] is 2.

Letters: V vocabulary size of the text encoder.
"""
import json
from typing import Any, NamedTuple

import numpy as np

from inputs.tokenizer import BERT_SETTINGS, BOS, EOS, PAD, HFTokenizer, WordPiece
from runtime.errors import ConvertError


class TokenizerFiles(NamedTuple):
    rows: np.ndarray         # (V,) our id of each id of the library
    ids: dict[str, int]      # the library's ids: {"pad": ..., "bos": ..., "eos": ...}
    texts: dict[str, str]    # {file name: content}


def tokenizer_files(tok: WordPiece, vocab_size: int, max_text_len: int) -> TokenizerFiles:
    """ConvertError if the library's tokenizer cannot get three special tokens more."""
    if isinstance(tok, HFTokenizer):
        spare = range(len(tok), vocab_size)
        rows = [*range(tok.SHIFT, len(tok)), PAD, BOS, EOS, *spare]
        names = ("[PAD]", "[BOS]", "[EOS]")
        content = with_special_tokens(tok, names)
        unknown = None
    else:
        rows, last = list(range(vocab_size)), len(tok) - 1
        rows[EOS], rows[last] = last, EOS
        names = tok.pieces[:3]
        content = wordpiece_json([tok.pieces[row] for row in rows[:len(tok)]], names)
        unknown = "[UNK]"
    pad, bos, eos = names
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_text_len,
        "pad_token": pad, "bos_token": bos, "eos_token": eos, "unk_token": unknown,
        "padding_side": "right", "truncation_side": "right", "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "split_special_tokens": True}  # a caption that spells out [EOS] does not end there
    texts = {"tokenizer.json": content,
             "tokenizer_config.json": json.dumps(config, indent=1) + "\n"}
    ids = {"pad": rows.index(PAD), "bos": rows.index(BOS), "eos": rows.index(EOS)}
    return TokenizerFiles(np.array(rows), ids, texts)


def wordpiece_json(pieces: list[str], names: tuple[str, ...]) -> str:
    """tokenizer.json of BERT's lower-case kind, with a start and an end of text."""
    vocab = {piece: i for i, piece in enumerate(pieces)}
    added = []
    for piece in sorted({*names, "[UNK]"}, key=vocab.get):
        added.append({"id": vocab[piece], "content": piece, "special": True, "single_word": False,
                      "lstrip": False, "rstrip": False, "normalized": False})

    def special(name: str) -> dict[str, Any]:
        return {"SpecialToken": {"id": name, "type_id": 0}}
    _, bos, eos = names
    sequence = [special(bos), {"Sequence": {"id": "A", "type_id": 0}}, special(eos)]
    content = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
    for part, settings in BERT_SETTINGS.items():
        content[part] = {name: values[0] for name, values in settings.items()}
    content["model"]["vocab"] = vocab
    content["post_processor"] = {
        "type": "TemplateProcessing", "single": sequence,
        "pair": [*sequence, {"Sequence": {"id": "B", "type_id": 0}}, special(eos)],
        "special_tokens": {name: {"id": name, "ids": [vocab[name]], "tokens": [name]}
                           for name in (bos, eos)}}
    content["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": False}
    return json.dumps(content, ensure_ascii=False) + "\n"


def with_special_tokens(tok: HFTokenizer, names: tuple[str, ...]) -> str:
    """tokenizer.json of the library's tokenizer with three special tokens after its own."""
    import tokenizers
    library = tokenizers.Tokenizer.from_str(tok.text)
    library.no_padding()
    library.no_truncation()
    library.add_special_tokens(list(names))
    ids = [library.token_to_id(name) for name in names]
    first = len(tok) - tok.SHIFT
    if ids != [first, first + 1, first + 2]:
        raise ConvertError(f"the run's tokenizer.json has {', '.join(names)} of its own, or gaps "
                           "among its ids: the pair cannot be exported with it")
    _, bos, eos = names
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{bos} $A {eos}", special_tokens=[(bos, ids[1]), (eos, ids[2])])
    return library.to_str()

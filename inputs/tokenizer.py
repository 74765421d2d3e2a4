"""WordPiece: captions to ids and back, by BERT's lower-case rules (the released text side).

It reads and writes the standard vocab.txt, one piece a line, and builds one from captions where none is given. A tokenizer.json
of that kind is read likewise; one of another kind (BPE, Unigram) through the `tokenizers` library, which is an extra. Only
the pieces make text: a caption that spells out "[PAD]" becomes brackets and a word, never the special token.

    python -m inputs.tokenizer "A caption."        shows its pieces, with a vocabulary built from the embedded scenes
"""
import collections
import json
import os
import string
import unicodedata
from collections.abc import Iterable

import numpy as np

from decoder import BOS, EOS, PAD

SPECIAL_TOKENS = ("[PAD]", "[BOS]", "[EOS]", "[UNK]")  # first lines of a built vocabulary; BERT's own file calls 1 and 2 unused
LONGEST = 100                                   # characters of a word; a longer one is [UNK] (BERT)
MOST_KNOWN = 1 << 17  # words whose pieces are kept: the web has words without end, memory has not
CJK = ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F), (0x2B920, 0x2CEAF),
       (0xF900, 0xFAFF), (0x2F800, 0x2FA1F))    # ideographs: each is a word of its own


def is_punctuation(c: str) -> bool:
    """Unicode's punctuation, and every ASCII mark that is no letter, digit or space."""
    return c in string.punctuation or unicodedata.category(c)[0] == "P"


def basic_tokenize(text: str) -> list[str]:
    """BERT's basic tokenizer: control characters out, accents off, lower case, marks and ideographs apart."""
    if not text.isascii():
        kept = []
        for c in text:
            if c not in "\t\n\r" and (c == "\ufffd" or unicodedata.category(c) in ("Cc", "Cf", "Co", "Cs")):
                continue
            kept.append(f" {c} " if any(a <= ord(c) <= b for a, b in CJK) else c)
        text = "".join(c for c in unicodedata.normalize("NFD", "".join(kept)) if unicodedata.category(c) != "Mn")
        text = "".join(c.lower() for c in text)  # one at a time: a final sigma stays a sigma, as in the reference
    else:
        text = "".join(c for c in text if (c >= " " and c != "\x7f") or c in "\t\n\r").lower()
    return "".join(f" {c} " if is_punctuation(c) else c for c in text).split()


class WordPiece:
    """pieces: the lines of a vocab.txt, a piece's id being its line. Continuations of a word start with ##."""
    filename = "vocab.txt"

    def __init__(self, pieces: Iterable[str], origin: str = "the vocabulary"):
        self.pieces = tuple(pieces)
        self.ids = {piece: i for i, piece in enumerate(self.pieces)}
        if "[UNK]" not in self.ids or not all(p[:1] == "[" and p[-1:] == "]" for p in self.pieces[:3]) or self.pieces[0] != "[PAD]":
            raise ValueError(f"{origin} is no WordPiece vocab.txt: its first line must be [PAD], the next two bracketed "
                             "names that serve as start and end of a caption, and it must hold [UNK]")
        if len(self.ids) != len(self.pieces):
            twice = collections.Counter(self.pieces).most_common(1)[0][0]
            raise ValueError(f"{origin} lists {twice!r} more than once")
        self.unknown = self.ids["[UNK]"]
        self.known: dict[str, list[int]] = {}  # words met so far, so that each is split once

    def __len__(self) -> int:
        return len(self.pieces)

    @property
    def state(self) -> list[str] | str:
        """What a checkpoint keeps of it, for `restore`."""
        return list(self.pieces)

    def split(self, word: str) -> list[int]:
        """Greedy longest match; [UNK] for a word with a part that no piece covers."""
        ids, start = [], 0
        while start < len(word) <= LONGEST:
            for end in range(len(word), start, -1):
                found = self.ids.get(("##" if start else "") + word[start:end])
                if found is not None:
                    ids.append(found)
                    start = end
                    break
            else:
                return [self.unknown]
        return ids or [self.unknown]

    def encode_pieces(self, text: str) -> list[int]:
        """The ids of a text, without start, end or padding."""
        ids, known = [], self.known
        for word in basic_tokenize(text):
            pieces = known.get(word)
            if pieces is None:
                pieces = self.split(word)
                if len(known) >= MOST_KNOWN:
                    known = self.known = {}  # a new one: other threads may be reading the full one
                known[word] = pieces
            ids += pieces
        return ids

    def encode(self, text: str, length: int) -> np.ndarray:
        """(length,) int32: [bos] words [eos], padded with 0; too long a text is cut, and the last place is eos."""
        ids = [BOS, *self.encode_pieces(text)[:length - 2], EOS]
        return np.array(ids + [PAD] * (length - len(ids)), np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Text up to the first eos. Marks stay apart from words, for a tokenizer does not keep spaces."""
        text = []
        for i in ids:
            if i == EOS:
                break
            if i not in (PAD, BOS):
                piece = self.pieces[i] if i < len(self.pieces) else "[UNK]"  # rows of the table beyond the vocabulary
                text.append(piece[2:] if piece.startswith("##") else " " + piece)
        return "".join(text).strip()

    def save(self, path: str) -> None:
        with open(path, "w", encoding="utf-8") as f:
            f.write("\n".join(self.pieces) + "\n")


class HFTokenizer(WordPiece):
    """A tokenizer.json of any kind, by the `tokenizers` library. Pad, start and end are 0, 1 and 2 as everywhere here, and the
    file's own ids come after them, each three higher. Its own marks of start and end are not used, nor its padding or cutting."""
    filename, SHIFT = "tokenizer.json", 3

    def __init__(self, text: str, origin: str = "the tokenizer.json"):
        """ValueError without the library, or where it cannot read the text."""
        try:
            import tokenizers
        except ImportError:
            raise ValueError(f"{origin} is read by the package tokenizers, which is not installed: pip install -e '.[tokenizers]', "
                             "or give a vocab.txt") from None
        try:
            self.library = tokenizers.Tokenizer.from_str(text)
        except Exception as problem:  # the library raises no narrower kind
            raise ValueError(f"{origin} is no tokenizer.json that this version of tokenizers reads ({str(problem)[:200]})") from None
        self.text, self.count = text, 1 + max(self.library.get_vocab(with_added_tokens=True).values(), default=-1) + self.SHIFT
        self.library.no_padding()
        self.library.no_truncation()
        self.library.encode_special_tokens = True  # a caption that spells out </s> has spelled it out, not ended

    def __len__(self) -> int:
        return self.count

    @property
    def state(self) -> list[str] | str:
        return self.text

    def encode_pieces(self, text: str) -> list[int]:
        return [i + self.SHIFT for i in self.library.encode(text, add_special_tokens=False).ids]

    def decode(self, ids: Iterable[int]) -> str:
        """Text up to the first eos, with the spaces that its kind keeps."""
        words = []
        for i in ids:
            if i == EOS:
                break
            if self.SHIFT <= i < self.count:
                words.append(int(i) - self.SHIFT)
        return self.library.decode(words, skip_special_tokens=True).strip()

    def save(self, path: str) -> None:
        with open(path, "w", encoding="utf-8") as f:
            f.write(self.text)


def from_json(text: str, origin: str) -> WordPiece:
    """A tokenizer.json's text: WordPiece with BERT's lower-case rules is read here, and gives the same ids as its vocab.txt; the library reads
    the rest. ValueError if it is none."""
    try:
        found = json.loads(text)
        kind, vocab = found["model"].get("type"), found["model"]["vocab"]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{origin} is no tokenizer.json: it must be a JSON object with a model and its vocab") from None
    ours = {("model", "unk_token"): ("[UNK]",), ("model", "continuing_subword_prefix"): ("##",), ("model", "max_input_chars_per_word"): (LONGEST,),
            ("normalizer", "type"): ("BertNormalizer",), ("normalizer", "clean_text"): (True,), ("normalizer", "handle_chinese_chars"): (True,),
            ("normalizer", "strip_accents"): (None, True), ("normalizer", "lowercase"): (True,), ("pre_tokenizer", "type"): ("BertPreTokenizer",)}
    exact = kind == "WordPiece" and all(isinstance(found.get(part), dict) and found[part].get(name) in values for (part, name), values in ours.items())
    if exact and isinstance(vocab, dict) and sorted(map(str, vocab.values())) == sorted(map(str, range(len(vocab)))):
        pieces = sorted(vocab, key=lambda piece: int(vocab[piece]))
        if pieces[:1] == ["[PAD]"] and all(p[:1] == "[" and p[-1:] == "]" for p in pieces[:3]) and all(
                isinstance(added, dict) and added.get("content") in vocab and added.get("special") for added in found.get("added_tokens") or ()):
            return WordPiece(pieces, origin)
    return HFTokenizer(text, origin)


def from_state(stored: list[str] | str, origin: str = "the vocabulary") -> WordPiece:
    """The tokenizer whose `stored` this is."""
    return HFTokenizer(stored, origin) if isinstance(stored, str) else WordPiece(stored, origin)


def load(path: str) -> WordPiece:
    """Read a vocab.txt or a tokenizer.json. ValueError says what is wrong with it, OSError that it cannot be read."""
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder: a vocabulary is a text file, one piece a line")
    with open(path, encoding="utf-8", errors="strict", newline="\n") as f:
        try:
            text = f.read()
        except UnicodeDecodeError:
            raise ValueError(f"{path} is no WordPiece vocab.txt: it is not UTF-8 text") from None
    if text.lstrip()[:1] == "{":
        return from_json(text, path)
    return WordPiece(text.replace("\r\n", "\n").removesuffix("\n").split("\n"), path)


def train_vocab(captions: Iterable[str], size: int) -> WordPiece:
    """At most `size` pieces: special tokens, every character met (so that no word of the captions is unknowable) and
    ASCII's, then the commonest words, with the last tenth kept for the commonest endings of words left out."""
    counts = collections.Counter(w for text in captions for w in basic_tokenize(text))
    letters = sorted({c for w in counts for c in w} | set(string.printable[:36] + string.punctuation))
    pieces = dict.fromkeys([*SPECIAL_TOKENS, *letters, *("##" + c for c in letters if not is_punctuation(c))])
    if len(pieces) > size:
        raise ValueError(f"a vocabulary of {size} cannot hold the {len(pieces)} characters of these captions: raise --vocab-size")
    ranked = sorted(counts, key=lambda w: (-counts[w], w))
    if len(pieces) + len(ranked) > size:
        cut = size - len(pieces) - size // 10
        ends = collections.Counter()
        for w in ranked[max(cut, 0):]:
            for at in range(max(1, len(w) - 5), len(w) - 1):
                ends["##" + w[at:]] += counts[w]
        ranked = ranked[:max(cut, 0)] + sorted(ends, key=lambda e: (-ends[e], e))
    for piece in ranked:
        if len(pieces) < size:
            pieces[piece] = None
    return WordPiece(pieces)


if __name__ == "__main__":
    import sys

    from inputs import scene_captions, scenes
    tok = train_vocab((scene_captions.caption(scenes.sample_scene(0, "train", i)) for i in range(2000)), 1000)
    text = " ".join(sys.argv[1:]) or scene_captions.caption(scenes.sample_scene(0, "val", 0)) + " An unseen wörd, and [PAD]."
    ids = tok.encode_pieces(text)
    print(f"vocabulary of {len(tok)} pieces\ntext    {text}\npieces  {' '.join(tok.pieces[i] for i in ids)}\nids     {ids}\nback    {tok.decode(ids)}")

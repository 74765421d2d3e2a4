"""The tokenizer: captions to token ids and back, by BERT's lower-case WordPiece rules (released).

It reads and writes the standard vocab.txt, one piece per line, and builds one from captions. A
tokenizer.json of BERT's kind is read too; other kinds (BPE, Unigram) need the `tokenizers` library,
which is an extra. Special tokens never come from text: a caption that spells out "[PAD]" becomes
brackets and a word.

    python -m inputs.tokenizer "A caption."       prints its pieces (vocabulary of scenes)
"""
import collections
import json
import os
import re
import string
import unicodedata
from collections.abc import Iterable
from typing import Any

import numpy as np

PAD, BOS, EOS = 0, 1, 2
SPECIAL_TOKENS = ("[PAD]", "[BOS]", "[EOS]", "[UNK]")  # BERT's own vocab.txt calls 1 and 2 unused
MAX_WORD_CHARS = 100  # a longer word is [UNK] (BERT)
CACHE_WORDS = 1 << 17  # words whose pieces are remembered
ASCII_PUNCTUATION = re.compile(f"[{re.escape(string.punctuation)}]")
CJK = ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F),
       (0x2B740, 0x2B81F), (0x2B920, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F))


# ------------------------------------------------------------------------------- basic tokens
def is_punctuation(char: str) -> bool:
    """Unicode's punctuation, and all ASCII symbols."""
    return char in string.punctuation or unicodedata.category(char)[0] == "P"


def is_ideograph(char: str) -> bool:
    return any(first <= ord(char) <= last for first, last in CJK)


def is_dropped(char: str) -> bool:
    """Control and format characters, private ones and U+FFFD."""
    if char in "\t\n\r":
        return False
    return char == "\ufffd" or unicodedata.category(char) in ("Cc", "Cf", "Co", "Cs")


def basic_tokenize(text: str) -> list[str]:
    """BERT's basic tokenizer: removes control characters and accents, lower-cases, and makes words
    of punctuation characters and ideographs."""
    if text.isascii() and text.isprintable():  # nothing to remove: the fast path
        return ASCII_PUNCTUATION.sub(r" \g<0> ", text.lower()).split()
    text = "".join(c for c in text if not is_dropped(c))
    text = "".join(f" {c} " if is_ideograph(c) else c for c in text)
    decomposed = unicodedata.normalize("NFD", text)
    text = "".join(c for c in decomposed if unicodedata.category(c) != "Mn")
    text = "".join(c.lower() for c in text)  # one by one: the reference keeps a final sigma
    return "".join(f" {c} " if is_punctuation(c) else c for c in text).split()


# ---------------------------------------------------------------------------------- WordPiece
def has_special_tokens(pieces: list[str] | tuple[str, ...]) -> bool:
    """[PAD] first, and two bracketed names that serve as start and end of a caption."""
    bracketed = all(p[:1] == "[" and p[-1:] == "]" for p in pieces[:3])
    return bracketed and pieces[0] == "[PAD]"


class WordPiece:
    """pieces: the lines of a vocab.txt. A piece's id is its line, from 0; pieces that continue a
    word start with ##. ValueError names `origin` if they are no vocabulary."""
    filename = "vocab.txt"

    def __init__(self, pieces: Iterable[str], origin: str = "the vocabulary"):
        self.pieces = tuple(pieces)
        self.ids = {piece: i for i, piece in enumerate(self.pieces)}
        if "[UNK]" not in self.ids or not has_special_tokens(self.pieces):
            raise ValueError(f"{origin} is no WordPiece vocab.txt: its first line must be [PAD], "
                             "the next two bracketed names that serve as start and end of a "
                             "caption, and it must hold [UNK]")
        if len(self.ids) != len(self.pieces):
            repeated = collections.Counter(self.pieces).most_common(1)[0][0]
            raise ValueError(f"{origin} lists {repeated!r} more than once")
        self.unknown = self.ids["[UNK]"]
        self.cache: dict[str, list[int]] = {}  # word: ids

    def __len__(self) -> int:
        return len(self.pieces)

    @property
    def state(self) -> list[str] | str:
        """What a checkpoint keeps, for `from_state`."""
        return list(self.pieces)

    def split(self, word: str) -> list[int]:
        """Greedy longest match; [UNK] for a word with a part that no piece covers."""
        ids: list[int] = []
        start = 0
        while start < len(word) <= MAX_WORD_CHARS:
            prefix = "##" if start else ""
            ends = range(len(word), start, -1)
            end = next((e for e in ends if prefix + word[start:e] in self.ids), None)
            if end is None:
                return [self.unknown]
            ids.append(self.ids[prefix + word[start:end]])
            start = end
        return ids or [self.unknown]

    def encode_pieces(self, text: str) -> list[int]:
        """The ids of a text, without start, end or padding. Several threads may call it."""
        ids: list[int] = []
        cache = self.cache
        for word in basic_tokenize(text):
            pieces = cache.get(word)
            if pieces is None:
                pieces = self.split(word)
                if len(cache) >= CACHE_WORDS:
                    cache = self.cache = {}  # a new one, because other threads may read the old
                cache[word] = pieces
            ids += pieces
        return ids

    def encode(self, text: str, length: int) -> np.ndarray:
        """(length,) int32: BOS, ids, EOS, padding. A text that is too long is cut; EOS is kept."""
        ids = [BOS, *self.encode_pieces(text)[:length - 2], EOS]
        return np.array(ids + [PAD] * (length - len(ids)), np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """The text up to the first EOS, with spaces around punctuation."""
        text = ""
        for i in ids:
            if i == EOS:
                break
            if i in (PAD, BOS):
                continue
            piece = self.pieces[i] if i < len(self.pieces) else "[UNK]"  # a spare embedding row
            text += piece[2:] if piece.startswith("##") else " " + piece
        return text.strip()

    def save(self, path: str) -> None:
        with open(path, "w", encoding="utf-8") as f:
            f.write("\n".join(self.pieces) + "\n")


class HFTokenizer(WordPiece):
    """A tokenizer.json of any kind, run by the `tokenizers` library. Its ids are shifted by three,
    behind PAD, BOS and EOS; its own special tokens, padding and truncation are not used."""
    filename = "tokenizer.json"
    SHIFT = 3

    def __init__(self, text: str, origin: str = "the tokenizer.json"):
        """text: the file's content. ValueError without the library, or if it cannot read it."""
        try:
            import tokenizers
        except ImportError:
            raise ValueError(f"{origin} is read by the package tokenizers, which is not installed: "
                             "pip install -e '.[tokenizers]', or give a vocab.txt") from None
        try:
            self.library = tokenizers.Tokenizer.from_str(text)
        except Exception as problem:  # the library raises no narrower kind
            raise ValueError(f"{origin} is no tokenizer.json that this version of tokenizers reads "
                             f"({str(problem)[:200]})") from None
        ids = self.library.get_vocab(with_added_tokens=True).values()
        self.text = text
        self.size = 1 + max(ids, default=-1) + self.SHIFT
        self.library.no_padding()
        self.library.no_truncation()
        self.library.encode_special_tokens = True  # a caption that contains </s> does not end there

    def __len__(self) -> int:
        return self.size

    @property
    def state(self) -> list[str] | str:
        return self.text

    def encode_pieces(self, text: str) -> list[int]:
        ids = self.library.encode(text, add_special_tokens=False).ids
        return [i + self.SHIFT for i in ids]

    def decode(self, ids: Iterable[int]) -> str:
        """The text up to the first EOS, with the spaces that this kind of tokenizer keeps."""
        library_ids = []
        for i in ids:
            if i == EOS:
                break
            if self.SHIFT <= i < self.size:
                library_ids.append(int(i) - self.SHIFT)
        return self.library.decode(library_ids, skip_special_tokens=True).strip()

    def save(self, path: str) -> None:
        with open(path, "w", encoding="utf-8") as f:
            f.write(self.text)


# ------------------------------------------------------------------------------------ reading
BERT_SETTINGS = {  # of a tokenizer.json: the values that WordPiece above implements
    "model": {"type": ("WordPiece",), "unk_token": ("[UNK]",),
              "continuing_subword_prefix": ("##",), "max_input_chars_per_word": (MAX_WORD_CHARS,)},
    "normalizer": {"type": ("BertNormalizer",), "clean_text": (True,),
                   "handle_chinese_chars": (True,), "strip_accents": (None, True),
                   "lowercase": (True,)},
    "pre_tokenizer": {"type": ("BertPreTokenizer",)}}


def load(path: str) -> WordPiece:
    """A vocab.txt or tokenizer.json. ValueError says what is wrong with its content."""
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder: a vocabulary is a text file, one piece per line")
    with open(path, encoding="utf-8", newline="\n") as f:
        try:
            text = f.read()
        except UnicodeDecodeError:
            raise ValueError(f"{path} is no WordPiece vocab.txt: it is not UTF-8 text") from None
    if text.lstrip().startswith("{"):
        return from_json(text, path)
    return WordPiece(text.replace("\r\n", "\n").removesuffix("\n").split("\n"), path)


def from_json(text: str, origin: str) -> WordPiece:
    """The tokenizer of a tokenizer.json's text. BERT's kind gives the same ids as its vocab.txt."""
    try:
        content = json.loads(text)
        content["model"].get("type")
        content["model"]["vocab"]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{origin} is no tokenizer.json: it must be a JSON object with a model "
                         "and its vocab") from None
    pieces = bert_pieces(content)
    return WordPiece(pieces, origin) if pieces else HFTokenizer(text, origin)


def bert_pieces(content: dict[str, Any]) -> list[str]:
    """The pieces of a tokenizer.json of BERT's lower-case kind; none for any other kind."""
    for part, settings in BERT_SETTINGS.items():
        values = content.get(part)
        if not isinstance(values, dict):
            return []
        if any(values.get(name) not in allowed for name, allowed in settings.items()):
            return []
    vocab = content["model"]["vocab"]
    if not isinstance(vocab, dict) or not all(isinstance(i, int) for i in vocab.values()):
        return []
    pieces = sorted(vocab, key=vocab.get)
    if sorted(vocab.values()) != list(range(len(vocab))) or not pieces:
        return []
    for token in content.get("added_tokens") or ():
        if not isinstance(token, dict) or token.get("content") not in vocab:
            return []
        if not token.get("special"):
            return []
    return pieces if has_special_tokens(pieces) else []


def from_state(state: list[str] | str, origin: str = "the vocabulary") -> WordPiece:
    """The tokenizer with this `state`."""
    return HFTokenizer(state, origin) if isinstance(state, str) else WordPiece(state, origin)


# ----------------------------------------------------------------------------------- building
def train_vocab(captions: Iterable[str], size: int) -> WordPiece:
    """At most `size` pieces: the special tokens, all characters of the captions and of ASCII, then
    the most frequent words. If not all words fit, a tenth of the pieces are the most frequent word
    endings."""
    counts: collections.Counter = collections.Counter()
    for text in captions:
        counts.update(basic_tokenize(text))
    chars = sorted(set("".join(counts)) | set(string.printable[:36] + string.punctuation))
    continuations = ["##" + c for c in chars if not is_punctuation(c)]
    pieces = dict.fromkeys([*SPECIAL_TOKENS, *chars, *continuations])
    if len(pieces) > size:
        raise ValueError(f"--vocab-size {size} is too small: the characters of the captions alone "
                         f"make {len(pieces)} pieces (each at the start of a word and within one): "
                         f"give {len(pieces)} or more")
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    if len(pieces) + len(ranked) > size:
        num_words = max(size - len(pieces) - size // 10, 0)
        endings: collections.Counter = collections.Counter()
        for word in ranked[num_words:]:
            for start in range(max(1, len(word) - 5), len(word) - 1):
                endings["##" + word[start:]] += counts[word]
        ranked = ranked[:num_words] + sorted(endings, key=lambda piece: (-endings[piece], piece))
    for piece in ranked:
        if len(pieces) < size:
            pieces[piece] = None
    return WordPiece(pieces)


if __name__ == "__main__":
    import sys

    from inputs import scene_captions, scenes

    captions = [scene_captions.caption(scenes.sample_scene(0, "train", i)) for i in range(2000)]
    tokenizer = train_vocab(captions, 1000)
    text = " ".join(sys.argv[1:]) or captions[0] + " An unseen wörd, and [PAD]."
    ids = tokenizer.encode_pieces(text)
    print(f"text    {text}")
    print(f"pieces  {' '.join(tokenizer.pieces[i] for i in ids)}")
    print(f"ids     {ids}")
    print(f"decoded {tokenizer.decode(ids)}")

"""WordPiece against the `tokenizers` library: the same ids for any text, however unusual."""
import itertools
import random
import string
import unicodedata

import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from inputs import tokenizer

NORMALIZER = normalizers.BertNormalizer(clean_text=True, handle_chinese_chars=True,
                                        strip_accents=None, lowercase=True)
PRE_TOKENIZER = pre_tokenizers.BertPreTokenizer()
PLAIN = """a the this photo picture shows of with and two three small big red Blue green circle
 square star dog dogs cat running RUNNING jumped over table wooden window street people walking near
 under sky cloudy sunlight don't mother-in-law e.g. U.S.A. 3.14 1,000 50% $20 #1 @home snake_case
 x+y=z <b> 5'11" 10:30 well... what?! "quoted" (both) [left] {}~^`|\\/"""
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[BOS]", "[EOS]", "[unused3]", "##ing", "run##ing", "##",
           "[ PAD ]", "[pad]")
SCRIPTS = """café naïve Ångström ÉCOLE straße ǆungla ﬁne ĳsvogel Đorđe Łódź Øre İSTANBUL
 Iğdır ısı İ e\u0301tude a\u0323\u0302 o\u0302\u0323 \u0301start n\u0303\u0303\u0303 x\u20dd
 \u212bngstrom \u212aelvin \u2126 ΟΔΟΣ Σ ΣΟΦΟΣ ΆΝΘΡΩΠΟΣ ς, λόγος. ᾌ
 Привет ЁЖИК й Їжак კატა ᲙᲐᲢᲐ կատու שָׁלוֹם مَرْحَبًا القطة، ٣٤؟ हिन्दी बिल्ली।
 கிழவி ภาษาไทย แมวสีดำ 한국어 고양이 \u1112\u1161\u11ab 日本語のテキスト カタカナ ガ か\u3099
 中文字符 黑色的猫。 𠀀𪚥 㐂 \uf900\u2f81a ２０２４ Ａｂｃ ① ½ x² ™ € ₿ № ½cup ﷺ
 “curly” ‘q’ —dash– … «guillemets» ¿qué? 「引用」 ・ ‰ § ¶ † × ÷ ° µ ªº ⓐⒶ
 Ⅷ"""
EMOJI = ("😀", "👍🏽", "👩‍👩‍👧", "❤️", "🇯🇵", "1️⃣", "🏴\U000e0067\U000e0062\U000e007f", "🫠",
         "\U0001fae8", "\U0001fabf", "☃", "➡️")
LONG = ("a" * 99, "b" * 100, "c" * 101, "é" * 100, "e\u0301" * 101, "가" * 50, "각" * 34, "ab" * 80,
        "z" * 101 + "-z", "中" * 120)
SPACES = " \t\n\r\u00a0\u1680\u2002\u2009\u2028\u2029\u202f\u205f\u3000"
DIRT = ("\0\1\x07\x08\x0b\x0c\x1b\x1c\x1d\x1e\x1f\x7f\x80\x85\x9f\xad\u180e\u200b\u200c\u200d\u200e"
        "\u202a\u2060\ufeff\ufffd\ue000\U000f1234")
NEVER_ASSIGNED = "\ufdd0\ufdef\ufffe\uffff\U0001fffe\U0010ffff"  # kept, unlike other C categories
EDGES = (  # of the blocks of ideographs, from both sides
    "\u33ff\u3400\u4dbf\u4dc0\u4dff\u4e00\u9fff\ua000\uf8ff\uf900\ufaff\ufb00\U0001ffff\U00020000"
    "\U0002a6df\U0002a6e0\U0002a6ff\U0002a700\U0002b73f\U0002b740\U0002b81f\U0002b820\U0002b91f"
    "\U0002b920\U0002ceaf\U0002ceb0\U0002f7ff\U0002f800\U0002fa1f\U0002fa20")


def is_stable(char):
    """Whether Python and the library agree on the category. The library's table is Unicode 8, so
    they differ on some 500 marks and punctuation of rare scripts that are younger. Symbols, emoji
    among them, are treated alike at any age."""
    old, new = unicodedata.ucd_3_2_0.category(char), unicodedata.category(char)
    return old == new not in ("Cn", "Cs") or (old == "Cn" and new[0] == "S")


BY_CATEGORY = {}
for _char in map(chr, range(0x110000)):
    if is_stable(_char) or _char in NEVER_ASSIGNED + EDGES:
        BY_CATEGORY.setdefault(unicodedata.category(_char), []).append(_char)


def captions(count, seed=0):
    """Half plain sentences, half with anything in them."""
    rng = random.Random(seed)
    plain, scripts, categories = PLAIN.split(), SCRIPTS.split(), sorted(BY_CATEGORY)

    def any_characters():
        length = rng.randint(1, 6)
        return "".join(rng.choice(BY_CATEGORY[rng.choice(categories)]) for _ in range(length))

    unusual = (lambda: rng.choice(scripts), lambda: rng.choice(scripts).upper(),
               lambda: rng.choice(EMOJI), lambda: rng.choice(SPECIAL),
               lambda: rng.choice(string.punctuation) * rng.randint(1, 3), any_characters)

    def item():
        kind = rng.random()
        if kind < 0.4:
            return rng.choice(plain)
        return rng.choice(LONG) if kind < 0.45 else rng.choice(unusual)()

    def caption():
        if rng.random() < 0.5:
            words = rng.choices(plain, k=rng.randint(3, 30))
            return " ".join(words) + rng.choice((".", "", " !"))
        text = ""
        for _ in range(rng.randint(0, 20)):
            text += item() + rng.choice((" ", " ", "", rng.choice(SPACES)))
        for _ in range(rng.choice((0, 0, 1, 5))):
            position = rng.randint(0, len(text))
            extra = rng.choice(DIRT + NEVER_ASSIGNED + SPACES)
            text = text[:position] + extra + text[position:]
        return text

    return [caption() for _ in range(count)]


TEXTS = captions(12_000)


def bert_style_vocabulary():
    """Laid out as BERT's: [UNK] at 100, unused ids, letters, words, endings."""
    letters = [*string.ascii_lowercase, *string.digits, "\u1112", "\u1161", "\u11ab", "i\u0307",
               *"αβγδεικλνορσςτφωабвгдежийкрпт中日文黑色本ก한ㅏ"]
    words = sorted(set(PLAIN.lower().split()) - set(string.punctuation))
    endings = ["ing", "s", "ed", "er", "ning", "ly", "an", "ie", "e\u0301", "中", "ος", "ᅡᆫ", "ᅡ"]
    pieces = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]",
              "[unused99]", *string.punctuation, *"。、“”—…€؟", "😀", *letters, *words,
              *("##" + piece for piece in letters + endings)]
    return tokenizer.WordPiece(dict.fromkeys(pieces))


@pytest.mark.parametrize("vocabulary", ["built", "bert"])
def test_ids_equal_the_librarys(vocabulary):
    if vocabulary == "bert":
        tok = bert_style_vocabulary()
    else:
        tok = tokenizer.train_vocab(TEXTS[::3], 6_000)
    library = tokenizers.Tokenizer(
        models.WordPiece(tok.ids, unk_token="[UNK]", max_input_chars_per_word=100))
    library.normalizer, library.pre_tokenizer = NORMALIZER, PRE_TOKENIZER
    expected = [e.ids for e in library.encode_batch(TEXTS, add_special_tokens=False)]
    wrong = [text for text, ids in zip(TEXTS, expected) if tok.encode_pieces(text) != ids]
    assert not wrong, f"{len(wrong)} captions differ, the shortest is {min(wrong, key=len)!a}"
    used = list(itertools.chain(*expected))  # the captions must use the vocabulary
    assert 0 < used.count(tok.unknown) < 0.1 * len(used) and len(set(used)) > len(tok) // 2


def library_words(text):
    normalized = NORMALIZER.normalize_str(text)
    return [word for word, _ in PRE_TOKENIZER.pre_tokenize_str(normalized)]


def test_words_equal_the_librarys():
    """Before a vocabulary hides a difference behind [UNK]."""
    assert [t for t in TEXTS if tokenizer.basic_tokenize(t) != library_words(t)] == []


def test_every_stable_character_is_treated_as_by_the_library():
    """Each in the middle of a word; only some of the 137,000 private ones, which are all alike."""
    count, wrong = 0, []
    for category, chars in BY_CATEGORY.items():
        for char in chars[::500 if category == "Co" else 1]:
            count += 1
            if tokenizer.basic_tokenize(f"a{char}B") != library_words(f"a{char}B"):
                wrong.append(f"U+{ord(char):04X}")
    assert count > 90_000 and wrong == []

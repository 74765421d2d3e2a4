"""Our WordPiece against the `tokenizers` library: the same ids for the same text, however odd the text."""
import random
import string
import unicodedata

import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from inputs import tokenizer

NORMALIZER = normalizers.BertNormalizer(clean_text=True, handle_chinese_chars=True, strip_accents=None, lowercase=True)
PRE_TOKENIZER = pre_tokenizers.BertPreTokenizer()
PLAIN = """a the this photo picture shows of with and two three small big red Blue green circle square star dog dogs cat
 running RUNNING jumped over table wooden window street people walking near under sky cloudy sunlight don't mother-in-law
 e.g. U.S.A. 3.14 1,000 50% $20 #1 @home snake_case x+y=z <b> 5'11" 10:30 well... what?! "quoted" (both) [left] {}~^`|\\/"""
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[BOS]", "[EOS]", "[unused3]", "##ing", "run##ing", "##", "[ PAD ]", "[pad]")
SCRIPTS = """café naïve Ångström ÉCOLE straße ǆungla ﬁne ĳsvogel Đorđe Łódź Øre İSTANBUL Iğdır ısı İ e\u0301tude a\u0323\u0302 o\u0302\u0323
 \u0301start n\u0303\u0303\u0303 x\u20dd \u212bngstrom \u212aelvin \u2126 ΟΔΟΣ Σ ΣΟΦΟΣ ΆΝΘΡΩΠΟΣ ς, λόγος. ᾌ Привет ЁЖИК й Їжак კატა ᲙᲐᲢᲐ կատու שָׁלוֹם
 مَرْحَبًا القطة، ٣٤؟ हिन्दी बिल्ली। கிழவி ภาษาไทย แมวสีดำ 한국어 고양이 \u1112\u1161\u11ab 日本語のテキスト カタカナ ガ か\u3099 中文字符 黑色的猫。 𠀀𪚥 㐂
 \uf900\u2f81a ２０２４ Ａｂｃ ① ½ x² ™ € ₿ № ½cup ﷺ “curly” ‘q’ —dash– … «guillemets» ¿qué? 「引用」 ・ ‰ § ¶ † × ÷ ° µ ªº ⓐⒶ Ⅷ"""
EMOJI = ("😀", "👍🏽", "👩‍👩‍👧", "❤️", "🇯🇵", "1️⃣", "🏴\U000e0067\U000e0062\U000e007f", "🫠", "\U0001fae8", "\U0001fabf", "☃", "➡️")
LONG = ("a" * 99, "b" * 100, "c" * 101, "é" * 100, "e\u0301" * 101, "가" * 50, "각" * 34, "ab" * 80, "z" * 101 + "-z", "中" * 120)
SPACES = " \t\n\r\u00a0\u1680\u2002\u2009\u2028\u2029\u202f\u205f\u3000"
DIRT = "\0\1\x07\x08\x0b\x0c\x1b\x1c\x1d\x1e\x1f\x7f\x80\x85\x9f\xad\u180e\u200b\u200c\u200d\u200e\u202a\u2060\ufeff\ufffd\ue000\U000f1234"
NOWHERE = "\ufdd0\ufdef\ufffe\uffff\U0001fffe\U0010ffff"  # never to be assigned: kept, where other C categories go
EDGES = ("\u33ff\u3400\u4dbf\u4dc0\u4dff\u4e00\u9fff\ua000\uf8ff\uf900\ufaff\ufb00\U0001ffff\U00020000\U0002a6df\U0002a6e0"
         "\U0002a6ff\U0002a700\U0002b73f\U0002b740\U0002b81f\U0002b820\U0002b91f\U0002b920\U0002ceaf\U0002ceb0\U0002f7ff\U0002f800"
         "\U0002fa1f\U0002fa20")  # of the blocks of ideographs, from both sides


def settled(c):
    """Is the character's category the same for Python and for the library, whose table is of Unicode 8? Of younger
    or reclassified characters (some 500 marks and punctuation of rare scripts) the library knows less than Python,
    and nothing but its old table could agree with it; symbols, emoji among them, are handled alike at any age."""
    old, new = unicodedata.ucd_3_2_0.category(c), unicodedata.category(c)
    return old == new not in ("Cn", "Cs") or (old == "Cn" and new[0] == "S")


ALL = [c for c in map(chr, range(0x110000)) if settled(c) or c in NOWHERE + EDGES]
BY_CATEGORY = {}


for _c in ALL:
    BY_CATEGORY.setdefault(unicodedata.category(_c), []).append(_c)


def captions(count, seed=0):
    """Half plain sentences, half with anything in them."""
    rng = random.Random(seed)
    plain, scripts, categories = PLAIN.split(), SCRIPTS.split(), sorted(BY_CATEGORY)

    def soup():
        return "".join(rng.choice(BY_CATEGORY[rng.choice(categories)]) for _ in range(rng.randint(1, 6)))

    def item():
        kind = rng.random()
        if kind < 0.4:
            return rng.choice(plain)
        if kind < 0.45:
            return rng.choice(LONG)
        return rng.choice((lambda: rng.choice(scripts), lambda: rng.choice(scripts).upper(), lambda: rng.choice(EMOJI),
                           lambda: rng.choice(SPECIAL), lambda: rng.choice(string.punctuation) * rng.randint(1, 3), soup))()

    def caption():
        if rng.random() < 0.5:
            return " ".join(rng.choices(plain, k=rng.randint(3, 30))) + rng.choice((".", "", " !"))
        text = "".join(item() + rng.choice((" ", " ", "", rng.choice(SPACES))) for _ in range(rng.randint(0, 20)))
        for _ in range(rng.choice((0, 0, 1, 5))):
            at = rng.randint(0, len(text))
            text = text[:at] + rng.choice(DIRT + NOWHERE + SPACES) + text[at:]
        return text
    return [caption() for _ in range(count)]


TEXTS = captions(12_000)


def bert_style():
    """A vocabulary laid out as BERT's: [UNK] at 100, unused places, letters, words, endings."""
    letters = [*string.ascii_lowercase, *string.digits, *"αβγδεικλνορσςτφωабвгдежийкрпт中日文黑色本ก한ㅏ", "\u1112", "\u1161", "\u11ab", "i\u0307"]
    words = sorted(set(PLAIN.lower().split()) - set(string.punctuation))
    ends = ["ing", "s", "ed", "er", "ning", "ly", "an", "ie", "é", "中", "ος", "ᅡᆫ", "ᅡ"]
    pieces = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused99]",
              *string.punctuation, *"。、“”—…€؟", "😀", *letters, *words, *("##" + p for p in letters + ends)]
    return tokenizer.WordPiece(dict.fromkeys(pieces))


@pytest.mark.parametrize("vocabulary", ["built", "bert"])
def test_ids(vocabulary):
    ours = bert_style() if vocabulary == "bert" else tokenizer.train_vocab(TEXTS[::3], 6_000)
    theirs = tokenizers.Tokenizer(models.WordPiece(ours.ids, unk_token="[UNK]", max_input_chars_per_word=100))
    theirs.normalizer, theirs.pre_tokenizer = NORMALIZER, PRE_TOKENIZER
    wanted = [encoding.ids for encoding in theirs.encode_batch(TEXTS, add_special_tokens=False)]
    wrong = [text for text, ids in zip(TEXTS, wanted) if ours.encode_pieces(text) != ids]
    assert not wrong, f"{len(wrong)} of {len(TEXTS)} captions differ, the shortest is {min(wrong, key=len)!a}"
    used = [i for ids in wanted for i in ids]  # the captions must put the vocabulary to use
    assert 0 < used.count(ours.unknown) < 0.1 * len(used) and len(set(used)) > len(ours) // 2


def library_words(text):
    return [word for word, _ in PRE_TOKENIZER.pre_tokenize_str(NORMALIZER.normalize_str(text))]


def test_words():
    """Before any vocabulary hides a difference behind [UNK]."""
    assert [text for text in TEXTS if tokenizer.basic_tokenize(text) != library_words(text)] == []


def test_every_settled_character():
    """Each in the middle of a word; of the 137,000 private ones, which all go alike, some."""
    chosen = [c for category, members in BY_CATEGORY.items() for c in members[::500 if category == "Co" else 1]]
    assert len(chosen) > 90_000
    assert [f"U+{ord(c):04X}" for c in chosen if tokenizer.basic_tokenize(f"a{c}B") != library_words(f"a{c}B")] == []

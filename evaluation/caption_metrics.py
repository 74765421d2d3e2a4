"""Caption metrics: BLEU-4, ROUGE-L and CIDEr-D, the length and the repetition of captions.

They compare the words of a generated caption with those of one or more references. The formulas,
and the numbers to 1e-6, are those of COCO's evaluation code (pycocoevalcap). The words are not: a
caption becomes words by the basic tokenizer of inputs/tokenizer.py (lower case, no accents), and
punctuation is removed. COCO's code uses the Penn Treebank tokenizer, which needs Java.

None of these metrics says whether a long caption is true. BLEU and ROUGE reward the wording of the
references. CIDEr-D falls with the difference in length, by half at 7 words, so that a dense caption
of another wording scores nearly 0. CIDEr-D is made for short captions with several references.

Letters: n the number of words in an n-gram, 1 to 4.
"""
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence

from inputs.tokenizer import basic_tokenize, is_punctuation

Words = list[str]
MAX_N = 4
ROUGE_BETA = 1.2      # weight of recall against precision
CIDER_SIGMA = 6.0     # words of difference in length, of the Gaussian penalty
TINY, SMALL = 1e-15, 1e-9  # COCO's: a caption without a common n-gram scores about 0, not an error


def split_words(text: str) -> Words:
    """The words of a caption, without punctuation."""
    return [word for word in basic_tokenize(text) if not is_punctuation(word[0])]


def ngrams(words: Words, n: int) -> Iterator[tuple[str, ...]]:
    return zip(*(words[start:] for start in range(n)))


def caption_scores(captions: Sequence[str], references: Sequence[Sequence[str]]
                   ) -> dict[str, float]:
    """All metrics of generated captions, each with its references (one or more): means over the
    images, but BLEU-4 is that of the set. Scores are from 0 to 1, CIDEr-D from 0 to 10."""
    hypotheses = [split_words(text) for text in captions]
    truths = [[split_words(text) for text in texts] for texts in references]
    reference_words = [len(words) for words in itertools.chain(*truths)]
    return {"cider_d": mean(cider_d(hypotheses, truths)),
            "bleu_4": bleu(hypotheses, truths)[-1],
            "rouge_l": mean([rouge_l(words, refs) for words, refs in zip(hypotheses, truths)]),
            "words": mean([len(words) for words in hypotheses]),
            "reference_words": mean(reference_words),
            "references": len(reference_words) / len(truths),
            "repetition": mean([repetition(words) for words in hypotheses]),
            "reference_repetition": mean([repetition(refs[0]) for refs in truths]),
            "distinct_captions": len(set(captions)) / len(captions)}


def mean(values: Sequence[float]) -> float:
    return float(sum(values) / len(values))


# ------------------------------------------------------------------------------- BLEU (2002)
def bleu(hypotheses: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """BLEU-1 to BLEU-4 of a set: the geometric mean of n-gram precisions, where an n-gram counts at
    most as often as in one reference, times a penalty for captions that are shorter than their
    references (of the closest length)."""
    correct, total = Counter(), Counter()
    length = reference_length = 0
    for words, refs in zip(hypotheses, references):
        length += len(words)
        reference_length += min((abs(len(ref) - len(words)), len(ref)) for ref in refs)[1]
        for n in range(1, MAX_N + 1):
            allowed: Counter = Counter()
            for ref in refs:
                allowed |= Counter(ngrams(ref, n))  # the maximum of each count
            counts = Counter(ngrams(words, n))
            total[n] += counts.total()
            correct[n] += (counts & allowed).total()
    ratio = (length + TINY) / (reference_length + SMALL)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    scores, product = [], 1.0
    for n in range(1, MAX_N + 1):
        product *= (correct[n] + TINY) / (total[n] + SMALL)
        scores.append(penalty * product ** (1 / n))
    return scores


# ---------------------------------------------------------------------------- ROUGE-L (2004)
def rouge_l(words: Words, references: Sequence[Words]) -> float:
    """The F-measure of the longest common subsequence with the references: of the best precision
    and the best recall."""
    common = [common_length(words, ref) for ref in references]
    if not any(common):
        return 0.0
    precision = max(common) / len(words)
    recall = max(c / len(ref) for c, ref in zip(common, references) if ref)
    weight = ROUGE_BETA**2
    return (1 + weight) * precision * recall / (recall + weight * precision)


def common_length(a: Words, b: Words) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for word in a:
        previous, row = row, [0]
        for j, other in enumerate(b):
            longer = previous[j] + 1 if word == other else max(previous[j + 1], row[j])
            row.append(longer)
    return row[-1]


# ---------------------------------------------------------------------------- CIDEr-D (2015)
def cider_d(hypotheses: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """CIDEr-D of each caption, 0 to 10: the cosine of tf-idf vectors of n-grams with each
    reference, counts clipped at the reference's, times a Gaussian penalty for a difference in
    length; the mean over references and n. An n-gram is rare if few images have it in a reference.
    0 for a set of one image, where no n-gram is rare."""
    frequency: Counter = Counter()
    for refs in references:
        seen: set[tuple[str, ...]] = set()
        for ref in refs:
            for n in range(1, MAX_N + 1):
                seen.update(ngrams(ref, n))
        frequency.update(seen)
    scores = []
    for words, refs in zip(hypotheses, references):
        vectors = tf_idf(words, frequency, len(references))
        similarity = 0.0
        for ref in refs:
            delta = max(len(words) - 1, 0) - max(len(ref) - 1, 0)  # in 2-grams, as COCO's code
            penalty = math.exp(-delta**2 / (2 * CIDER_SIGMA**2))
            for a, b in zip(vectors, tf_idf(ref, frequency, len(references))):
                similarity += penalty * clipped_cosine(a, b)
        scores.append(10 * similarity / (MAX_N * len(refs)))
    return scores


def tf_idf(words: Words, frequency: Counter, num_images: int) -> list[dict[tuple, float]]:
    """{n-gram: count x ln(images / images with it)} for each n."""
    vectors = []
    for n in range(1, MAX_N + 1):
        counts = Counter(ngrams(words, n))
        vectors.append({gram: count * math.log(num_images / max(1, frequency[gram]))
                        for gram, count in counts.items()})
    return vectors


def clipped_cosine(a: dict[tuple, float], b: dict[tuple, float]) -> float:
    norms = math.hypot(*a.values()) * math.hypot(*b.values())
    dot = sum(min(weight, b[gram]) * b[gram] for gram, weight in a.items() if gram in b)
    return dot / norms if norms else 0.0


# -------------------------------------------------------------------------------- repetition
def repetition(words: Words) -> float:
    """The share of 4-grams that repeat an earlier one of the caption (rep-4: Welleck et al., 2020).
    0 for a caption of fewer than five words."""
    grams = list(ngrams(words, MAX_N))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0

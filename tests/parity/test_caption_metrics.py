"""Caption metrics against COCO's code, pycocoevalcap, on the same words."""
import random

import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from evaluation.caption_metrics import bleu, cider_d, rouge_l
from inputs import scene_captions, scenes

VOCABULARY = ["a", "the", "red", "blue", "cat", "dog", "on", "under", "table", "left", "of", "big"]


def random_corpus(seed: int) -> tuple[list[str], list[list[str]]]:
    """Captions of 0 to 20 words, with up to five references of 1 to 20 words."""
    rng = random.Random(seed)

    def caption(least: int) -> str:
        return " ".join(rng.choices(VOCABULARY, k=rng.randint(least, 20)))
    references = []
    for _ in range(40):
        references.append([caption(1) for _ in range(rng.randint(1, 5))])
    captions = [rng.choice(refs) if rng.random() < 0.2 else caption(0) for refs in references]
    return captions, references


def scene_corpus(count: int) -> tuple[list[str], list[list[str]]]:
    """Captions of scenes: of one wording, against two, of the scene or the next."""
    records = [scenes.sample_scene(0, "val", i) for i in range(count)]
    texts = []
    for record in records:
        texts.append([scene_captions.caption(record | {"wording": n}) for n in range(3)])
    captions = [wordings[0] for wordings in texts]
    return captions, [wordings[1:] for wordings in texts[1:] + texts[:1]]


@pytest.mark.parametrize("corpus", [random_corpus(0), random_corpus(1), scene_corpus(50)])
def test_scores_are_those_of_pycocoevalcap(corpus):
    captions, references = corpus
    words = [text.split() for text in captions]
    reference_words = [[text.split() for text in texts] for texts in references]
    generated = {i: [text] for i, text in enumerate(captions)}
    truth = dict(enumerate(references))
    expected, _ = Bleu(4).compute_score(truth, generated, verbose=0)
    assert bleu(words, reference_words) == pytest.approx(expected, abs=1e-6)
    _, expected = Cider().compute_score(truth, generated)
    assert cider_d(words, reference_words) == pytest.approx(expected.tolist(), abs=1e-6)
    _, expected = Rouge().compute_score(truth, generated)
    scores = [rouge_l(caption, refs) for caption, refs in zip(words, reference_words)]
    assert scores == pytest.approx(expected.tolist(), abs=1e-6)

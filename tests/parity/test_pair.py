"""The exported pair: transformers and open_clip compute our similarities and classify by them."""
import dataclasses

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import convert
import vit
from evaluation import pair as pairs
from inputs import tokenizer
from interop.encoder import load_pixels
from interop.tokenizer_files import tokenizer_files
from objectives import registry
from objectives.contrastive import logit_scale
from runtime import checkpoint
from tests.helpers.encoders import untrained_run
from tests.helpers.models import noisy_params
from tests.parity import libraries
from tests.parity.test_tokenizer_json import train_library_tokenizer, with_extras
from tests.parity.test_wordpiece import TEXTS

QUERIES = ["two small dogs", "a Blue square", "x+y=z", "", "a dog [EOS] a cat"]
CASES = [("transformers", {"image_pool": "map"}), ("open_clip", {"image_pool": "map"}),
         ("open_clip", {"image_pool": "map", "cls_token": True}),
         ("open_clip", {"image_pool": "mean"}), ("open_clip", {"objective": "clip"})]


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    return libraries.photograph(tmp_path_factory.mktemp("photo") / "photo.jpg")


def save_run(folder: str, changes: dict) -> None:
    """A run whose parameters are all other than initialized."""
    cfg = untrained_run(folder, **({"objective": "lit", "init_encoder": "random"} | changes))
    model = registry.model_spec(cfg)
    specs = {"encoder": vit.param_specs(model.encoder)} | registry.param_specs(model)
    params = noisy_params(specs)
    vocabulary = tokenizer.train_vocab(QUERIES, 150).state
    meta = {"config": dataclasses.asdict(cfg), "vocabulary": vocabulary}
    checkpoint.save_step(folder, 5, {"params": params}, meta)


@pytest.mark.parametrize("library, changes", CASES)
def test_the_cards_code_gives_our_similarities(library, changes, photo, tmp_path, monkeypatch):
    run, out = str(tmp_path / "run"), tmp_path / "out"
    save_run(run, changes)
    argv = ["export", run, "--to", library, "--pair", "--out", str(out), "--resolution", "32"]
    assert convert.main(argv) == 0
    pair = pairs.read_pair(run)
    image = pairs.embed_images(pair, load_pixels(photo, 32)[None])
    ours = image @ pairs.embed_texts(pair, QUERIES).T
    monkeypatch.chdir(out)
    variables = {"image": Image.open(photo), "texts": QUERIES}
    with torch.no_grad():
        exec(libraries.card_code(out), variables)
    theirs = variables["similarity"].numpy()
    assert theirs.shape == ours.shape and ours.std() > 0.01
    assert np.abs(theirs - ours).max() <= 1e-4
    scale = variables["model"].logit_scale.exp().item()
    assert scale == pytest.approx(float(logit_scale(pair.params)), rel=1e-5)
    best = variables["best"]
    assert QUERIES[ours.argmax()] == (best["label"] if library == "transformers" else best)


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "unigram"])
def test_the_librarys_tokenizer_gives_our_ids(kind, tmp_path):
    if kind == "wordpiece":
        tok = tokenizer.train_vocab(TEXTS[::3], 4000)
    else:
        tok = tokenizer.HFTokenizer(with_extras(train_library_tokenizer(kind)))
    files = tokenizer_files(tok, len(tok) + 5, 20)
    assert sorted(files.rows) == list(range(len(tok) + 5))
    for name, text in files.texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    library = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    texts = [*TEXTS[:2000], "[EOS] and [PAD]", "", "cat " * 50]
    ids = library(texts, padding="max_length", max_length=20, truncation=True,
                  return_tensors="np")["input_ids"]
    ours = np.array([tok.encode(text, 20) for text in texts])
    wrong = (files.rows[ids] != ours).any(1)
    assert not wrong.any(), texts[wrong.argmax()]
    assert (ids.argmax(1) == (ours == tokenizer.EOS).argmax(1)).all()  # the highest id is [EOS]

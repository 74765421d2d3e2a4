"""A small encoder, a captioner, and a run's folder; none of them is trained."""
import dataclasses
import os
from pathlib import Path

import jax
import pytest

import decoder
import vit
from caption import Captioner
from config import RECIPES, Config
from inputs import scene_captions, scenes, tokenizer
from interop.encoder import Encoder
from objectives.registry import init_params, model_spec
from runtime import checkpoint

CFG = vit.ViTConfig(2, 32, 2, 64, 8)


def scene_vocabulary(size: int) -> tokenizer.WordPiece:
    records = [scenes.sample_scene(0, "train", i) for i in range(60)]
    return tokenizer.train_vocab([scene_captions.caption(record) for record in records], size)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(vit.init(jax.random.key(0), CFG), CFG, 16)


@pytest.fixture(scope="module")
def captioner() -> Captioner:
    cfg = decoder.DecoderConfig(2, 32, 2, 64, 150, CFG.width)
    params = {"encoder": vit.init(jax.random.key(0), CFG),
              "decoder": decoder.init(jax.random.key(1), cfg)}
    settings = Config(max_text_len=40, keep_ratio=0.5)
    return Captioner(params, CFG, cfg, scene_vocabulary(150), settings, 16)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = str(tmp_path_factory.mktemp("run"))
    cfg = dataclasses.replace(RECIPES["toy"], encoder="micro/8", scan_unroll=1, val_samples=8,
                              max_text_len=40, vocab_size=150, workdir=folder,
                              stages="resolution=16 steps=2 batch=8 lr=1e-3")
    model = model_spec(cfg)
    params = init_params(cfg, model)
    meta = {"config": dataclasses.asdict(cfg), "data": {"validation data": "scenes"},
            "best_shuffled": 5.0, "vocabulary": scene_vocabulary(cfg.vocab_size).state}
    checkpoint.save_step(folder, 2, {"params": params}, meta)
    checkpoint.save(os.path.join(folder, "encoder.npz"), params["encoder"],
                    {"encoder": dataclasses.asdict(model.encoder), "resolution": 16,
                     "config": dataclasses.asdict(cfg)})
    return Path(folder)

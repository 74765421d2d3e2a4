"""Opens what a run's settings name: the sources of images and captions, and the tokenizer."""
import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from inputs import sources
from inputs.files import ReadOptions, caption_weights, open_storage
from inputs.sources import SceneSource, Source
from inputs.tokenizer import WordPiece, train_vocab
from inputs.tokenizer import load as load_tokenizer
from runtime.errors import BadSample, ConfigError

# The most samples whose captions a vocabulary is built from. 4,000 scenes have all their words.
VOCAB_SAMPLES, VOCAB_SCENES = 100_000, 4_000


def read_options(cfg: Any) -> ReadOptions:
    return ReadOptions(cfg.image_field, cfg.alt_field, cfg.cache_dir, cfg.cache_gb)


def open_data(cfg: Any) -> tuple[Source, Source]:
    """(training source, validation source) of a run's Config. ConfigError or DataError."""
    if not cfg.data:
        raise ConfigError("--data is missing: give a folder of captioned images, tars, or scenes")
    options = read_options(cfg)
    source = sources.open_source(cfg.data, cfg.caption_field, cfg.seed, "train", options=options)
    has_columns = getattr(source, "has_columns", True)  # scenes have no files
    if cfg.alt_field and cfg.caption_field == "txt" and not has_columns:
        raise ConfigError(f"--alt-field {cfg.alt_field} is a field of the KEY.json, from which "
                          "--caption-field must then come too: name its field")
    if not cfg.val and cfg.data != "scenes":
        return sources.train_val_split(source, cfg.val_samples)
    val_source = sources.open_source(cfg.val or "scenes", cfg.caption_field, cfg.seed, "val",
                                     cfg.val_samples, options)
    return source, sources.subsample(val_source, cfg.val_samples)


def open_validation_data(cfg: Any) -> Source:
    """The validation source. With --val, the training data need not exist."""
    return open_data(dataclasses.replace(cfg, data=cfg.val or cfg.data))[1]


def open_tokenizer(cfg: Any, source: Source) -> WordPiece:
    """The tokenizer of --vocab, or one built from the captions of at most 100,000 samples."""
    if not cfg.vocab:
        try:
            fields = [*caption_weights(cfg.caption_field), *filter(None, [cfg.alt_field])]
            return train_vocab(vocab_captions(source, fields), cfg.vocab_size)
        except ValueError as problem:
            raise ConfigError(str(problem)) from None
    try:
        path = open_storage(cfg.vocab, read_options(cfg)).local_copy(cfg.vocab)
        tokenizer = load_tokenizer(path)
    except (OSError, ValueError) as problem:
        raise ConfigError(f"--vocab: {problem}") from None
    if len(tokenizer) > cfg.vocab_size:
        raise ConfigError(f"--vocab-size {cfg.vocab_size} is less than the {len(tokenizer)} pieces "
                          f"of {cfg.vocab}")
    return tokenizer


def vocab_captions(source: Source, fields: Iterable[str] = ("",)) -> Iterator[str]:
    """The captions that a vocabulary is built from: these fields ("": the source's own) of the
    first samples. Those that cannot be read are left out."""
    count = VOCAB_SCENES if isinstance(source, SceneSource) else VOCAB_SAMPLES
    for i in range(min(len(source), count)):
        for field in fields:
            with contextlib.suppress(BadSample):
                yield source.caption(i, field)

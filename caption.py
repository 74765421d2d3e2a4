"""Captions for any pictures, from a run: its decoder is in the run's checkpoints, beside the encoder.

As in training, the decoder sees a random third of the patches (the run's keep ratio, or --keep-ratio). Greedy unless
--top-p is given; with --samples each caption has a draw of its own, of patches and of words. A picture's captions
follow from the picture and --seed, not from the pictures beside it.

    python caption.py RUN IMAGE... [--top-p 0.9] [--samples 3] [--seed 0]
"""
import argparse
import functools
import sys
from collections.abc import Callable
from typing import NamedTuple

import jax

import decoder
from config import Config
from inputs import tokenizer
from inputs.images import silence_pillow
from interop.encoder import load_pixels
from masking import keep_random_tokens
from objectives.registry import model_spec
from runtime import checkpoint
from runtime.checkpoint import load_run_checkpoint
from runtime.cpu_tuning import enable_compilation_cache
from runtime.curriculum import parse_stages
from runtime.errors import BadSample, CheckpointError
from vit import ViTConfig, init, vit


class Captioner(NamedTuple):
    """Encoder and decoder of a run, as its checkpoint has them."""
    params: dict                     # {"encoder": ..., "decoder": ...}
    encoder: ViTConfig
    decoder: decoder.DecoderConfig
    tokenizer: tokenizer.WordPiece
    settings: Config
    resolution: int


def read_captioner(path: str) -> Captioner:
    """From a run's folder (its last checkpoint) or a checkpoint. CheckpointError if it cannot be read, or has no decoder."""
    settings, arrays, meta = load_run_checkpoint(path)
    if settings.objective != "openvision2":
        raise CheckpointError(f"{path} is a run of --objective {settings.objective}: captions are told by runs of openvision2")
    encoder_cfg, decoder_cfg = model_spec(settings)[:2]
    if not any(name.startswith("params/decoder/") for name in arrays):
        raise CheckpointError(f"{path} has no caption decoder")
    like = jax.eval_shape(lambda key: {"encoder": init(key, encoder_cfg), "decoder": decoder.init(key, decoder_cfg)}, jax.random.key(0))
    params = jax.device_put(checkpoint.restore(arrays, like, path, under="params"))
    try:
        tok = tokenizer.from_state(meta["vocabulary"])
    except ValueError as problem:
        raise CheckpointError(f"{path}: {problem}") from None
    return Captioner(params, encoder_cfg, decoder_cfg, tok, settings, next(s.resolution for s in parse_stages(settings.stages) if meta["step"] <= s.end))


def load_captioner(folder: str, keep_ratio: float = 0.0) -> Callable[..., str]:
    """caption(picture, seed=0, sample=0, top_p=0.0) -> text, from a run's last checkpoint. keep_ratio 0 is the run's;
    top_p 0 is greedy. CheckpointError if there is no run to be read."""
    params, encoder_cfg, decoder_cfg, tok, settings, resolution = read_captioner(folder)

    @functools.partial(jax.jit, static_argnames="top_p")
    def write(params, images, key, top_p):
        tokens = vit(params["encoder"], images, encoder_cfg)["tokens"]                         # (1,N,D)
        patches, words = jax.random.split(key)
        kept, _ = keep_random_tokens(patches[None], tokens, keep_ratio or settings.keep_ratio, settings.shuffle_kept)  # (1,K,D)
        return decoder.generate(params["decoder"], kept, decoder_cfg, settings.max_text_len, words if top_p else None, top_p)

    def caption(picture, seed: int = 0, sample: int = 0, top_p: float = 0.0) -> str:
        key = jax.random.fold_in(jax.random.key(seed), sample)
        return tok.decode(jax.device_get(write(params, load_pixels(picture, resolution)[None], key, top_p))[0])
    return caption


def main(argv: list[str]) -> int:
    def share(text: str) -> float:
        if not 0 < (value := float(text)) <= 1:
            raise ValueError
        return value

    def count(text: str) -> int:
        if (value := int(text)) < 1:
            raise ValueError
        return value
    share.__name__, count.__name__ = "share (above 0, at most 1)", "count (1 or more)"  # as argparse calls them
    parser = argparse.ArgumentParser(prog="caption.py", allow_abbrev=False, description="Print captions for any pictures, from a run.")
    parser.add_argument("run", help="the folder of a run that train.py has saved, or a checkpoint of it")
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    parser.add_argument("--top-p", type=share, default=0.0, help="draw words from the likeliest that hold this share of the probability (default: greedy)")
    parser.add_argument("--samples", type=count, default=1, help="captions a picture (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of all draws (default: 0)")
    parser.add_argument("--keep-ratio", type=share, default=0.0, help="share of the patches that the decoder sees (default: the run's)")
    given = parser.parse_args(argv)
    try:
        caption = load_captioner(given.run, given.keep_ratio)
    except (CheckpointError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    bad = 0
    for image in given.images:
        try:
            for sample in range(given.samples):
                print(f"{image}: {caption(image, given.seed, sample, given.top_p)}", flush=True)
        except BadSample as problem:
            print(f"error: {problem}", file=sys.stderr)
            bad = 1
    return bad


if __name__ == "__main__":
    enable_compilation_cache()
    silence_pillow()
    sys.exit(main(sys.argv[1:]))

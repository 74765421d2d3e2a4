"""Captions for any image, by a trained run: its decoder is in the run's checkpoints.

As in training, the decoder reads a random share of the patch tokens (the run's keep ratio, or
--keep-ratio). Captions are greedy, or sampled with --top-p; with --samples, each has its own draw
of patches and of tokens. An image's captions depend on the image and --seed, not on other images.

    python caption.py RUN IMAGE... [--top-p 0.9] [--samples 3] [--seed 0]
"""
import argparse
import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

import decoder
from config import MAX_SEED, Config, from_dict
from inputs import tokenizer
from inputs.files import printable
from inputs.images import silence_pillow
from interop.encoder import ImageLike, load_pixels
from masking import keep_random_tokens
from objectives.registry import METHOD, model_spec
from runtime import checkpoint
from runtime.cpu_tuning import enable_compilation_cache
from runtime.errors import BadSample, CheckpointError, CommandParser, run_command
from vit import ViTConfig, init, vit


class Captioner(NamedTuple):
    """The encoder and the decoder of a checkpoint."""
    params: dict                     # {"encoder": ..., "decoder": ...}
    encoder: ViTConfig
    decoder: decoder.DecoderConfig
    tokenizer: tokenizer.WordPiece
    settings: Config
    resolution: int                  # pixels per side


def load_run_checkpoint(path: str) -> tuple[Config, dict[str, Any], dict[str, Any]]:
    """(settings, arrays, meta) of the last checkpoint in a run's folder, or of the checkpoint
    that is named. CheckpointError if there is none, or it cannot be read."""
    path, arrays, meta = checkpoint.load_last(path)
    if "encoder" in meta and not any(name.startswith("params/") for name in arrays):
        raise CheckpointError(f"{path} holds only an encoder: name the run's folder, or one of its "
                              "checkpoints step-N.npz")
    try:
        return from_dict(meta["config"]), arrays, meta
    except (TypeError, LookupError):
        raise CheckpointError(f"{path} is no checkpoint of a run of this version") from None


def read_captioner(path: str) -> Captioner:
    """From a run's folder (its last checkpoint) or a checkpoint. CheckpointError if it cannot be
    read, or has no caption decoder."""
    settings, arrays, meta = load_run_checkpoint(path)
    if settings.objective != METHOD:
        raise CheckpointError(f"{path} is a run of --objective {settings.objective}: only runs of "
                              f"{METHOD} write captions")
    if not any(name.startswith("params/decoder/") for name in arrays):
        raise CheckpointError(f"{path} has no caption decoder")
    model = model_spec(settings)
    key = jax.random.key(0)
    target = jax.eval_shape(lambda: {"encoder": init(key, model.encoder),
                                     "decoder": decoder.init(key, model.decoder)})
    params = jax.device_put(checkpoint.restore(arrays, target, path, "params"))
    try:
        tok = tokenizer.from_state(meta["vocabulary"])
    except ValueError as problem:
        raise CheckpointError(f"{path}: {problem}") from None
    _, resolution = checkpoint.encoder_config(meta)
    return Captioner(params, model.encoder, model.decoder, tok, settings, resolution)


def load_captioner(path: str, keep_ratio: float = 0.0) -> Callable[..., str]:
    """caption(image, seed=0, sample=0, top_p=0.0) -> text, by a run's last checkpoint.
    keep_ratio 0: the run's; top_p 0: greedy. CheckpointError as in read_captioner."""
    params, encoder_cfg, decoder_cfg, tok, settings, resolution = read_captioner(path)
    keep_ratio = keep_ratio or settings.keep_ratio

    @functools.partial(jax.jit, static_argnames="top_p")
    def generate(params: dict, images: jax.Array, key: jax.Array, top_p: float) -> jax.Array:
        tokens = vit(params["encoder"], images, encoder_cfg)["tokens"]                   # (1,N,D)
        patch_key, token_key = jax.random.split(key)
        kept, _ = keep_random_tokens(patch_key[None], tokens, keep_ratio,
                                     settings.shuffle_kept)                              # (1,K,D)
        return decoder.generate(params["decoder"], kept, decoder_cfg, settings.max_text_len,
                                token_key if top_p else None, top_p)

    def caption(image: ImageLike, seed: int = 0, sample: int = 0, top_p: float = 0.0) -> str:
        key = jax.random.fold_in(jax.random.key(seed), sample)
        pixels = load_pixels(image, resolution)[None]
        return tok.decode(jax.device_get(generate(params, pixels, key, top_p))[0])
    return caption


def fraction(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} must be above 0 and at most 1")
    return value


def count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be 1 or more")
    return value


def seed(text: str) -> int:
    value = int(text)
    if not 0 <= value <= MAX_SEED:
        raise argparse.ArgumentTypeError(f"{text} must be from 0 to {MAX_SEED}")
    return value


def main(argv: list[str]) -> int:
    parser = CommandParser(prog="caption.py",
                           description="Print captions for any image, by a trained run.")
    parser.add_argument("run", help="a run's folder, or one of its checkpoints")
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    parser.add_argument("--top-p", type=fraction, default=0.0,
                        help="sample from the most probable tokens that together have this "
                             "probability (default: greedy)")
    parser.add_argument("--samples", type=count, default=1, help="captions per image (default: 1)")
    parser.add_argument("--seed", type=seed, default=0, help="of all draws (default: 0)")
    parser.add_argument("--keep-ratio", type=fraction, default=0.0,
                        help="fraction of the patch tokens that the decoder reads (default: as in "
                             "the run)")
    return run_command(print_captions, parser.parse_args(argv))


def print_captions(args: argparse.Namespace) -> int:
    caption = load_captioner(args.run, args.keep_ratio)
    status = 0
    for image in args.images:
        try:
            for sample in range(args.samples):
                text = caption(image, args.seed, sample, args.top_p)
                print(f"{printable(image)}: {text}", flush=True)
        except BadSample as problem:  # the other images still get their captions
            print(f"error: {problem}", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    enable_compilation_cache()
    silence_pillow()
    sys.exit(main(sys.argv[1:]))

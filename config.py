"""What a run is: one frozen dataclass, the recipes by name, and the command line made from it.

    python train.py -h               every flag, with what to do about it
    python train.py l14 --dry-run    what the paper's L/14 run would be: sizes, tokens, FLOPs, steps

A recipe is a Config with a name. Its stages are the curriculum, each "resolution=84 images=12.8e9 batch=32768 lr=1e-3 warmup=5e7";
the switch from one to the next is CLIPA's: long at low resolution, then short at high (paper section 2.1; figures of the released recipe).
"""
import argparse
import dataclasses
import json
import math
from typing import Any, NamedTuple

import baselines
import decoder
import vit


class ConfigError(Exception):
    """A setting is impossible; the message names the flag."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One part of the curriculum. It starts from the parameters before it, and a new optimizer state."""
    number: int       # from 1
    resolution: int
    batch: int
    lr: float         # the peak: linear warm-up, then a cosine to 0
    steps: int
    warmup: int       # steps
    start: int        # steps of the run before this stage
    first_image: int  # images of the run before this stage

    @property
    def end(self) -> int:
        return self.start + self.steps


def opt(default: Any, text: str, choices: tuple | None = None) -> Any:
    return dataclasses.field(default=default, metadata={"help": text, "choices": choices})


@dataclasses.dataclass(frozen=True)
class Config:
    encoder: str = opt("micro/8", "encoder, SIZE/PATCH as in Ti/16 or L/14 (python vit.py lists them); out of memory: take a smaller one")
    decoder: str = opt("micro", "caption decoder, by size (python decoder.py lists them)", tuple(decoder.FAMILY))
    objective: str = opt("openvision2", "what is trained: the method, or a system it is compared with (baselines.py), where keep_ratio and prefix play no part",
                         ("openvision2", *baselines.OBJECTIVES))
    keep_ratio: float = opt(0.35, "share of patch tokens that the decoder sees, drawn anew each step; lower is faster")
    shuffle: bool = opt(False, "hand the kept tokens to the decoder in random order, as the "
                               "released code does, and not in their order in the image")
    prefix: str = opt("causal", "whether image tokens in the decoder see only those before them, or all", ("causal", "bidirectional"))
    text_positions: bool = opt(False, "give the caption's words sin-cos positions; as released the causal mask alone orders them")
    cls: bool = opt(False, "give the encoder a CLS token, as the released weights have")
    positions: int = opt(0, "grid side of a learned position table; 0 for the sin-cos formula, which fits any grid")
    init: str = opt("", "start from this encoder: a run's folder, its encoder.npz, or what convert.py imported; the decoder starts anew")
    init_scale: str = opt("xavier", "scale of the initial weights: Xavier's, or the released code's "
                                    "(docs/fidelity.md lists it)", ("xavier", "released"))
    stages: str = opt("", "the curriculum: resolution=R steps=S (or images=I) batch=B lr=L warmup=W, in steps or images as the length is; "
                          "stages part by commas")
    data: str = opt("", "training pictures: scenes, a folder of images with .txt captions, or tars ('shards/*.tar', 'shards/{00000..00011}.tar')")
    val: str = opt("", "held-out pictures, likewise; without it a tenth of --data is held out, --val-count samples at most")
    caption: str = opt("txt", "where captions are: txt for KEY.txt, or the name of a field in KEY.json, such as re_caption; of scenes: txt, web or conditioned")
    alt: str = opt("", "a second text of each picture, which --objective openvision reads: another field of KEY.json; of scenes: web")
    val_count: int = opt(512, "held-out pictures used in an evaluation")
    text_length: int = opt(128, "text positions: start, words and end; longer captions are cut")
    vocab: str = opt("", "a WordPiece vocab.txt, such as BERT's, or any tokenizer.json; without it a vocab.txt is built from the captions")
    vocab_size: int = opt(32000, "rows of the word table, and the most pieces of a vocabulary that is built")
    crop: float = opt(0.4, "least area of the random-resized crop; 1 for none")
    flip: bool = opt(False, "mirror half of the pictures; makes captions that say left or right untrue")
    jitter: float = opt(0.0, "colour jitter: brightness, contrast and saturation change by up to this share, in four images of five")
    hue: float = opt(0.0, "hue changes with the jitter, by up to this share of the colour circle; makes captions that name colours untrue")
    gray: float = opt(0.0, "share of training pictures that lose their colour")
    weight_decay: float = opt(0.2, "AdamW's decay, on matrices alone")
    b2: float = opt(0.95, "AdamW's second-moment decay")
    clip: float = opt(0.0, "largest gradient norm; 0 for no clipping; set 1 if the loss spikes")
    mu_dtype: str = opt("float32", "of AdamW's first moment; bfloat16 saves memory, as released", ("float32", "bfloat16"))
    dtype: str = opt("float32", "of activations and matmuls; bfloat16 on TPU and GPU", ("float32", "bfloat16"))
    remat: str = opt("none", "what the backward pass computes again; out of memory: dots, then block", tuple(vit.REMAT))
    loss_chunk: int = opt(0, "text positions whose logits exist at once; 0 for all; out of memory: lower it")
    unroll: int = opt(1, "layers a scan step; more can be faster on a CPU and compiles longer")
    accum: int = opt(1, "pieces that a batch is cut into, for the same update in less memory")
    seed: int = opt(0, "drives all that is random")
    out: str = opt("", "the run's folder; a run that is found there goes on (default: runs/ and the recipe's name)")
    workers: int = opt(2, "threads that decode pictures")
    log_every: int = opt(20, "steps between lines of metrics.jsonl")
    eval_every: int = opt(200, "steps between evaluations on held-out pictures")
    save_every: int = opt(400, "steps between checkpoints")
    keep_last: int = opt(2, "checkpoints that are kept, the newest")
    milestone_every: int = opt(0, "checkpoints at multiples of this step are kept for good; 0 for none")
    max_bad: float = opt(0.1, "largest share of bad samples among those read, above which a run stops (judged from 1,000 samples on)")
    distributed: bool = opt(False, "meet other processes first: on several hosts, or to rehearse that (a TPU pod needs no such word)")
    shard: bool = opt(False, "cut the optimizer's state over the devices: same update, less memory")
    tensorboard: bool = opt(False, "also write event files for TensorBoard, with the numbers and pictures of metrics.jsonl, curve.png and samples.png")
    profile: bool = opt(False, "trace the steps 10 to 14 of this start, into the folder profile of the run")
    devices: int = opt(0, "local devices to use; 0 for all (a CPU of several cores is two, for small models; any number up to its cores can be asked for)")


def paper(encoder: str, dec: str, low: int) -> Config:
    """The released recipe: 12.8 billion images at low resolution, then 1.02 billion at 224. What saves memory is set so
    that it fits a small pod: remat block computes 20 to 23% of a step's FLOPs again, loss_chunk 16 another 0.2 to 4%. With bytes to
    spare, --remat dots computes 0.5 to 4% again, and keeps nine times as much (python bench.py memory RECIPE tells both)."""
    epoch = 1_281_167  # the recipe counts in ImageNet epochs
    return Config(
        encoder=encoder, decoder=dec, dtype="bfloat16", mu_dtype="bfloat16", remat="block",
        loss_chunk=16, jitter=0.32, hue=0.08, gray=0.2, shuffle=True, init_scale="released",
        workers=32, log_every=50, eval_every=2000, save_every=1000, val_count=2048, caption="re_caption",
        stages=f"resolution={low} images={10_000 * epoch} batch=32768 lr=1.024e-3 warmup={40 * epoch}, "
               f"resolution=224 images={800 * epoch} batch=16384 lr=2.56e-5 warmup={20 * epoch}")


PRESETS = {
    "toy": Config(data="scenes", crop=1.0, text_length=28, vocab_size=192, clip=1.0, weight_decay=0.05,
                  stages="resolution=24 steps=350 batch=64 lr=2e-3 warmup=100, resolution=32 steps=920 batch=64 lr=2e-3 warmup=20"),
    "pictures": Config(crop=0.6, text_length=48, vocab_size=4000, clip=1.0, jitter=0.2, weight_decay=0.1,
                       stages="resolution=32 steps=1100 batch=64 lr=1.5e-3 warmup=100, resolution=48 steps=200 batch=64 lr=1e-3 warmup=20"),
    "ti16": paper("Ti/16", "Ti", 160),
    "s16": paper("S/16", "S", 160),
    "b16": paper("B/16", "B", 160),
    "l14": paper("L/14", "L", 84),
    "so400m14": paper("So400m/14", "So400m", 84),
    "h14": paper("H/14", "H", 84),
    "g14": paper("g/14", "H", 84),
}


def stages(cfg: Config) -> tuple[Stage, ...]:
    """The curriculum that --stages says. ConfigError tells what cannot be read."""
    found = []
    for text in cfg.stages.split(","):
        given = {}
        for word in text.split():
            name, _, value = word.partition("=")
            if name not in ("resolution", "steps", "images", "batch", "lr", "warmup") or name in given:
                raise ConfigError(f"--stages: {word!r} is not one of resolution=, steps=, images=, batch=, lr=, warmup=, each once a stage")
            try:
                number = float(value)
                given[name] = number if name == "lr" else int(number)
                if not math.isfinite(number) or number < 0 or given[name] != number:
                    raise ValueError
            except (ValueError, OverflowError):
                raise ConfigError(f"--stages: {word!r} wants a {'number' if name == 'lr' else 'whole number'} that is not negative") from None
            if number == 0 and name != "warmup":
                raise ConfigError(f"--stages: {word!r} must be above 0")
        if missing := [n for n in ("resolution", "batch", "lr") if not given.get(n)] or (
                [] if bool(given.get("steps")) != bool(given.get("images")) else ["steps or images (one of the two)"]):
            raise ConfigError(f"--stages: {text.strip()!r} lacks {', '.join(missing)}")
        a_step = given["batch"] if given.get("images") else 1
        # As in the released code, images that do not fill a batch are left out.
        length = max(1, (given.get("images") or given["steps"]) // a_step)
        warmup = given.get("warmup", 0) // a_step
        start, first = (found[-1].end, found[-1].first_image + found[-1].steps * found[-1].batch) if found else (0, 0)
        found.append(Stage(len(found) + 1, given["resolution"], given["batch"], given["lr"],
                           length, warmup, start, first))
        if found[-1].warmup >= length:
            raise ConfigError(f"--stages: the warm-up of {text.strip()!r} is as long as the stage")
    return tuple(found)


def models(cfg: Config, vocab: int) -> tuple[vit.ViTConfig, decoder.DecoderConfig]:
    """Encoder and decoder as the run has them, the word table with `vocab` rows."""
    how = {"dtype": cfg.dtype, "remat": cfg.remat, "unroll": cfg.unroll}
    enc = vit.config(cfg.encoder, cls=cfg.cls, positions=cfg.positions, **how)
    return enc, decoder.config(cfg.decoder, vocab, enc.width, prefix=cfg.prefix, positions=cfg.text_positions, loss_chunk=cfg.loss_chunk, **how)


class Model(NamedTuple):
    """What a step needs to know of the networks."""
    encoder: vit.ViTConfig
    decoder: decoder.DecoderConfig
    keep_ratio: float
    objective: str = "openvision2"
    shuffle: bool = False
    length: int = 0  # text positions, of which a baseline's text encoder and CapPa's decoder have a table


def model(cfg: Config) -> Model:
    return Model(*models(cfg, cfg.vocab_size), cfg.keep_ratio, cfg.objective, cfg.shuffle, cfg.text_length)


def parameters(cfg: Config) -> dict[str, int]:
    """How many the encoder has, the decoder, and what else the objective trains."""
    run = model(cfg)
    return {name: vit.count(part) for name, part in ({"encoder": vit.weights(run.encoder)} | baselines.weights(run)).items()}


def check(cfg: Config, devices: int = 1) -> None:
    """ConfigError for what cannot work, before anything is read or compiled. devices: all that share a batch."""
    try:
        enc, _ = models(cfg, cfg.vocab_size)
    except ValueError as problem:
        raise ConfigError(f"--encoder, --decoder: {problem}") from None
    bounds = {"keep_ratio": (1e-9, 1), "crop": (1e-9, 1), "jitter": (0, 1), "hue": (0, 0.5), "gray": (0, 1), "weight_decay": (0, 1e9), "b2": (0, 0.999999),
              "clip": (0, 1e9), "text_length": (3, 1 << 20), "vocab_size": (8, 1 << 30), "val_count": (2, 1 << 30), "accum": (1, 1 << 20),
              "workers": (1, 1024), "log_every": (1, 1 << 40), "eval_every": (1, 1 << 40), "save_every": (1, 1 << 40), "loss_chunk": (0, 1 << 20),
              "unroll": (1, 1024), "keep_last": (1, 1 << 20),
              "milestone_every": (0, 1 << 40), "max_bad": (0, 1), "positions": (0, 1 << 12), "seed": (0, (1 << 31) - 1), "devices": (0, 1 << 20)}
    for name, (low, high) in bounds.items():
        if not low <= getattr(cfg, name) <= high:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(cfg, name)} is out of range: {'above 0' if low == 1e-9 else f'at least {low}'}"
                              f", at most {high}")
    if cfg.objective in ("clip", "openvision") and cfg.accum > 1:
        raise ConfigError(f"--objective {cfg.objective} contrasts all pictures of a batch with one another, which --accum {cfg.accum} would part: "
                          "leave it at 1")
    if cfg.objective == "openvision" and not cfg.alt:
        raise ConfigError("--objective openvision reads a web caption beside the dense one: name its field with --alt")
    if cfg.alt and cfg.objective != "openvision":
        raise ConfigError(f"--alt {cfg.alt} is read by --objective openvision alone: leave it out, or take that")
    for stage in stages(cfg):
        if cfg.objective == "aimv2" and stage.resolution < 2 * enc.patch:
            raise ConfigError(f"--objective aimv2 predicts a patch from those before it: stage {stage.number} needs a resolution of {2 * enc.patch} or more")
        if stage.resolution < enc.patch:
            raise ConfigError(f"--stages: resolution {stage.resolution} of stage {stage.number} is below the patch size {enc.patch} of {cfg.encoder}: "
                              f"take {enc.patch} or more")
        if stage.batch % (devices * cfg.accum):
            raise ConfigError(f"--stages: batch {stage.batch} of stage {stage.number} cannot be shared by {devices} devices x {cfg.accum} pieces "
                              f"(--accum): make it a multiple of {devices * cfg.accum}")


def add_flags(parser: argparse.ArgumentParser, *names: str, recipe: Config = Config()) -> None:
    """A flag for each field of Config, or for those named, whose help says what the recipe has. What is not given is not set."""
    for f in dataclasses.fields(Config):
        if not names or f.name in names:
            value = getattr(recipe, f.name)
            shown = f.metadata["help"] + ("" if f.name == "out" else f" (default: {'none' if value == '' else value})")
            kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type, "choices": f.metadata["choices"]}
            parser.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, help=shown.replace("%", "%%"), **kind)


def parse(argv: list[str]) -> tuple[Config, bool]:
    """(config, whether --dry-run) from a command line: a recipe's name, then flags, one a field of Config. Unknown
    names and bad values end the program with a usage line."""
    parser = argparse.ArgumentParser(prog="train.py", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     description="Train a vision encoder from captions alone. Without arguments: the toy, in minutes on a CPU.")
    parser.add_argument("recipe", nargs="?", default="toy", metavar="{" + ",".join(PRESETS) + "}", help="the settings that flags change (default: toy)")
    add_flags(parser, recipe=PRESETS[next((word for word in argv if word in PRESETS), "toy")])
    parser.add_argument("--dry-run", action="store_true", help="print what the run would be, and end")
    found, unknown = parser.parse_known_args(argv)
    given = vars(found)
    if unknown:  # before the recipe, for which argparse takes what stands behind an unknown flag
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if found.recipe not in PRESETS:
        parser.error(f"argument recipe: invalid choice: {found.recipe!r} (choose from {', '.join(PRESETS)})")
    recipe, dry = given.pop("recipe"), given.pop("dry_run")
    cfg = dataclasses.replace(PRESETS[recipe], **given)
    return dataclasses.replace(cfg, out=cfg.out or f"runs/{recipe}"), dry


def describe(cfg: Config) -> str:
    """What a run is and costs: the resolved config, parameters, and for each stage tokens, FLOPs and steps."""
    run = model(cfg)
    # OpenAI's CLIP papers count a ViT's learned position table and output projection too: with those, 304 M for L/14.
    lines = [json.dumps(dataclasses.asdict(cfg), indent=1),
             "parameters   " + ", ".join(f"{name} {size / 1e6:.1f} M" for name, size in parameters(cfg).items())]
    T, total, seen, work = cfg.text_length - 1, 0, 0, 0.0
    for s in stages(cfg):
        N = (s.resolution // run.encoder.patch) ** 2
        K = baselines.kept(run, N)
        rest = f" (the last {s.resolution % run.encoder.patch} px at the right and bottom fill none)" if s.resolution % run.encoder.patch else ""
        parts = baselines.flops(run, s.resolution, cfg.text_length)
        each = sum(parts.values())
        total, seen, work = total + s.steps, seen + s.steps * s.batch, work + 3 * each * s.steps * s.batch
        lines.append(f"stage {s.number}      {s.resolution} px: {N} patch tokens{rest}, {K} kept, {T} text positions; "
                     f"{each / 1e9:.2f} GFLOPs an image forward "
                     f"({', '.join(f'{name} {part / 1e9:.2f}' for name, part in parts.items())}); {s.steps:,} steps of {s.batch:,} at peak lr {s.lr:g}, "
                     f"warm-up {s.warmup:,} steps")
    return "\n".join([*lines, f"in all       {total:,} steps, {seen:,} images, {work:.3g} FLOPs forward and backward"])

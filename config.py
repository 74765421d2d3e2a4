"""Settings: one frozen dataclass, the recipes by name, and the command line made from it.

    python train.py -h               every flag, with its default
    python train.py l14 --dry-run    what the paper's L/14 run would be: sizes, tokens, FLOPs, steps

A recipe is a Config with a name. Its stages are the curriculum, each written as "resolution=84
images=12.8e9 batch=32768 lr=1e-3 warmup=5e7". The curriculum is CLIPA's: a long stage at low
resolution, then a short one at high resolution (paper section 2.1)."""
import argparse
import dataclasses
import functools
from typing import Any

import decoder
import vit
from objectives import registry
from runtime.curriculum import parse_stages
from runtime.errors import CommandParser, ConfigError


def arg(group: str, default: Any, text: str, choices: tuple = (), low: float | None = None,
        high: float | None = None, above: float | None = None, resumable: bool = False) -> Any:
    """A field that is a flag. low and high are its bounds; `above` is a bound that it must exceed.
    A resumable field may differ when a run is continued."""
    return dataclasses.field(default=default, metadata={
        "group": group, "help": text, "choices": choices, "low": low, "high": high, "above": above,
        "resumable": resumable})


MAX_SEED = (1 << 31) - 1
DECODERS, REMAT = tuple(decoder.DECODER_SIZES), tuple(vit.REMAT)
DTYPES = ("float32", "bfloat16")
model_arg = functools.partial(arg, "model")
data_arg = functools.partial(arg, "data")
optim_arg = functools.partial(arg, "optimization")
system_arg = functools.partial(arg, "system")
resumable_arg = functools.partial(arg, "system", resumable=True)


@dataclasses.dataclass(frozen=True)
class Config:
    encoder: str = model_arg("micro/8", "encoder, SIZE/PATCH as in Ti/16 or L/14 (python vit.py "
                             "lists them); out of memory: take a smaller one")
    decoder: str = model_arg("micro", "caption decoder (python decoder.py lists them)", DECODERS)
    objective: str = model_arg(registry.METHOD, "what is trained: the method, or a system it is "
                               "compared with (objectives/)", registry.OBJECTIVES)
    keep_ratio: float = model_arg(0.35, "share of patch tokens that the decoder reads, drawn anew "
                                  "in each step; lower is faster", above=0, high=1)
    shuffle_kept: bool = model_arg(False, "give the kept tokens to the decoder in random order, as "
                                   "released, not in their order in the image")
    prefix_attention: str = model_arg("causal", "image tokens in the decoder attend to earlier "
                                      "ones only, or to all", ("causal", "bidirectional"))
    text_pos_embed: bool = model_arg(False, "give caption tokens sin-cos positions; as released "
                                     "only the causal mask orders them")
    cls_token: bool = model_arg(False, "give the encoder a CLS token, as the released weights have")
    image_pool: str = model_arg("attention", "how --objective lit makes one vector of the patch "
                                "tokens: eight learned queries, SigLIP's head, the mean, or all of "
                                "them side by side (grid)", ("attention", "map", "mean", "grid"))
    feature_copies: int = model_arg(0, "augmented copies of each image whose features --objective "
                                    "lit computes once; 0: encode in each step, or once if nothing "
                                    "is augmented", low=0, high=1 << 20)
    gated_attention: bool = model_arg(False, "gate the attention outputs in the encoder's blocks, "
                                      "as GenLIP does")
    learned_pos_grid: int = model_arg(0, "grid side of a learned position table; 0 for the sin-cos "
                                      "formula, which fits any grid", low=0, high=1 << 12)
    init_encoder: str = model_arg("", "start from this encoder: a run's folder, an encoder.npz, "
                                  "an address; with --objective lit also random or pixels")
    init_scale: str = model_arg("xavier", "scale of the initial weights: Xavier's, or the released "
                                "code's (docs/fidelity.md)", ("xavier", "released"))

    data: str = data_arg("", "training images: scenes, a folder of images with .txt captions, "
                         "tars ('shards/*.tar', 'shards/{00000..00011}.tar') or 'x/*.parquet'")
    val: str = data_arg("", "validation images; without it a tenth of --data or less")
    caption_field: str = data_arg("txt", "txt for KEY.txt, or a field of KEY.json or parquet, such "
                                  "as re_caption; for scenes: txt, web or conditioned; a:1,b:3 "
                                  "draws a or b each time, with weights 1 and 3")
    image_field: str = data_arg("image", "the column of parquet files that holds the images")
    alt_field: str = data_arg("", "another field, for the second text of --objective openvision; "
                              "for scenes: web")
    val_samples: int = data_arg(512, "validation images in an evaluation", low=2, high=1 << 30)
    max_text_len: int = data_arg(128, "text positions, bos and eos included; longer captions are "
                                 "cut", low=3, high=1 << 20)
    vocab: str = data_arg("", "a WordPiece vocab.txt, such as BERT's, or any tokenizer.json; "
                          "without it a vocab.txt is built from the captions")
    vocab_size: int = data_arg(32000, "rows of the token embedding, and the most tokens of a "
                               "vocabulary that is built", low=8, high=1 << 30)
    min_crop_area: float = data_arg(0.4, "least area of the random-resized crop, as a share of the "
                                    "image; 1 for no crop", above=0, high=1)
    hflip: bool = data_arg(False, "mirror half of the images; captions that say left become false")
    jitter: float = data_arg(0.0, "color jitter: brightness, contrast and saturation change by up "
                             "to this share, in four images of five", low=0, high=1)
    hue: float = data_arg(0.0, "hue changes with the jitter, by up to this share of the color "
                          "circle; captions that name colors become untrue", low=0, high=0.5)
    grayscale_prob: float = data_arg(0.0, "share of images that lose their color", low=0, high=1)

    stages: str = optim_arg("", "the curriculum: resolution=R steps=S (or images=I) batch=B lr=L "
                            "warmup=W, with a comma between stages; warmup has the unit of the "
                            "length")
    weight_decay: float = optim_arg(0.2, "AdamW's decay, on matrices only", low=0, high=1e9)
    adam_b2: float = optim_arg(0.95, "AdamW's second-moment decay", low=0, high=0.999999)
    grad_clip: float = optim_arg(0.0, "largest gradient norm; 0 for no clipping; set 1 if the loss "
                                 "spikes", low=0, high=1e9)
    grad_accum: int = optim_arg(1, "microbatches that a batch is divided into, for the same "
                                "update in less memory", low=1, high=1 << 20, resumable=True)
    seed: int = optim_arg(0, "drives what is random in training", low=0, high=MAX_SEED)

    dtype: str = system_arg("float32", "dtype of activations and matmuls; bfloat16 on TPU and "
                            "GPU", DTYPES)
    mu_dtype: str = system_arg("float32", "dtype of AdamW's first moment; bfloat16 saves memory, "
                               "as released", DTYPES)
    remat: str = resumable_arg("none", "activation checkpointing: what the backward pass computes "
                               "again; out of memory: dots, then block", REMAT)
    loss_chunk: int = resumable_arg(0, "text positions whose logits exist at once; 0 for all; out "
                                    "of memory: try 16", low=0, high=1 << 20)
    scan_unroll: int = resumable_arg(1, "layers per scan step; more can be faster on a CPU and "
                                     "compiles longer; 1 with --remat", low=1, high=1024)
    zero1: bool = resumable_arg(False, "shard the optimizer state over the devices: same update, "
                                "less memory")
    num_devices: int = resumable_arg(0, "local devices to use (of a CPU, up to its cores); 0 for "
                                     "all (for small models, a CPU is split into two)", low=0,
                                     high=1 << 20)
    distributed: bool = resumable_arg(False, "start as one of several processes, on several hosts "
                                      "or on one (a TPU pod needs no such flag)")
    workdir: str = resumable_arg("", "the run's folder; a run that is there is continued (default: "
                                 "runs/ and the recipe's name)")
    cache_dir: str = resumable_arg("", "local folder for what is unpacked or downloaded (default: "
                                   "~/.cache/openvision2)")
    cache_gb: float = resumable_arg(20.0, "most GB in --cache-dir", above=0, high=1e6)
    workers: int = resumable_arg(2, "threads that decode images", low=1, high=1024)
    worker_processes: int = resumable_arg(0, "processes that decode the training images, for hosts "
                                          "with many cores; 0: the threads do", low=0, high=1024)
    log_every: int = resumable_arg(20, "steps between lines of metrics.jsonl", low=1, high=1 << 40)
    eval_every: int = resumable_arg(200, "steps between evaluations", low=1, high=1 << 40)
    save_every: int = resumable_arg(400, "steps between checkpoints", low=1, high=1 << 40)
    keep_checkpoints: int = resumable_arg(2, "newest checkpoints to keep", low=1, high=1 << 20)
    keep_every: int = resumable_arg(0, "checkpoints at multiples of this step are never deleted; 0 "
                                    "for none", low=0, high=1 << 40)
    max_bad_fraction: float = resumable_arg(0.1, "largest share of bad samples among those read, "
                                            "above which a run stops (from 1,000 samples on)",
                                            low=0, high=1)
    tensorboard: bool = resumable_arg(False, "also write TensorBoard event files")
    profile: bool = resumable_arg(False, "trace steps 10 to 14 after this start, into profile in "
                                  "the run's folder")


FIELDS = {f.name: f for f in dataclasses.fields(Config)}
RESUMABLE = {name for name, f in FIELDS.items() if f.metadata["resumable"]}
OLD_NAMES = {  # settings of earlier versions, in checkpoints and on command lines
    "shuffle": "shuffle_kept", "prefix": "prefix_attention", "text_positions": "text_pos_embed",
    "cls": "cls_token", "positions": "learned_pos_grid", "init": "init_encoder",
    "caption": "caption_field", "alt": "alt_field", "val_count": "val_samples",
    "text_length": "max_text_len", "crop": "min_crop_area", "flip": "hflip",
    "gray": "grayscale_prob", "clip": "grad_clip", "accum": "grad_accum", "b2": "adam_b2",
    "unroll": "scan_unroll", "shard": "zero1", "devices": "num_devices",
    "max_bad": "max_bad_fraction", "keep_last": "keep_checkpoints",
    "milestone_every": "keep_every", "out": "workdir"}


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def from_dict(settings: dict[str, Any]) -> Config:
    """The Config that a checkpoint or config.json holds. TypeError for unknown settings. A setting
    that is newer than the file has its default, which is how the run was made."""
    return Config(**{OLD_NAMES.get(name, name): value for name, value in settings.items()})


# ------------------------------------------------------------------------------------ recipes
def paper_recipe(encoder: str, decoder_size: str, low_resolution: int) -> Config:
    """The released recipe: 12.8 billion images at low resolution, then 1.02 billion at 224 px.

    remat and loss_chunk are set to fit the memory of a small pod. remat block recomputes 15 to 22%
    of a step's FLOPs, loss_chunk 16 another 0.4 to 11%. With memory to spare, --remat dots
    recomputes 0.5 to 4% and saves nine times as many activations (python bench.py memory RECIPE
    prints both)."""
    epoch = 1_281_167  # the recipe counts in ImageNet epochs
    return Config(
        encoder=encoder, decoder=decoder_size, dtype="bfloat16", mu_dtype="bfloat16",
        remat="block", loss_chunk=16, shuffle_kept=True, init_scale="released", jitter=0.32,
        hue=0.08, grayscale_prob=0.2, workers=32, log_every=50, eval_every=2000, save_every=1000,
        val_samples=2048, caption_field="re_caption",
        stages=f"resolution={low_resolution} images={10_000 * epoch} batch=32768 lr=1.024e-3 "
               f"warmup={40 * epoch}, "
               f"resolution=224 images={800 * epoch} batch=16384 lr=2.56e-5 warmup={20 * epoch}")


SMALL_IMAGES = Config(
    min_crop_area=0.6, max_text_len=48, vocab_size=4000, grad_clip=1.0, jitter=0.2,
    weight_decay=0.1, scan_unroll=4,
    stages="resolution=32 steps=1100 batch=64 lr=1.5e-3 warmup=100, "
           "resolution=48 steps=200 batch=64 lr=1e-3 warmup=20")
RECIPES = {
    "toy": Config(
        encoder="micro/4", data="scenes", min_crop_area=1.0, max_text_len=28, vocab_size=192,
        grad_clip=1.0, weight_decay=0.05, scan_unroll=4, text_pos_embed=True,
        stages="resolution=24 steps=300 batch=32 lr=1.6e-3 warmup=100, "
               "resolution=32 steps=1800 batch=32 lr=1.7e-3 warmup=20"),
    "images": SMALL_IMAGES,
    "emoji": dataclasses.replace(SMALL_IMAGES, data="emoji/google/*.tar",
                                 val="emoji/twitter/*.tar", caption_field="re_caption"),
    "ti16": paper_recipe("Ti/16", "Ti", 160),
    "s16": paper_recipe("S/16", "S", 160),
    "b16": paper_recipe("B/16", "B", 160),
    "l14": paper_recipe("L/14", "L", 84),
    "so400m14": paper_recipe("So400m/14", "So400m", 84),
    "h14": paper_recipe("H/14", "H", 84),
    "g14": paper_recipe("g/14", "H", 84),
}


# ----------------------------------------------------------------------------------- checking
def validate(cfg: Config, num_devices: int = 1) -> None:
    """ConfigError for what cannot work, before anything is read or compiled. num_devices: how many
    devices share a batch."""
    try:
        model = registry.model_spec(cfg)
    except ValueError as problem:
        raise ConfigError(f"--encoder, --decoder: {problem}") from None
    for name, field in FIELDS.items():
        check_bounds(name, getattr(cfg, name), field.metadata)
    registry.check_settings(cfg)
    patch = model.encoder.patch_size
    for stage in parse_stages(cfg.stages):
        if stage.resolution < patch:
            raise ConfigError(f"--stages: resolution {stage.resolution} of stage {stage.number} is "
                              f"below the patch size {patch} of {cfg.encoder}: take {patch} or "
                              "more")
        multiple = num_devices * cfg.grad_accum
        if stage.batch % multiple:
            raise ConfigError(f"--stages: batch {stage.batch} of stage {stage.number} cannot be "
                              f"shared by {num_devices} devices x {cfg.grad_accum} microbatches "
                              f"(--grad-accum): make it a multiple of {multiple}")


def check_bounds(name: str, value: Any, bounds: Any) -> None:
    low, high, above = bounds["low"], bounds["high"], bounds["above"]
    too_low = (low is not None and value < low) or (above is not None and value <= above)
    if too_low or (high is not None and value > high) or value != value:  # the last: NaN
        least = f"above {above}" if low is None else f"at least {low}"
        raise ConfigError(f"{flag(name)} {value} is out of range: {least}, at most {high}")


# ------------------------------------------------------------------------------- command line
def add_flags(parser: CommandParser, *names: str, recipe: Config = Config()) -> None:
    """A flag for each field of Config, or for those named. Its help shows the recipe's value. A
    flag that is not given sets nothing."""
    groups: dict[str, Any] = {}
    for name in names or FIELDS:
        field, value = FIELDS[name], getattr(recipe, name)
        group = field.metadata["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        text = field.metadata["help"].replace("%", "%%")
        if name not in ("workdir", "cache_dir"):
            text += f" (default: {'none' if value == '' else value})"
        kind: dict[str, Any] = {"type": field.type, "choices": field.metadata["choices"] or None}
        if field.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        groups[group].add_argument(flag(name), default=argparse.SUPPRESS, help=text, **kind)


def refuse_old_flags(parser: CommandParser, argv: list[str],
                     old_names: dict[str, str] = OLD_NAMES) -> None:
    """Ends the program, with the new name, for a flag that an earlier version had."""
    for word in argv:
        name = word.partition("=")[0].removeprefix("--").replace("-", "_")
        negated = name.startswith("no_")
        new = old_names.get(name.removeprefix("no_"))
        if word.startswith("--") and new:
            parser.error(f"{word.partition('=')[0]} is now {flag('no_' + new if negated else new)}")


OLD_RECIPES = {"pictures": "images"}


def parse_args(argv: list[str]) -> tuple[Config, bool]:
    """(config, whether --dry-run) from a command line: a recipe's name, then flags, one per field
    of Config. Unknown names and bad values end the program with one sentence."""
    parser = CommandParser(
        prog="train.py", description="Train a vision encoder from captions alone. Without "
                                     "arguments: the toy, in minutes on a CPU.")
    parser.add_argument("recipe", nargs="?", default="toy", metavar="{" + ",".join(RECIPES) + "}",
                        help="the settings to start from; flags change them (default: toy)")
    # Found before parsing, because -h shows the recipe's values as defaults.
    named = [word for word in argv if word in RECIPES] or ["toy"]
    add_flags(parser, recipe=RECIPES[named[0]])
    parser.add_argument("--dry-run", action="store_true",
                        help="print what the run would be, without reading data, and end")
    refuse_old_flags(parser, argv)
    changes = vars(parser.parse_args(argv))
    recipe, dry_run = changes.pop("recipe"), changes.pop("dry_run")
    if recipe in OLD_RECIPES:
        parser.error(f"the recipe {recipe} is now {OLD_RECIPES[recipe]}")
    if recipe not in RECIPES:
        parser.error(f"argument recipe: invalid choice: {recipe!r} "
                     f"(choose from {', '.join(RECIPES)})")
    cfg = dataclasses.replace(RECIPES[recipe], **changes)
    return dataclasses.replace(cfg, workdir=cfg.workdir or f"runs/{recipe}"), dry_run

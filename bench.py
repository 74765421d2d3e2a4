"""Benchmarks: time, FLOPs and memory of training, speed of the data pipeline, and ablations.

    python bench.py step --encoder Ti/16 --resolution 160 --batch 32
                                      time of a training step, and its share of the matmul rate
    python bench.py parts --encoder Ti/16 --resolution 160 --batch 32
                                      where its time goes: milliseconds per part of the step
    python bench.py clipa --encoder L/14          what the mask and the curriculum save (Table 5)
    python bench.py flops                         FLOPs per image, by formula (Table 3)
    python bench.py memory l14 --resolution 224 --batch 2048
                                                  GiB per TPU chip, without a TPU (Table 4)
    python bench.py data                          images per second that one core decodes
    python bench.py ablate                        the paper's ablations on the toy (Tables 5 to 7)
    python bench.py gpu-report --json FILE        all measurements of a GPU, by one command

The first five take the name of a recipe (python train.py -h) and flags that change it. Each command
prints a table; --json FILE also stores it.
"""
import argparse
import dataclasses
import shlex
import sys
from collections.abc import Callable

import config
import decoder
from benchmarks import ablations, gpu_report, loader, part_times, step_time, tpu_memory
from config import RECIPES, Config
from objectives import registry
from runtime import checkpoint
from runtime.curriculum import parse_stages
from runtime.errors import CommandParser, ConfigError, check_output_file, run_command
from runtime.tables import format_table

MODEL_FLAGS = ("encoder", "decoder", "objective", "keep_ratio", "prefix_attention", "cls_token",
               "gated_attention", "max_text_len", "vocab_size", "mu_dtype", "dtype", "remat",
               "loss_chunk", "scan_unroll", "grad_accum", "zero1", "seed")
DECODER_OF = {"g": "H"}  # as in the recipes; other encoders have the decoder of their name
OLD_FLAGS = {"peer": "compare", "largest": "find_max_batch", "pictures": "images"}
OLD_FLAGS |= {old: new for old, new in config.OLD_NAMES.items() if new in MODEL_FLAGS}
PAPER_GFLOPS = {("l14", 224): 208.9, ("so400m14", 384): 1017.7}  # Table 3


# --------------------------------------------------------------------------------- settings
def bench_config(args: argparse.Namespace) -> Config:
    """The recipe, changed by the flags. An --encoder without a recipe has default settings."""
    flags = {name: value for name, value in vars(args).items() if name in MODEL_FLAGS}
    if flags.get("objective") == "openvision":
        flags["alt_field"] = "web"  # any name does: the captions are random
    if flags.get("objective") == "lit":
        flags["init_encoder"] = "random"
    if args.recipe or "encoder" not in flags:
        return dataclasses.replace(RECIPES[args.recipe or "toy"], **flags)
    size = flags["encoder"].partition("/")[0]
    if size not in decoder.DECODER_SIZES:
        size = DECODER_OF.get(size, "L")
    defaults = {"decoder": size, "stages": "resolution=224 steps=1 batch=8 lr=1e-3"}
    return Config(**(defaults | flags))


def settings(args: argparse.Namespace, stage_index: int = 0,
             num_devices: int = 1) -> tuple[Config, int, int]:
    """(config, resolution, batch), the last two from the recipe's stage where no flag sets them.
    ConfigError for impossible settings."""
    cfg = bench_config(args)
    stage = parse_stages(cfg.stages)[stage_index]
    resolution, batch = args.resolution or stage.resolution, args.batch or stage.batch
    stages = f"resolution={resolution} steps=1000000 batch={batch} lr={stage.lr} warmup=1"
    cfg = dataclasses.replace(cfg, stages=stages)
    try:
        config.validate(cfg, num_devices)
    except ConfigError as problem:
        message = str(problem).replace("--stages: resolution", "--resolution")
        raise ConfigError(message.replace("--stages: batch", "--batch")) from None
    return cfg, resolution, batch


# --------------------------------------------------------------------------------- commands
def step(args: argparse.Namespace) -> list[dict]:
    return step_time.rows(*settings(args), args.compare, args.repeats)


def parts(args: argparse.Namespace) -> list[dict]:
    cfg, resolution, batch = settings(args)
    part_times.check_settings(cfg)
    steps, _ = step_time.make_steps(cfg, resolution, batch, args.compare)
    return part_times.rows(cfg, resolution, batch, steps, args.repeats)


def clipa(args: argparse.Namespace) -> list[dict]:
    """The recipe's two stages. The batch at low resolution has as many pixels as at high, so that
    the optimizer's update costs the same share of both."""
    if not args.recipe:
        vars(args).setdefault("encoder", "L/14")
    low, high = parse_stages(RECIPES[args.recipe or "l14"].stages)
    high_resolution, high_batch = args.resolution or high.resolution, args.batch or 2
    low_batch = high_batch * round((high_resolution / low.resolution) ** 2)
    args.resolution, args.batch = low.resolution, low_batch
    low_cell = (*settings(args), low.steps * low.batch)
    args.resolution, args.batch = high_resolution, high_batch
    high_cell = (*settings(args), high.steps * high.batch)
    return step_time.table5(low_cell, high_cell, args.repeats)


def flops(args: argparse.Namespace) -> list[dict]:
    """Forward GFLOPs per image, 2 per multiply-add, matmuls only. Without arguments: all recipes,
    and the figures of the paper's Table 3."""
    if not args.recipe and not args.resolution and not set(MODEL_FLAGS) & set(vars(args)):
        table = []
        for cfg in RECIPES.values():
            table += [flops_row(cfg, stage.resolution) for stage in parse_stages(cfg.stages)]
        for (name, resolution), paper in PAPER_GFLOPS.items():
            table.append(flops_row(RECIPES[name], resolution) | {"paper GFLOPs": paper})
        return table
    num_stages = 2 if args.recipe and not args.resolution else 1
    return [flops_row(*settings(args, index)[:2]) for index in range(num_stages)]


def flops_row(cfg: Config, resolution: int) -> dict:
    model = registry.model_spec(cfg)
    num_patches = (resolution // model.encoder.patch_size) ** 2
    parts = registry.flops(model, resolution, cfg.max_text_len)
    row = {"encoder": cfg.encoder, "decoder": cfg.decoder, "px": resolution,
           "patches": num_patches, "kept": registry.num_decoder_tokens(model, num_patches),
           "text": cfg.max_text_len}
    row |= {f"{name} GFLOPs": part / 1e9 for name, part in parts.items()}
    return row | {"total GFLOPs": sum(parts.values()) / 1e9, "paper GFLOPs": None}


def memory(args: argparse.Namespace) -> list[dict]:
    num_chips = tpu_memory.num_chips(args.topology)
    cfg, resolution, batch = settings(args, num_devices=num_chips)
    return tpu_memory.rows(cfg, resolution, batch, args.topology, args.find_max_batch)


def data(args: argparse.Namespace) -> list[dict]:
    sizes = args.resolution, args.images, args.batch, args.repeats
    if args.worker_processes:
        return loader.worker_rows(*sizes, args.worker_processes)
    return loader.rows(*sizes, args.alone)


def ablate(args: argparse.Namespace) -> list[dict]:
    return ablations.rows(args.tables, args.seeds, args.folder, args.show,
                          step_time.measure_costs)


def gpu_report_rows(args: argparse.Namespace) -> list[dict]:
    return gpu_report.rows(args.cells, args.dtype, args.compare, args.repeats, args.toy_flags)


# ----------------------------------------------------------------------------- command line
def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def topology(text: str) -> str:
    try:
        tpu_memory.num_chips(text)
    except ValueError as problem:
        raise argparse.ArgumentTypeError(str(problem)) from None
    return text


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line. Ends the program with one sentence if it cannot be parsed."""
    parser = CommandParser(prog="bench.py", description=__doc__.split("\n\n")[0],
                           epilog="Each command has its own -h.")
    names = "{step,parts,clipa,flops,memory,data,ablate,gpu-report}"
    commands = parser.add_subparsers(dest="command", required=True, metavar=names)

    def command(function: Callable, text: str, name: str = "") -> CommandParser:
        sub = commands.add_parser(name or function.__name__, help=text,
                                  description=f"{text[0].upper()}{text[1:]}.")
        sub.set_defaults(function=function)
        sub.add_argument("--json", metavar="FILE", help="also write the table to this file, with "
                         "the machine and the arguments (null: not known)")
        return sub

    def add_model_flags(sub: CommandParser, default: Config, default_text: str,
                        batch_text: str = "images per step (default: the recipe's); lower it if "
                        "memory runs out") -> None:
        """default: the settings where the command line names no recipe, for the help."""
        if "--encoder" in argv:
            default = Config()
        for word in argv:
            default = RECIPES.get(word, default)
        sub.add_argument("recipe", nargs="?", choices=tuple(RECIPES),
                         help=f"the settings that flags change (default: {default_text})")
        config.add_flags(sub, *MODEL_FLAGS, recipe=default)
        sub.add_argument("--resolution", type=positive,
                         help="pixels per side (default: the recipe's)")
        sub.add_argument("--batch", type=positive, help=batch_text)

    toy, toy_text = RECIPES["toy"], "toy; with --encoder the defaults of the flags"
    sub = command(step, "time, FLOP/s and memory of a training step, on one accelerator or the CPU "
                        "(with --zero1 on all devices of this machine)")
    add_model_flags(sub, toy, toy_text)
    sub.add_argument("--compare", choices=("torch", "torch-compile"),
                     help="also time the same model, weights and batch in PyTorch, step by step "
                          "in turn with JAX")
    sub.add_argument("--repeats", type=positive, default=7,
                     help="timed steps, of which the table has the median (default: 7)")
    sub = command(parts, "time of each part of a training step, against its FLOPs at the matmul "
                         "rate and its bytes at the memory bandwidth")
    add_model_flags(sub, toy, toy_text)
    sub.add_argument("--compare", choices=("torch",),
                     help="also time the same parts in PyTorch, in turn with JAX")
    sub.add_argument("--repeats", type=positive, default=15,
                     help="timed calls of each part, of which the table has the median (default: "
                          "15)")
    sub = command(clipa, "speedup by the mask and the curriculum, from measured steps")
    add_model_flags(sub, Config(encoder="L/14", decoder="L"), "L/14 with the defaults of the flags",
                    "images per step at the high resolution; at the low one as many pixels "
                    "(default: 2)")
    sub.add_argument("--repeats", type=positive, default=2,
                     help="timed steps of each of the four kinds (default: 2)")
    sub = command(flops, "forward FLOPs per image, by formula")
    add_model_flags(sub, toy, f"every recipe; with flags {toy_text}")
    sub = command(memory, "bytes per chip of a training step on a TPU pod, as planned by the TPU "
                          "compiler, without a TPU")
    add_model_flags(sub, toy, toy_text)
    sub.add_argument("--topology", type=topology, default="v4:4x4x2",
                     help="of the chips: v4:4x4x2 is a v4-64 (the default); others are v5e:4x8, "
                          "v5p:2x2x2, v6e:4x4")
    sub.add_argument("--find-max-batch", action="store_true",
                     help="find the largest batch that fits, starting at --batch; about six "
                          "compilations")
    sub = command(data, "samples per second that one core makes from tars of photograph-sized "
                        "JPEGs, compared with the webdataset library")
    sub.add_argument("--resolution", type=positive, nargs="+", default=[84, 224],
                     help="pixels per side (default: 84 224)")
    sub.add_argument("--images", type=positive, default=256,
                     help="images to make and to read again and again (default: 256)")
    sub.add_argument("--batch", type=positive, default=128,
                     help="samples per timed round (default: 128)")
    sub.add_argument("--repeats", type=positive, default=7,
                     help="timed rounds, of which the table has the median (default: 7)")
    sub.add_argument("--alone", action="store_true", help="leave the other library out")
    sub.add_argument("--worker-processes", type=positive, nargs="+", metavar="N",
                     help="compare N threads with N worker processes instead, on all cores, with "
                          "the augmentation of the paper's recipes")
    sub = command(ablate, "the paper's ablations on the toy: trains and evaluates each row, 6 to "
                          "60 minutes per row and seed on one core; an interrupted command resumes")
    ablate_parser = sub
    sub.add_argument("tables", nargs="*", metavar="TABLE",
                     help=f"some of {', '.join(ablations.TABLES)} (default: all)")
    sub.add_argument("--seeds", type=positive, default=3, help="per cell (default: 3)")
    sub.add_argument("--folder", default="runs/ablate",
                     help="where the runs are kept (default: runs/ablate)")
    sub.add_argument("--show", action="store_true",
                     help="print the tables of results/ablations.json, without a run")
    sub = command(gpu_report_rows, "all measurements of a GPU: steps in bf16 against "
                  "torch.compile, and the toy; each in a process of its own", "gpu-report")
    sub.add_argument("--cells", nargs="+", default=list(gpu_report.CELLS),
                     metavar="CELL", help="steps to time: RECIPE:RESOLUTION:BATCH, or with the "
                     "--remat and the --scan-unroll after that (default: "
                     f"{' '.join(gpu_report.CELLS)})")
    sub.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    sub.add_argument("--compare", choices=("torch", "torch-compile"), default="torch-compile")
    sub.add_argument("--repeats", type=positive, default=20, help="timed steps (default: 20)")
    sub.add_argument("--toy-flags", type=shlex.split, default=[], metavar="FLAGS",
                     help="flags of the toy's training, in one word: --toy-flags='--seed 1'")
    config.refuse_old_flags(parser, argv, OLD_FLAGS)
    args = parser.parse_args(argv)
    unknown = set(vars(args).get("tables", ())) - set(ablations.TABLES)
    if unknown:
        known = ", ".join(ablations.TABLES)
        ablate_parser.error(f"unknown table {min(unknown)!r}: take some of {known}")
    return args


def run(argv: list[str]) -> int:
    args = parse(argv)
    check_output_file("--json", args.json)
    rows = args.function(args)
    print(format_table(rows))
    if args.json:
        arguments = {name: value for name, value in vars(args).items()
                     if name not in ("function", "json") and value is not None}
        table = {"arguments": arguments, "machine": step_time.machine(), "rows": rows}
        with open(args.json, "w", encoding="utf-8") as f:
            f.write(checkpoint.to_json(table, indent=1))
    return 0


def main(argv: list[str]) -> int:
    return run_command(run, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

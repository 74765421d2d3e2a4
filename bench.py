"""What it costs, measured on the machine at hand: time, FLOPs, memory, data. Every claim of the paper's section 3.2 has a command.

    python bench.py step --encoder Ti/16 --resolution 160 --batch 32     a training step: images/s, share of the matmul rate
    python bench.py clipa --encoder L/14                                 what mask and curriculum save (Table 5)
    python bench.py flops                                                FLOPs an image, by formula (Table 3)
    python bench.py memory l14 --resolution 224 --batch 2048             GiB a chip on a TPU pod, without a TPU (Table 4)
    python bench.py data                                                 pictures/s that one core decodes
    python bench.py ablate                                               what each choice does to what can be read (Tables 5, 6, 7), in a night

The first four take a recipe's name (python train.py -h) and flags that change it; each prints a table, and writes it with --json FILE.
"""
import argparse
import dataclasses
import os
import sys
from collections.abc import Callable

import config
import decoder
from benchmarks import ablations, loader, step_time, tpu_memory
from config import RECIPES, Config
from objectives import registry
from runtime import checkpoint, curriculum
from runtime.errors import ConfigError
from runtime.tables import format_table

MODEL_FLAGS = ("encoder", "decoder", "objective", "keep_ratio", "prefix_attention", "cls_token", "max_text_len", "vocab_size", "mu_dtype", "dtype", "remat", "loss_chunk",
               "scan_unroll", "grad_accum", "zero1", "seed")
DECODERS = {"g": "H"}  # as the recipes have it; elsewhere the decoder of the encoder's name


def settings(args: argparse.Namespace, stage: int = 0, devices: int = 1) -> tuple[Config, int, int]:
    """(config, resolution, batch) as the recipe and flags say; what is not said is that of the recipe's stage. ConfigError
    for what cannot be."""
    given = {k: v for k, v in vars(args).items() if k in MODEL_FLAGS}
    if given.get("objective") == "openvision":
        given["alt_field"] = "web"  # any: the bench makes its own
    if args.recipe is None and "encoder" in given:
        size = given["encoder"].partition("/")[0]
        given.setdefault("decoder", DECODERS.get(size, size if size in decoder.DECODER_SIZES else "L"))
        cfg = dataclasses.replace(Config(stages="resolution=224 steps=1 batch=8 lr=1e-3"), **given)
    else:
        cfg = dataclasses.replace(RECIPES[args.recipe or "toy"], **given)
    plan = curriculum.parse_stages(cfg.stages)[stage]
    resolution, batch = args.resolution or plan.resolution, args.batch or plan.batch
    cfg = dataclasses.replace(cfg, stages=f"resolution={resolution} steps=1000000 batch={batch} lr={plan.lr} warmup=1")
    try:
        config.validate(cfg, devices)
    except ConfigError as problem:
        raise ConfigError(str(problem).replace("--stages: resolution", "--resolution").replace("--stages: batch", "--batch")) from None
    return cfg, resolution, batch


def step(args: argparse.Namespace) -> list[dict]:
    return step_time.rows(*settings(args), args.compare, args.repeats)


def clipa(args: argparse.Namespace) -> list[dict]:
    """Of the recipe's two stages. At low resolution a batch of as many pixels: so the update weighs alike in both."""
    if not args.recipe:
        vars(args).setdefault("encoder", "L/14")
    low, high = curriculum.parse_stages(RECIPES[args.recipe or "l14"].stages)
    resolution, batch = args.resolution or high.resolution, args.batch or 2
    cells = []
    for stage, side, many in ((low, low.resolution, batch * round((resolution / low.resolution) ** 2)), (high, resolution, batch)):
        args.resolution, args.batch = side, many
        cells.append((*settings(args), stage.steps * stage.batch))
    return step_time.table5(*cells, args.repeats)


def flops(args: argparse.Namespace) -> list[dict]:
    """Forward GFLOPs an image, 2 a multiply-add, matmuls alone; without a choice the family, and what the paper's Table 3 has."""
    if args.recipe or args.resolution or set(MODEL_FLAGS) & set(vars(args)):
        cells = [(*settings(args, number)[:2], None) for number in range(2 if args.recipe and not args.resolution else 1)]
    else:
        cells = [(cfg, stage.resolution, None) for cfg in RECIPES.values() for stage in curriculum.parse_stages(cfg.stages)]
        cells += [(RECIPES["l14"], 224, 208.9), (RECIPES["so400m14"], 384, 1017.7)]
    table = []
    for cfg, resolution, paper in cells:
        model = registry.model_spec(cfg)
        n = (resolution // model.encoder.patch_size) ** 2
        parts = registry.flops(model, resolution, cfg.max_text_len)
        table.append({"encoder": cfg.encoder, "decoder": cfg.decoder, "px": resolution, "patches": n, "kept": registry.num_decoder_tokens(model, n), "text": cfg.max_text_len,
                      **{f"{name}, G": part / 1e9 for name, part in parts.items()}, "in all, G": sum(parts.values()) / 1e9, "paper, G": paper})
    return table


def memory(args: argparse.Namespace) -> list[dict]:
    cfg, resolution, batch = settings(args, devices=tpu_memory.num_chips(args.topology))
    return tpu_memory.rows(cfg, resolution, batch, args.topology, args.find_max_batch)


def data(args: argparse.Namespace) -> list[dict]:
    return loader.rows(args.resolution, args.pictures, args.batch, args.repeats, args.alone)


def ablate(args: argparse.Namespace) -> list[dict]:
    return ablations.rows(args.tables, args.seeds, args.folder, args.show)


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; what cannot be read ends the program with a usage line."""
    parser = argparse.ArgumentParser(prog="bench.py", allow_abbrev=False, description=__doc__.split("\n\n")[0],
                                     epilog="Each has its own -h.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{step,clipa,flops,memory,data,ablate}")

    def command(run: Callable, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(run.__name__, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
        sub.set_defaults(run=run)
        sub.add_argument("--json", metavar="FILE", help="write the table there too, with the machine and what was asked (a figure that is not known is null)")
        return sub

    def model(sub: argparse.ArgumentParser, otherwise: str = "toy, or plain ones for an --encoder", unnamed: Config = RECIPES["toy"],
              batch: str = "images a step (default: the recipe's; out of memory or patience: lower it)") -> argparse.ArgumentParser:
        """otherwise, unnamed: the settings where the command line names no recipe, in words and as the flags' help shows them."""
        sub.add_argument("recipe", nargs="?", choices=tuple(RECIPES), help=f"the settings that flags change (default: {otherwise})")
        named = next((RECIPES[word] for word in argv if word in RECIPES), Config() if "--encoder" in argv else unnamed)
        config.add_flags(sub, *MODEL_FLAGS, recipe=named)
        sub.add_argument("--resolution", type=positive, help="pixels a side (default: the recipe's)")
        sub.add_argument("--batch", type=positive, help=batch)
        return sub

    sub = model(command(step, "time, FLOP/s and memory of a training step, on the first device (with --zero1 on all of this machine)"))
    sub.add_argument("--compare", choices=("torch", "torch-compile"), help="the same model, weights and batch in PyTorch, in turns with ours")
    sub.add_argument("--repeats", type=positive, default=7, help="timed steps; the median counts (default: 7)")
    sub = model(command(clipa, "what mask and curriculum save, from measured steps"), "plain ones for L/14, or for an --encoder",
                Config(encoder="L/14", decoder="L"), "images a step at the high resolution, as many pixels at the low one (default: 2)")
    sub.add_argument("--repeats", type=positive, default=2, help="timed steps of each of the four kinds (default: 2)")
    model(command(flops, "FLOPs an image, forward, by formula"), "every recipe; with flags the toy, or plain ones for an --encoder")
    sub = model(command(memory, "bytes a chip of a training step on a TPU pod, by the TPU compiler, without a TPU"))
    sub.add_argument("--topology", type=pod, default="v4:4x4x2", help="of chips: v4:4x4x2 is a v4-64 (the default); v5e:4x8, v5p:2x2x2, v6e:4x4 …")
    sub.add_argument("--find-max-batch", action="store_true", help="find the largest batch that fits, from --batch on; about six compilations")
    sub = command(data, "samples/s that one core makes from tars of photograph-sized JPEGs, beside the webdataset library")
    sub.add_argument("--resolution", type=positive, nargs="+", default=[84, 224], help="pixels a side (default: 84 224)")
    sub.add_argument("--pictures", type=positive, default=256, help="pictures to make and read, over and over (default: 256)")
    sub.add_argument("--batch", type=positive, default=128, help="samples a timed round (default: 128)")
    sub.add_argument("--repeats", type=positive, default=7, help="timed rounds of each; the median counts (default: 7)")
    sub.add_argument("--alone", action="store_true", help="leave the other library out")
    sub = command(ablate, "the paper's ablations on the toy, trained and read: some 3 minutes a cell and seed on 2 cores; what is stopped goes on")
    sub.add_argument("tables", nargs="*", metavar="TABLE", help=f"of {', '.join(ablations.TABLES)} (default: all)")
    sub.add_argument("--seeds", type=positive, default=3, help="of each cell (default: 3)")
    sub.add_argument("--folder", default="runs/ablate", help="where the runs lie (default: runs/ablate)")
    sub.add_argument("--show", action="store_true", help="the tables from results/ablations.json as it is, without any run")
    found = parser.parse_args(argv)
    if unknown := set(vars(found).get("tables", ())) - set(ablations.TABLES):
        sub.error(f"unknown table {min(unknown)!r}: take some of {', '.join(ablations.TABLES)}")
    return found


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def pod(text: str) -> str:
    try:
        tpu_memory.num_chips(text)
    except ValueError as problem:
        raise argparse.ArgumentTypeError(str(problem)) from None
    return text


def main(argv: list[str]) -> int:
    args = parse(argv)
    asked = {k: v for k, v in vars(args).items() if k not in ("run", "json") and v is not None}
    try:
        if args.json and not os.access(os.path.dirname(os.path.abspath(args.json)), os.W_OK):  # told now, not after the measurement
            raise ConfigError(f"--json {args.json}: its folder does not exist or cannot be written")
        rows = args.run(args)
        print(format_table(rows))
        if args.json:
            with open(args.json, "w", encoding="utf-8") as f:
                f.write(checkpoint.to_json({"asked": asked, "machine": step_time.machine(), "rows": rows}, indent=1))
        return 0
    except ConfigError as problem:
        print(f"error: {problem}", file=sys.stderr)
    except OSError as problem:
        print(f"error: {problem.filename or 'output'}: {problem.strerror}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

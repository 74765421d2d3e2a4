"""Import and export of encoders.

    python convert.py import FILE --out ENCODER.npz      released weights, or any known layout
    python convert.py export RUN --to transformers --out DIR     or timm, open_clip, npz
    python convert.py export RUN --to transformers --pair --out DIR       with the text encoder

FILE is open_clip_pytorch_model.bin, a .safetensors file, or a folder with one. Beside the weights,
an export has the library's configuration, its image processor's (if it has one), a model card.
Where each library keeps each array is in interop/layouts.py, the card in interop/model_card.py.
"""
import argparse
import sys

from interop.pair import export_pair
from interop.transfer import LIBRARY_FILES, export_encoder, import_encoder
from runtime.errors import CommandParser, run_command


def main(argv: list[str]) -> int:
    parser = CommandParser(prog="convert.py", description="Import and export of encoders.",
                           epilog="Each command has its own -h.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("import",
                                  help="weights in another library's layout become an .npz")
    command.add_argument("file", help="open_clip_pytorch_model.bin, a .safetensors file, or a "
                                      "folder with one: released weights, or an export")
    command.add_argument("--out", required=True, metavar="DIR_OR_NPZ",
                         help="where the encoder goes")
    command.add_argument("--heads", type=int, default=0,
                         help="number of attention heads, if it is not known for the width")
    command = commands.add_parser("export",
                                  help="a run's encoder in the layout of another library")
    command.add_argument("run", metavar="RUN_OR_NPZ",
                         help="a run's folder, a checkpoint, or an encoder's .npz")
    command.add_argument("--to", required=True, choices=tuple(LIBRARY_FILES),
                         help="the library; open_clip without --pair only for runs "
                              "with --cls-token")
    command.add_argument("--out", required=True, metavar="DIR",
                         help="the folder for weights, configuration and model card")
    command.add_argument("--resolution", type=int, default=0,
                         help="pixels per side (default: that of the last training stage)")
    command.add_argument("--pair", action="store_true",
                         help="also the text encoder of a run of --objective lit or clip, and the "
                              "tokenizer: for transformers or open_clip")
    return run_command(convert, parser.parse_args(argv))


def convert(args: argparse.Namespace) -> int:
    if args.command == "import":
        print("\n".join(import_encoder(args.file, args.out, args.heads)))
    else:
        export = export_pair if args.pair else export_encoder
        files = export(args.run, args.to, args.out, args.resolution)
        print("written: " + ", ".join(files))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

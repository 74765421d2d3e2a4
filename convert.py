"""Encoders in and out: the released weights become an .npz of this project, and any run what other libraries load.

    python convert.py import FILE --out ENCODER.npz             open_clip_pytorch_model.bin, .safetensors, or a folder with one
    python convert.py export RUN --to transformers --out DIR    or timm, open_clip, npz

Beside the weights an export writes the library's configuration, its image processor's where it has one, and a model card.
Where each library keeps each array is in interop/layouts.py, the card in interop/model_card.py.
"""
import argparse
import sys

from interop.transfer import export_encoder, import_encoder
from runtime.errors import CheckpointError, ConvertError, LayoutError


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="convert.py", allow_abbrev=False, description="Encoders in and out.", epilog="Each has its own -h.")
    ways = parser.add_subparsers(dest="way", required=True)
    way = ways.add_parser("import", allow_abbrev=False, help="weights in another library's layout become an .npz")
    way.add_argument("file", help="open_clip_pytorch_model.bin, a .safetensors, or a folder with one; OpenVision, or what export wrote")
    way.add_argument("--out", required=True, metavar="DIR_OR_NPZ", help="where the encoder goes")
    way.add_argument("--heads", type=int, default=0, help="attention heads, if the width is of no known size")
    way = ways.add_parser("export", allow_abbrev=False, help="a run's encoder becomes what another library loads")
    way.add_argument("run", metavar="RUN_OR_NPZ", help="a run's folder, a checkpoint, or an encoder's .npz")
    way.add_argument("--to", required=True, choices=("transformers", "timm", "open_clip", "npz"), help="the library; open_clip for runs with --cls-token alone")
    way.add_argument("--out", required=True, metavar="DIR", help="where weights, configuration and model card go")
    way.add_argument("--resolution", type=int, default=0, help="pixels a side (default: what it was trained at last)")
    given = parser.parse_args(argv)
    try:
        if given.way == "import":
            print("\n".join(import_encoder(given.file, given.out, given.heads)))
        else:
            print("written: " + ", ".join(export_encoder(given.run, given.to, given.out, given.resolution)))
        return 0
    except (ConvertError, LayoutError, CheckpointError) as problem:
        print(f"error: {problem}", file=sys.stderr)
    except OSError as problem:
        print(f"error: {problem.filename or given.out}: {problem.strerror or problem}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

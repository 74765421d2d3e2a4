"""Runs a program of this project with one more model size, "nano": its files are small enough for a
repository.

    python tests/artefacts/nano.py train --encoder nano/8 --decoder nano ...
    python tests/artefacts/nano.py resume FOLDER        continues a run with its own settings
"""
import dataclasses
import importlib
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
import decoder
import vit

NANO = (1, 16, 2, 32)  # depth, width, heads, MLP width


def resume(folder: str) -> int:
    import caption
    import train
    settings, _, _ = caption.load_run_checkpoint(folder)
    return train.train(dataclasses.replace(settings, workdir=folder))


if __name__ == "__main__":
    vit.ENCODER_SIZES["nano"] = NANO
    decoder.DECODER_SIZES["nano"] = NANO  # before config is imported: its flags list the sizes
    if sys.argv[1] == "resume":
        sys.exit(resume(sys.argv[2]))
    sys.exit(importlib.import_module(sys.argv[1]).main(sys.argv[2:]))

"""TODO."""
import io
import json
import os
import struct
import tarfile
import zlib

import numpy as np
from PIL import Image

from data import Loader
from inputs import tokenizer
from inputs.images import Augment

TRAINING = Augment(jitter=0.32, hue=0.08, grayscale_prob=0.2)
TOK = tokenizer.train_vocab(["a cat number 0123456789"], 200)


def photo(width=48, height=36, seed=0, detail=5):
    """Soft blotches of color, unlike in every corner."""
    small = np.random.default_rng(seed).integers(0, 256, (detail - 1, detail, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, kind="PNG", **how):
    held = io.BytesIO()
    image.save(held, kind, **how)
    return held.getvalue()


def opened(image, kind="PNG", **how):
    return Image.open(io.BytesIO(encoded(image, kind, **how)))


def sample(i):
    return {"jpg": encoded(photo(seed=i), "JPEG"), "json": json.dumps({"re_caption": f"a cat number {i}", "n": i}).encode(), "txt": b"a cat %d" % i}


def put(path, members):
    """A tar of (name, bytes), as img2dataset lays them out; a name may be bytes."""
    with tarfile.open(path, "w", encoding="utf-8", errors="surrogateescape") as tar:
        for name, content in members:
            info = tarfile.TarInfo(os.fsdecode(name))
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def members(count, start=0):
    return [(f"{i:09d}.{suffix}", content) for i in range(start, start + count) for suffix, content in sample(i).items()]


def spill(folder, files):
    for name, content in files:
        path = os.path.join(os.fsencode(folder), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as f:
            f.write(content)
    return str(folder)


def reader(source, seed=0, augment=TRAINING, workers=2):
    return Loader(source, TOK, 12, seed, augment, workers)


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


BOMB = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))  # claims 10 GB


def tar_of(form=tarfile.USTAR_FORMAT, extra=(), long=""):
    """Five samples, the victim in their midst; extra: (TarInfo fields, data) of members after it."""
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w", format=form) as tar:
        for i in range(5):
            for suffix in ("jpg", "txt"):
                info = tarfile.TarInfo(f"{long}{i:09d}.{suffix}")
                info.size = len(sample(i)[suffix])
                tar.addfile(info, io.BytesIO(sample(i)[suffix]))
            for fields, data in extra if i == 2 else ():
                info = tarfile.TarInfo()
                for name, value in ({"size": len(data)} | fields).items():
                    setattr(info, name, value)
                tar.addfile(info, io.BytesIO(data))
    return held.getvalue()


TAR = tar_of()


with tarfile.open(fileobj=io.BytesIO(TAR)) as opened_tar:
    AT = {m.name: m for m in opened_tar}


J, T, NEXT, LAST = (AT[f"{i:09d}.{s}"] for i, s in ((2, "jpg"), (2, "txt"), (3, "jpg"), (4, "txt")))
HEADER = TAR[J.offset:J.offset_data]


def mended(block, at, new):
    """A header with a field overwritten, and its checksum made right again."""
    block = block[:at] + new + block[at + len(new):]
    total = sum(block) - sum(block[148:156]) + 256
    return block[:148] + b"%06o\0 " % total + block[156:]

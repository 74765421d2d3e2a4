"""Small images, captions, folders and tars that tests of reading data use, and damaged ones."""
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


# ------------------------------------------------------------------------------------ images
def photo(width=48, height=36, seed=0, detail=5):
    """Soft blotches of color, different in every corner."""
    small = np.random.default_rng(seed).integers(0, 256, (detail - 1, detail, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def opened(image, kind="PNG", **options):
    """An image after saving and opening, not yet decoded."""
    return Image.open(io.BytesIO(encoded(image, kind, **options)))


def chunk(name, content):
    """A chunk of a PNG."""
    checksum = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + checksum


PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
BOMB = PNG_SIGNATURE + chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))  # 10 GB


# ----------------------------------------------------------------------------------- samples
def sample(i):
    """{suffix: bytes} of sample i."""
    fields = {"re_caption": f"a cat number {i}", "n": i}
    return {"jpg": encoded(photo(seed=i), "JPEG"), "json": json.dumps(fields).encode(),
            "txt": b"a cat %d" % i}


def members(count, start=0):
    """(name, bytes) of the files of `count` samples."""
    files = []
    for i in range(start, start + count):
        files += [(f"{i:09d}.{suffix}", content) for suffix, content in sample(i).items()]
    return files


def put(path, members):
    """A tar of (name, bytes), as img2dataset writes them. A name may be bytes."""
    with tarfile.open(path, "w", encoding="utf-8", errors="surrogateescape") as tar:
        for name, content in members:
            info = tarfile.TarInfo(os.fsdecode(name))
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def spill(folder, files):
    """A folder of (name, bytes)."""
    for name, content in files:
        path = os.path.join(os.fsencode(folder), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as f:
            f.write(content)
    return str(folder)


def reader(source, seed=0, augment=TRAINING, workers=2):
    return Loader(source, TOK, 12, seed, augment, workers)


# ---------------------------------------------------------------------- a tar to be damaged
def tar_of(form=tarfile.USTAR_FORMAT, extra=(), long=""):
    """Five samples, whose names start with `long`. extra: (TarInfo fields, data) of members that
    follow the one in the middle, number 2."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for i in range(5):
            for suffix in ("jpg", "txt"):
                info = tarfile.TarInfo(f"{long}{i:09d}.{suffix}")
                info.size = len(sample(i)[suffix])
                tar.addfile(info, io.BytesIO(sample(i)[suffix]))
            for fields, data in extra if i == 2 else ():
                info = tarfile.TarInfo()
                info.size = len(data)
                for name, value in fields.items():
                    setattr(info, name, value)
                tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def mended(block, offset, field):
    """A header with a field overwritten, and a checksum that is correct again."""
    block = block[:offset] + field + block[offset + len(field):]
    total = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    return block[:148] + b"%06o\0 " % total + block[156:]


TAR = tar_of()
with tarfile.open(fileobj=io.BytesIO(TAR)) as opened_tar:
    AT = {member.name: member for member in opened_tar}
J, T = AT["000000002.jpg"], AT["000000002.txt"]  # the sample that is damaged
NEXT, LAST = AT["000000003.jpg"], AT["000000004.txt"]
HEADER = TAR[J.offset:J.offset_data]

"""Emoji as a data set: downloads the drawings of two vendors and packs them into tars.

The recipe `emoji` trains on one vendor's drawings and validates on the other's drawings of the same
things. The images come from public npm packages (MIT; drawings: Google's Apache 2.0, Twitter's
CC-BY 4.0). The tars are WebDatasets as img2dataset writes them, so this file is also an example of
how to pack your own images. The fields `txt` and `caption` hold the short name; `re_caption` says
more: another name, the category, and the colors, which are counted in the image.

    python -m inputs.emoji        downloads and packs, into the folder emoji
    python train.py emoji         trains for 5 to 10 minutes on two cores
"""
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

from inputs.images import open_image, silence_pillow
from runtime.errors import BadSample, CommandParser, UserError, run_command

VERSION = "16.0.0"
VENDORS = ("google", "twitter")
SHARD_SAMPLES = 1000
SKIN_TONES = {"1F3FB": "light", "1F3FC": "medium light", "1F3FD": "medium", "1F3FE": "medium dark",
              "1F3FF": "dark"}
COLORS = {
    "black": (25, 25, 25), "white": (245, 245, 245), "gray": (140, 145, 150), "red": (215, 45, 50),
    "orange": (245, 135, 35), "yellow": (255, 205, 60), "green": (70, 160, 70),
    "blue": (55, 125, 215), "light blue": (150, 205, 240), "purple": (140, 85, 190),
    "pink": (245, 150, 185), "brown": (135, 85, 60), "beige": (245, 215, 185)}
NPM_FLAGS = ("--no-save", "--no-package-lock", "--ignore-scripts", "--no-audit", "--no-fund",
             "--fetch-retries=1")
OR_PACKAGES = "name a node_modules folder that holds the packages with --packages"


class EmojiError(UserError):
    """The data set cannot be made; the message says what to do."""


# ---------------------------------------------------------------------------------- download
def download(folder: str) -> str:
    """Installs the packages below `folder` (150 MB). Returns their node_modules folder."""
    npm = shutil.which("npm")
    if npm is None:
        raise EmojiError("npm, which downloads the images, is not installed: install Node.js, or "
                         + OR_PACKAGES)
    names = [f"emoji-datasource-{vendor}@{VERSION}" for vendor in VENDORS]
    command = [npm, "install", "--prefix", folder, *NPM_FLAGS, *names]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                          errors="replace")
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.lower().startswith("npm err")]
        reasons = errors or lines[-1:] or [f"it ended with status {done.returncode}"]
        raise EmojiError(f"npm could not download {' and '.join(names)} ({reasons[0][:200]}): it "
                         f"needs the network; run this again when there is one, or {OR_PACKAGES}")
    return os.path.join(folder, "node_modules")


# ---------------------------------------------------------------------------------- captions
def plain(text: str) -> str:
    """Names and categories as words: MAN_WITH-VEIL becomes man with veil."""
    return " ".join(text.replace("_", " ").replace("-", " ").lower().split())


def has_digit(text: str) -> bool:
    return any(char.isdigit() for char in text)


def short_caption(emoji: dict) -> str:
    """As in an alt text. Flags and symbols have codes for short names (flag-bo, u7533), which mean
    nothing; those get their long names."""
    name = emoji["short_name"]
    is_code = name.startswith("flag-") or len(name) < 3 or has_digit(name)
    return plain(emoji["name"] if is_code and emoji["name"] else name)


def main_colors(image: Image.Image) -> list[str]:
    """The one or two colors that fill most of what is drawn, each at least a fifth of it."""
    pixels = np.asarray(image.convert("RGBA")).reshape(-1, 4).astype(np.int32)
    opaque = pixels[pixels[:, 3] > 127, :3]
    distances = ((opaque[:, None] - np.array(list(COLORS.values()))) ** 2).sum(-1)
    counts = np.bincount(distances.argmin(-1), minlength=len(COLORS))
    most = np.argsort(-counts, kind="stable")[:2]
    return [list(COLORS)[i] for i in most if counts[i] > 0.2 * len(opaque)]


def dense_caption(emoji: dict, name: str, image: Image.Image) -> str:
    """All that is known of an image, in one of three wordings. The emoji's code determines the
    wording, so that the vendors agree."""
    kind = plain(emoji["subcategory"]).removeprefix("other ")
    group = emoji["category"].lower()
    colors = " and ".join(main_colors(image))
    for other in (plain(emoji["name"] or ""), *map(plain, emoji["short_names"])):
        if other and other not in name and not has_digit(other):
            named = f"{name}, also called {other}"
            break
    else:
        named = name
    wording = zlib.crc32(emoji["unified"].encode()) % 3
    if wording == 0:
        ending = f", mostly {colors}." if colors else "."
        return f"a picture of {named}. a kind of {kind} from {group}{ending}"
    if wording == 1:
        ending = f". it is mostly {colors}." if colors else "."
        return f"{named}: {kind}, from {group}{ending}"
    start = f"an emoji, mostly {colors}," if colors else "an emoji"
    return f"{start} that shows {named}: {kind}, {group}."


# ----------------------------------------------------------------------------------- packing
def variants(emoji: dict) -> list[tuple[dict, str]]:
    """(entry, ending of its name): the emoji, and one of the skin tones that it comes in."""
    tones = [tone for tone in SKIN_TONES if tone in emoji.get("skin_variations", {})]
    if not tones:
        return [(emoji, "")]
    tone = tones[zlib.crc32(emoji["unified"].encode()) % len(tones)]
    return [(emoji, ""), (emoji["skin_variations"][tone], f" with {SKIN_TONES[tone]} skin")]


def read_sample(packages: str, vendor: str, emoji: dict, drawn: dict, skin: str) -> dict:
    """{"png": bytes, "json": fields} of one drawing."""
    package = f"emoji-datasource-{vendor}"
    path = os.path.join("img", vendor, "64", drawn["image"])
    with open(os.path.join(packages, package, path), "rb") as f:
        png = f.read()
    image = open_image(io.BytesIO(png))
    name = short_caption(emoji) + skin
    return {"png": png, "json": {
        "url": f"npm:{package}@{VERSION}/{path}", "caption": name,
        "re_caption": dense_caption(emoji, name, image), "unified": drawn["unified"],
        "category": emoji["category"], "subcategory": emoji["subcategory"], "status": "success",
        "error_message": None, "width": image.width, "height": image.height,
        "sha256": hashlib.sha256(png).hexdigest()}}


def read_samples(packages: str, vendor: str) -> Iterator[dict]:
    """All emoji that the vendor has drawn. EmojiError if the package is not what it should be."""
    base = os.path.join(packages, f"emoji-datasource-{vendor}")
    try:
        with open(os.path.join(base, "emoji.json"), encoding="utf-8") as f:
            listed = json.load(f)
        for emoji in listed:
            for drawn, skin in variants(emoji):
                if drawn[f"has_img_{vendor}"]:
                    yield read_sample(packages, vendor, emoji, drawn, skin)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, BadSample) as problem:
        raise EmojiError(f"{base} is not the npm package emoji-datasource-{vendor} {VERSION} "
                         f"({type(problem).__name__}: {problem})") from None


def tar_bytes(samples: list[dict], shard: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for n, sample in enumerate(samples):
            key = f"{shard:05d}{n:04d}"
            fields = sample["json"] | {"key": key}
            for suffix, content in (("png", sample["png"]), ("txt", fields["caption"].encode()),
                                    ("json", json.dumps(fields).encode())):
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def write_file(path: str, content: bytes) -> None:
    """Under another name first, so that the file is complete or missing."""
    with open(path + ".part", "wb") as f:
        f.write(content)
    os.replace(path + ".part", path)


def pack(packages: str, vendor: str, folder: str) -> int:
    """Writes 00000.tar, 00000_stats.json, ... and returns the number of samples. The stats come
    last, because they mark a complete tar."""
    samples = list(read_samples(packages, vendor))
    os.makedirs(folder, exist_ok=True)
    for start in range(0, len(samples), SHARD_SAMPLES):
        shard, part = start // SHARD_SAMPLES, samples[start:start + SHARD_SAMPLES]
        stats = {"count": len(part), "successes": len(part), "failed_to_download": 0,
                 "failed_to_resize": 0, "status_dict": {"success": len(part)}}
        write_file(os.path.join(folder, f"{shard:05d}.tar"), tar_bytes(part, shard))
        write_file(os.path.join(folder, f"{shard:05d}_stats.json"),
                   json.dumps(stats, indent=4).encode())
    return len(samples)


def main(argv: list[str]) -> int:
    parser = CommandParser(prog="inputs.emoji",
                           description="Download and pack the emoji of two vendors.")
    parser.add_argument("--packages", default="", metavar="DIR", help="a node_modules folder that "
                        "holds the packages already (default: npm downloads them)")
    parser.add_argument("--data", default="emoji", metavar="DIR",
                        help="where the tars go (default: emoji)")
    args = parser.parse_args(argv)
    marker = os.path.join(args.data, "packed.json")
    if os.path.exists(marker):
        print(f"{marker} exists: nothing is downloaded or packed again")
        return 0
    os.makedirs(args.data, exist_ok=True)
    counts = {}
    with tempfile.TemporaryDirectory(dir=args.data) as temporary:
        packages = args.packages or download(temporary)
        for vendor in VENDORS:
            counts[vendor] = pack(packages, vendor, os.path.join(args.data, vendor))
    write_file(marker, json.dumps(counts).encode())
    for vendor, count in counts.items():
        print(f"{os.path.join(args.data, vendor)}: {count:,} captioned images")
    return 0


if __name__ == "__main__":
    silence_pillow()
    sys.exit(run_command(main, sys.argv[1:]))

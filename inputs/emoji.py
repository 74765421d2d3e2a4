"""A real data set in one command: the emoji of two vendors, drawn apart and named alike. One vendor's pictures train a small
encoder for about ten minutes on two cores; the other's, never seen, tell whether it learned what things look like.

The pictures come from public npm packages (MIT; the drawings: Google's Apache 2.0, Twitter's CC-BY 4.0) and lie afterwards in
WebDataset tars as img2dataset writes them, so this file is also an example of how to pack pictures of your own. A sample's `txt`
and `caption` are its short name; `re_caption` says more: the name, another name, the kind, and the colors, which are counted in the picture.

    python -m inputs.emoji [--pack-only]        fetches and packs (emoji/), trains (runs/emoji), and says how well it sees
"""
import argparse
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
from runtime import checkpoint
from runtime.cpu_tuning import enable_compilation_cache
from runtime.errors import BadSample

VERSION, VENDORS, SHARD = "16.0.0", ("google", "twitter"), 1000
SKIN_TONES = {"1F3FB": "light", "1F3FC": "medium light", "1F3FD": "medium", "1F3FE": "medium dark", "1F3FF": "dark"}
COLORS = {"black": (25, 25, 25), "white": (245, 245, 245), "gray": (140, 145, 150), "red": (215, 45, 50), "orange": (245, 135, 35), "yellow": (255, 205, 60),
           "green": (70, 160, 70), "blue": (55, 125, 215), "light blue": (150, 205, 240), "purple": (140, 85, 190), "pink": (245, 150, 185),
           "brown": (135, 85, 60), "beige": (245, 215, 185)}


class EmojiError(Exception):
    """The data set cannot be made; the message says what to do."""


def fetch(folder: str) -> str:
    """Installs the packages below `folder` (150 MB) and returns where they lie. EmojiError without npm, or where npm fails."""
    npm = shutil.which("npm")
    if npm is None:
        raise EmojiError("npm, which fetches the pictures, is not installed: install Node.js, or name a node_modules folder that holds the packages "
                         "with --packages")
    names = [f"emoji-datasource-{vendor}@{VERSION}" for vendor in VENDORS]
    command = [npm, "install", "--prefix-attention", folder, "--no-save", "--no-package-lock", "--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=1"]
    done = subprocess.run([*command, *names], stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        said = [line for line in lines if line.lower().startswith("npm err")] or lines[-1:] or [f"it ended with status {done.returncode}"]  # not a warning
        raise EmojiError(f"npm could not fetch {' and '.join(names)} ({said[0][:200]}): it needs the network; run this again when there is one, or name a "
                         "node_modules folder that holds the packages with --packages")
    return os.path.join(folder, "node_modules")


def plain(text: str) -> str:
    """Names and kinds as words: MAN_WITH-VEIL becomes man with veil."""
    return " ".join(text.replace("_", " ").replace("-", " ").lower().split())


def short(emoji: dict) -> str:
    """As in an alt text. Flags and signs go by codes (flag-bo, u7533), which name nothing; those take their long names."""
    name = emoji["short_name"]
    coded = name.startswith("flag-") or len(name) < 3 or any(c.isdigit() for c in name)
    return plain(emoji["name"] if coded and emoji["name"] else name)


def colors(image: Image.Image) -> list[str]:
    """The one or two colors that fill most of what is drawn, each a fifth of it at least."""
    pixels = np.asarray(image.convert("RGBA")).reshape(-1, 4).astype(np.int32)
    drawn = pixels[pixels[:, 3] > 127, :3]
    nearest = ((drawn[:, None] - np.array(list(COLORS.values()))) ** 2).sum(-1).argmin(-1)
    counts = np.bincount(nearest, minlength=len(COLORS))
    return [list(COLORS)[i] for i in np.argsort(-counts, kind="stable")[:2] if counts[i] > 0.2 * len(drawn)]


def dense(emoji: dict, name: str, image: Image.Image) -> str:
    """All that is known of a picture, in one of three wordings; which one follows from the name, so that the vendors agree."""
    other = next((n for n in (plain(emoji["name"] or ""), *map(plain, emoji["short_names"])) if n and n not in name and not any(c.isdigit() for c in n)), "")
    kind, group, seen = plain(emoji["subcategory"]).removeprefix("other "), emoji["category"].lower(), " and ".join(colors(image))
    also, painted = other and f", also called {other}", seen and f"mostly {seen}"
    return (f"a picture of {name}{also}. a kind of {kind} from {group}" + (f", {painted}." if painted else "."),
            f"{name}{also}: {kind}, from {group}" + (f". it is {painted}." if painted else "."),
            "an emoji" + (f", {painted}," if painted else "") + f" that shows {name}{also}: {kind}, {group}.")[zlib.crc32(emoji["unified"].encode()) % 3]


def samples(packages: str, vendor: str) -> Iterator[dict]:
    """{"png": bytes, "json": fields} of each emoji that the vendor has drawn; people and hands also in one of the skin
    tones. EmojiError if the package is not there, or not what it should be."""
    base = os.path.join(packages, f"emoji-datasource-{vendor}")
    try:
        with open(os.path.join(base, "emoji.json"), encoding="utf-8") as f:
            listed = json.load(f)
        for emoji in listed:
            kinds, tones = [(emoji, "")], [t for t in SKIN_TONES if t in emoji.get("skin_variations", {})]
            if tones:
                tone = tones[zlib.crc32(emoji["unified"].encode()) % len(tones)]
                kinds.append((emoji["skin_variations"][tone], f" with {SKIN_TONES[tone]} skin"))
            for drawn, skin in kinds:
                if drawn[f"has_img_{vendor}"]:
                    path = os.path.join("img", vendor, "64", drawn["image"])
                    with open(os.path.join(base, path), "rb") as f:
                        png = f.read()
                    image = open_image(io.BytesIO(png))
                    name = short(emoji) + skin
                    yield {"png": png, "json": {
                        "url": f"npm:emoji-datasource-{vendor}@{VERSION}/{path}", "caption": name, "re_caption": dense(emoji, name, image),
                        "unified": drawn["unified"], "category": emoji["category"], "subcategory": emoji["subcategory"], "status": "success",
                        "error_message": None, "width": image.width, "height": image.height, "sha256": hashlib.sha256(png).hexdigest()}}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, BadSample) as problem:
        raise EmojiError(f"{base} is not the npm package emoji-datasource-{vendor} {VERSION} ({type(problem).__name__}: {problem})") from None


def pack(packages: str, vendor: str, folder: str) -> int:
    """Writes folder/00000.tar, 00000_stats.json, … of `SHARD` samples each; returns how many samples. The stats come last: they say that a tar is whole."""
    found = list(samples(packages, vendor))
    os.makedirs(folder, exist_ok=True)
    for shard, start in enumerate(range(0, len(found), SHARD)):
        part = found[start:start + SHARD]

        def fill(f) -> None:
            with tarfile.open(fileobj=f, mode="w") as tar:
                for n, one in enumerate(part):
                    key = f"{shard:05d}{n:04d}"
                    for suffix, content in (("png", one["png"]), ("txt", one["json"]["caption"].encode()),
                                            ("json", json.dumps(one["json"] | {"key": key}).encode())):
                        info = tarfile.TarInfo(f"{key}.{suffix}")
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))
        stats = {"count": len(part), "successes": len(part), "failed_to_download": 0, "failed_to_resize": 0, "status_dict": {"success": len(part)}}
        checkpoint.atomic_write(os.path.join(folder, f"{shard:05d}.tar"), fill)
        checkpoint.atomic_write(os.path.join(folder, f"{shard:05d}_stats.json"), lambda f: f.write(json.dumps(stats, indent=4).encode()))
    return len(found)


def prepare(folder: str, packages: str) -> None:
    """The tars of all vendors below `folder`, unless they are there already."""
    marker = os.path.join(folder, "packed.json")
    if os.path.exists(marker):
        print(f"{marker} is there: nothing is fetched or packed again")
        return
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as fetched:
        source = packages or fetch(fetched)
        counts = {vendor: pack(source, vendor, os.path.join(folder, vendor)) for vendor in VENDORS}
    checkpoint.atomic_write(marker, lambda f: f.write(json.dumps(counts).encode()))
    print(", ".join(f"{os.path.join(folder, vendor)}: {count:,} captioned pictures" for vendor, count in counts.items()))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="inputs/emoji.py", allow_abbrev=False, description="Fetch and pack the emoji of two vendors, and train on one. "
                                     "Further flags go to train.py.")
    parser.add_argument("--packages", default="", metavar="DIR", help="a node_modules folder that holds the packages already (default: npm fetches them)")
    parser.add_argument("--data", default="emoji", metavar="DIR", help="where the tars go (default: emoji)")
    parser.add_argument("--out", default="runs/emoji", metavar="DIR", help="the run's folder (default: runs/emoji)")
    parser.add_argument("--pack-only", action="store_true", help="do not train")
    given, further = parser.parse_known_args(argv)
    try:
        prepare(given.data, given.packages)
    except EmojiError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    except OSError as problem:
        print(f"error: {problem.filename or given.data}: {problem.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped before the pictures were packed: the same command starts that again", file=sys.stderr)
        return 130
    if given.pack_only:
        return 0
    import train
    where = [os.path.join(given.data, vendor, "*.tar") for vendor in VENDORS]
    code = train.main(["pictures", "--data", where[0], "--val", where[1], "--caption-field", "re_caption", "--out", given.out, *further])
    if not code:
        with open(os.path.join(given.out, "summary.json"), encoding="utf-8") as f:
            found = json.load(f)
        print(f"on {found['held_out_pictures']} drawings of {VENDORS[1]}, which it never saw: {found['val_loss']:.2f} nats a token, and "
              f"{found['val_loss_shuffled']:.2f} with the pictures shuffled; look at {os.path.join(given.out, 'samples.png')}")
    return code


if __name__ == "__main__":
    enable_compilation_cache()
    silence_pillow()
    sys.exit(main(sys.argv[1:]))

"""Where pictures with captions lie: the embedded `scenes`, a folder of images with KEY.txt (or KEY.json) beside them, or
WebDataset tars as img2dataset writes them (KEY.jpg KEY.json KEY.txt side by side).

A source knows how many samples it has, and gives the caption and the (undecoded) picture of each. What cannot be a
sample is skipped, and counted in `skipped` with the reason; a sample that turns out broken when it is read raises
BadSample; only a source with nothing to train on raises DataError.

    python sources.py WHERE [CAPTION]        counts samples, shows some captions, and says what is skipped and why
"""
import glob
import io
import json
import os
import re
import tarfile
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

import scenes

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
warnings.simplefilter("error", Image.DecompressionBombWarning)  # above 89 million pixels a picture is a broken sample


class DataError(Exception):
    """The data cannot be used at all; the message says what to do about it."""


class BadSample(Exception):
    """One sample cannot be used; the message says why."""


class Scenes:
    """The embedded pictures (scenes.py). A training split has no end, so no picture comes twice."""

    def __init__(self, seed: int, split: str, count: int | None = None):
        self.seed, self.split, self.count, self.skipped = seed, split, count, {}

    def __len__(self) -> int:
        return self.count or 1 << 40

    def fingerprint(self) -> str:
        return "scenes"

    def name(self, i: int) -> str:
        return f"scene {self.split} {i}"

    def record(self, i: int) -> dict:
        return scenes.record(self.seed, self.split, i)

    def caption(self, i: int) -> str:
        return scenes.caption(self.record(i))

    def picture(self, i: int) -> Image.Image:
        return scenes.paint(self.record(i))


class Files:
    """Samples that lie in files: each has an image and the text that holds its caption, both a (file, offset, size).
    `field` is "txt" for the KEY.txt, or the name of a field in the KEY.json."""

    def __init__(self, where: str, field: str):
        self.where, self.field, self.skipped = where, field, {}
        self.paths: list[str] = []
        self.rows: Any = []                                    # (image file, offset, size, text file, offset, size)

    def close(self) -> "Files":
        """After indexing: settle the table, and refuse a source that holds nothing to train on."""
        self.rows = np.array(self.rows, np.int64).reshape(-1, 6)
        if not len(self.rows):
            found = "; ".join(f"{n} {why}" for why, n in self.skipped.items()) or "no images at all"
            raise DataError(f"no captioned image in {self.where}: {found}. Each KEY.jpg (or .png, .webp …) needs "
                            + ("a KEY.txt beside it, or a KEY.json and --caption FIELD" if self.field == "txt" else
                               f"a KEY.json with the field {self.field!r} beside it"))
        problems = []
        for i in range(min(len(self), 200)):                   # a wrong --caption shows in the first samples or never
            try:
                self.caption(i)
                return self
            except BadSample as problem:
                problems.append(str(problem))
        raise DataError(f"no caption can be read from the first {len(problems)} samples of {self.where}: {problems[0]}")

    def skip(self, why: str, count: int = 1) -> None:
        if count > 0:
            self.skipped[why] = self.skipped.get(why, 0) + count

    def note(self, found: dict[str, dict[str, tuple]], key: str, suffix: str, place: tuple) -> None:
        """found: {key: {suffix: (file, offset, size)}} of one shard or folder. Of equal names the last counts, as when
        a tar is unpacked."""
        parts = found.setdefault(key, {})
        self.skip("replaced by a later file of the same name", suffix in parts)
        parts[suffix] = place

    def pair(self, found: dict[str, dict[str, tuple]]) -> None:
        """Adds the complete samples of one shard or folder."""
        text = "txt" if self.field == "txt" else "json"
        for parts in found.values():
            images = [parts[s] for s in IMAGES if s in parts]
            self.skip("beside another image of the same name", len(images) - 1)
            if images and text in parts:
                self.rows.append((*images[0], *parts[text]))
            elif images:
                self.skip(f"without a .{text}")
            elif text in parts:
                self.skip("without an image")

    def __len__(self) -> int:
        return len(self.rows)

    def fingerprint(self) -> str:
        """Changes when the data set does: to continue a run on other data would be another run."""
        crc = zlib.crc32(np.ascontiguousarray(self.rows[:, [1, 2, 4, 5]]))
        for file, _, size in self.rows[:, :3]:
            if size < 0:  # in a folder the names tell, where in tars the sizes do
                crc = zlib.crc32(os.fsencode(os.path.relpath(self.paths[file], self.where)), crc)
        return f"{len(self)} samples ({crc:08x})"

    def name(self, i: int) -> str:
        file, offset, _ = self.rows[i][:3]
        return printable(self.paths[file]) + (f" at byte {offset}" if offset else "")

    def read(self, file: int, offset: int, size: int) -> bytes:
        """size -1 means the whole file."""
        try:
            with open(self.paths[file], "rb") as f:
                f.seek(offset)
                data = f.read(size)
        except OSError as problem:
            raise BadSample(f"cannot be read ({problem.strerror})") from None
        if len(data) < size:
            raise BadSample("is cut off")
        return data

    def caption(self, i: int) -> str:
        data = self.read(*self.rows[i][3:])
        try:
            text = data.decode("utf-8-sig")
            if self.field != "txt":
                fields = json.loads(text)
                if not isinstance(fields, dict) or self.field not in fields:
                    has = ", ".join(fields) if isinstance(fields, dict) else "no fields"
                    raise BadSample(f"json has no field {self.field!r} (it has {has[:200]}); name one with --caption")
                text = fields[self.field]
        except UnicodeDecodeError:
            raise BadSample("caption is not UTF-8 text") from None
        except (ValueError, RecursionError):  # ValueError is also what a number of thousands of digits gives
            raise BadSample("json cannot be parsed") from None
        if not isinstance(text, str) or not text.strip():
            raise BadSample("caption is empty")
        return text

    def picture(self, i: int) -> Image.Image:
        """Opened, not yet decoded."""
        data = self.read(*self.rows[i][:3])
        try:
            return Image.open(io.BytesIO(data))
        except Exception as problem:  # Pillow's plugins raise what they like on broken bytes
            raise BadSample(f"image cannot be opened ({type(problem).__name__})") from None


def printable(path: str) -> str:
    """A path as text: on disk it may be bytes that no terminal takes."""
    return os.fsencode(path).decode("utf-8", "replace")


def folder(where: str, field: str) -> Files:
    """All images below a folder, in the order of their names."""
    source = Files(where, field)
    for base, folders, names in os.walk(where, onerror=lambda _: source.skip("folders that cannot be read")):
        folders.sort()
        found: dict[str, dict] = {}
        for name in sorted(names):
            key, dot, suffix = name.rpartition(".")
            if dot and key and suffix.lower() in (*IMAGES, "txt", "json"):
                source.paths.append(os.path.join(base, name))
                source.note(found, key, suffix.lower(), (len(source.paths) - 1, 0, -1))
        source.pair(found)
    return source.close()


def shards(where: str, field: str) -> Files:
    """WebDataset tars: a glob, or a brace list such as data/{00000..00011}.tar."""
    named = [where] if os.path.exists(where) else expand(where)  # a name may itself hold brackets
    paths = sorted({p for one in named for p in ([one] if os.path.exists(one) or not glob.has_magic(one) else glob.glob(one))})
    if not paths:
        raise DataError(f"no file matches {where}")
    source = Files(where, field)
    for path in paths:
        try:
            size = os.path.getsize(path)
            tar = tarfile.open(path, "r:")
        except (OSError, tarfile.TarError) as problem:
            raise DataError(f"{path} cannot be read as an uncompressed tar: {getattr(problem, 'strerror', None) or problem}") from None
        source.paths.append(path)
        found: dict[str, dict] = {}
        end = 0
        with tar:
            try:
                for member in tar:
                    key, _, suffix = member.name.rpartition(".")
                    end = member.offset_data + (member.size + 511) // 512 * 512
                    if member.offset_data + member.size > size:
                        source.skip("cut off by the end of a shard")
                    elif member.isfile():
                        source.note(found, key, suffix.lower(), (len(source.paths) - 1, member.offset_data, member.size))
            except (tarfile.TarError, OSError, ValueError):
                pass  # what came before is good; the mark below is then missing
        if not ends_well(path, end):
            source.skip(f"shard {printable(path)} has no end mark: it was cut off or damaged, and what could be read is used")
        source.pair(found)
    return source.close()


def ends_well(path: str, end: int) -> bool:
    """Whether a tar's end mark (a block of zeros) stands after its last member: tarfile stops silently without it."""
    with open(path, "rb") as f:
        f.seek(end)
        return f.read(512) == bytes(512)


def expand(pattern: str) -> list[str]:
    """Braces as shells have them: a{1,2}b and a{00..11}b, left to right."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if not found:
        return [pattern]
    inside = found[1]
    if span := re.fullmatch(r"(\d+)\.\.(\d+)", inside):
        if len(span[2]) > 7:
            raise DataError(f"{pattern} lists too many files: give a range below ten million")
        options = [f"{n:0{len(span[1])}d}" for n in range(int(span[1]), int(span[2]) + 1)]
    else:
        options = inside.split(",")
    return [whole for o in options for whole in expand(pattern[:found.start()] + o + pattern[found.end():])]


class Part:
    """Some samples of a source: what is held out, or what remains."""

    def __init__(self, source: Files, indices: np.ndarray):
        self.source, self.indices, self.skipped = source, indices, source.skipped

    def __len__(self) -> int:
        return len(self.indices)

    def fingerprint(self) -> str:
        return f"{len(self)} of {self.source.fingerprint()}"

    def __getattr__(self, name: str) -> Callable:  # name, caption, picture: of the i-th of these samples
        return lambda i: getattr(self.source, name)(int(self.indices[i]))


def open_source(where: str, field: str = "txt", seed: int = 0, split: str = "train", count: int | None = None) -> Any:
    """`scenes`, a folder, or tars. DataError if there is nothing there to train on."""
    if where == "scenes":
        return Scenes(seed, split, count)
    if os.path.isdir(where):
        return folder(where, field)
    if where.endswith(".tar") or glob.has_magic(where) or "{" in where:
        return shards(where, field)
    raise DataError(f"{where} is no data: give scenes, a folder of images with captions, or tars (a glob or a {{00000..00011}} list)"
                    + ("" if os.path.exists(where) else "; nothing of that name exists"))


def draw(source: Any, count: int) -> Any:
    """`count` samples of a held-out source at most: a fixed random draw, for files often lie in order of what they show."""
    if isinstance(source, Scenes):
        return source
    if len(source) < 2:
        raise DataError(f"{source.where} holds one sample: to measure anything on held-out pictures takes two or more")
    return Part(source, np.random.default_rng(0).permutation(len(source))[:count])


def hold_out(source: Files, count: int) -> tuple[Part, Part]:
    """(train, held-out): a fixed draw of `count` samples, a tenth at most (but two), for a data set without one of its own."""
    if len(source) < 3:
        raise DataError(f"{source.where} holds {len(source)} sample{'s' * (len(source) > 1)}: give at least three, or held-out pictures with --val")
    drawn = np.random.default_rng(0).permutation(len(source))
    cut = max(2, min(count, len(source) // 10))
    return Part(source, np.sort(drawn[cut:])), Part(source, drawn[:cut])



if __name__ == "__main__":
    import sys
    if not 2 <= len(sys.argv) <= 3:
        sys.exit("usage: python sources.py WHERE [CAPTION]")
    try:
        found = open_source(*sys.argv[1:], count=1000)
    except DataError as problem:
        sys.exit(f"error: {problem}")
    print(f"{len(found):,} samples; skipped: {found.skipped or 'none'}")
    for i in range(min(len(found), 5)):
        try:
            print(f"{found.name(i)}: {found.caption(i)}")
        except BadSample as problem:
            print(f"{found.name(i)}: {problem}")

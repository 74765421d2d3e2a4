"""Where captioned images come from: the `scenes`, a folder, WebDataset tars or parquet files.

A folder has images with KEY.txt or KEY.json beside them; tars are as img2dataset writes them.
Memory does not grow with the samples of tars, and by about the length of a path per sample of a
folder.

    python -m inputs.sources WHERE [CAPTION]     counts samples, prints captions and what is skipped
"""
import functools
import glob
import importlib
import os
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np
from PIL import Image

from inputs import scene_captions, scenes
from inputs.files import (
    DEFAULT_OPTIONS,
    ByteRange,
    Choose,
    FileSource,
    ReadOptions,
    caption_weights,
    pair_files,
    printable,
)
from inputs.tar_headers import FORKS, TEXT_SUFFIXES, is_sample_file
from runtime.errors import BadSample, DataError, raise_passing, run_command


class Source(Protocol):
    """What training and evaluation need of a source of captioned images, numbered from 0.

    What cannot be a sample is counted in `skipped` when the source is opened. A sample that turns
    out to be broken when it is read raises BadSample. DataError: nothing can be read at all."""
    skipped: Counter           # {reason: count}
    starts: np.ndarray | None  # (shards + 1,) first sample of each shard, then the number of all;
                               # None where samples are random draws, which need no shuffling
    shuffle_by_chunk: bool     # training keeps the samples of a chunk together (inputs/order.py)
    chunk_length: int          # samples in a chunk: consecutive ones, which one read covers
    is_remote: bool            # on a server: samples are fetched before they are needed

    def __len__(self) -> int: ...

    def fingerprint(self) -> str:
        """Changes when the data does. A run is not continued on other data."""

    def name(self, i: int) -> str:
        """Sample i for a person: a path, and the position in it."""

    def image(self, i: int) -> Image.Image:
        """Opened, not yet decoded."""

    def caption(self, i: int, field: str = "") -> str:
        """By default of the source's own field. Of a list of captions, the first."""

    def sample(self, i: int, fields: Iterable[str], choose: Choose,
               with_chunk: bool = False) -> tuple[list[str], bytes | Image.Image]:
        """The caption of each field, and the image: the bytes of its file, or one that was drawn.
        choose(n) chooses one of n captions. with_chunk: those around this are needed soon."""

    def prefetch_sample(self, i: int, with_chunk: bool) -> None:
        """Only where is_remote: sample i will be needed soon. with_chunk: see `sample`."""

    def chunk_of(self, samples: np.ndarray) -> np.ndarray:
        """Only where shuffle_by_chunk: the number of each sample's chunk in its shard."""


cached_scene = functools.lru_cache(64)(scenes.sample_scene)  # for the caption, then for the image


class SceneSource:
    """The embedded scenes (inputs/scenes.py). A training split is endless: no image comes twice."""
    starts, shuffle_by_chunk, chunk_length, is_remote = None, False, 1, False

    def __init__(self, seed: int, split: str, count: int | None = None, field: str = "txt"):
        self.seed, self.split, self.count = seed, split, count
        self.skipped: Counter = Counter()
        self.field, *others = caption_weights(field)
        for name in (self.field, *others):
            self.caption(0, name)

    def __len__(self) -> int:
        return self.count or 1 << 40

    def fingerprint(self) -> str:
        return "scenes"

    def name(self, i: int) -> str:
        return f"scene {self.split} {i}"

    def scene(self, i: int) -> dict:
        return cached_scene(self.seed, self.split, i)

    def image(self, i: int) -> Image.Image:
        return scenes.render(self.scene(i))

    def caption(self, i: int, field: str = "") -> str:
        field = (field or self.field).partition(",")[0]
        if field not in scene_captions.CAPTION_FIELDS:
            raise DataError(f"scenes have no captions {field!r}: take one of "
                            f"{', '.join(scene_captions.CAPTION_FIELDS)}")
        return scene_captions.caption(self.scene(i), field)

    def sample(self, i: int, fields: Iterable[str], choose: Choose,
               with_chunk: bool = False) -> tuple[list[str], Image.Image]:
        return [self.caption(i, field) for field in fields], self.image(i)

    def caption_nats(self, i: int) -> float:
        """-log of the caption's probability without the image, in nats."""
        return scene_captions.caption_nats(self.scene(i), self.field)

    def grade(self, text: str, i: int) -> dict[str, tuple[int, int]]:
        """{attribute: (correct, total)} of a generated caption of sample i. Alt text is not graded,
        because it states too little."""
        if self.field == "web":
            return {}
        return scene_captions.grade_caption(text, self.scene(i))


# ------------------------------------------------------------------------------------ a folder
class FolderSource(FileSource):
    """All captioned images below a folder, in the order of their paths."""

    def __init__(self, where: str, field: str):
        super().__init__(where, field)
        names: list[bytes] = []  # of each sample: path of the image, NUL, suffix of the text
        pairs = np.zeros(3, int)
        for folder, files in walk_folders(where, self.skipped):
            samples, counts = pair_files(sample_files(files, self.skipped), self.skipped)
            pairs += counts[self.text_suffix]
            below = os.path.relpath(folder, where)
            for image, *texts in samples:
                text = texts[TEXT_SUFFIXES.index(self.text_suffix)]
                if text:
                    path, suffix = os.path.join(below, image), text.rpartition(".")[2]
                    names.append(os.fsencode(path) + b"\0" + os.fsencode(suffix))
        self.names = b"".join(names)  # as one string: a list of strings takes five times the memory
        self.begins = np.cumsum([0, *map(len, names)])
        self.starts = np.array([0, len(names)])
        self.crc = zlib.crc32(self.names)
        self.validate(pairs.tolist())

    def byte_ranges(self, i: int) -> tuple[ByteRange, ByteRange]:
        image, _, suffix = self.names[self.begins[i]:self.begins[i + 1]].partition(b"\0")
        path = os.path.join(self.where, os.path.normpath(os.fsdecode(image)))
        text = f"{path.rpartition('.')[0]}.{os.fsdecode(suffix)}"
        return ByteRange(path, 0, -1), ByteRange(text, 0, -1)


def walk_folders(top: str, skipped: Counter) -> Iterator[tuple[str, list[str]]]:
    """(folder, its files sorted) from `top` down. Links are followed, and no folder comes twice."""
    def count_unreadable(problem: OSError) -> None:
        raise_passing(problem, printable(problem.filename))
        skipped["folders that cannot be read"] += 1

    visited = {os.path.realpath(top)}
    for folder, subfolders, files in os.walk(top, onerror=count_unreadable, followlinks=True):
        names = {}
        for name in sorted(subfolders, reverse=True):  # of links to one folder the first counts
            names[os.path.realpath(os.path.join(folder, name))] = name
        subfolders[:] = sorted(name for path, name in names.items() if path not in visited)
        if len(subfolders) < len(names):
            skipped["folders that links lead to again"] += len(names) - len(subfolders)
        visited |= names.keys()
        yield folder, sorted(files)


def sample_files(names: list[str], skipped: Counter) -> Iterator[tuple[str, str, str]]:
    """(key, suffix, name) of the images and texts among a folder's files."""
    for name in names:
        key, _, suffix = name.rpartition(".")
        if key and is_sample_file(os.fsencode(name)):
            if key.startswith("._"):
                skipped[FORKS] += 1
            else:
                yield key, suffix.lower(), name


# -------------------------------------------------------------------- a part of another source
class Subset:
    """Some samples of a source, in a given order: a validation set."""
    shuffle_by_chunk, chunk_length = False, 1

    def __init__(self, source: FileSource, indices: np.ndarray):
        self.source, self.indices, self.skipped = source, indices, source.skipped
        self.where, self.is_remote = source.where, source.is_remote
        self.starts = np.array([0, len(indices)])

    def source_index(self, i: Any) -> Any:
        """The number in the source of sample i of this part. i may be an array."""
        return self.indices[i]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def fingerprint(self) -> str:
        return f"{len(self)} of {self.source.fingerprint()}"

    def name(self, i: int) -> str:
        return self.source.name(self.source_index(i))

    def image(self, i: int) -> Image.Image:
        return self.source.image(self.source_index(i))

    def caption(self, i: int, field: str = "") -> str:
        return self.source.caption(self.source_index(i), field)

    def sample(self, i: int, *args: Any) -> tuple[list[str], bytes]:
        return self.source.sample(self.source_index(i), *args)

    def prefetch_sample(self, i: int, with_chunk: bool) -> None:
        self.source.prefetch_sample(self.source_index(i), with_chunk)

    def chunk_of(self, samples: np.ndarray) -> np.ndarray:
        return self.source.chunk_of(self.source_index(samples))


class Complement(Subset):
    """All samples of a source except some: the training set. Only the exceptions are stored."""

    def __init__(self, source: FileSource, excluded: np.ndarray):
        super().__init__(source, np.sort(excluded))
        self.starts = source.starts - np.searchsorted(self.indices, source.starts)
        self.kept_before = self.indices - np.arange(len(excluded))  # samples before each exception
        self.shuffle_by_chunk, self.chunk_length = source.shuffle_by_chunk, source.chunk_length

    def source_index(self, i: Any) -> Any:
        return i + np.searchsorted(self.kept_before, i, side="right")


def draw_indices(size: int, count: int) -> np.ndarray:
    """At most `count` of `size` samples in random order, the same in every call."""
    return np.random.default_rng(0).choice(size, min(count, size), replace=False)


def subsample(source: Any, count: int) -> Any:
    """At most `count` samples of a validation source, at random: files may be sorted by content."""
    if isinstance(source, SceneSource):
        return source
    if len(source) < 2:
        raise DataError(f"{source.where} holds one sample: validation needs two images or more")
    return Subset(source, draw_indices(len(source), count))


def train_val_split(source: FileSource, count: int) -> tuple[Complement, Subset]:
    """(training, validation): a fixed random draw of `count` samples, from 2 to a tenth of all."""
    if len(source) < 3:
        plural = "s" if len(source) > 1 else ""
        raise DataError(f"{source.where} holds {len(source)} sample{plural}: give at least three, "
                        "or validation images with --val")
    indices = draw_indices(len(source), max(2, min(count, len(source) // 10)))
    return Complement(source, indices), Subset(source, indices)


# ---------------------------------------------------------------------------------- opening
def open_source(where: str, field: str = "txt", seed: int = 0, split: str = "train",
                count: int | None = None, options: ReadOptions = DEFAULT_OPTIONS) -> Any:
    """The source that --data or --val names. DataError if there is nothing to train on."""
    if where == "scenes":
        return SceneSource(seed, split, count, field)
    is_web = where.startswith(("http://", "https://"))
    name = where.partition("?")[0] if is_web else where  # without an address's query
    if name.endswith(".parquet"):  # this and tars by name: a run needs one kind of source
        return importlib.import_module("inputs.parquet").ParquetSource(where, field, options)
    if os.path.isdir(where):
        return FolderSource(where, field)
    if name.endswith(".tar") or glob.has_magic(name) or "{" in name:
        return importlib.import_module("inputs.tars").TarSource(where, field, options)
    missing = "" if os.path.exists(where) else "; nothing of that name exists"
    raise DataError(f"{where} is no data: give scenes, a folder of images with captions, tars "
                    f"or parquet files (a glob or a {{00000..00011}} list){missing}")


def skipped_samples(source: Source) -> str:
    """How many samples a source left out, by reason."""
    return "; ".join(f"{count} {reason}" for reason, count in source.skipped.items()) or "none"


def main(argv: list[str]) -> int:
    if not 1 <= len(argv) <= 2:
        sys.exit("usage: python -m inputs.sources WHERE [CAPTION]")
    source = open_source(*argv, count=1000)
    print(f"{len(source):,} samples; skipped: {skipped_samples(source)}")
    for i in range(min(len(source), 5)):
        try:
            print(f"{source.name(i)}: {source.caption(i)}")
        except BadSample as problem:
            print(f"{source.name(i)}: {problem}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))

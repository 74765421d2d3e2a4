"""Where pictures with captions lie: the embedded `scenes`, a folder of images with KEY.txt (or KEY.json) beside them, or
WebDataset tars as img2dataset writes them (KEY.jpg KEY.json KEY.txt side by side).

A source knows how many samples it has, and gives the caption and the (undecoded) picture of each; its memory does not
grow with the samples of tars, and in a folder by about the length of a path. What cannot be a sample is skipped, and
counted in `skipped` with the reason; a sample that turns out broken when it is read raises BadSample; only a source with
nothing to train on raises DataError.

    python -m inputs.sources WHERE [CAPTION]        counts samples, shows some captions, and says what is skipped and why
"""
import functools
import glob
import os
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from PIL import Image

from inputs import scene_captions, scenes
from inputs.files import Choose, FileSource, FolderSource
from inputs.tars import TarSource
from runtime.errors import BadSample, DataError

cached_scene = functools.lru_cache(64)(scenes.sample_scene)  # which the caption asks for, and then the picture
class SceneSource:
    """The embedded pictures (inputs/scenes.py). A training split has no end, so no picture comes twice."""
    run = 0

    def __init__(self, seed: int, split: str, count: int | None = None, field: str = "txt"):
        self.seed, self.split, self.count, self.field, self.skipped = seed, split, count, field, {}
        self.caption(0)

    def __len__(self) -> int:
        return self.count or 1 << 40

    def fingerprint(self) -> str:
        return "scenes"

    def name(self, i: int) -> str:
        return f"scene {self.split} {i}"

    def scene(self, i: int) -> dict:
        return cached_scene(self.seed, self.split, i)

    def caption(self, i: int, field: str = "") -> str:
        if (field or self.field) not in scene_captions.CAPTION_FIELDS:
            raise DataError(f"scenes have no captions {field or self.field!r}: take one of {', '.join(scene_captions.CAPTION_FIELDS)}")
        return scene_captions.caption(self.scene(i), field or self.field)

    def caption_nats(self, i: int) -> float:
        """Nats in the caption for one who does not see the picture."""
        return scene_captions.caption_nats(self.scene(i), self.field)

    def grade(self, text: str, i: int) -> dict[str, tuple[int, int]]:
        """What of sample i a generated caption states rightly, by attribute; nothing for alt text, which states too little."""
        return scene_captions.grade_caption(text, self.scene(i)) if self.field != "web" else {}

    def image(self, i: int) -> Image.Image:
        return scenes.render(self.scene(i))

    def sample(self, i: int, fields: Iterable[str], choose: Choose, with_run: bool = False) -> tuple[list[str], Image.Image]:
        """(the text of each field, the image)."""
        return [self.caption(i, field) for field in fields], self.image(i)
class Subset:
    """Some samples of a source, in a given order: what is held out."""
    run = 0

    def __init__(self, source: FileSource, indices: np.ndarray):
        self.source, self.indices, self.skipped = source, indices, source.skipped
        self.starts = np.array([0, len(indices)])

    def at(self, i: Any) -> Any:
        """Which sample of the source is the i-th of this part; or which ones, of an array."""
        return self.indices[i]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def fingerprint(self) -> str:
        return f"{len(self)} of {self.source.fingerprint()}"

    def __getattr__(self, name: str) -> Callable:  # name, caption, picture: of the i-th of these samples
        return lambda i, *more: getattr(self.source, name)(self.at(i), *more)


class Complement(Subset):
    """All samples of a source but some: what remains for training. Only those left out are listed."""

    def __init__(self, source: FileSource, left_out: np.ndarray):
        super().__init__(source, np.sort(left_out))
        self.starts = source.starts - np.searchsorted(self.indices, source.starts)
        self.before = self.indices - np.arange(len(left_out))  # how many remain before each one that is left out
        self.run = source.run

    def at(self, i: Any) -> Any:
        return i + np.searchsorted(self.before, i, side="right")


def open_source(where: str, field: str = "txt", seed: int = 0, split: str = "train", count: int | None = None) -> Any:
    """`scenes`, a folder, or tars. DataError if there is nothing there to train on."""
    if where == "scenes":
        return SceneSource(seed, split, count, field)
    if os.path.isdir(where):
        return FolderSource(where, field)
    if where.endswith(".tar") or glob.has_magic(where) or "{" in where:
        return TarSource(where, field)
    raise DataError(f"{where} is no data: give scenes, a folder of images with captions, or tars (a glob or a {{00000..00011}} list)"
                    + ("" if os.path.exists(where) else "; nothing of that name exists"))


def draw_indices(size: int, count: int) -> np.ndarray:
    """`count` of `size` samples, the same at every call, in random order."""
    return np.random.default_rng(0).choice(size, min(count, size), replace=False)


def subsample(source: Any, count: int) -> Any:
    """`count` samples of a held-out source at most: a fixed random draw, for files often lie in order of what they show."""
    if isinstance(source, SceneSource):
        return source
    if len(source) < 2:
        raise DataError(f"{source.where} holds one sample: to measure anything on held-out pictures takes two or more")
    return Subset(source, draw_indices(len(source), count))


def train_val_split(source: FileSource, count: int) -> tuple[Complement, Subset]:
    """(train, held-out): a fixed draw of `count` samples, a tenth at most (but two), for a data set without one of its own."""
    if len(source) < 3:
        raise DataError(f"{source.where} holds {len(source)} sample{'s' * (len(source) > 1)}: give at least three, or held-out pictures with --val")
    drawn = draw_indices(len(source), max(2, min(count, len(source) // 10)))
    return Complement(source, drawn), Subset(source, drawn)


if __name__ == "__main__":
    import sys
    if not 2 <= len(sys.argv) <= 3:
        sys.exit("usage: python -m inputs.sources WHERE [CAPTION]")
    try:
        found = open_source(*sys.argv[1:], count=1000)
    except DataError as problem:
        sys.exit(f"error: {problem}")
    print(f"{len(found):,} samples; skipped: {dict(found.skipped) or 'none'}")
    for i in range(min(len(found), 5)):
        try:
            print(f"{found.name(i)}: {found.caption(i)}")
        except BadSample as problem:
            print(f"{found.name(i)}: {problem}")

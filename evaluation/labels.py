"""Pictures with labels: what is asked about them when features are judged.

A scene's labels come from its record. Of other data they are fields of KEY.json (--label-fields caption,group), or the text of KEY.txt.
A label is one text a picture, or one for each place of a scene; "" where there is nothing to tell, as the color of what
stands in an empty place.

Letters: n pictures, H heads (places where a label is told: 4, or 1), R pixels a side.

    python -m evaluation.labels WHERE [LABEL,LABEL]        counts the labels of 1,000 pictures
"""
import dataclasses
import functools
import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from inputs import images, scenes, sources
from runtime.errors import BadSample, DataError

RAW_SIZE = 24              # pixels a side of the raw pictures that stand beside the features
UNSEEN = 1 << 30      # from this training scene on, none was ever trained on
SCENE_LABELS = ("color", "shape", "size", "place", "count", "word", "background_color", "pattern")
class LabeledImages:
    """Samples of a source and their labels {name: (n,H) of str}. What is decoded or encoded is kept."""

    def __init__(self, source: Any, indices: Sequence[int], labels: dict[str, np.ndarray], copies: int = 1, augment: images.Augment | None = None):
        """copies: how often each picture comes, the first time as it is, then augmented."""
        self.source, self.indices, self.copies, self.augment = source, list(indices), copies, augment
        self.labels = {name: np.concatenate([found] * copies) for name, found in labels.items()}
        self.pixel_cache: dict[int, np.ndarray] = {}
        self.copied: dict[tuple, LabeledImages] = {}
        self.feature_cache: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

    def __len__(self) -> int:
        return len(self.indices) * self.copies

    def augmented(self, copies: int, augment: images.Augment) -> "LabeledImages":
        """The same pictures, and copies - 1 augmented ones of each; the same at every call."""
        if (copies, augment) not in self.copied:
            self.copied[copies, augment] = LabeledImages(self.source, self.indices, self.labels, copies, augment)
        return self.copied[copies, augment]

    def pixels(self, resolution: int) -> np.ndarray:
        """(n,R,R,3) uint8, as held-out pictures are prepared: the whole, resized. Each picture is drawn once, at RAW pixels too."""
        if resolution not in self.pixel_cache:
            sides = {resolution, RAW_SIZE}
            for side in sides:
                self.pixel_cache[side] = np.empty((len(self), side, side, 3), np.uint8)
            for n in range(len(self)):
                how = self.augment if n >= len(self.indices) else None
                for side in sides:
                    picture = self.source.image(self.indices[n % len(self.indices)])
                    self.pixel_cache[side][n] = images.decode_and_augment(picture, side, how, np.random.default_rng((n, 5)))
        return self.pixel_cache[resolution]

    def features(self, encoder: Any) -> Any:
        """features.Features of all pictures: an encoder runs once over them."""
        if encoder not in self.feature_cache:
            self.feature_cache[encoder] = encoder(self.pixels(encoder.resolution), batch=128)
        return self.feature_cache[encoder]


def scene_labels(record: dict[str, Any]) -> dict[str, list[str]]:
    """Of color, shape and size one a place; of place whether it is taken; the rest one a scene."""
    there = {o["place"]: o for o in record["objects"]}
    told = {name: [there.get(place, {}).get(name, "") for place in scenes.PLACES] for name in ("color", "shape", "size")}
    return told | {"place": ["taken" if place in there else "free" for place in scenes.PLACES], "count": [str(len(there))],
                   "word": [record["word"] or ""], "background_color": [record["background_color"]], "pattern": [record["pattern"]]}


@functools.lru_cache(4)
def scene_images(seed: int, split: str, count: int) -> LabeledImages:
    """`count` scenes with their labels; those of the split "train" are none that a run has trained on."""
    source = sources.SceneSource(seed, split, count)
    indices = range(UNSEEN, UNSEEN + count) if split == "train" else range(count)
    told = [scene_labels(source.scene(i)) for i in indices]
    return LabeledImages(source, indices, {name: np.array([t[name] for t in told]) for name in SCENE_LABELS})


def file_images(source: Any, labels: Sequence[str], count: int) -> LabeledImages:
    """`count` samples at most whose picture and labels can be read; a label is "txt" or a field of the json that the source reads."""
    indices, told, why = [], {name: [] for name in labels}, ""
    for i in np.sort(sources.draw_indices(len(source), count)).tolist():
        try:
            found = {name: source.caption(i, name).strip() for name in labels}
            images.decode_and_augment(source.image(i), RAW_SIZE)
        except BadSample as problem:
            why = why or f"; {source.name(i)}: {problem}".replace("--alt-field", "--label-fields")
            continue
        indices.append(i)
        for name, text in found.items():
            told[name].append([text])
    if len(indices) < 2:
        raise DataError(f"fewer than two pictures have the labels {', '.join(labels)}{why}")
    return LabeledImages(source, indices, {name: np.array(texts) for name, texts in told.items()})


def open_labeled_images(settings: Any, labels: Sequence[str], count: int, train: bool = True) -> tuple[LabeledImages | None, LabeledImages]:
    """(training, held-out) pictures of a run's settings with labels: count held-out ones at most, of those that the settings hold out, and four
    times as many to train on; None for those without `train`. DataError says what is wrong with data or labels."""
    import data
    where = {settings.data, settings.val or settings.data} if train else {settings.val or settings.data}
    if where == {"scenes"}:
        if unknown := set(labels) - set(SCENE_LABELS):
            raise DataError(f"--label-fields {', '.join(sorted(unknown))}: scenes have {', '.join(SCENE_LABELS)}")
        count = min(count, UNSEEN // 4)
        pair = scene_images(settings.seed, "train", 4 * count) if train else None, scene_images(settings.seed, "val", count)
        return tuple(select_labels(p, labels) if p else p for p in pair) if labels else pair
    if not labels:
        raise DataError(f"no label is named: which fields of the KEY.json in {settings.data} are classes? (evaluate.py --label-fields, evaluation/labels.py's second word)")
    if "txt" in labels and len(labels) > 1:
        raise DataError("--label-fields txt is the KEY.txt, the others are fields of the KEY.json: ask for them one at a time")
    settings = dataclasses.replace(settings, alt_field="", caption_field=labels[0])
    try:
        if not train:
            return None, file_images(data.open_validation_data(settings), labels, count)
        both = data.open_data(settings)
    except DataError as problem:
        raise DataError(str(problem).replace("--caption-field", "--label-fields")) from None
    return file_images(both[0], labels, 4 * count), file_images(both[1], labels, count)


def select_labels(pictures: LabeledImages, labels: Sequence[str]) -> LabeledImages:
    """The same pictures with some of their labels, sharing all that is decoded and encoded."""
    found = LabeledImages(pictures.source, pictures.indices, {name: pictures.labels[name] for name in labels})
    found.pixel_cache, found.feature_cache = pictures.pixel_cache, pictures.feature_cache
    return found


if __name__ == "__main__":
    import sys

    from config import Config
    if not 2 <= len(sys.argv) <= 3:
        sys.exit("usage: python -m evaluation.labels WHERE [LABEL,LABEL]")
    images.silence_pillow()
    try:
        _, found = open_labeled_images(Config(data=sys.argv[1], val_samples=1000), sys.argv[2].split(",") if len(sys.argv) > 2 else (), 1000)
    except DataError as problem:
        sys.exit(f"error: {problem}")
    for name, texts in found.labels.items():
        counts = Counter(texts.ravel().tolist())
        print(f"{name}: {len(counts)} kinds; " + ", ".join(f"{text or '(none)'} {n}" for text, n in counts.most_common(8)))

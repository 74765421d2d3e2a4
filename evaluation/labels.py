"""Images with labels, for probes and neighbors.

The labels of a scene come from its record. Those of other data are fields of KEY.json
(--label-fields caption,group), or the text of KEY.txt. A label is one text per image, or one per
place of a scene; "" where there is none, such as the color in an empty place.

Letters: n images, H places (4, or 1), R pixels per side.

    python -m evaluation.labels WHERE [LABEL,LABEL]        counts the labels of 1,000 images
"""
import dataclasses
import functools
import re
import sys
import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from config import Config
from evaluation.run_data import check_split
from evaluation.tasks import progress
from inputs import images, opening, scenes, sources
from interop.encoder import Encoder, Features
from runtime.errors import BadSample, DataError, run_command

RAW_SIZE = 24     # pixels per side of the raw images that are compared with features
UNSEEN = 1 << 30  # no run trains on the training scenes from this one on
SCENE_LABELS = ("color", "shape", "size", "place", "count", "word", "background_color", "pattern")


class LabeledImages:
    """Samples of a source and their labels {name: (n,H) of str}. Pixels and features are cached."""

    def __init__(self, source: Any, indices: Sequence[int], labels: dict[str, np.ndarray],
                 copies: int = 1, augment: images.Augment | None = None):
        """copies: how often each image comes, the first time as it is, then augmented."""
        self.source, self.indices = source, list(indices)
        self.copies, self.augment = copies, augment
        self.labels = {name: np.concatenate([texts] * copies) for name, texts in labels.items()}
        self.pixel_cache: dict[int, np.ndarray] = {}
        self.augmented_cache: dict[tuple, LabeledImages] = {}
        self.feature_cache: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

    def __len__(self) -> int:
        return len(self.indices) * self.copies

    def augmented(self, copies: int, augment: images.Augment) -> "LabeledImages":
        """The same images and copies - 1 augmented ones of each; the same at every call."""
        key = copies, augment
        if key not in self.augmented_cache:
            self.augmented_cache[key] = LabeledImages(self.source, self.indices, self.labels, *key)
        return self.augmented_cache[key]

    def subset(self, rows: np.ndarray) -> "LabeledImages":
        """The images `rows` and their labels, without copies."""
        indices = [self.indices[row] for row in rows]
        labels = {name: texts[rows] for name, texts in self.labels.items()}
        return LabeledImages(self.source, indices, labels)

    def pixels(self, resolution: int) -> np.ndarray:
        """(n,R,R,3) uint8, preprocessed like validation images. An image is decoded for R and for
        RAW_SIZE at once."""
        if resolution in self.pixel_cache:
            return self.pixel_cache[resolution]
        for side in {resolution, RAW_SIZE}:
            pixels = np.empty((len(self), side, side, 3), np.uint8)
            for n in progress(range(len(self)), f"images at {side} px"):
                index = self.indices[n % len(self.indices)]
                augment = self.augment if n >= len(self.indices) else None
                rng = np.random.default_rng((n, 5))
                image = self.source.image(index)
                pixels[n] = images.decode_and_augment(image, side, augment, rng)
            self.pixel_cache[side] = pixels
        return self.pixel_cache[resolution]

    def features(self, encoder: Encoder) -> Features:
        """Features of all images. An encoder runs once on them."""
        if encoder not in self.feature_cache:
            pixels = self.pixels(encoder.resolution)
            parts = []
            for start in progress(range(0, len(pixels), 1280), "features"):
                parts.append(encoder(pixels[start:start + 1280], batch=128))
            self.feature_cache[encoder] = Features(*map(np.concatenate, zip(*parts)))
        return self.feature_cache[encoder]


def scene_labels(record: dict[str, Any]) -> dict[str, list[str]]:
    """Color, shape, size, and whether the place is taken: one each per place. The others: one per
    scene."""
    objects = {o["place"]: o for o in record["objects"]}
    labels = {}
    for name in ("color", "shape", "size"):
        labels[name] = [objects.get(place, {}).get(name, "") for place in scenes.PLACES]
    labels["place"] = ["taken" if place in objects else "free" for place in scenes.PLACES]
    labels["count"] = [str(len(objects))]
    labels["word"] = [record["word"] or ""]
    labels["background_color"] = [record["background_color"]]
    labels["pattern"] = [record["pattern"]]
    return labels


@functools.lru_cache(4)
def scene_images(seed: int, split: str, count: int) -> LabeledImages:
    """`count` scenes with their labels. No run has trained on those of the split "train"."""
    source = sources.SceneSource(seed, split, count)
    indices = range(UNSEEN, UNSEEN + count) if split == "train" else range(count)
    per_scene = [scene_labels(source.scene(i)) for i in indices]
    labels = {name: np.array([one[name] for one in per_scene]) for name in SCENE_LABELS}
    return LabeledImages(source, indices, labels)


def about_labels(message: str) -> str:
    """A message about captions, as one about labels."""
    message = re.sub("--(caption|alt)-field", "--label-fields", message)
    message = message.replace("no caption can be read", "no label can be read")
    return message.replace("caption is no text", "a label must be text, as in \"3\", and is")


def file_images(source: Any, labels: Sequence[str], count: int) -> LabeledImages:
    """At most `count` samples whose image and labels can be read. A label is "txt" or a field of
    KEY.json. DataError if fewer than two can be used."""
    indices, texts, reason = [], {name: [] for name in labels}, ""
    for i in np.sort(sources.draw_indices(len(source), count)).tolist():
        try:
            row = {name: [source.caption(i, name).strip()] for name in labels}
            images.decode_and_augment(source.image(i), RAW_SIZE)
        except BadSample as problem:
            if not reason:
                reason = about_labels(f"; {source.name(i)}: {problem}")
            continue
        indices.append(i)
        for name in labels:
            texts[name].append(row[name])
    if len(indices) < 2:
        raise DataError(f"fewer than two images have the labels {', '.join(labels)}{reason}")
    return LabeledImages(source, indices, {name: np.array(rows) for name, rows in texts.items()})


def check_labels(labels: Sequence[str], where: str) -> None:
    """DataError unless these can be the labels of the data that `where` names."""
    if not labels:
        raise DataError(f"no label is named: which fields of the KEY.json in {where} are classes? "
                        "Name them with --label-fields (python -m evaluation.labels: as the second "
                        "word)")
    if "txt" in labels and len(labels) > 1:
        raise DataError("--label-fields txt is the KEY.txt, and the others are fields of the "
                        "KEY.json: measure them one at a time")


def open_labeled_images(cfg: Config, labels: Sequence[str], count: int, train: bool = True,
                        run_cfg: Config | None = None
                        ) -> tuple[LabeledImages | None, LabeledImages]:
    """(training, validation) images of the settings cfg: at most `count` of its validation images
    and four times as many to train on, or None without `train`. run_cfg: the settings of the run,
    for run_data.check_split. DataError says what is wrong with the data or the labels."""
    val = cfg.val or cfg.data
    if val == "scenes" and (not train or cfg.data == "scenes"):
        return open_scenes(cfg.seed, labels, min(count, UNSEEN // 4), train)
    check_labels(labels, cfg.data)
    cfg = dataclasses.replace(cfg, alt_field="", caption_field=labels[0])
    try:
        check_split(run_cfg or cfg, cfg)
        if not train:
            return None, file_images(opening.open_validation_data(cfg), labels, count)
        train_source, val_source = opening.open_data(cfg)
    except DataError as problem:
        raise DataError(about_labels(str(problem))) from None
    return file_images(train_source, labels, 4 * count), file_images(val_source, labels, count)


def open_scenes(seed: int, labels: Sequence[str], count: int,
                train: bool) -> tuple[LabeledImages | None, LabeledImages]:
    """`open_labeled_images` of scenes; without names, all their labels."""
    unknown = sorted(set(labels) - set(SCENE_LABELS))
    if unknown:
        raise DataError(f"--label-fields {', '.join(unknown)}: scenes have "
                        + ", ".join(SCENE_LABELS))
    names = labels or SCENE_LABELS
    train_images = select_labels(scene_images(seed, "train", 4 * count), names) if train else None
    return train_images, select_labels(scene_images(seed, "val", count), names)


def select_labels(labeled: LabeledImages, names: Sequence[str]) -> LabeledImages:
    """The same images with some of their labels. The caches are shared."""
    labels = {name: labeled.labels[name] for name in names}
    selected = LabeledImages(labeled.source, labeled.indices, labels)
    selected.pixel_cache, selected.feature_cache = labeled.pixel_cache, labeled.feature_cache
    return selected


def main(argv: list[str]) -> int:
    if not 1 <= len(argv) <= 2:
        sys.exit("usage: python -m evaluation.labels WHERE [LABEL,LABEL]")
    where, names = argv[0], argv[1].split(",") if len(argv) > 1 else ()
    if where == "scenes":
        _, labeled = open_scenes(0, names, 1000, train=False)
    else:
        check_labels(names, where)
        labeled = file_images(sources.open_source(where, names[0]), names, 1000)
    for name, texts in labeled.labels.items():
        counts = Counter(texts.ravel().tolist())
        most = [f"{text or '(none)'} {count}" for text, count in counts.most_common(8)]
        print(f"{name}: {len(counts)} classes; " + ", ".join(most))
    return 0


if __name__ == "__main__":
    images.silence_pillow()
    sys.exit(run_command(main, sys.argv[1:]))

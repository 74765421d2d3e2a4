"""Samples in files: how images and captions are paired, read and checked.

A sample is an image KEY.jpg (.png, .webp …) with a caption KEY.txt, or with a field of KEY.json.
FileSource does all but locate the files; FolderSource (inputs/sources.py) and TarSource
(inputs/tars.py) do that.
"""
import glob
import importlib
import io
import json
import math
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from inputs.images import open_image
from inputs.tar_headers import IMAGE_SUFFIXES, TEXT_SUFFIXES
from inputs.tokenizer import is_dropped
from runtime.errors import BadSample, ConfigError, DataError, raise_passing

MAX_IMAGE_BYTES, MAX_TEXT_BYTES = 256 << 20, 1 << 20  # a larger file is a broken sample
Choose = Callable[[int], int]                         # n captions to the one to use, 0..n-1


class ReadOptions(NamedTuple):
    """How --data and --val are read, beside their names."""
    image_field: str = "image"  # the column of a parquet file
    alt_field: str = ""         # the field of the second text, if one is needed
    cache_dir: str = ""         # "" for disk_cache.default_folder()
    cache_gb: float = 20.0


DEFAULT_OPTIONS = ReadOptions()


class ByteRange(NamedTuple):
    path: str
    offset: int
    size: int    # -1 for the rest of the file


def choose_first(count: int) -> int:
    """The caption of a list that validation and the vocabulary use."""
    return 0


def printable(path: str) -> str:
    """A path as text: on disk it may be bytes that are not UTF-8."""
    return os.fsencode(path).decode("utf-8", "replace")


def read_span(path: str, begin: int, end: int) -> bytes:
    """The bytes begin..end of a file, fewer if it ends before. OSError if it cannot be read."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe of that name must not block
    try:
        parts = []
        while begin < end and (part := os.pread(fd, end - begin, begin)):  # it may return less
            parts.append(part)
            begin += len(part)
        return b"".join(parts)
    finally:
        os.close(fd)


class LocalStorage:
    """Files on this machine. inputs/remote_storage.py has the same methods for addresses."""
    is_remote = False

    def file_size(self, path: str) -> int:
        """In bytes. OSError if there is no such file."""
        return os.stat(path).st_size

    def read_span(self, path: str, begin: int, end: int) -> bytes:
        return read_span(path, begin, end)

    def local_copy(self, path: str) -> str:
        """The path of the file on this machine."""
        return path


LOCAL = LocalStorage()


def open_storage(where: str, options: ReadOptions = DEFAULT_OPTIONS) -> Any:
    """What reads the files of a path or an address (gs://, s3://, hf://, https://)."""
    if "://" not in where:
        return LOCAL
    return importlib.import_module("inputs.remote_storage").RemoteStorage(options)


def pair_files(files: Iterable[tuple[Hashable, str, Any]],
               skipped: Counter) -> tuple[list[tuple[Any, Any, Any]], dict[str, list[int]]]:
    """Samples from files, each given as (key, suffix, location).

    Returns (image, txt, json) locations for each key with an image, None for a missing text; and
    for each kind of text its counts [image and text, image only, text only]. Of files with the same
    name the last is used, as when a tar is unpacked."""
    keys: dict[Hashable, dict[str, Any]] = {}
    for key, suffix, location in files:
        parts = keys.setdefault(key, {})
        if suffix in parts:
            skipped["replaced by a later file of the same name"] += 1
        parts[suffix] = location
    samples = []
    pairs = {text: [0, 0, 0] for text in TEXT_SUFFIXES}
    for parts in keys.values():
        images = [parts[suffix] for suffix in IMAGE_SUFFIXES if suffix in parts]
        if len(images) > 1:
            skipped["beside another image of the same name"] += len(images) - 1
        if images:
            samples.append((images[0], *(parts.get(text) for text in TEXT_SUFFIXES)))
        for text, counts in pairs.items():
            if images and text in parts:
                counts[0] += 1
            elif images:
                counts[1] += 1
            elif text in parts:
                counts[2] += 1
    return samples, pairs


class FileSource:
    """A source (inputs/sources.py) of image and text files. `field` is "txt" for KEY.txt, or a
    field of KEY.json. A subclass sets `starts` and `crc`, calls `validate`, and has
    `byte_ranges`."""
    shuffle_by_chunk, chunk_length = False, 1
    has_columns = False  # texts are columns of a table, so that txt is a name as any other

    def __init__(self, where: str, field: str, options: ReadOptions = DEFAULT_OPTIONS):
        self.storage = open_storage(where, options)
        self.where, self.fields = where, list(caption_weights(field))
        self.is_remote = "://" in where
        self.field = ",".join(self.fields)
        self.text_suffix = "txt" if self.fields == ["txt"] else "json"
        self.skipped: Counter = Counter()
        self.starts = np.zeros(1, np.int64)
        self.crc = 0

    def byte_ranges(self, i: int) -> tuple[ByteRange, ByteRange]:
        """Where the image and the text of sample i are."""
        raise NotImplementedError

    def validate(self, counts: list[int]) -> None:
        """DataError if there is nothing to train on. counts: how many have [image and text, an
        image only, a text only]."""
        _, without_text, without_image = counts
        self.skipped += Counter({f"without a .{self.text_suffix}": without_text,
                                 "without an image": without_image})
        if not len(self):
            raise DataError(f"no captioned image in {self.where}{self.advice()}")
        if self.text_suffix == "json" and "txt" in self.fields and not self.has_columns:
            raise DataError("--caption-field: txt cannot be mixed with the fields of KEY.json")
        for field in self.fields:
            self.check_field(field)

    def check_field(self, field: str) -> None:
        """A wrong --caption-field fails from the start. DataError if the first 200 samples lack it;
        with several fields, 200 random ones, because a part of the source may lack one of them."""
        problems, count = [], min(len(self), 200)
        draw = np.random.default_rng(0).choice(len(self), count, replace=False).tolist()
        for i in range(count) if len(self.fields) == 1 else draw:
            try:
                self.caption(i, field)
                return
            except BadSample as problem:
                problems.append(str(problem))
        raise DataError(f"no caption can be read from {count} samples of {self.where}: "
                        f"{problems[0]}")

    def advice(self) -> str:
        """What a place without a sample has instead, and what it needs."""
        for message, pattern in ((", but tars: name those, as '{}'", "*.tar"),
                                 (", but parquet files: name those, as '{}'", "*.parquet")):
            if glob.glob(os.path.join(glob.escape(self.where), pattern)):
                return message.format(os.path.join(self.where, pattern))
        contents = "; ".join(f"{n} {why}" for why, n in self.skipped.items()) or "no images at all"
        need = f"a KEY.json with the field {self.field!r} beside it"
        if self.field == "txt":
            need = "a KEY.txt beside it, or a KEY.json and --caption-field FIELD"
        return f": {contents}. Each KEY.jpg (or .png, .webp …) needs {need}"

    def __len__(self) -> int:
        return int(self.starts[-1])

    def fingerprint(self) -> str:
        return f"{len(self)} samples ({self.crc:08x})"

    def name(self, i: int) -> str:
        path, offset, _ = self.byte_ranges(i)[0]
        return printable(path) + (f" at byte {offset}" if offset else "")

    def image(self, i: int) -> Image.Image:
        return open_image(io.BytesIO(self.read_bytes(self.byte_ranges(i)[0], MAX_IMAGE_BYTES)))

    def caption(self, i: int, field: str = "") -> str:
        return self.parse_caption(self.read_bytes(self.byte_ranges(i)[1], MAX_TEXT_BYTES), field)

    def sample(self, i: int, fields: Iterable[str], choose: Choose,
               with_chunk: bool = False) -> tuple[list[str], bytes]:
        image, text = self.read_sample(i, with_chunk)
        captions = [self.parse_caption(text, field, choose) for field in fields]
        return captions, image

    def read_sample(self, i: int, with_chunk: bool) -> tuple[bytes, bytes]:
        """The bytes of the image and of the text. The text is read first, because it is short."""
        image, text = self.byte_ranges(i)
        text_bytes = self.read_bytes(text, MAX_TEXT_BYTES)
        return self.read_bytes(image, MAX_IMAGE_BYTES), text_bytes

    def read_bytes(self, where: ByteRange, limit: int) -> bytes:
        """BadSample if they cannot be read, are cut off or are more than `limit`. DataError for an
        error that may pass."""
        path, offset, size = where
        try:
            if size < 0:
                size = self.storage.file_size(path) - offset
            check_size(size, limit)
            data = self.storage.read_span(path, offset, offset + size)
        except OSError as problem:
            raise_passing(problem, printable(path))
            raise BadSample(f"cannot be read ({problem.strerror or problem})") from None
        if len(data) < size:
            raise BadSample("is cut off")
        return data

    def parse_caption(self, data: bytes, field: str = "", choose: Choose = choose_first) -> str:
        """The caption in the bytes of a KEY.txt or KEY.json. `field` replaces the source's own. Of
        several, as in a,b, the first that the sample has is used."""
        names = (field or self.field).split(",")
        try:
            text = data.decode("utf-8-sig")
            fields = json.loads(text) if self.text_suffix == "json" else {"txt": text}
        except UnicodeDecodeError:
            raise BadSample("caption is not UTF-8 text") from None
        except (ValueError, RecursionError):  # a number with thousands of digits is a ValueError
            raise BadSample("json cannot be parsed") from None
        problems = []
        for name in names:
            flag = "--caption-field" if name in self.fields else "--alt-field"
            try:
                return json_caption(fields, name, flag, choose)
            except BadSample as problem:
                problems.append(problem)
        raise problems[0]


def check_size(size: int, limit: int) -> None:
    if size > limit:
        raise BadSample(f"is larger than {limit >> 20} MiB")


def caption_weights(text: str) -> dict[str, float]:
    """{field: probability} of --caption-field: one name, or several as in a,b or a:3,b:1."""
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = part.rpartition(":")
        try:
            weight = float(number) if name else 1.0
        except ValueError:  # the colon is a part of the name
            name, weight = "", 1.0
        name = (name or part).strip()
        if not name or name in weights or not 0 < weight < math.inf:
            raise ConfigError(f"--caption-field {text}: give a field, or several once each with "
                              "weights above 0, as in short:1,dense:3")
        weights[name] = weight
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}


def has_word(text: str) -> bool:
    """Whether the tokenizer leaves anything of a text: not of zero-width spaces, for example."""
    return any(not (char.isspace() or is_dropped(char) or unicodedata.category(char) == "Mn")
               for char in text)


def json_caption(fields: Any, field: str, flag: str, choose: Choose) -> str:
    """A field of a parsed KEY.json; of a list, the text that `choose` chooses."""
    if not isinstance(fields, dict) or field not in fields:
        names = ", ".join(fields) if isinstance(fields, dict) else "no fields"
        names = names[:200].encode("utf-8", "replace").decode()  # as below
        raise BadSample(f"json has no field {field!r} (it has {names}); name one with {flag}")
    text = fields[field]
    if isinstance(text, list):
        texts = [part for part in text if isinstance(part, str) and has_word(part)]
        if not texts:
            raise BadSample("caption list holds no text" if text else "caption list is empty")
        text = texts[choose(len(texts))]
    if text is not None and not isinstance(text, str):
        raise BadSample(f"caption is no text: {str(text)[:40]}")
    # json can have half a surrogate pair, which cannot be printed
    text = (text or "").encode("utf-8", "replace").decode()
    if not text.strip():
        raise BadSample("caption is empty")
    if not has_word(text):
        raise BadSample("caption holds no word")
    return text

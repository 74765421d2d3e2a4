"""TODO."""
import glob
import io
import json
import os
import threading
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future
from typing import Any

import numpy as np
from PIL import Image

from inputs import tar_headers
from inputs.images import open_image
from inputs.tar_headers import IMAGE_SUFFIXES, TEXT_SUFFIXES
from runtime.errors import BadSample, DataError


def pair_files(files: Iterable[tuple[Hashable, str, Any]], skipped: Counter) -> tuple[list[tuple[Any, Any, Any]], dict[str, list[int]]]:
    """Samples of (key, suffix, place) files: (image, txt, json) places of each key with an image, None for what it
    lacks; and for each kind of text [with image and text, image alone, text alone]. Of equal names the last counts, as
    when a tar is unpacked."""
    keys: dict[Hashable, dict[str, Any]] = {}
    for key, suffix, place in files:
        parts = keys.setdefault(key, {})
        if suffix in parts:
            skipped["replaced by a later file of the same name"] += 1
        parts[suffix] = place
    rows, pairs = [], {text: [0, 0, 0] for text in TEXT_SUFFIXES}
    for parts in keys.values():
        images = [parts[s] for s in IMAGE_SUFFIXES if s in parts]
        if len(images) > 1:
            skipped["beside another image of the same name"] += len(images) - 1
        if images:
            rows.append((images[0], *map(parts.get, TEXT_SUFFIXES)))
        for text, counts in pairs.items():
            if images or text in parts:
                counts[0 if images and text in parts else 1 if images else 2] += 1
    return rows, pairs


def read_span(path: str, begin: int, end: int) -> bytes:
    """The bytes begin..end of a file, fewer where it ends before. OSError if they cannot be read."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe of that name must not block
    try:
        parts = []
        while begin < end and (part := os.pread(fd, end - begin, begin)):  # the system may return less than asked for
            parts.append(part)
            begin += len(part)
        return b"".join(parts)
    finally:
        os.close(fd)


class SpanCache:
    """Spans of files in memory, together `limit` bytes at most: the one used longest ago is dropped first.
    Threads that want the same span wait for one read of it."""

    def __init__(self, limit: int):
        self.limit, self.held, self.lock = limit, 0, threading.Lock()
        self.spans: OrderedDict[tuple[str, int, int], Future] = OrderedDict()

    def read(self, path: str, begin: int, end: int) -> bytes:
        """As `read_span`. A span that could not be read is not kept."""
        key = path, begin, end
        with self.lock:
            span = self.spans.get(key)
            missing = span is None
            if missing:
                span = self.spans[key] = Future()
                self.held += end - begin
                while self.held > self.limit and len(self.spans) > 1:
                    self.drop(next(iter(self.spans)))
            else:
                self.spans.move_to_end(key)
        if missing:
            try:
                span.set_result(read_span(path, begin, end))
            except BaseException as problem:
                with self.lock:
                    if self.spans.get(key) is span:
                        self.drop(key)
                span.set_exception(problem)
        return span.result()

    def drop(self, key: tuple[str, int, int]) -> None:
        """Forget a span; the lock is held."""
        del self.spans[key]
        self.held -= key[2] - key[1]
MAX_IMAGE_BYTES, MAX_TEXT_BYTES = 256 << 20, 1 << 20               # bytes: a larger file is a broken sample
ByteRange = tuple[str, int, int]                             # path, offset, bytes
Choose = Callable[[int], int]                            # which of n captions is taken


def first_of(count: int) -> int:
    """Which of a sample's captions validation and the vocabulary take."""
    return 0


class FileSource:
    """Samples that lie in files. `starts` (shards + 1,) int64 says at which sample each shard begins, and how many there
    are in all; a folder is one shard. `field` is "txt" for the KEY.txt, or the name of a field in the KEY.json. `run` is
    how many samples in a row training reads at once and then mixes with others (data.py); 0: all are shuffled together."""
    run = 0

    def __init__(self, where: str, field: str):
        self.where, self.field, self.text = where, field, "txt" if field == "txt" else "json"
        self.skipped: Counter = Counter()
        self.starts, self.crc = np.zeros(1, np.int64), 0

    def byte_ranges(self, i: int) -> tuple[ByteRange, ByteRange]:
        """Where the image and the text of sample i lie."""
        raise NotImplementedError

    def validate(self, pairs: list[int]) -> None:
        """After indexing: pairs counts [image and text, image alone, text alone]. Refuses a source that holds nothing to
        train on."""
        self.skipped += Counter({f"without a .{self.text}": pairs[1], "without an image": pairs[2]})  # += drops what is 0
        if not len(self):
            found = "; ".join(f"{n} {why}" for why, n in self.skipped.items()) or "no images at all"
            if glob.glob(os.path.join(glob.escape(self.where), "*.tar")):
                raise DataError(f"no captioned image in {self.where}, but tars: name those, as '{os.path.join(self.where, '*.tar')}'")
            raise DataError(f"no captioned image in {self.where}: {found}. Each KEY.jpg (or .png, .webp …) needs "
                            + ("a KEY.txt beside it, or a KEY.json and --caption-field FIELD" if self.field == "txt" else
                               f"a KEY.json with the field {self.field!r} beside it"))
        problems = []
        for i in range(min(len(self), 200)):                   # a wrong --caption-field shows in the first samples or never
            try:
                self.caption(i)
                return
            except BadSample as problem:
                problems.append(str(problem))
        raise DataError(f"no caption can be read from the first {len(problems)} samples of {self.where}: {problems[0]}")

    def __len__(self) -> int:
        return int(self.starts[-1])

    def fingerprint(self) -> str:
        """Changes when the data set does: to continue a run on other data would be another run."""
        return f"{len(self)} samples ({self.crc:08x})"

    def name(self, i: int) -> str:
        path, offset, _ = self.byte_ranges(i)[0]
        return printable(path) + (f" at byte {offset}" if offset else "")

    def read_bytes(self, place: ByteRange, most: int) -> bytes:
        """The bytes at a place; size -1 means the whole file."""
        path, offset, size = place
        if size > most:
            raise BadSample(f"is larger than {most >> 20} MiB")
        try:
            if size < 0:
                with open(path, "rb", opener=lambda p, flags: os.open(p, flags | os.O_NONBLOCK)) as f:  # a pipe of that name must not block
                    data = f.read(most + 1) or b""
            else:
                data = read_span(path, offset, offset + size)
        except OSError as problem:
            raise BadSample(f"cannot be read ({problem.strerror or problem})") from None
        if len(data) > most:
            raise BadSample(f"is larger than {most >> 20} MiB")
        if len(data) < size:
            raise BadSample("is cut off")
        return data

    def caption(self, i: int, field: str = "") -> str:
        """The text of sample i, or another field of the KEY.json that it is from; the first of a list."""
        return self.parse_caption(self.read_bytes(self.byte_ranges(i)[1], MAX_TEXT_BYTES), field)

    def sample(self, i: int, fields: Iterable[str], choose: Choose, with_run: bool = False) -> tuple[list[str], Image.Image]:
        """(the text of each field, the image as `picture` gives it). choose(n) says which of the n
        captions of a list is taken; with_run: the samples around this one are wanted soon."""
        image, text = self.read_sample(i, with_run)
        return [self.parse_caption(text, field, choose) for field in fields], open_image(io.BytesIO(image))

    def read_sample(self, i: int, with_run: bool) -> tuple[bytes, bytes]:
        """The bytes of the image and of the text."""
        image, text = self.byte_ranges(i)
        data = self.read_bytes(text, MAX_TEXT_BYTES)
        return self.read_bytes(image, MAX_IMAGE_BYTES), data

    def parse_caption(self, data: bytes, field: str = "", choose: Choose = first_of) -> str:
        """The text in the bytes of a KEY.txt or KEY.json."""
        flag, field = ("--alt-field" if field else "--caption-field"), field or self.field
        try:
            text = data.decode("utf-8-sig")
            if field != "txt":
                fields = json.loads(text)
                if not isinstance(fields, dict) or field not in fields:
                    has = ", ".join(fields) if isinstance(fields, dict) else "no fields"
                    raise BadSample(f"json has no field {field!r} (it has {has[:200]}); name one with {flag}")
                text = fields[field]
                if isinstance(text, list):
                    texts = [one for one in text if isinstance(one, str) and one.strip()]
                    if not texts:
                        raise BadSample("caption list holds no text" if text else "caption list is empty")
                    text = texts[choose(len(texts))]
                if isinstance(text, str):
                    text = text.encode("utf-8", "replace").decode()  # json can spell halves of characters, which nothing can print
        except UnicodeDecodeError:
            raise BadSample("caption is not UTF-8 text") from None
        except (ValueError, RecursionError):  # ValueError is also what a number of thousands of digits gives
            raise BadSample("json cannot be parsed") from None
        if not isinstance(text, str) or not text.strip():
            raise BadSample("caption is empty")
        return text

    def image(self, i: int) -> Image.Image:
        """Opened, not yet decoded."""
        return open_image(io.BytesIO(self.read_bytes(self.byte_ranges(i)[0], MAX_IMAGE_BYTES)))


class FolderSource(FileSource):
    """All images below a folder, in the order of their names. Links to folders are followed, each folder once."""

    def __init__(self, where: str, field: str):
        super().__init__(where, field)
        names, pairs, seen = [], np.zeros(3, int), {os.path.realpath(where)}
        for base, folders, files in os.walk(where, onerror=lambda _: self.skipped.update(["folders that cannot be read"]), followlinks=True):
            inside = {os.path.realpath(os.path.join(base, f)): f for f in sorted(folders, reverse=True)}  # of equal ones the first name
            folders[:] = sorted(f for real, f in inside.items() if real not in seen)
            self.skipped += Counter({"folders that links lead to again": len(inside) - len(folders)})  # upwards would never end
            seen |= inside.keys()
            parts = ((name, *name.rpartition(".")) for name in sorted(files))
            found = [(key, suffix.lower(), name) for name, key, _, suffix in parts if key and suffix.lower() in tar_headers.IMAGE_SUFFIXES + tar_headers.TEXT_SUFFIXES]
            own = [f for f in found if not f[0].startswith("._")]
            self.skipped += Counter({tar_headers.FORKS: len(found) - len(own)})
            rows, counts = pair_files(own, self.skipped)
            pairs += counts[self.text]
            below = os.path.relpath(base, where)
            for image, *texts in rows:
                if text := texts[tar_headers.TEXT_SUFFIXES.index(self.text)]:
                    names.append(os.fsencode(os.path.join(below, image)) + b"\0" + os.fsencode(text.rpartition(".")[2]))
        self.names = b"".join(names)                            # one long text and where each begins: objects take five times as much
        self.begins = np.cumsum([0, *map(len, names)])
        self.starts, self.crc = np.array([0, len(names)]), zlib.crc32(self.names)
        self.validate(pairs.tolist())

    def byte_ranges(self, i: int) -> tuple[ByteRange, ByteRange]:
        image, _, suffix = self.names[self.begins[i]:self.begins[i + 1]].partition(b"\0")
        path, suffix = os.path.normpath(os.path.join(self.where, os.fsdecode(image))), os.fsdecode(suffix)
        return (path, 0, -1), (f"{path.rpartition('.')[0]}.{suffix}", 0, -1)


def printable(path: str) -> str:
    """A path as text: on disk it may be bytes that no terminal takes."""
    return os.fsencode(path).decode("utf-8", "replace")

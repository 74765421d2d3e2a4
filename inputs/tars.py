"""TODO."""
import contextlib
import functools
import zlib

import numpy as np

from inputs import files, tar_headers, tar_index
from inputs.files import MAX_IMAGE_BYTES, MAX_TEXT_BYTES, ByteRange, FileSource, printable
from runtime.errors import BadSample, DataError

MAX_SHUFFLE_BYTES = 256 << 20                                       # bytes of tars that a process keeps in memory for training
NUM_LANES = 64                                               # places of a large set that training reads side by side
CACHED_TARS = 80                                              # tars whose rows are in memory: one per lane, and some for validation


class TarSource(FileSource):
    """WebDataset tars: a glob, or a brace list such as data/{00000..00011}.tar. In memory are counts by tar, and the rows
    of the tars that were read last; those of all lie in the index beside each (inputs/tar_index.py)."""

    def __init__(self, where: str, field: str):
        super().__init__(where, field)
        try:
            paths = tar_index.matching_paths(where)
        except ValueError as problem:
            raise DataError(str(problem)) from None
        if not paths:
            raise DataError(f"no file matches {where}")
        found = tar_index.index_tars(paths)
        good = [(p, one) for p, one in zip(paths, found) if isinstance(one, tar_index.TarIndex)]
        bad = [(printable(p), getattr(one, "strerror", None) or one) for p, one in zip(paths, found) if not isinstance(one, tar_index.TarIndex)]
        if not good:
            raise DataError(f"{bad[0][0]} cannot be read as an uncompressed tar: {bad[0][1]}")
        if bad:
            self.skipped[f"files that cannot be read as uncompressed tars, first {bad[0][0]} ({bad[0][1]})"] += len(bad)
        self.paths, self.kept = [p for p, _ in good], {n: one.rows for n, (_, one) in enumerate(good) if one.rows is not None}
        pairs = np.array([one.meta["pairs"][self.text] for _, one in good], np.int64)
        self.starts = np.cumsum([0, *pairs[:, 0]])
        self.crcs = np.array([one.meta["crc"] for _, one in good], np.uint32)
        self.crc = zlib.crc32(self.crcs)
        first: dict[str, str] = {}                              # reason: the tar that gives it first
        for path, one in good:
            for why, count in one.meta["skipped"].items():
                self.skipped[why if why not in tar_index.PLACED else f"{why}, first {first.setdefault(why, printable(path))}"] += count
        self.plan_reads(sum(one.meta["size"] for _, one in good))
        self.validate(pairs.sum(0).tolist())

    def plan_reads(self, size: int) -> None:
        """Training reads runs of samples: of half of a lane's memory on average, so that few exceed all of it.
        A lane has 16 of them or more, because the one at its end is read by the next lane too. A set that fits
        in MEMORY (size: bytes of all tars) is read once, and shuffled whole."""
        whole = size <= MAX_SHUFFLE_BYTES
        self.longest = MAX_SHUFFLE_BYTES if whole else MAX_SHUFFLE_BYTES // NUM_LANES
        count = MAX_SHUFFLE_BYTES // NUM_LANES // 2 * len(self) // max(size, 1)
        self.read_run = max(1, count if whole else min(count, len(self) // (16 * NUM_LANES)))
        self.run = 0 if whole else self.read_run
        self.rows = functools.lru_cache(None if whole else CACHED_TARS)(self.load_rows)
        self.run_span = functools.lru_cache(4 * NUM_LANES)(self.span)
        self.cache = files.SpanCache(MAX_SHUFFLE_BYTES)

    def load_rows(self, shard: int) -> np.ndarray:
        """(samples, 4) int64 of one tar: offset and bytes of the image and of the text."""
        path, rows = self.paths[shard], self.kept.get(shard)
        if rows is None:
            found = tar_index.load_index(path, rows=True)
            try:
                found = found or tar_index.scan_tar(path)
            except (OSError, ValueError) as problem:
                raise BadSample(f"{printable(path)} can no longer be read ({getattr(problem, 'strerror', None) or problem})") from None
            if found.meta["crc"] != self.crcs[shard]:
                raise DataError(f"{printable(path)} has changed since it was opened: start again")
            rows = found.rows
        text = 2 + 2 * tar_headers.TEXT_SUFFIXES.index(self.text)
        return rows[rows[:, text] > 0][:, [0, 1, text, text + 1]]

    def locate(self, i: int) -> tuple[int, int]:
        """Which tar sample i is in, and which of its samples it is."""
        shard = int(np.searchsorted(self.starts, i, side="right")) - 1
        return shard, int(i - self.starts[shard])

    def byte_ranges(self, i: int) -> tuple[ByteRange, ByteRange]:
        shard, row = self.locate(i)
        image, size, text, length = self.rows(shard)[row].tolist()
        return (self.paths[shard], image, size), (self.paths[shard], text, length)

    def run_of(self, samples: np.ndarray) -> np.ndarray:
        """Which run of its tar each sample is in."""
        return (samples - self.starts[np.searchsorted(self.starts, samples, side="right") - 1]) // self.read_run

    def span(self, shard: int, first: int, count: int) -> tuple[int, int] | None:
        """Where `count` samples of a tar begin and end, or None if much else lies between them."""
        rows = self.rows(shard)[first:first + count]
        begins, sizes = rows[:, [0, 2]], rows[:, [1, 3]]
        begin, end = int(begins.min()), int((begins + sizes).max())
        headers = 8192 * len(rows)  # of three files or so, and what fills up their last blocks
        return (begin, end) if end - begin <= 2 * int(sizes.sum()) + headers else None

    def read_sample(self, i: int, with_run: bool) -> tuple[bytes, bytes]:
        """Image and text come out of one read: that of their run, which is kept for its other samples, or
        their own where the run is too long or cannot be read."""
        shard, row = self.locate(i)
        image, text = self.byte_ranges(i)
        for (_, _, size), most in ((text, MAX_TEXT_BYTES), (image, MAX_IMAGE_BYTES)):
            if size > most:
                raise BadSample(f"is larger than {most >> 20} MiB")
        data, begin = None, 0
        run = self.run_span(shard, row - row % self.read_run, self.read_run) if with_run else None
        if run and run[1] - run[0] <= self.longest:
            with contextlib.suppress(OSError):
                data, begin = self.cache.read(self.paths[shard], *run), run[0]
        if data is None:
            own = self.span(shard, row, 1)
            if own is None:
                return super().read_sample(i, with_run)
            begin, size = own[0], own[1] - own[0]
            data = self.read((self.paths[shard], begin, size), size)
        parts = [data[offset - begin:offset - begin + size] for _, offset, size in (image, text)]
        if any(len(part) < place[2] for part, place in zip(parts, (image, text))):
            raise BadSample("is cut off")
        return parts[0], parts[1]

    def name(self, i: int) -> str:
        try:
            return super().name(i)
        except BadSample:  # its tar is gone
            return f"sample {i} of {self.where}"

"""Parquet files with embedded images as a source (extra `parquet`), as Hugging Face has them.

Parquet is read by row groups, of any size: a group may be a complete file of 1.5 GB. So a group is
unpacked once, a few rows at a time, into a file of the local cache (inputs/parquet_groups.py).
There, every row can be read alone. Training then reads groups as it reads tars: a group is a shard,
and a chunk is a series of its rows.
"""
import contextlib
import functools
import os
import threading
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from inputs import files, order, parquet_groups, tar_index
from inputs.disk_cache import DiskCache
from inputs.files import DEFAULT_OPTIONS, ByteRange, ReadOptions, printable
from inputs.images import read_image
from inputs.parquet_columns import Column
from inputs.parquet_groups import Footer
from inputs.tars import TarSource
from runtime.errors import BadSample, DataError, raise_passing

MAX_CAPTION_BYTES, MAX_CAPTION_ROWS = 64 << 20, 100_000  # of a group whose captions are in memory


class Group(NamedTuple):
    """A row group: the number of its file, its number there, and its rows."""
    file: int
    number: int
    rows: int


class ParquetSource(TarSource):
    """`where` is a path, a glob or a brace list. field: the columns of captions, by dotted name."""
    has_columns = True

    def __init__(self, where: str, field: str, options: ReadOptions = DEFAULT_OPTIONS):
        files.FileSource.__init__(self, where, field, options)
        self.text_suffix = "json"
        self.image_field = options.image_field
        self.text_fields = [*self.fields, *([options.alt_field] if options.alt_field else [])]
        self.disk = DiskCache(options.cache_dir, int(options.cache_gb * 1e9))
        self.origin, self.storage = self.storage, files.LOCAL  # of the files, of unpacked groups
        self.files, footers = self.read_footers()
        self.footer_crcs = [footer.crc for footer in footers]
        table = [footer.groups for footer in footers]
        self.file_of = np.repeat(np.arange(len(table)), [len(groups) for groups in table])
        self.number = np.concatenate([np.arange(len(groups)) for groups in table])
        counts = np.concatenate(table)
        self.starts = np.cumsum([0, *counts[:, 0]])
        self.crc = zlib.crc32(np.array(self.footer_crcs, np.uint32))
        if not len(self):
            raise DataError(f"{where} has no rows")
        self.check_cache_size(counts[:, 1])
        self.paths = GroupPaths(self)
        self.checking = threading.Lock()
        self.unpacked_ahead: deque[int] = deque(maxlen=4 * order.NUM_LANES)
        self.footer = functools.lru_cache(16)(self.read_footer)
        self.captions_of = functools.lru_cache(4)(self.read_captions)
        self.plan_chunks(int(counts[:, 1].sum()))
        self.validate([len(self), 0, 0])

    # ---- opening
    def read_footers(self) -> tuple[list[str], list[Footer]]:
        """(paths, footers) of the files that can be read. The others are counted in `skipped`.
        DataError if none can."""
        try:
            paths = tar_index.matching_paths(self.where, self.origin)
        except ValueError as problem:
            raise DataError(str(problem)) from None
        if not paths:
            raise DataError(f"no file matches {self.where}")
        parquet_groups.import_pyarrow()
        with ThreadPoolExecutor(8, thread_name_prefix="footers") as pool:
            results = list(pool.map(self.try_footer, paths))
        readable = [n for n, footer in enumerate(results) if isinstance(footer, Footer)]
        problems = [(path, why) for path, why in zip(paths, results) if isinstance(why, str)]
        if problems:
            path, why = problems[0]
            if not readable:
                raise DataError(f"{printable(path)} cannot be used as parquet: {why}")
            self.skipped[f"files that cannot be used as parquet, first {printable(path)} ({why})"
                         ] += len(problems)
        return [paths[n] for n in readable], [results[n] for n in readable]

    def try_footer(self, path: str) -> Footer | str:
        """A footer without its metadata; or what is wrong with the file. DataError for an error
        that may pass."""
        try:
            footer = parquet_groups.read_footer(self.origin, path)
            self.columns(footer.metadata)
        except (OSError, ValueError) as problem:
            raise_passing(problem, printable(path))
            return tar_index.reason(problem)
        return footer._replace(metadata=None)

    def columns(self, metadata: Any) -> tuple[Column, list[Column]]:
        """(image, captions) in a file. ValueError if one is missing or has another type."""
        return parquet_groups.find_columns(metadata, self.image_field, self.text_fields)

    def check_cache_size(self, sizes: np.ndarray) -> None:
        """DataError if the groups that training uses at once do not fit into the cache."""
        in_use = int(np.sort(sizes)[-order.NUM_LANES:].sum())
        if in_use > self.disk.limit:
            raise DataError(
                f"{self.where} has row groups of up to {sizes.max() / 1e9:.2g} GB, and training "
                f"keeps {min(order.NUM_LANES, len(sizes))} of them in the cache: set --cache-gb "
                f"{-(-in_use // 10**9)} or more, or write the files with smaller row groups")

    # ---- reading
    def group(self, shard: int) -> Group:
        rows = int(self.starts[shard + 1] - self.starts[shard])
        return Group(int(self.file_of[shard]), int(self.number[shard]), rows)

    def read_footer(self, file: int) -> Footer:
        """The footer of a file. DataError if it has changed, or is gone."""
        path = self.files[file]
        try:
            footer = parquet_groups.read_footer(self.origin, path)
        except (OSError, ValueError) as problem:
            raise DataError(f"{printable(path)} can no longer be read "
                            f"({tar_index.reason(problem)})") from None
        if footer.crc != self.footer_crcs[file]:
            raise DataError(f"{printable(path)} has changed since it was opened: start again")
        return footer

    def key(self, shard: int) -> str:
        """Of a group's entry in the cache."""
        group = self.group(shard)
        path = self.files[group.file]
        origin = path if "://" in path else os.path.abspath(path)
        columns = "\n".join([self.image_field, *self.text_fields])
        return (f"{parquet_groups.VERSION}\n{origin}\n{self.footer_crcs[group.file]}\n"
                f"{group.number}\n{columns}")

    def unpack(self, shard: int) -> str:
        """The path of the unpacked group, which is made if necessary."""
        group = self.group(shard)

        def make(out: Any) -> None:
            footer = self.footer(group.file)
            parquet_groups.unpack(self.origin, self.files[group.file], footer, group.number,
                                  self.columns(footer.metadata), out)
        return self.disk.get(self.key(shard), make)

    def load_rows(self, shard: int) -> np.ndarray:
        """(rows, 4) int64 of an unpacked group: offset and size of the image and of the text. An
        image of negative size is one that cannot be read; then the text says why."""
        for _ in range(5):  # another run may delete it, or the machine may have stopped in a write
            with self.checking:
                path = self.disk.find(self.key(shard))
                if path and parquet_groups.read_rows(path) is None:
                    with contextlib.suppress(FileNotFoundError):  # another process deletes too
                        os.remove(path)
            rows = parquet_groups.read_rows(self.unpack(shard))
            if rows is not None and len(rows) == self.group(shard).rows:
                return rows
        raise DataError(f"the cache {self.disk.folder} loses its files as they are used: set "
                        "--cache-gb higher, or name another folder with --cache-dir")

    def read_sample(self, i: int, with_chunk: bool) -> tuple[bytes, bytes]:
        shard, row = self.locate(i)
        for attempt in range(3):
            _, size, text_offset, text_size = self.rows(shard)[row].tolist()
            try:
                if size < 0:
                    why = self.read_bytes(ByteRange(self.paths[shard], text_offset, text_size),
                                          files.MAX_TEXT_BYTES)
                    break
                return super().read_sample(i, False)  # the cache is local: no need for long reads
            except BadSample:
                if attempt == 2:
                    raise
                self.load_rows(shard)  # if it was deleted to make room, it is made again
        raise BadSample(why.decode("utf-8", "replace"))

    def prefetch_sample(self, i: int, with_chunk: bool) -> None:
        """Unpacks the group of a sample that will be needed soon."""
        shard, _ = self.locate(i)
        if shard not in self.unpacked_ahead:
            self.unpacked_ahead.append(shard)
            self.unpack(shard)

    def image(self, i: int) -> Any:
        return read_image(self.read_sample(i, False)[0])

    def caption(self, i: int, field: str = "") -> str:
        """Without reading images, unless the captions of the row group are very large."""
        shard, row = self.locate(i)
        captions = self.captions_of(shard, field)
        text = self.read_sample(i, False)[1] if captions is None else captions[row]
        if isinstance(text, str):
            raise BadSample(text)
        return self.parse_caption(text, field)

    def read_captions(self, shard: int, field: str) -> list[bytes | str] | None:
        """The captions of a group, each as json. None if they are too large to be in memory."""
        group = self.group(shard)
        footer = self.footer(group.file)
        try:
            names = field.split(",") if field else self.fields
            _, columns = parquet_groups.find_columns(footer.metadata, self.image_field, names,
                                                     "--alt-field")
        except ValueError as problem:
            raise DataError(f"{printable(self.files[group.file])} has {problem}") from None
        size = parquet_groups.stored_bytes(footer.metadata, group.number, columns)
        if size > MAX_CAPTION_BYTES or group.rows > MAX_CAPTION_ROWS:
            return None
        return parquet_groups.read_captions(self.origin, self.files[group.file], footer,
                                            group.number, columns)

    def name(self, i: int) -> str:
        shard, row = self.locate(i)
        group = self.group(shard)
        first = self.starts[np.searchsorted(self.file_of, group.file)]
        return f"{printable(self.files[group.file])} row {self.starts[shard] + row - first}"


class GroupPaths:
    """The path of each unpacked group, by its number, in place of a list."""

    def __init__(self, source: ParquetSource):
        self.source = source

    def __getitem__(self, shard: int) -> str:
        return self.source.disk.path(self.source.key(shard))

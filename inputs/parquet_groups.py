"""One row group of a parquet file: its footer entry, its captions, and how it is unpacked.

An unpacked group is a file: the images and captions one after the other, then a table of offsets
and sizes, then TAIL. A group that cannot be read to its end gives the rows that could be read; for
each of the others the reason is in its place.
"""
import importlib
import io
import json
import os
import struct
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from inputs import files
from inputs.parquet_columns import Column, find_column, first_bytes, pick, texts
from runtime.errors import DataError, MissingExtra

VERSION = "parquet group 1"    # of what this file writes: a new one makes all groups anew
TAIL = struct.Struct("<QI8s")  # number of rows, CRC-32 of the table, mark
MARK = b"OV2GROUP"
MAGIC, ENCRYPTED = b"PAR1", b"PARE"
FOOTER_GUESS = 1 << 16         # bytes of the end of a file that are read at once
STREAM_BYTES = 1 << 18         # read at a time; without it pyarrow reads a complete column
BATCH_BYTES = 1 << 20          # rows are decoded in batches of about this size
MIN_BATCH, MAX_BATCH = 1, 256  # rows
DAMAGED_GROUP = "row cannot be read, because its row group is damaged"


class Footer(NamedTuple):
    """crc: of the footer's bytes. groups: (row groups, 2) int64, the rows and the bytes of each.
    metadata: pyarrow's FileMetaData."""
    crc: int
    groups: np.ndarray
    metadata: Any


def import_pyarrow() -> Any:
    """pyarrow, or MissingExtra. It reads the variable once: its own allocator keeps freed pages."""
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    try:
        importlib.import_module("pyarrow.parquet")
        return importlib.import_module("pyarrow")
    except ImportError as problem:
        raise MissingExtra(f"parquet files need pyarrow ({problem}): pip install -e '.[parquet]'"
                           ) from None


# ------------------------------------------------------------------------------------ footer
def read_footer(storage: Any, path: str) -> Footer:
    """OSError if the file cannot be read, ValueError if it is not a complete parquet file."""
    pa = import_pyarrow()
    size = storage.file_size(path)
    end = storage.read_span(path, max(0, size - FOOTER_GUESS), size)
    if len(end) < 12:
        raise ValueError("the file is empty" if not end else "the file is cut off")
    length = int.from_bytes(end[-8:-4], "little")
    if end[-4:] == ENCRYPTED:
        raise ValueError("it is encrypted")
    if end[-4:] != MAGIC:
        raise ValueError("no parquet footer at its end: it is cut off, or another kind of file")
    if length + 12 > size:
        raise ValueError("its footer is damaged")
    if length + 8 > len(end):
        end = storage.read_span(path, size - length - 8, size)
    footer = end[len(end) - length - 8:]
    try:
        metadata = pa.parquet.read_metadata(io.BytesIO(MAGIC + footer))
        groups = np.zeros((metadata.num_row_groups, 2), np.int64)
        for n in range(len(groups)):
            group = metadata.row_group(n)
            groups[n] = group.num_rows, group.total_byte_size
    except Exception as problem:  # pyarrow raises many types on broken bytes
        raise ValueError(f"its footer is damaged ({first_line(problem)})") from None
    if groups.min(initial=0) < 0:
        raise ValueError("its footer is damaged (a negative size)")
    return Footer(zlib.crc32(footer), groups, metadata)


def first_line(problem: Exception) -> str:
    return (str(problem).splitlines() or [type(problem).__name__])[0][:120]


def find_columns(metadata: Any, image: str, captions: list[str],
                 flag: str = "--caption-field") -> tuple[Column, list[Column]]:
    """(image, captions). ValueError as in find_column."""
    return (find_column(metadata, image, "--image-field", image=True),
            [find_column(metadata, name, flag) for name in captions])


def stored_bytes(metadata: Any, group: int, columns: list[Column]) -> int:
    """Bytes that the columns of a row group take without compression; 0 if that is damaged."""
    leaves = {leaf for column in columns for leaf in column.leaves}
    total = 0
    for n in range(metadata.num_columns):
        try:
            chunk = metadata.row_group(group).column(n)
            total += chunk.total_uncompressed_size if chunk.path_in_schema in leaves else 0
        except Exception:  # as in read_footer; to read the column gives the same error
            return 0
    return max(0, total)


# ------------------------------------------------------------------------------------- rows
def iter_rows(storage: Any, path: str, metadata: Any, group: int, columns: list[Column],
              batch_size: int) -> Iterator[list[Any]]:
    """The values of the columns in each row of a group. pyarrow's errors where it is damaged.
    storage: files.LocalStorage or RemoteStorage, in all functions here."""
    pa = import_pyarrow()
    leaves = list(dict.fromkeys(leaf for column in columns for leaf in column.leaves))
    with open_for_pyarrow(storage, path) as file:
        reader = pa.parquet.ParquetFile(file, metadata=metadata, buffer_size=STREAM_BYTES,
                                        pre_buffer=False)
        for batch in reader.iter_batches(batch_size, [group], leaves, use_threads=False):
            tables = {top: to_values(batch.column(top)) for top in {c.top for c in columns}}
            for n in range(len(batch)):
                yield [pick(tables[column.top][n], column.steps) for column in columns]


def open_for_pyarrow(storage: Any, path: str) -> Any:
    """A local file by pyarrow's own reader, which saves a copy of each page."""
    if storage.is_remote:
        return storage.open_file(path)
    return import_pyarrow().OSFile(path)


def to_values(array: Any) -> list[Any]:
    """The Python values of a column. One with text that is not UTF-8 is bytes."""
    try:
        return array.to_pylist()
    except UnicodeDecodeError:
        values = []
        for scalar in array:
            try:
                values.append(scalar.as_py())
            except UnicodeDecodeError:
                values.append(b"\xff")
        return values


def salvaged_rows(storage: Any, path: str, metadata: Any, group: int, columns: list[Column],
                  count: int) -> Iterator[list[Any] | str]:
    """`count` rows of a group; in place of one that cannot be read, the reason. Where a batch
    fails, the rows before the damage are read one by one."""
    row_bytes = max(1, stored_bytes(metadata, group, columns) // max(1, count))
    batch_size = min(max(BATCH_BYTES // row_bytes, MIN_BATCH), MAX_BATCH)
    num_read, problem = 0, "the group ends before"
    for size in (batch_size, 1):
        try:
            rows = iter_rows(storage, path, metadata, group, columns, size)
            for n, row in enumerate(rows):
                if num_read <= n < count:
                    num_read += 1
                    yield row
            break
        except (OSError, ValueError, LookupError, RuntimeError, NotImplementedError,
                TypeError) as error:  # pyarrow's own are among these
            if getattr(error, "errno", None):  # the system's, which may pass: no damage
                raise DataError(f"{path} cannot be read ({first_line(error)})") from None
            problem = first_line(error)
    for _ in range(count - num_read):
        yield f"{DAMAGED_GROUP} ({problem})"


def caption_json(columns: list[Column], values: list[Any]) -> bytes:
    """The captions of a row as a KEY.json has them."""
    if any(isinstance(value, bytes) for value in values):
        return b"\xff"  # which is not UTF-8 either, and is reported so
    fields = {column.name: texts(value) for column, value in zip(columns, values)}
    return json.dumps(fields, ensure_ascii=False, default=str).encode("utf-8", "replace")


def read_captions(storage: Any, path: str, footer: Footer, group: int,
                  columns: list[Column]) -> list[bytes | str]:
    """The captions of each row as json, without images; the reason for one that cannot be read."""
    captions = []
    count = int(footer.groups[group, 0])
    for row in salvaged_rows(storage, path, footer.metadata, group, columns, count):
        captions.append(row if isinstance(row, str) else caption_json(columns, row))
    return captions


# --------------------------------------------------------------------------------- unpacking
def unpack(storage: Any, path: str, footer: Footer, group: int,
           columns: tuple[Column, list[Column]], out: BinaryIO) -> None:
    """Writes an unpacked group. At most a few rows, and what pyarrow decodes at once (a page), are
    in memory."""
    image_column, caption_columns = columns
    count = int(footer.groups[group, 0])
    table = np.zeros((count, 4), np.int64)
    columns_read = [image_column, *caption_columns]
    rows = salvaged_rows(storage, path, footer.metadata, group, columns_read, count)
    position = 0
    for n, row in enumerate(rows):
        image, text = None, b""
        if isinstance(row, str):
            text = row.encode()
        else:
            image = first_bytes(row[0])
            if image is None:
                text = f"no image: {image_column.name} is null".encode()
            else:
                text = caption_json(caption_columns, row[1:])
        image_size = -1 if image is None else len(image)
        table[n] = position, image_size, position + max(0, image_size), len(text)
        position += out.write(image or b"") + out.write(text)
    content = table.tobytes()
    out.write(content)
    out.write(TAIL.pack(count, zlib.crc32(content), MARK))


def read_rows(path: str) -> np.ndarray | None:
    """The table of an unpacked group. None if it is gone or damaged."""
    try:
        size = os.stat(path).st_size
        count, crc, mark = TAIL.unpack(files.read_span(path, size - TAIL.size, size))
        content = files.read_span(path, size - TAIL.size - 32 * count, size - TAIL.size)
    except (OSError, struct.error, OverflowError):
        return None
    if mark != MARK or zlib.crc32(content) != crc or len(content) != 32 * count:
        return None
    return np.frombuffer(content, np.int64).reshape(-1, 4)

"""Parquet files of strangers: what reading one takes, told from its page headers before anything is unpacked.

A few hundred bytes can say that one text of a megabyte is there a million times: in a dictionary page that every row
points to, as prefixes of the text before (DELTA_BYTE_ARRAY), in a run length, or in a page that compresses well. What
the footer says of sizes may be untrue; what the header of each page says is what the reader goes by. So all headers are
read (Thrift's compact protocol, parquet-format's PageHeader), and rows are unpacked a few at a time, so few that the
longest text there can be does not fill the memory.
"""

from __future__ import annotations

import mmap
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from gulliver.core.errors import DataError, GulliverError
from gulliver.core.foreign import foreign

UNPACKED = 100
"""A file unpacks to at most so many times its bytes; text compresses to a fifth, or to a thirtieth where it recurs."""
SPARE_BYTES, SPARE_VALUES = 2**26, 2**20
BATCH_ROWS, BATCH_BYTES = 1024, 2**26
DATA, DICTIONARY, DATA_2 = 0, 2, 3
DELTA_BYTE_ARRAY = 7


@dataclass
class _Sizes:
    """What pages say: their bytes when unpacked, their values, and the longest that can be repeated by a reference."""

    unpacked: int = 0
    values: int = 0
    repeated: int = 0


def rows_of(path: Path, columns: Sequence[str], error: type[GulliverError] = DataError) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file, each a value by column; texts are one object where they are equal in a batch.

    `error` for what is not such a file, lacks a column, or unpacks to far more than it is.
    """
    most = SPARE_BYTES + UNPACKED * path.stat().st_size
    taken = 0
    with foreign(f"{path.name} is not a readable Parquet file", error), opened(path, columns, error) as file:
        rows = _rows_at_once(path, file.metadata, columns, error)
        for batch in file.iter_batches(rows, columns=list(columns), use_threads=False):
            values = [batch.column(name).to_pylist() for name in columns]
            for row in zip(*values, strict=True):
                taken += sum(len(value) for value in row if isinstance(value, str))
                if taken > most:
                    raise too_much(path, error)
                yield dict(zip(columns, row, strict=True))


def opened(path: Path, columns: Collection[str], error: type[GulliverError] = DataError) -> pyarrow.parquet.ParquetFile:
    """A Parquet file that has these columns."""
    limits: dict[str, Any] = {"thrift_string_size_limit": SPARE_BYTES, "thrift_container_size_limit": SPARE_VALUES}
    file = pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20, **limits)
    names = file.schema_arrow.names
    for column in columns:
        if column not in names:
            known = ", ".join(map(repr, names[:20]))[:500]
            raise error(f"{path.name} has no column {column!r}; it has {known}")
    return file


def read_table(path: Path, columns: Collection[str]) -> pyarrow.Table:
    """All columns of a Parquet file, of which it must have `columns`. DataError as above."""
    with foreign(f"{path.name} is not a readable Parquet file", DataError), opened(path, columns) as file:
        _rows_at_once(path, file.metadata, file.schema_arrow.names, DataError)
        return file.read(use_threads=False)


def too_much(path: Path, error: type[GulliverError] = DataError) -> GulliverError:
    """The error for a file that is small and unpacks to a lot."""
    told = f"{path.name} has {path.stat().st_size:,} bytes and unpacks to more than {UNPACKED} times as much"
    return error(f"{told}; it is not read: write it again, each text once")


def _rows_at_once(path: Path, footer: Any, columns: Collection[str], error: type[GulliverError]) -> int:
    """How many rows are unpacked at once."""
    sizes, size = _Sizes(), path.stat().st_size
    with open(path, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for group in range(footer.num_row_groups):
            row_group = footer.row_group(group)
            for index in range(row_group.num_columns):
                chunk = row_group.column(index)
                if chunk.path_in_schema.split(".")[0] in columns:
                    _add_chunk(data, chunk, sizes)
    unpacked, values = SPARE_BYTES + UNPACKED * size, SPARE_VALUES + UNPACKED * size
    if sizes.unpacked > unpacked or max(sizes.values, footer.num_rows) > values:
        raise too_much(path, error)
    return max(1, min(BATCH_ROWS, BATCH_BYTES // max(1, sizes.repeated)))


def _add_chunk(data: mmap.mmap, chunk: Any, sizes: _Sizes) -> None:
    at = chunk.data_page_offset
    if chunk.has_dictionary_page and chunk.dictionary_page_offset:
        at = min(at, chunk.dictionary_page_offset)
    end = at + chunk.total_compressed_size
    while at < end:
        reader = _Compact(data, at)
        header = reader.struct()
        kind, unpacked, packed = (header[field] for field in (1, 2, 3))
        if min(unpacked, packed) < 0 or reader.at + packed > len(data):
            raise ValueError("a page ends outside the file")
        sizes.unpacked += unpacked
        page: Mapping[int, Any] = header.get({DATA: 5, DICTIONARY: 7, DATA_2: 8}.get(kind, 0), {})
        if kind == DICTIONARY:
            sizes.repeated = max(sizes.repeated, unpacked)
        else:
            sizes.values += max(0, page.get(1, 0))
            if page.get(4 if kind == DATA_2 else 2) == DELTA_BYTE_ARRAY:
                sizes.repeated = max(sizes.repeated, unpacked)
        at = reader.at + packed


class _Compact:
    """A reader of Thrift's compact protocol at a place of a file; IndexError beyond its end."""

    def __init__(self, data: mmap.mmap, at: int) -> None:
        self.data, self.at = data, at

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def unsigned(self) -> int:
        value = shift = 0
        while True:
            byte = self.byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("a number has more than 64 bits")

    def signed(self) -> int:
        value = self.unsigned()
        return (value >> 1) ^ -(value & 1)

    def struct(self) -> dict[int, Any]:
        """Field -> value."""
        found: dict[int, Any] = {}
        field = 0
        while (head := self.byte()) & 15:
            field = field + (head >> 4) if head >> 4 else self.signed()
            found[field] = self.value(head & 15)
        return found

    def value(self, kind: int) -> Any:
        if kind in (1, 2):
            return kind == 1
        if kind in (4, 5, 6):
            return self.signed()
        if kind == 12:
            return self.struct()
        if kind in (9, 10):
            head = self.byte()
            count = head >> 4 if head >> 4 < 15 else self.unsigned()
            if count > len(self.data):
                raise ValueError("a list is longer than the file")
            return [self.byte() if head & 15 in (1, 2) else self.value(head & 15) for _ in range(count)]
        sizes = {3: 1, 7: 8, 8: 0}
        if kind not in sizes:
            raise ValueError(f"a value is of kind {kind}, which a page header has none of")
        length = self.unsigned() if kind == 8 else sizes[kind]
        self.at += length
        if self.at > len(self.data):
            raise ValueError("it ends inside a page header")
        return None

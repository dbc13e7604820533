"""How much memory a parquet file's pages take, from their headers: a page is decompressed as a whole.

pyarrow tells the size of a column in a group of rows, not that of a page: 400 MiB may be a hundred thousand texts or
one. The headers are Thrift's compact protocol, of which only the few fields of a page's header are read
(parquet-format, PageHeader).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import IO, Any

HEADER = 2**16
"""Bytes that a page's header may have; it holds statistics of a few values."""
I32, STRUCT = 5, 12
UNCOMPRESSED, COMPRESSED, DICTIONARY = 2, 3, 7
"""Fields of a header: the page's sizes, and what is there if it is a dictionary."""


def largest_pages(raw: IO[bytes], group: Any, columns: Sequence[str]) -> tuple[int, int]:
    """Bytes of the largest page, and of the largest dictionary, of some columns in a group of rows, uncompressed.

    Args:
        raw: the file.
        group: pyarrow's `RowGroupMetaData`.
        columns: names of columns; of nested ones the first part.
    """
    page = dictionary = 0
    for index in range(group.num_columns):
        column = group.column(index)
        if column.path_in_schema.split(".")[0] not in columns and column.path_in_schema not in columns:
            continue
        starts = [at for at in (column.dictionary_page_offset, column.data_page_offset) if at]
        at = min(starts, default=0)
        end = at + column.total_compressed_size
        while at < end:
            raw.seek(at)
            try:
                fields, length = _header(raw.read(HEADER))
                size, following = fields[UNCOMPRESSED], at + length + fields[COMPRESSED]
            except (IndexError, KeyError):  # damaged: pyarrow says so
                break
            if following <= at:
                break
            page, at = max(page, size), following
            dictionary = max(dictionary, size if DICTIONARY in fields else 0)
    return page, dictionary


def _header(data: bytes) -> tuple[dict[int, int], int]:
    """The integers of a page's header by field, structures as 0, and its length in bytes."""
    fields: dict[int, int] = {}
    at = _struct(data, 0, fields)
    return fields, at


def _struct(data: bytes, at: int, fields: dict[int, int]) -> int:
    """Read a structure's fields from `at`; returns where it ends."""
    number = 0
    while (first := data[at]) != 0:
        # 0x15: one field further on, of kind 5; 0x05 has the field's number behind it
        at, kind = at + 1, first & 15
        if first >> 4:
            number += first >> 4
        else:
            raw, at = _varint(data, at)
            number = _signed(raw)
        fields[number], at = _value(data, at, kind)
    return at + 1


def _value(data: bytes, at: int, kind: int) -> tuple[int, int]:
    """An integer, or 0 for another kind of value, and where it ends."""
    if kind in (1, 2):  # true and false have no bytes of their own
        return 0, at
    if kind == 3:
        return data[at], at + 1
    if kind in (4, I32, 6):
        raw, at = _varint(data, at)
        return _signed(raw), at
    if kind == 7:
        return 0, at + 8
    if kind == 8:
        length, at = _varint(data, at)
        return 0, at + length
    if kind == STRUCT:
        return 0, _struct(data, at, {})
    raise KeyError(kind)  # lists and maps are in no header of a page


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _signed(raw: int) -> int:
    """0, -1, 1, -2, ... are written as 0, 1, 2, 3, ..."""
    return (raw >> 1) ^ -(raw & 1)

"""Rows of Arrow tables, token ids as numpy arrays rather than as Python integers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def arrow_rows(batch: Any, tokens: str | None) -> Iterator[dict[str, Any]]:
    """The rows of a pyarrow RecordBatch or Table; the column `tokens` (None: there is none) as (n,) arrays."""
    if tokens is None or tokens not in batch.schema.names:
        yield from batch.to_pylist()
        return
    others = batch.drop_columns([tokens]).to_pylist()
    if not others:
        others = [{} for _ in range(batch.num_rows)]
    for row, ids in zip(others, _arrays(batch.column(tokens)), strict=True):
        yield row | {tokens: ids}


def _arrays(column: Any) -> Iterator[Any]:
    import pyarrow

    for array in getattr(column, "chunks", [column]):
        is_list = pyarrow.types.is_list(array.type) or pyarrow.types.is_large_list(array.type)
        if not is_list or array.null_count or array.values.null_count:
            yield from array.to_pylist()
            continue
        offsets = array.offsets.to_numpy()
        values = array.values.to_numpy(zero_copy_only=False)
        for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
            yield values[start:end]

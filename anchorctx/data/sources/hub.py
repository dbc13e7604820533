"""Documents from any dataset of the `datasets` library: a name on the hub, or a folder saved by `save_to_disk`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anchorctx.data.sources.documents import Document, Reading, Tokens
from anchorctx.data.sources.fields import Fields, arrow_rows
from anchorctx.errors import UserError

PART_ROWS = 2**16
"""Rows of a dataset in a part."""
ROWS_AT_ONCE = 128
"""Rows read at once where they hold token ids."""


@dataclass(frozen=True, slots=True)
class DatasetName:
    """Which dataset, and which part of it."""

    path: str
    """Name on the hub, a local folder saved by `save_to_disk`, or whatever `load_dataset` takes."""
    subset: str | None
    """The dataset's configuration name."""
    split: str
    """Its split."""
    revision: str | None
    """Commit or tag on the hub."""
    streaming: bool
    """Read from the network as it comes, nothing stored."""


@dataclass(frozen=True, slots=True)
class DatasetPart:
    """Rows start..stop of a dataset; all of them where `stop` is None."""

    name: DatasetName
    start: int
    stop: int | None
    fields: Fields
    identity: dict[str, Any]
    size: int | None

    def documents(self, reading: Reading) -> Iterator[Document | Tokens]:
        """The rows' documents."""
        dataset = open_dataset(self.name)
        if self.stop is not None:
            dataset = dataset.select(range(self.start, self.stop))
        return read_dataset(dataset, self.name, self.fields, reading, self.start)


def is_saved_dataset(path: str) -> bool:
    """Was the folder written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`?"""
    return any((Path(path) / name).is_file() for name in ("state.json", "dataset_dict.json"))


def open_dataset(name: DatasetName) -> Any:
    """The `datasets.Dataset` (or IterableDataset); UserError when there is no such dataset, subset or split."""
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        if not is_saved_dataset(name.path):
            return datasets.load_dataset(
                name.path, name.subset, split=name.split, streaming=name.streaming, revision=name.revision
            )
        loaded = datasets.load_from_disk(name.path)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise UserError(
            f"the dataset {name.path} (subset={name.subset}, split={name.split}) cannot be loaded ({reason}): "
            "correct path, subset and split"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if name.split not in loaded:
            raise UserError(f"{name.path} has no split {name.split}: set split to one of {', '.join(map(str, loaded))}")
        loaded = loaded[name.split]
    return loaded


def dataset_identity(dataset: Any, name: DatasetName) -> dict[str, Any]:
    """What identifies the content: the library's fingerprint; of a stream only its name, split and revision."""
    identity = {"subset": name.subset, "split": name.split}
    if name.streaming:
        return identity | {"path": name.path, "revision": name.revision}
    return identity | {"fingerprint": dataset._fingerprint, "rows": len(dataset)}


def dataset_bytes(dataset: Any) -> int | None:
    """Bytes of the dataset in memory-mapped tables; None for a stream."""
    return None if not hasattr(dataset, "data") else int(dataset.data.nbytes)


def dataset_parts(dataset: Any, name: DatasetName, fields: Fields, facts: dict[str, Any]) -> list[DatasetPart]:
    """The dataset in parts of PART_ROWS; a stream is one."""
    identity, size = {"dataset": dataset_identity(dataset, name), **facts}, dataset_bytes(dataset)
    if name.streaming:
        return [DatasetPart(name, 0, None, fields, identity, size)]
    rows = len(dataset)
    # only the rows' range is known of a part, not its bytes
    return [
        DatasetPart(name, start, stop := min(start + PART_ROWS, rows), fields, identity | {"rows": [start, stop]}, None)
        for start in range(0, rows, PART_ROWS)
    ]


def read_dataset(
    dataset: Any, name: DatasetName, fields: Fields, reading: Reading, start: int = 0
) -> Iterator[Document | Tokens]:
    """Yield the documents of a dataset in order; its first row is row `start` of the whole, for messages."""
    if dataset.column_names is not None:  # None for a stream that does not know them yet
        dataset = dataset.select_columns(fields.columns(dataset.column_names, f"the dataset {name.path}"))
    size, count = dataset_bytes(dataset) or 0, 1 if name.streaming else len(dataset)
    rows = _rows(dataset, name, fields)
    yield from fields.read(rows, name.path, reading, size=size, count=count, before=start)


def _rows(dataset: Any, name: DatasetName, fields: Fields) -> Iterator[Any]:
    """The rows; of a stored dataset through Arrow, token ids and labels as arrays."""
    if name.streaming or fields.tokens is None:
        yield from dataset
        return
    for table in dataset.with_format("arrow").iter(ROWS_AT_ONCE):
        yield from arrow_rows(table, fields.arrays)

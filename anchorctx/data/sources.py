"""Sources of documents: what a user configures, and one way to read them all."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from anchorctx.data import hub, stdlib
from anchorctx.data.documents import Document, Fields, OnBadRow, Reading
from anchorctx.data.files import content_identity, find_files, read_files
from anchorctx.data.stdlib import StdlibConfig
from anchorctx.errors import UserError


class SourceFormat(StrEnum):
    """How the documents lie in a source."""

    auto = "auto"
    """By the endings of the files' names; a folder saved by `datasets` is recognised."""
    jsonl = "jsonl"
    """One JSON object a line; .gz and .zst are decompressed."""
    parquet = "parquet"
    """One document a row."""
    text = "text"
    """One document a file, UTF-8; in a folder every file, whatever its ending."""
    datasets = "datasets"
    """A dataset of the `datasets` library."""
    stdlib = "stdlib"
    """The embedded corpus: the Python standard library's sources."""


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """One source of documents."""

    path: str = ""
    """File, folder (searched recursively) or glob; with format=datasets a dataset's name or saved folder; unused
    with format=stdlib."""
    format: SourceFormat = SourceFormat.auto
    """auto, jsonl, parquet, text, datasets or stdlib."""
    text_field: str = "text"
    """Field of a row that holds the text."""
    domain_field: str | None = None
    """Field of a row that holds the document's domain; null where rows have none."""
    domain: str = ""
    """Domain of all documents of this source, where there is no domain_field; empty is unknown."""
    on_bad_row: OnBadRow = OnBadRow.fail
    """fail: stop at a row that is no document; skip: leave it out and count it."""
    split: str = "train"
    """Split of a dataset."""
    subset: str | None = None
    """Configuration name of a dataset."""
    revision: str | None = None
    """Commit or tag of a dataset on the hub."""
    streaming: bool = False
    """Read a dataset as it comes from the network, without storing it; it then has no fingerprint but its name."""
    stdlib: StdlibConfig = field(default_factory=StdlibConfig)
    """Settings of the embedded corpus."""


@dataclass(frozen=True, slots=True)
class Source:
    """An opened source."""

    name: str
    """For messages."""
    identity: dict[str, Any]
    """JSON that changes whenever the documents do: part of the packed set's fingerprint."""
    total_bytes: int | None
    """What `Reading.bytes_read` will reach; None where it cannot be known."""
    on_bad_row: OnBadRow
    """What to do with rows that are no documents."""
    _read: Callable[[Reading], Iterator[Document]]

    def documents(self, reading: Reading) -> Iterator[Document]:
        """Yield the documents, in an order that never changes; UserError when there are none."""
        for document in self._read(reading):
            reading.documents += 1
            yield document
        if not reading.documents:
            skipped = f" ({reading.skipped.total()} rows were skipped)" if reading.skipped else ""
            raise UserError(f"{self.name} holds no documents{skipped}: name a source that has some")


def open_source(config: SourceConfig) -> Source:
    """Find the source's files (or dataset) and what identifies them; UserError when there are none."""
    if config.format is SourceFormat.stdlib:
        return _open_stdlib(config)
    if not config.path:
        raise UserError(f"a source with format={config.format.value} has no path: set path to a file, folder or glob")
    if config.domain_field is not None and config.domain:
        raise UserError(
            f"{config.path} has both domain_field={config.domain_field} and domain={config.domain}: set one"
        )
    fields = Fields(config.text_field, config.domain_field, config.domain)
    is_dataset = config.format is SourceFormat.datasets
    if is_dataset or (config.format is SourceFormat.auto and hub.is_saved_dataset(config.path)):
        return _open_dataset(config, fields)
    return _open_files(config, fields)


def _open_files(config: SourceConfig, fields: Fields) -> Source:
    kind = None if config.format is SourceFormat.auto else config.format.value
    files = find_files(config.path, kind)
    contents = content_identity(files)

    def read(reading: Reading) -> Iterator[Document]:
        return read_files(files, kind, fields, reading)

    identity = {"format": kind, "files": contents, "fields": dataclasses.asdict(fields), **_policy(config)}
    total = sum(content["bytes"] for content in contents)
    return Source(f"path={config.path}", identity, total, config.on_bad_row, read)


def _open_dataset(config: SourceConfig, fields: Fields) -> Source:
    name = hub.DatasetName(config.path, config.subset, config.split, config.revision, config.streaming)
    dataset = hub.open_dataset(name)

    def read(reading: Reading) -> Iterator[Document]:
        return hub.read_dataset(dataset, name, fields, reading)

    identity = {"dataset": hub.dataset_identity(dataset, name), "fields": dataclasses.asdict(fields), **_policy(config)}
    return Source(f"the dataset {config.path}", identity, hub.dataset_bytes(dataset), config.on_bad_row, read)


def _open_stdlib(config: SourceConfig) -> Source:
    """The corpus is read once to identify it: distributions patch and leave out files, whatever the version says."""
    digest, total = hashlib.sha256(), 0
    for document in stdlib.documents(config.stdlib):
        text = document.text.encode()
        digest.update(f"{document.source}\0{document.domain}\0{len(text)}\0".encode() + text)
        total += len(text)

    def read(reading: Reading) -> Iterator[Document]:
        for document in stdlib.documents(config.stdlib):
            reading.bytes_read += len(document.text.encode())
            yield document

    identity = {"stdlib": digest.hexdigest()}
    return Source("format=stdlib", identity, total, config.on_bad_row, read)


def _policy(config: SourceConfig) -> dict[str, str]:
    return {"on_bad_row": config.on_bad_row.value}

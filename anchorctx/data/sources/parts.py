"""A source in parts: what one worker reads and tokenises, and what need not be done again after an interruption."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from anchorctx.data.sources import hub, stdlib
from anchorctx.data.sources.documents import Document, Reading, Tokens
from anchorctx.data.sources.fields import Fields
from anchorctx.data.sources.files import read_files
from anchorctx.data.sources.hub import DatasetName
from anchorctx.data.sources.stdlib import StdlibConfig

PART_BYTES = 2**26
"""Small files are read together until they have so many bytes; a larger file is a part of its own."""
PART_ROWS = 2**16
"""Rows of a dataset in a part."""


class Part(Protocol):
    """Some of a source's documents; can be sent to another process."""

    @property
    def identity(self) -> dict[str, Any]:
        """JSON that changes whenever the documents do."""
        ...

    @property
    def size(self) -> int | None:
        """What `Reading.bytes_read` will grow by; None where it cannot be known."""
        ...

    def documents(self, reading: Reading) -> Iterator[Document | Tokens]:
        """Yield the documents, in an order that never changes."""
        ...


@dataclass(frozen=True, slots=True)
class FilesPart:
    """Some files."""

    files: tuple[Path, ...]
    kind: str | None
    fields: Fields
    identity: dict[str, Any]
    size: int | None

    def documents(self, reading: Reading) -> Iterator[Document | Tokens]:
        """The files' documents."""
        return read_files(self.files, self.kind, self.fields, reading)


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
        dataset = hub.open_dataset(self.name)
        if self.stop is not None:
            dataset = dataset.select(range(self.start, self.stop))
        return hub.read_dataset(dataset, self.name, self.fields, reading, self.start)


@dataclass(frozen=True, slots=True)
class StdlibPart:
    """The embedded corpus."""

    config: StdlibConfig
    identity: dict[str, Any]
    size: int | None

    @classmethod
    def of(cls, config: StdlibConfig) -> StdlibPart:
        """The corpus is read once to identify it: distributions patch and leave out files, whatever the version."""
        digest, total = hashlib.sha256(), 0
        for document in stdlib.documents(config):
            text = document.text.encode()
            digest.update(f"{document.source}\0{document.domain}\0{len(text)}\0".encode() + text)
            total += len(text)
        return cls(config, {"stdlib": digest.hexdigest()}, total)

    def documents(self, reading: Reading) -> Iterator[Document | Tokens]:
        """The library's files."""
        for document in stdlib.documents(self.config):
            reading.bytes_read += len(document.text.encode())
            yield document


def file_parts(
    files: list[Path], contents: list[dict[str, Any]], kind: str | None, fields: Fields, facts: dict[str, Any]
) -> list[FilesPart]:
    """The files in parts of some PART_BYTES, in order; `contents` identifies each, `facts` belong to every identity."""
    parts, begin, size = [], 0, 0
    for index, content in enumerate(contents):
        size += content["bytes"]
        if size >= PART_BYTES or index == len(contents) - 1:
            identity = {"format": kind, "files": contents[begin : index + 1], **facts}
            parts.append(FilesPart(tuple(files[begin : index + 1]), kind, fields, identity, size))
            begin, size = index + 1, 0
    return parts


def dataset_parts(dataset: Any, name: DatasetName, fields: Fields, facts: dict[str, Any]) -> list[DatasetPart]:
    """The dataset in parts of PART_ROWS; a stream is one."""
    identity, size = {"dataset": hub.dataset_identity(dataset, name), **facts}, hub.dataset_bytes(dataset)
    if name.streaming:
        return [DatasetPart(name, 0, None, fields, identity, size)]
    rows = len(dataset)
    return [
        DatasetPart(name, start, stop := min(start + PART_ROWS, rows), fields, identity | {"rows": [start, stop]}, None)
        for start in range(0, rows, PART_ROWS)
    ]

"""Sources of documents: what a user configures, and one way to read them all."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from anchorctx.data.sources import hub
from anchorctx.data.sources.documents import Document, OnBadRow, Part, Reading, Tokens
from anchorctx.data.sources.fields import Fields
from anchorctx.data.sources.files import content_identity, file_parts, find_files
from anchorctx.data.sources.stdlib import StdlibConfig, StdlibPart
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
    with format=stdlib. Evaluations without a path read the embedded corpus."""
    format: SourceFormat = SourceFormat.auto
    """auto, jsonl, parquet, text, datasets or stdlib."""
    name: str = ""
    """Its name in the account and in mixture.weights; empty is the last part of the path."""
    text_field: str = "text"
    """Field of a row that holds the text; `a.b` is field b of the object in field a."""
    tokens_field: str | None = None
    """Field of a row that holds token ids, of sources that were tokenised before, such as input_ids; null is text."""
    boundaries_field: str | None = None
    """Field beside tokens_field that says where documents end: [{end: 812}, ...] (as Long-Context-Data-Engineering's
    `source`), [0, 812, ...] or [[0, 812], ...] (as ProLong's `indices`); null where each row is one document."""
    labels_field: str | None = None
    """Field beside tokens_field of labels that are as long: -100 where a token is not trained, as in the prompts of
    instruction data, else the token itself (not the one after it); null trains all tokens."""
    mask_field: str | None = None
    """Instead of labels_field, a field of 1 for tokens that are trained and 0 for others, such as completion_mask."""
    domain_field: str | None = None
    """Field of a row that holds the document's domain, such as meta.redpajama_set_name; null where rows have none."""
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
    """For the account of its tokens, and for the mixture."""
    described: str
    """For messages."""
    identity: dict[str, Any]
    """JSON that changes whenever the documents do: part of the packed set's fingerprint."""
    parts: Sequence[Part]
    """The parts that it is read in, in order."""
    total_bytes: int | None
    """What `Reading.bytes_read` will reach; None where it cannot be known."""
    on_bad_row: OnBadRow
    """What to do with rows that are not valid documents."""

    def documents(self, reading: Reading) -> Iterator[Document | Tokens]:
        """Yield the documents, in an order that never changes; UserError when there are none."""
        for part in self.parts:
            for document in part.documents(reading):
                reading.documents += 1
                yield document
        self.check_not_empty(reading)

    def texts(self, reading: Reading) -> Iterator[Document]:
        """The documents of a source of texts; UserError when they are tokenised already."""
        for document in self.documents(reading):
            if isinstance(document, Tokens):
                raise UserError(f"{self.described} holds token ids, not texts: name a source of texts, no tokens_field")
            yield document

    def check_not_empty(self, reading: Reading) -> None:
        """UserError when nothing was read."""
        if not reading.documents:
            skipped = f" ({reading.skipped.total()} rows were skipped)" if reading.skipped else ""
            raise UserError(f"{self.described} holds no documents{skipped}: name a source that has some")


def open_sources(configs: Sequence[SourceConfig]) -> list[Source]:
    """Open all sources and give each a name of its own; UserError when two are configured with the same name."""
    sources = [open_source(config) for config in configs]
    given = Counter(config.name for config in configs if config.name)
    for name, count in given.items():
        if count > 1:
            raise UserError(f"{count} sources have name={name}: give each a name of its own, or none")
    # two files train.jsonl in different folders become "train.jsonl #1" and "train.jsonl #2"
    names = Counter(source.name for source in sources)
    numbered: Counter[str] = Counter()
    for index, source in enumerate(sources):
        if names[source.name] > 1:
            numbered[source.name] += 1
            sources[index] = dataclasses.replace(source, name=f"{source.name} #{numbered[source.name]}")
    return sources


def open_source(config: SourceConfig) -> Source:
    """Find the source's files (or dataset) and what identifies them; UserError when there are none."""
    if config.format is SourceFormat.stdlib and config.path:
        raise UserError(
            f"path={config.path} is not read with format=stdlib, the embedded corpus: set format=auto as well"
        )
    if config.format is SourceFormat.stdlib:
        part = StdlibPart.of(config.stdlib)
        name = config.name or f"stdlib {config.stdlib.split.value}"
        return Source(name, "format=stdlib", part.identity, [part], part.size, config.on_bad_row)
    fields = _fields(config)
    is_dataset = config.format is SourceFormat.datasets
    if is_dataset or (config.format is SourceFormat.auto and hub.is_saved_dataset(config.path)):
        return _open_dataset(config, fields)
    return _open_files(config, fields)


def _fields(config: SourceConfig) -> Fields:
    """The fields to read; UserError when the settings contradict each other."""
    if not config.path:
        raise UserError(f"a source with format={config.format.value} has no path: set path to a file, folder or glob")
    if config.domain_field is not None and config.domain:
        raise UserError(
            f"{config.path} has both domain_field={config.domain_field} and domain={config.domain}: set one"
        )
    for option in ("boundaries_field", "labels_field", "mask_field"):
        name = getattr(config, option)
        if name is not None and config.tokens_field is None:
            raise UserError(f"{config.path} has {option}={name} but no tokens_field: set tokens_field=input_ids")
    if config.labels_field is not None and config.mask_field is not None:
        raise UserError(
            f"{config.path} has both labels_field={config.labels_field} and mask_field={config.mask_field}: set one"
        )
    if config.tokens_field is not None and config.format is SourceFormat.text:
        raise UserError(
            f"{config.path} has tokens_field={config.tokens_field}, but format=text has no fields: set format"
        )
    return Fields(
        text=config.text_field,
        domain=config.domain_field,
        constant_domain=config.domain,
        tokens=config.tokens_field,
        boundaries=config.boundaries_field,
        labels=config.labels_field,
        mask=config.mask_field,
    )


def _open_files(config: SourceConfig, fields: Fields) -> Source:
    kind = None if config.format is SourceFormat.auto else config.format.value
    files = find_files(config.path, kind)
    contents = content_identity(files)
    facts = {"fields": fields.identity}
    parts = file_parts(files, contents, kind, fields, facts)
    identity = {"format": kind, "files": contents, **facts, "on_bad_row": config.on_bad_row.value}
    total = sum(content["bytes"] for content in contents)
    described = f"path={config.path}"
    return Source(config.name or Path(config.path).name, described, identity, parts, total, config.on_bad_row)


def _open_dataset(config: SourceConfig, fields: Fields) -> Source:
    name = hub.DatasetName(config.path, config.subset, config.split, config.revision, config.streaming)
    dataset = hub.open_dataset(name)
    facts = {"fields": fields.identity}
    identity = {"dataset": hub.dataset_identity(dataset, name), **facts, "on_bad_row": config.on_bad_row.value}
    parts = hub.dataset_parts(dataset, name, fields, facts)
    described, size = f"the dataset {config.path}", hub.dataset_bytes(dataset)
    return Source(config.name or Path(config.path).name, described, identity, parts, size, config.on_bad_row)

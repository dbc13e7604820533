"""The held-out documents that evaluations read."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from anchorctx.data.sources.documents import Reading
from anchorctx.data.sources.source import Source, SourceConfig, SourceFormat, open_source
from anchorctx.data.sources.stdlib import Split, StdlibConfig


def embedded() -> SourceConfig:
    """No path: `open_corpus` then takes the validation files of the embedded corpus."""
    return SourceConfig(stdlib=StdlibConfig(split=Split.validation))


def open_corpus(config: SourceConfig) -> Source:
    """The source that was named; the embedded corpus where none was."""
    is_named = config.path or config.format is not SourceFormat.auto
    return open_source(config if is_named else dataclasses.replace(config, format=SourceFormat.stdlib))


class Corpus(Sequence[str]):
    """The texts of a source's documents, read when they are first asked for."""

    def __init__(self, config: SourceConfig) -> None:
        self._source, self._on_bad_row = open_corpus(config), config.on_bad_row
        self.identity = self._source.identity
        self._texts: list[str] | None = None

    @property
    def texts(self) -> list[str]:
        """All texts, in the source's order."""
        if self._texts is None:
            reading = Reading(on_bad_row=self._on_bad_row)
            self._texts = [document.text for document in self._source.texts(reading)]
        return self._texts

    def first(self, count: int) -> list[str]:
        """The first texts, without reading on."""
        if self._texts is not None:
            return self._texts[:count]
        # A new reading, which stops early: for studies that need a few texts of a large corpus.
        documents = self._source.texts(Reading(on_bad_row=self._on_bad_row))
        return [document.text for document in itertools.islice(documents, count)]

    def __getitem__(self, index: Any) -> Any:
        return self.texts[index]

    def __len__(self) -> int:
        return len(self.texts)

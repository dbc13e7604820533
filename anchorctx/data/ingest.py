"""The first stage: the documents of one part of a source, to token ids on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anchorctx.data import store
from anchorctx.data.documents import BadRow, Document, OnBadRow, Reading, Tokens
from anchorctx.data.facts import FactTokens
from anchorctx.data.parts import Part
from anchorctx.data.store import TokenWriter
from anchorctx.data.tokenize import Encoder, default_workers, tokenize
from anchorctx.errors import UserError
from anchorctx.manifest import fingerprint

STORE_VERSION = 1
"""Raised whenever the same part would give other tokens or another format, so that no old store is read."""

Progress = Callable[[Reading, int], None]
"""Told, after every document, what was read of the part and how many tokens that made."""


@dataclass(frozen=True, slots=True)
class Ingest:
    """What all parts share; can be sent to another process."""

    root: Path
    """Folder of the token stores."""
    encoder: Encoder
    """The tokenizer."""
    tokenizer: str
    """Its fingerprint."""
    vocab_size: int
    """Ids are below it."""
    eos: int | None
    """Appended to documents; None appends nothing."""
    needs_domain: bool
    """Are documents without a domain a mistake?"""
    facts: FactTokens | None
    """Weigh the loss by planted facts; None weighs all tokens the same."""
    workers: int | None
    """Tokenising processes; 1 uses threads, None chooses by the part's size."""

    def folder(self, part: Part, on_bad_row: OnBadRow) -> Path:
        """Where the part's tokens are, or will be: named by everything that decides them."""
        identity = {
            "version": STORE_VERSION,
            "part": part.identity,
            "on_bad_row": on_bad_row,
            "tokenizer": self.tokenizer,
            "eos": self.eos,
            "facts": self.facts is not None,
        }
        return self.root / fingerprint(identity)

    def run(self, part: Part, on_bad_row: OnBadRow, progress: Progress | None = None) -> Path:
        """Tokenise the part unless that was done before; returns its folder. Nothing half-written is left behind."""
        folder = self.folder(part, on_bad_row)
        if (folder / store.FILE).is_file():
            return folder
        reading = Reading(on_bad_row)
        with TokenWriter(folder, self.vocab_size, self.eos, self.facts is not None) as writer:
            for document in self._tokens(part, reading):
                reading.documents += 1
                if self._is_usable(document, reading):
                    writer.add(document.ids, document.domain, self._weights(document.ids))
                if progress is not None:
                    progress(reading, writer.tokens)
            return writer.close(reading)

    def _tokens(self, part: Part, reading: Reading) -> Iterator[Tokens]:
        """The documents' tokens, in order: of texts by the tokenizer, of ids as they are."""
        documents = iter(part.documents(reading))
        first = next(documents, None)
        if isinstance(first, Tokens):
            yield first
            yield from documents  # type: ignore[misc]  # a part holds one kind
        elif first is not None:
            workers = self.workers or default_workers(part.size)
            yield from tokenize(_chained(first, documents), self.encoder, workers)

    def _is_usable(self, document: Tokens, reading: Reading) -> bool:
        ids = document.ids
        if self.needs_domain and not document.domain:
            raise UserError(
                f"{document.source} has no domain, but pack.domain_tags=true: set domain or domain_field of its source"
            )
        if not len(ids):
            sentence = f"{document.source} has a text that the tokenizer turns into no token: remove it"
            reading.bad(BadRow("no tokens", sentence))
            return False
        if int(ids.min()) < 0 or int(ids.max()) >= self.vocab_size:
            wrong = ids[(ids < 0) | (ids >= self.vocab_size)][0]
            reading.bad(
                BadRow(
                    "id outside the vocabulary",
                    f"{document.source} has token id {wrong}, outside the tokenizer's 0 to {self.vocab_size - 1}: "
                    "set tokenizer to the one that made the ids",
                )
            )
            return False
        return True

    def _weights(self, ids: np.ndarray) -> np.ndarray | None:
        if self.facts is None:
            return None
        return self.facts.loss_weights(ids if self.eos is None else np.append(ids, self.eos))


def _chained(first: Any, rest: Iterator[Any]) -> Iterator[Document]:
    yield first
    yield from rest

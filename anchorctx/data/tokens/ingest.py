"""The first stage: tokenises the documents of one part of a source and stores the ids on disk.

A part becomes one or more *stretches*, each a token store of some STRETCH_TOKENS, so that an interruption costs one
stretch and not the whole part.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from anchorctx.data.sources.documents import BadRow, Document, OnBadRow, Part, Reading, Tokens
from anchorctx.data.sources.facts import FactTokens
from anchorctx.data.sources.source import Source
from anchorctx.data.tokens import store
from anchorctx.data.tokens.encode import Encoder, default_workers, tokenize
from anchorctx.data.tokens.store import TokenPart, TokenWriter
from anchorctx.errors import UserError
from anchorctx.records.manifest import fingerprint

STORE_VERSION = 2
"""To be raised when the same part would give other tokens or another format, so that no old store is read."""
STRETCH_TOKENS = 2**25
"""Tokens after which a part's next store begins: what an interruption, or a bad row, costs at most."""

Done = TypeVar("Done")
Progress = Callable[[Reading, int], None]
"""Called after every document with what was read of the part and how many tokens that made."""


@dataclass(frozen=True, slots=True)
class Ingest:
    """How parts are tokenised, the same for all; can be sent to another process."""

    root: Path
    """Folder of the token stores."""
    encoder: Encoder
    """The tokenizer."""
    tokenizer: str
    """Its fingerprint."""
    vocab_size: int
    """Ids are below it."""
    eos: int | None
    """Token id that is appended to documents; None appends nothing."""
    needs_domain: bool
    """Are documents without a domain a mistake?"""
    facts: FactTokens | None
    """Weigh the loss by planted facts; None weighs all tokens the same."""
    workers: int | None
    """Tokenising processes; 1 uses threads, None chooses by the part's size."""

    def folder(self, part: Part, stretch: int) -> Path:
        """Where the tokens of a stretch of the part are, or will be: named by everything that decides them."""
        identity = {
            "version": STORE_VERSION,
            "part": part.identity,
            "stretch": [stretch, STRETCH_TOKENS],
            "tokenizer": self.tokenizer,
            "eos": self.eos,
            "facts": self.facts is not None,
            "special_tokens": self.encoder.special.value,
        }
        return self.root / fingerprint(identity)

    def run(self, part: Part, on_bad_row: OnBadRow, progress: Progress | None = None) -> list[Path]:
        """Tokenise the part, in stretches of some STRETCH_TOKENS, unless that was done before; returns their folders.

        Nothing half-written is left behind. A stretch that is whole stays, whatever happens after it: its documents are
        read again, to get past them, but not tokenised.
        """
        # two stretches of 30 and 25 documents are whole: reading starts behind document 55, with stretch 2
        done = self._whole(part, on_bad_row)
        folders, tokens = [stretch.folder for stretch in done], sum(stretch.facts["tokens"] for stretch in done)
        if done and done[-1].facts["is_last"]:
            return folders
        reading, is_last = Reading(on_bad_row, documents=sum(stretch.facts["read"] for stretch in done)), False
        with closing(self._tokens(part, reading)) as documents:
            while not is_last:
                counted, folder = Reading(on_bad_row), self.folder(part, len(folders))
                with TokenWriter(folder, self.vocab_size, self.eos) as writer:
                    for _ in self._fill(writer, documents, counted):
                        if progress is not None:
                            progress(reading, tokens + writer.tokens)
                    # the documents ran out; if they did just at a full stretch, an empty one follows, as the last
                    is_last = writer.tokens < STRETCH_TOKENS
                    is_clean = not counted.skipped and not reading.skipped
                    # `counted` has the rows that this stretch rejected. Those that the reader rejected are counted with
                    # the last stretch: the reader is ahead, so that nobody knows to which one they belong
                    counted.skipped += reading.skipped if is_last else Counter()
                    folders.append(writer.close(counted, is_last, is_clean))
                tokens += writer.tokens
        return folders

    def _whole(self, part: Part, on_bad_row: OnBadRow) -> list[TokenPart]:
        """The stretches that exist already; where bad rows are an error, only those before the first bad row."""
        found: list[TokenPart] = []
        while not (found and found[-1].facts["is_last"]):
            folder = self.folder(part, len(found))
            if not (folder / store.FILE).is_file():
                break
            stretch = TokenPart.open(folder)
            if on_bad_row is OnBadRow.fail and not stretch.facts["is_clean"]:
                break
            found.append(stretch)
        return found

    def _fill(self, writer: TokenWriter, documents: Iterator[Tokens], counted: Reading) -> Iterator[None]:
        """Write documents, one at a time, until the stretch is full."""
        for document in documents:
            counted.documents += 1
            if self._is_usable(document, counted):
                counted.written += document.written
                writer.add(document, self._weights(document))
            yield
            if writer.tokens >= STRETCH_TOKENS:
                return

    def _tokens(self, part: Part, reading: Reading) -> Generator[Tokens, None, None]:
        """Tokens of all documents but the first `reading.documents`: of texts by the tokenizer, of ids as they are."""
        documents = islice(part.documents(reading), reading.documents, None)
        first = next(documents, None)
        if first is None:
            return
        every: Iterator[Any] = chain([first], documents)  # a part holds one kind
        if isinstance(first, Document):
            every = tokenize(every, self.encoder, self.workers or default_workers(part.size))
        for document in every:
            reading.documents += 1
            yield document

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
        # ids of a tokenised source may be of any integer type, also negative
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

    def _weights(self, document: Tokens) -> np.ndarray | None:
        """(n,) loss weights of a document's tokens, an EOS behind them included; None: all 1."""
        ids, trained = document.ids, document.trained
        if self.facts is None and trained is None:
            return None
        if self.eos is not None:  # after an answer EOS is trained like it, after a masked token it is masked
            ids = np.append(ids, self.eos)
            trained = None if trained is None else np.append(trained, trained[-1])
        weights = np.ones(len(ids), np.float32) if self.facts is None else self.facts.loss_weights(ids)
        return weights if trained is None else weights * trained


@dataclass(frozen=True, slots=True)
class SourcePart:
    """A part to tokenise."""

    source: int
    """Index of its source."""
    on_bad_row: OnBadRow
    part: Part


def run_part(ingest: Ingest, item: SourcePart, progress: Progress | None = None) -> list[Path]:
    """The first stage: tokenise one part; returns the folders of its stretches."""
    return ingest.run(item.part, item.on_bad_row, progress)


class ReadingBar:
    """The progress bar: bytes read if this process reads, parts done if others do; a context manager."""

    def __init__(self, sources: Sequence[Source], parts: int) -> None:
        sizes = [source.total_bytes for source in sources]
        total = None if None in sizes else sum(size or 0 for size in sizes)
        self._bar: Any = tqdm(total=total, unit="B", unit_scale=True, desc="tokenise", mininterval=0.5)
        self._parts, self._is_running = parts, False
        self._documents = self._tokens = self._before = 0

    def __enter__(self) -> ReadingBar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def running(self, function: Callable[..., Any]) -> Callable[[Ingest, Any], Any]:
        """The stage's function for one part, followed by the bar as it reads."""
        self._is_running = True

        def run(ingest: Ingest, item: Any) -> Any:
            began = self._documents, self._tokens, self._before  # where the bar stood before this part

            def follow(reading: Reading, tokens: int) -> None:
                self._documents, self._tokens = began[0] + reading.documents, began[1] + tokens
                self._move(began[2] + reading.bytes_read)

            folder = function(ingest, item, follow)
            # a part that was tokenised before reads nothing, and one may read less than its size
            self._before = began[2] + (item.part.size or self._before - began[2])
            self._move(self._before)
            return folder

        return run

    def counting(self, done: Iterable[Done]) -> Iterator[Done]:
        """The results as they come; where other processes read, the bar counts them."""
        if not self._is_running:
            self._bar.reset(self._parts)
            self._bar.unit, self._bar.unit_scale = "part", False
        for result in done:
            if not self._is_running:
                self._bar.update()
            yield result

    def _move(self, to: int) -> None:
        elapsed = max(time.time() - self._bar.start_t, 1e-9)
        rates = f"{self._documents / elapsed:,.0f} documents/s, {self._tokens / elapsed:,.0f} tokens/s"
        self._bar.set_postfix_str(rates, refresh=False)
        self._before = to
        self._bar.update(max(to - self._bar.n, 0))

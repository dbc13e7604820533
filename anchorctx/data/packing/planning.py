"""The second stage: which documents, in which order, in which rows. It goes by lengths alone and reads no token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from anchorctx.data.packing.accounting import Accounting
from anchorctx.data.packing.config import PackConfig
from anchorctx.data.packing.mixture import MixtureBy, MixtureConfig, draw, duplicates
from anchorctx.data.packing.packer import Packer
from anchorctx.data.packing.pieces import Rows, Tags, make_pieces
from anchorctx.data.tokens.store import TokenPart

AT_ONCE = 2**16
"""Documents handed to the packer at a time."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """All tokenised documents of a preparation, in order."""

    parts: Sequence[TokenPart]
    sources: Sequence[int]
    """The source of each part, as an index into `names`."""
    names: Sequence[str]
    """The sources' names."""

    def domains(self) -> list[str]:
        """All domains, in order of appearance."""
        return list(dict.fromkeys(domain for part in self.parts for domain in part.domains))

    def parts_of(self, source: int) -> list[TokenPart]:
        """The parts of the source with this index."""
        return [part for part, index in zip(self.parts, self.sources, strict=True) if index == source]

    def skipped(self) -> Counter[str]:
        """Rows of all sources that were left out, by reason."""
        return sum((part.skipped for part in self.parts), Counter())

    def written(self) -> int:
        """Names of special tokens in the documents of all sources."""
        return sum(part.facts["written"] for part in self.parts)

    def length_histogram(self) -> np.ndarray:
        """(64,) int64: entry i counts the documents of 2**i to 2**(i+1) - 1 tokens, an appended EOS left out."""
        counts = np.zeros(64, np.int64)
        for part in self.parts:
            documents = part.documents
            lengths = documents["length"] - documents["eos"]
            # frexp gives x = m * 2**e with m in [0.5, 1): e - 1 is 3 for 8 and for 15, and 4 for 16
            counts += np.bincount(np.frexp(lengths)[1] - 1, minlength=64)
        return counts


class DocumentPlan:
    """How often each document is taken, and under which source (or domain) its tokens are counted."""

    def __init__(self, corpus: Corpus, config: MixtureConfig) -> None:
        self._corpus, self._config = corpus, config
        by_domain = config.by is MixtureBy.domain
        self.names: list[str] = corpus.domains() if by_domain else list(corpus.names)
        """The sources (or domains) that tokens are counted under."""
        # for each part (D,): how often its documents are taken, and which repeat an earlier one; None takes all once
        self._copies: list[np.ndarray] | None = None
        self._duplicate: list[np.ndarray] | None = None
        if config.weights or config.deduplicate:
            self._draw()

    def accounting(self) -> Accounting:
        """A new account, with what came in and what the mixture leaves out or repeats."""
        accounting = Accounting(self.names)
        for index in range(len(self._corpus.parts)):
            documents, group = self._corpus.parts[index].documents, self._group(index)
            lengths = documents["length"]
            accounting.add("document_tokens", group, lengths - documents["eos"])
            accounting.add("eos_tokens", group, documents["eos"])
            if self._copies is None or self._duplicate is None:
                continue
            # a document of 50 tokens: taken 3 times, 100 are repeated; taken 0 times, 50 are dropped
            copies, duplicate = self._copies[index], self._duplicate[index]
            accounting.add("repeated", group, np.maximum(copies - 1, 0) * lengths)
            accounting.drop("duplicate", group, lengths * duplicate)
            accounting.drop("not in the mixture", group, lengths * ((copies == 0) & ~duplicate))
        return accounting

    def documents(self, tags: Sequence[np.ndarray], tag_lengths: np.ndarray) -> Iterator[np.ndarray]:
        """Yield all documents as (n,) PIECE: every one once, then the copies, pass by pass.

        Args:
            tags: for each part, the (number of domains,) tags of its domains.
            tag_lengths: (number of tags,) tokens of each tag.
        """
        # copies = [2, 0, 3, 1]: the first pass has documents 0, 2, 3, the second 0 and 2, the third 2
        number = 0
        for turn in range(self._passes()):
            for index, part in enumerate(self._corpus.parts):
                group, taken = self._group(index), self._taken(index, turn)
                for start in range(0, len(taken), AT_ONCE):
                    chosen = taken[start : start + AT_ONCE]
                    documents = part.documents[chosen]
                    tag = tags[index][documents["domain"]]
                    yield make_pieces(
                        documents["length"],
                        size=documents["length"] + tag_lengths[tag],
                        document=np.arange(number, number + len(chosen)),
                        part=index,
                        start=documents["start"],
                        tag=tag,
                        source=group[chosen],
                    )
                    number += len(chosen)

    def report(self, content: np.ndarray) -> dict[str, Any]:
        """The mixture for the manifest: wanted and realised shares; `content` (names,) is what the rows hold."""
        asked, whole = self._config.weights, sum(self._config.weights.values())
        # tokens of each source: every document once, as often as it is taken, and of the latter those of long ones
        count = len(self.names)
        available, taken, taken_long = np.zeros((3, count))
        for index, part in enumerate(self._corpus.parts):
            lengths, group = part.documents["length"], self._group(index)
            tokens = lengths if self._copies is None else lengths * self._copies[index]
            available += np.bincount(group, lengths, count)
            taken += np.bincount(group, tokens, count)
            taken_long += np.bincount(group, tokens * (lengths >= (self._config.long_from or 0)), count)
        realised = {
            name: {"tokens": int(content[i]), "share": content[i] / max(content.sum(), 1)}
            | {"passes": taken[i] / max(available[i], 1)}
            | ({"long_share": taken_long[i] / max(taken[i], 1)} if self._config.long_from else {})
            for i, name in enumerate(self.names)
        }
        wanted = {name: weight / whole for name, weight in asked.items()}
        return {"by": self._config.by.value, "wanted": wanted, "realised": realised}

    def _draw(self) -> None:
        parts = self._corpus.parts
        sizes = [len(part.documents) for part in parts]
        lengths = np.concatenate([part.documents["length"] for part in parts])
        group = np.concatenate([self._group(index) for index in range(len(parts))])
        duplicate = np.zeros(len(lengths), bool)
        if self._config.deduplicate:
            duplicate = duplicates(np.concatenate([part.documents["hash"] for part in parts]))
        copies = (~duplicate).astype(np.int64)
        if self._config.weights:
            copies = draw(self._config, self.names, group, lengths, ~duplicate)
        ends = np.cumsum(sizes)[:-1]
        self._copies, self._duplicate = np.split(copies, ends), np.split(duplicate, ends)

    def _group(self, index: int) -> np.ndarray:
        """(D,) the source (or domain) of each document of a part, as an index into `names`."""
        part = self._corpus.parts[index]
        documents = part.documents
        if self._config.by is MixtureBy.source:
            return np.full(len(documents), self._corpus.sources[index])
        # a part numbers the domains in the order in which it meets them: its [books, web] may be [3, 0] of all
        numbers = np.array([self.names.index(domain) for domain in part.domains], np.int64)
        return numbers[documents["domain"]]

    def _taken(self, index: int, turn: int) -> np.ndarray:
        """Numbers of the part's documents that are taken more than `turn` times."""
        if self._copies is None:
            return np.arange(len(self._corpus.parts[index].documents))
        return np.flatnonzero(self._copies[index] > turn)

    def _passes(self) -> int:
        if self._copies is None:
            return 1
        return max((int(copies.max()) for copies in self._copies if len(copies)), default=0)


def plan_rows(
    plan: DocumentPlan,
    config: PackConfig,
    capacity: int,
    tags: Tags,
    domain_tags: Sequence[np.ndarray],
    accounting: Accounting,
) -> Iterator[Rows]:
    """Yield all rows of the set, some at a time, in order; `capacity` is a row's tokens without the anchor."""
    packer = Packer(config, capacity, tags.longest, accounting)
    for documents in plan.documents(domain_tags, tags.lengths):
        yield from packer.add(documents)
    yield from packer.finish()


def shards_of(several: Iterator[Rows], rows_per_shard: int) -> Iterator[Rows]:
    """The same rows in groups of `rows_per_shard`; the last may be smaller."""
    waiting: list[Rows] = []
    count = 0
    for rows in several:
        waiting.append(rows)
        count += len(rows)
        if count >= rows_per_shard:
            # 3 rows a shard, 8 rows waiting: two shards of rows 0..3 and 3..6, rows 6 and 7 wait on
            joined = Rows.joined(waiting)
            whole = count - count % rows_per_shard
            for start in range(0, whole, rows_per_shard):
                yield joined.part(start, start + rows_per_shard)
            waiting, count = [joined.part(whole, count)], count - whole
    if count:
        yield Rows.joined(waiting)

"""The specification of packing, in plain Python: one token after the other, one document after the other, no array.

The package's packer must make the same rows, token for token, and lose the same tokens for the same reasons.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np

from anchorctx.data.packing.assemble import RowShape, scatter
from anchorctx.data.packing.config import LongDocuments, PackConfig, Policy


@dataclass
class PlainDocument:
    """A document, or a piece of one."""

    number: int
    ids: list[int]
    weights: list[float]
    tag: list[int]
    source: int
    start: int = 0

    @property
    def size(self) -> int:
        return len(self.tag) + len(self.ids)

    def part(self, start: int, stop: int) -> PlainDocument:
        return replace(self, ids=self.ids[start:stop], weights=self.weights[start:stop], start=self.start + start)


@dataclass
class PlainRow:
    """What a row is."""

    ids: list[int]
    weights: list[float]
    docs: list[int]
    """The document of each token: 0 the anchor, then the row's pieces in order, then the padding."""


@dataclass
class PlainPacker:
    """Packs a whole corpus."""

    config: PackConfig
    shape: RowShape
    dropped: Counter[tuple[str, int]] = field(default_factory=Counter)
    """Tokens by (reason, source)."""

    def pack(self, documents: list[PlainDocument], buffer_pieces: int) -> list[PlainRow]:
        pieces = [piece for document in documents for piece in self._cut(document)]
        place = {
            Policy.one_per_row: lambda: [[piece] for piece in pieces],
            Policy.concat_split: lambda: self._concat(pieces),
            Policy.best_fit: lambda: self._best_fit(pieces, buffer_pieces),
        }[self.config.policy]
        return [self._row(number, row) for number, row in enumerate(place())]

    def _drop(self, reason: str, piece: PlainDocument, tokens: int) -> None:
        self.dropped[reason, piece.source] += tokens

    def _cut(self, document: PlainDocument) -> list[PlainDocument]:
        room, length, config = self.shape.capacity - len(document.tag), len(document.ids), self.config
        if length < config.min_length:
            self._drop("shorter than min_length", document, length)
            return []
        if length <= room:
            return [document]
        if config.long_documents is LongDocuments.drop:
            self._drop("longer than a row", document, length)
            return []
        if config.long_documents is LongDocuments.truncate:
            self._drop("truncated", document, length - room)
            return [document.part(0, room)]
        if config.policy is Policy.concat_split:
            return [document]
        return self._long_enough([document.part(i, min(i + room, length)) for i in range(0, length, room)])

    def _long_enough(self, pieces: list[PlainDocument]) -> list[PlainDocument]:
        for piece in pieces:
            if len(piece.ids) < self.config.min_length:
                self._drop("shorter than min_length", piece, len(piece.ids))
        return [piece for piece in pieces if len(piece.ids) >= self.config.min_length]

    def _concat(self, pieces: list[PlainDocument]) -> list[list[PlainDocument]]:
        rows: list[list[PlainDocument]] = [[]]
        for piece in pieces:
            while piece.ids:
                room = self.shape.capacity - sum(p.size for p in rows[-1]) - len(piece.tag)
                if room < min(self.config.min_length, len(piece.ids)):
                    rows.append([])
                    continue
                rows[-1].append(piece.part(0, room))
                piece = piece.part(room, len(piece.ids))
                if 0 < len(piece.ids) < self.config.min_length:
                    self._long_enough([piece])
                    break
        return [row for row in rows if row]

    def _best_fit(self, pieces: list[PlainDocument], buffer_pieces: int) -> list[list[PlainDocument]]:
        capacity, finished, buffer, added = self.shape.capacity, [], [], 0
        limit = max(self.config.buffer_tokens, 4 * capacity)
        for piece in pieces:
            buffer.append(piece)
            added += 1
            if sum(p.size for p in buffer) >= limit or added >= buffer_pieces:
                rows = _decreasing(buffer, capacity)
                emptiest = sorted(range(len(rows)), key=lambda i: _filled(rows[i]))[: max(len(rows) // 4, 1)]
                kept = [rows[i] for i in emptiest if _filled(rows[i]) < capacity]
                done = [row for i, row in enumerate(rows) if i not in emptiest or _filled(row) == capacity]
                finished += sorted(done, key=_earliest)
                # the next buffer begins with what is kept, in the order in which it came
                buffer = [piece for piece in buffer if any(piece is p for row in kept for p in row)]
                added = 0
        return finished + sorted(_decreasing(buffer, capacity), key=_earliest)

    def _row(self, number: int, pieces: list[PlainDocument]) -> PlainRow:
        pieces = sorted(pieces, key=lambda piece: (piece.number, piece.start))
        head, seed = self.shape.anchor_len, [self.shape.seed, number]
        row = PlainRow([self.shape.anchor_id] * head, [0.0] * head, [0] * head)
        sizes = np.array([piece.size for piece in pieces])
        segments = scatter(sizes, self.shape.chunks, np.random.default_rng(seed))
        runs = zip(segments.piece.tolist(), segments.start.tolist(), segments.length.tolist(), strict=True)
        for index, start, length in runs:
            piece = pieces[index]
            for position in range(start, start + length):
                is_tag = position < len(piece.tag)
                token = piece.tag[position] if is_tag else piece.ids[position - len(piece.tag)]
                continues = row.docs[-1] == index + 1
                weight = 0.0 if is_tag or not continues else piece.weights[position - len(piece.tag)]
                row.ids.append(token)
                row.weights.append(weight)
                row.docs.append(index + 1)
        while len(row.ids) < self.shape.row_length:
            row.ids.append(self.shape.pad_id)
            row.weights.append(0.0)
            row.docs.append(len(pieces) + 1)
        return row


def _filled(row: list[PlainDocument]) -> int:
    return sum(piece.size for piece in row)


def _earliest(row: list[PlainDocument]) -> int:
    return min(piece.number for piece in row)


def _decreasing(pieces: list[PlainDocument], capacity: int) -> list[list[PlainDocument]]:
    """The textbook: the longest first, into the fullest row that has room; of equals the one that changed last."""
    rows: list[list[PlainDocument]] = []
    changed: list[int] = []
    for turn, piece in enumerate(sorted(pieces, key=lambda piece: -piece.size)):
        fits = [i for i, row in enumerate(rows) if _filled(row) + piece.size <= capacity]
        if fits:
            best = max(fits, key=lambda i: (_filled(rows[i]), changed[i]))
        else:
            best = len(rows)
            rows.append([])
            changed.append(0)
        rows[best].append(piece)
        changed[best] = turn
    return rows

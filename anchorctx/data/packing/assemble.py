"""Makes rows of tokens from rows of pieces, a shard at a time: anchor, documents, padding, and loss weights.

A token is trained where its loss weight is not 0, it is content, and the token before it in the row is the same
document's. So the anchor is never trained, nor is the first token of a document or of a later chunk of one.

There is no loop over tokens: one copy for each run of tokens that lie together in the corpus and in the rows. At 1,000
tokens a document that is as fast as copying memory (benchmarks/packing.md).

With `interleave` a document is cut into chunks that are scattered over its row, in order; for the attention it is still
one document. The paper tries it and finds that it hurts; it is there so that a user can see this for himself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from anchorctx.data.packing.accounting import Accounting
from anchorctx.data.packing.pieces import Rows, Tags, Text
from anchorctx.data.packing.shard import RowShape, Shard, Workspace

Run = tuple[int, int, int, int]
"""A copy: token store (`part`), first token there, first token in the rows, number of tokens."""


@dataclass(frozen=True, slots=True)
class Placed:
    """Where S segments lie in R rows; all arrays are (S,) int64 unless they say otherwise.

    A segment is a run of tokens of one piece: the whole piece (its tag, then its content), or a chunk of it.
    """

    row: np.ndarray
    """Index of its row."""
    piece: np.ndarray
    """Index of its piece."""
    at: np.ndarray
    """Where it begins, in tokens from the first row's start."""
    length: np.ndarray
    """Its tokens, those of a tag included."""
    tag_skip: np.ndarray
    """Where in the piece's tag it begins; meaningless where `tag` is 0."""
    tag: np.ndarray
    """Tokens of the tag that it begins with."""
    content_skip: np.ndarray
    """Where in the piece's content its own begins."""
    used: np.ndarray
    """(R,) tokens of each row that pieces take."""


def assemble(
    rows: Rows,
    shape: RowShape,
    tags: Tags,
    texts: Mapping[int, Text],
    accounting: Accounting,
    first_row: int = 0,
    workspace: Workspace | None = None,
) -> Shard:
    """Make a shard of the rows.

    Args:
        rows: which pieces share a row.
        shape: length of the rows, their anchor and padding.
        tags: what is put in front of pieces.
        texts: the tokens of every part (token store) that the pieces refer to.
        accounting: counts the tokens that are in the rows.
        first_row: number of the first row in its set, which seeds the interleaving.
        workspace: memory for the shard, which the next one made in it overwrites; None allocates.
    """
    placed = _place(rows, shape, tags, first_row)
    uniform = not any(text.has_weights for text in texts.values())
    workspace, size = workspace or Workspace(), (len(rows), shape.row_length)
    tokens = workspace.array("tokens", size, next(iter(texts.values())).dtype)
    weights = workspace.array("weights", size, np.dtype(np.uint8 if uniform else np.float16))
    weights.fill(uniform)  # 1 everywhere, or 0 until the loss weights are read
    flat_tokens, flat_weights = tokens.reshape(-1), weights.reshape(-1)
    for part, source, target, length in _runs(rows.pieces, placed):
        text = texts[part]
        text.read_tokens(source, flat_tokens[target : target + length])
        if not uniform:
            text.read_weights(source, flat_weights[target : target + length])
    # what is not content: anchors, padding, tags
    tokens[:, : shape.anchor_len], weights[:, : shape.anchor_len] = shape.anchor_id, 0
    for row in np.flatnonzero(placed.used < shape.capacity).tolist():
        end = shape.anchor_len + int(placed.used[row])
        tokens[row, end:], weights[row, end:] = shape.pad_id, 0
    for index in np.flatnonzero(placed.tag).tolist():
        at, skip, length = int(placed.at[index]), int(placed.tag_skip[index]), int(placed.tag[index])
        tag = tags.ids[rows.pieces["tag"][placed.piece[index]]]
        flat_tokens[at : at + length] = tag[skip : skip + length]
        flat_weights[at : at + length] = 0
    flat_weights[placed.at] = 0  # the first token of each segment follows another document's, or the anchor
    _account(rows, shape, placed, weights, accounting)
    return Shard(tokens, _narrow(weights), *_boundaries(rows, shape, placed), rows.counts)


def _place(rows: Rows, shape: RowShape, tags: Tags, first_row: int) -> Placed:
    """Segments and where they lie, from lengths alone."""
    # two rows of 9 tokens, anchor of 1: pieces of 3 and 5 in the first, one of 4 in the second
    # row = [0, 0, 1], ends = [3, 8, 12], used = [8, 4], before = [0, 8], at = [1, 4, 10]
    pieces, counts = rows.pieces, rows.counts
    sizes = pieces["size"].astype(np.int64)
    segments = scatter_rows(sizes, counts, shape.chunks, shape.seed, first_row)
    row = np.repeat(np.arange(len(rows)), counts)[segments.piece]
    ends = np.cumsum(segments.length)
    used = np.diff(np.cumsum(sizes)[rows.ends - 1], prepend=0)
    if used.max() > shape.capacity:
        raise ValueError(f"pieces of {used.max()} tokens do not fit into a row's {shape.capacity}")
    before = np.cumsum(used) - used  # tokens of pieces in earlier rows
    at = row * shape.row_length + shape.anchor_len + ends - segments.length - before[row]
    # a tag of 2 tokens before a piece whose segments start at 0 and 1 (1 and 3 tokens long):
    # tag = [1, 1] tokens of the tag in each, content_skip = [0, 0]; segments at 0 and 3: tag = [2, 0], skip = [0, 1]
    tag_length = tags.lengths[pieces["tag"]][segments.piece]
    tag = np.clip(tag_length - segments.start, 0, segments.length)
    content_skip = np.maximum(segments.start - tag_length, 0)
    return Placed(row, segments.piece, at, segments.length, segments.start, tag, content_skip, used)


def _runs(pieces: np.ndarray, placed: Placed) -> Iterator[Run]:
    """The copies that are needed; segments that follow each other both in the token store and in the rows are one."""
    # pieces of 3 and 5 tokens that follow each other both in the token store (from 100) and in the row (from 1) are one
    # copy: source = [100, 103], target = [1, 4], new = [True, False] -> (part, 100, 1, 8)
    length = placed.length - placed.tag
    has = length > 0  # a chunk may hold tokens of the tag alone
    piece = pieces[placed.piece[has]]
    part, length = piece["part"], length[has]
    source, target = piece["start"] + placed.content_skip[has], (placed.at + placed.tag)[has]
    new = np.ones(len(length), bool)
    new[1:] = (part[1:] != part[:-1]) | (source[1:] != (source + length)[:-1]) | (target[1:] != (target + length)[:-1])
    first = np.flatnonzero(new)
    lengths = np.add.reduceat(length, first) if len(first) else length
    return zip(part[first].tolist(), source[first].tolist(), target[first].tolist(), lengths.tolist(), strict=True)


def _narrow(weights: np.ndarray) -> np.ndarray:
    """The weights as uint8 where all are 0 or 1, which takes half the space of float16."""
    is_plain = weights.dtype == np.uint8 or not ((weights != 0) & (weights != 1)).any()
    return weights.astype(np.uint8, copy=False) if is_plain else weights


def _account(rows: Rows, shape: RowShape, placed: Placed, weights: np.ndarray, accounting: Accounting) -> None:
    source = rows.pieces["source"][placed.piece]
    content = placed.length - placed.tag
    # the first token of a segment is never trained; it is a token of content only where no tag begins the segment
    first = ((content > 0) & (placed.tag == 0)).astype(np.int64)
    trained = content - first  # the written weights are counted too, and compared, when the set is whole
    if weights.dtype != np.uint8:
        is_trained = (weights > 0).reshape(-1).view(np.uint8)
        trained = np.add.reduceat(is_trained, placed.at, dtype=np.int64)  # nothing between segments is trained
    accounting.add("trained", source, trained)
    accounting.add("first_tokens", source, first)
    accounting.add("zero_weight", source, content - first - trained)
    accounting.rows += len(rows)
    accounting.pieces += len(rows.pieces)
    accounting.cells["anchor"] += len(rows) * shape.anchor_len
    accounting.cells["tags"] += int(placed.tag.sum())
    accounting.cells["padding"] += int((shape.capacity - placed.used).sum())


def _boundaries(rows: Rows, shape: RowShape, placed: Placed) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`offsets`, `doc_ids` and `pointers` of the shard."""
    # rows of 9 tokens, anchor of 1: pieces of 3 and 5 in the first, one of 4 in the second, which is padded
    # sizes = [4, 4], begin = [0, 4], offsets = [0, 1, 4, 9,  0, 1, 5, 9]; rank = [0, 1, 0] counts a row's segments
    padded = (placed.used < shape.capacity).astype(np.int64)
    segments = np.bincount(placed.row, minlength=len(rows))
    rank = np.arange(len(placed.row)) - np.repeat(np.cumsum(segments) - segments, segments)
    sizes = segments + 2 + padded
    begin = np.cumsum(sizes) - sizes
    offsets = np.empty(sizes.sum(), np.int32)
    offsets[begin], offsets[begin + 1] = 0, shape.anchor_len
    offsets[begin[placed.row] + 2 + rank] = placed.at + placed.length - placed.row * shape.row_length
    offsets[(begin + sizes - 1)[padded > 0]] = shape.row_length
    # only interleaved rows have document ids, 0 for the anchor and one more for the padding:
    # two pieces of which the first is in two segments: doc_ids = [0, 1, 2, 1] or, padded, [0, 1, 2, 1, 3]
    scattered = segments != rows.counts
    id_sizes = np.where(scattered, segments + 1 + padded, 0)
    id_begin = np.cumsum(id_sizes) - id_sizes
    doc_ids = np.empty(id_sizes.sum(), np.int32)
    segment = scattered[placed.row]  # (S,) bool: segments of such rows
    first_piece = (rows.ends - rows.counts)[placed.row]
    doc_ids[id_begin[scattered]] = 0
    doc_ids[(id_begin[placed.row] + 1 + rank)[segment]] = (placed.piece - first_piece + 1)[segment]
    last = scattered & (padded > 0)
    doc_ids[(id_begin + id_sizes - 1)[last]] = (rows.counts + 1)[last]
    return offsets, doc_ids, np.pad(np.cumsum([sizes, id_sizes], axis=1), ((0, 0), (1, 0))).T


@dataclass(frozen=True, slots=True)
class Segments:
    """Contiguous runs of pieces, in the order of the row: S segments."""

    piece: np.ndarray
    """(S,) index of each segment's piece."""
    start: np.ndarray
    """(S,) where it starts inside the piece, tag included."""
    length: np.ndarray
    """(S,) tokens, at least 1."""


def scatter(lengths: np.ndarray, chunks: int, rng: np.random.Generator) -> Segments:
    """Cut each piece into `chunks` nearly equal chunks (fewer if it is shorter) and shuffle them over the row.

    A piece's chunks keep their order; neighbouring chunks of one piece become one segment.

    Args:
        lengths: (P,) tokens of the pieces of one row, tags included.
        chunks: 1 leaves the pieces whole and in order.
        rng: source of all randomness.
    """
    if chunks == 1 or len(lengths) == 1:
        return Segments(np.arange(len(lengths)), np.zeros_like(lengths), lengths)
    # lengths = [4, 2] in 2 chunks each, shuffled: owner = [0, 1, 1, 0], by_owner = [0, 3, 1, 2], rank = [0, 0, 1, 1],
    # start = [0, 0, 1, 2], length = [2, 1, 1, 2]; the two chunks of piece 1 touch, so segments have 2, 2, 2 tokens
    counts = np.minimum(lengths, chunks)
    owner = rng.permutation(np.repeat(np.arange(len(lengths)), counts))
    by_owner = np.argsort(owner, kind="stable")
    rank = np.empty_like(owner)  # how many chunks of the same piece come before
    rank[by_owner] = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    start = rank * lengths[owner] // counts[owner]
    length = (rank + 1) * lengths[owner] // counts[owner] - start
    first = np.flatnonzero(np.append(True, owner[1:] != owner[:-1]))
    return Segments(owner[first], start[first], np.add.reduceat(length, first))


def scatter_rows(sizes: np.ndarray, counts: np.ndarray, chunks: int, seed: int, first_row: int) -> Segments:
    """The segments of many rows, row after row; `counts` (R,) of the `sizes` (P,) belong to each.

    Each row is seeded by (`seed`, its number in the set), so that it does not matter which process makes the row.
    """
    if chunks == 1:
        return Segments(np.arange(len(sizes)), np.zeros_like(sizes), sizes)
    parts, begin = [], 0
    for row, count in enumerate(counts.tolist()):
        rng = np.random.default_rng([seed, first_row + row])
        found = scatter(sizes[begin : begin + count], chunks, rng)
        parts.append((found.piece + begin, found.start, found.length))
        begin += count
    return Segments(*(np.concatenate(column) for column in zip(*parts, strict=True)))

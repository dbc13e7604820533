"""Where the documents of a batch lie in rows, and the layout that each pattern makes of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from anchorctx.layout import Document, PackedLayout, Pattern, lay_out


def row_starts(lengths: Sequence[int], row_length: int) -> list[int]:
    """The row position of each document's first token, documents placed one behind the other as the collator does.

    For batches that are smaller than a row: place the whole dataset in rows once, and give each example `position_ids`
    from its start on (`start, start + 1, ...`). They hold under `anchor` and `intra_doc`, whatever the batches are.

    Args:
        lengths: tokens of each document, in the order in which they fill rows.
        row_length: tokens of a row, the anchor among them.
    """
    # lengths 3, 2, 4 in rows of 8 (places 1 to 7): 1, 4, and 1 in the next row
    starts, place = [], 1
    for length in lengths:
        place = 1 if place + length > row_length else place
        starts.append(place)
        place += length
    return starts


def copies_under(pattern: Pattern) -> int:
    """Anchor tokens in front of each document."""
    return 0 if pattern in (Pattern.intra_doc, Pattern.intra_doc_reset) else 1


def lay_out_batch(
    lengths: Sequence[int], given: Sequence[int | None], pattern: Pattern, row_length: int
) -> tuple[PackedLayout, np.ndarray]:
    """A batch's layout, and (T',) int64 which tokens of [anchor, *documents] to gather for it.

    Args:
        lengths: tokens of each document.
        given: the row position of each document's first token, or None for one behind the other.
        pattern: what documents see; under `full` each row is one document.
        row_length: tokens of a row, the anchor among them.
    """
    # documents of 3 and 2 tokens in one row: spans (1, 4) and (4, 6), starts 1 and 4
    stops, copies = np.cumsum([1, *lengths]).tolist(), copies_under(pattern)
    spans, starts = list(zip(stops, stops[1:], strict=False)), row_starts(lengths, row_length)
    if pattern is Pattern.full:
        firsts = [i for i, start in enumerate(starts) if start == 1]  # where rows begin
        spans = [(stops[a], stops[b]) for a, b in zip(firsts, [*firsts[1:], len(lengths)], strict=True)]
        starts = [1] * len(spans)
    elif pattern in (Pattern.anchor_reset, Pattern.intra_doc_reset):
        starts = [copies] * len(spans)
    else:
        starts = [place if start is None else start for start, place in zip(given, starts, strict=True)]
    documents = [Document((span,), (start,)) for span, start in zip(spans, starts, strict=True)]
    return lay_out(documents, copies), np.concatenate([document.where(copies) for document in documents])

"""What the tokens of one packed row may attend to: the whole row, and a close-up of a document's end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from anchorctx.layout import PackedLayout
from anchorctx.report.figures.chart import WIDTH, Chart, Entry, label, save_charts
from anchorctx.report.figures.charts import rectangle
from anchorctx.report.figures.inline import tag
from anchorctx.report.figures.style import BLUE, LEFT_OUT, MUTED, ORANGE, SKY
from anchorctx.report.numbers import number, percent

LEFT, SIZE, TOP, BOTTOM = 44, 350, 28, 44
"""Where the square lies in its chart, in points."""
REACH = 9
"""Tokens on either side of the boundary in the close-up."""
LABELS = "key position (tokens)", "query position (tokens)", LEFT


def pattern_figure(layout: PackedLayout, path: Path) -> Path:
    """Draw which keys each token of one packed row attends to, with a close-up; returns `path`."""
    heading = f"{pattern_words(layout)}; grey is left out"
    heading += "; the anchor is drawn wider than it is" if 0 < layout.anchor_len < band_width(layout) else ""
    close = f"Close-up, where a document ends at {first_boundary(layout):,}" if layout.num_documents > 1 else "Close-up"
    return save_charts([("One packed row", whole_chart(layout)), (close, close_chart(layout))], path, heading)


def pattern_words(layout: PackedLayout) -> str:
    """A row in words: 128 tokens, 3 documents, 38.1 % of full causal attention."""
    share = layout.attention_pairs() / (layout.length * (layout.length + 1) / 2)
    documents = f"{layout.num_documents} document{'s' if layout.num_documents != 1 else ''}"
    return f"{layout.length:,} tokens, {documents}, {percent(share, 1)} of full causal attention"


def whole_chart(layout: PackedLayout) -> Chart:
    """Documents as triangles (and blocks, where one comes in pieces), the anchor as a band wide enough to see."""

    def draw(axes: Any) -> None:
        tokens = layout.length
        axes.set(xlim=(0, tokens), ylim=(tokens, 0))
        _area(axes, [(0, 0), (0, tokens), (tokens, tokens)], LEFT_OUT, "left out")
        ids = layout.doc_ids or tuple(range(len(layout.doc_offsets) - 1))
        # Offsets [0, 1, 40, 100] are spans 0-1 (the anchor), 1-40 and 40-100; an interleaved document has several.
        order, spans = _ranks(layout, ids), list(zip(ids, layout.doc_offsets, layout.doc_offsets[1:], strict=False))
        for i, (doc, start, stop) in enumerate(spans):
            # A span sees itself up to each query, a triangle, and all of its document's earlier spans, blocks.
            color, words = (BLUE, SKY)[order[doc] % 2], f"tokens {start:,} to {stop - 1:,}"
            _area(axes, [(start, start), (start, stop), (stop, stop)], color, words)
            for other, a, b in spans[:i]:
                if other == doc:
                    _area(axes, [(a, start), (b, start), (b, stop), (a, stop)], color, words)
        # Last, over the documents: true to scale, one token of 128k could not be seen.
        if layout.anchor_len:
            width = band_width(layout)
            _area(axes, [(0, 0), (width, width), (width, tokens), (0, tokens)], ORANGE, "the anchor, seen by all")
        ticks = [part * tokens // 4 for part in range(5)]
        axes.set_xticks(ticks, [number(tick) for tick in ticks])
        axes.set_yticks(ticks, [number(tick) for tick in ticks])
        label(axes, *LABELS)

    return _chart("Which keys each query of one packed row attends to", draw, layout, SIZE)


def close_chart(layout: PackedLayout) -> Chart:
    """Single tokens around the first boundary between documents, beside the row's first keys."""
    boundary = first_boundary(layout)
    queries = np.arange(max(boundary - REACH, 0), min(boundary + REACH, layout.length))
    first = np.arange(min(layout.anchor_len + 3, int(queries[0])))
    keys = np.concatenate([first, queries])
    # Columns of both groups have width 1; a gap with dots between them stands for the keys that are not drawn.
    gap = 1.2 if len(first) and first[-1] + 1 < queries[0] else 0.0
    left = np.arange(len(keys)) + np.where(np.arange(len(keys)) >= len(first), gap, 0.0)

    def draw(axes: Any) -> None:
        axes.set(xlim=(0, len(keys) + gap), ylim=(len(queries), 0))
        for row, colors in enumerate(cell_colors(layout, queries, keys)):
            for x, key, color in zip(left, keys, colors, strict=True):
                if color is not None:
                    rectangle(axes, (x, row, 0.93, 0.93), color, f"query {queries[row]:,}, key {key:,}", "cell-of-row")
        if gap:
            axes.text(len(first) + gap / 2, len(queries) / 2, "…", ha="center", color=MUTED)
        # Every sixth position has its number: the columns are too narrow for more.
        shown = [0, *range(len(first), len(keys), 6)] if len(first) else list(range(0, len(keys), 6))
        axes.set_xticks(left[shown] + 0.5, [f"{keys[i]:,}" for i in shown])
        axes.set_yticks(np.arange(0, len(queries), 6) + 0.5, [f"{query:,}" for query in queries[::6]])
        label(axes, *LABELS)

    return _chart("The same, token by token", draw, layout, SIZE * len(queries) / (len(keys) + gap))


def _chart(description: str, draw: Any, layout: PackedLayout, height: float) -> Chart:
    legend: list[Entry] = [("the anchor", 2, "fill")] if layout.anchor_len else []
    legend += [("a document", 1, "fill"), ("the next document", 5, "fill")]
    return Chart(description, draw, legend, TOP + height + BOTTOM, (LEFT, WIDTH - LEFT - SIZE, TOP, BOTTOM))


def _area(axes: Any, corners: Sequence[tuple[float, float]], color: str, words: str) -> None:
    axes.fill(*zip(*corners, strict=True), color=color, linewidth=0, gid=tag("area", words))


def cell_colors(layout: PackedLayout, queries: np.ndarray, keys: np.ndarray) -> list[list[str | None]]:
    """Colour of every (query, key) pair, [queries, keys]; None for keys that are still to come."""
    docs = layout.token_docs()  # the document of each token, [length]
    order = _ranks(layout, docs.tolist())

    def color(query: int, key: int) -> str | None:
        if key > query:
            return None
        if key < layout.anchor_len:
            return ORANGE
        return (BLUE, SKY)[order[int(docs[query])] % 2] if docs[query] == docs[key] else LEFT_OUT

    return [[color(query, key) for key in keys.tolist()] for query in queries.tolist()]


def band_width(layout: PackedLayout) -> float:
    """Width of the anchor's band in tokens, or of the narrowest band that can be seen."""
    return max(layout.anchor_len, layout.length / 80)


def first_boundary(layout: PackedLayout) -> int:
    """Where the first document ends and another follows; the middle of the row when there is but one."""
    # The end of the anchor is no boundary between documents.
    inner = [offset for offset in layout.doc_offsets[1:-1] if offset > layout.anchor_len]
    return inner[0] if inner else layout.length // 2


def _ranks(layout: PackedLayout, ids: Sequence[int]) -> dict[int, int]:
    """Number of each document in order of appearance, from 0; the anchor, which is none, comes before."""
    first = -1 if layout.anchor_len else 0
    return {doc: rank for rank, doc in enumerate(dict.fromkeys(ids), first)}

"""What the tokens of one packed row may see."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from markupsafe import Markup

from anchorctx.layout import PackedLayout
from anchorctx.report.blocks import Figure, Section
from anchorctx.report.charts import Chart
from anchorctx.report.collect import Material
from anchorctx.report.plots import band_width, first_boundary, ranks
from anchorctx.report.svg import number, percent, picture, text, tooltip

LEFT, SIZE, TOP = 44, 350, 28
REACH = 9
"""Tokens on either side of the boundary in the close-up."""
LEGEND = [("a document", 1, "fill"), ("the next document", 5, "fill")]
ANCHOR = ("the anchor", 2, "fill")


def build(material: Material) -> Section | None:
    """None without a packed set."""
    if not material.layouts:
        return None
    path, layout = next(iter(material.layouts.items()))
    share = layout.attention_pairs() / (layout.length * (layout.length + 1) / 2)
    lead = (
        f"One row of {_set_name(material, path)}: {layout.length:,} tokens, {layout.num_documents} "
        f"document{'s' if layout.num_documents != 1 else ''}, {percent(share, 1)} of full causal attention."
    )
    close = f"Token by token where the first document ends, at {first_boundary(layout):,}, beside the row's first keys."
    legend = [*([ANCHOR] if layout.anchor_len else []), *LEGEND]
    blocks = [
        Figure("One packed row", Chart(_whole(layout), legend), _caption(layout)),
        Figure("Close-up", Chart(_close(layout), legend), close),
    ]
    return Section("pattern", "Attention pattern", lead, blocks)


def _set_name(material: Material, path: Path) -> str:
    return next((place.name.split("/")[0] for place in material.packed if place.path == path), path.name)


def _caption(layout: PackedLayout) -> str:
    anchor = ""
    if layout.anchor_len:
        wider = ", drawn wider than it is" if band_width(layout) > layout.anchor_len else ""
        anchor = f" All see the anchor ({layout.anchor_len} token{'s' if layout.anchor_len > 1 else ''}{wider})."
    return f"A query (downwards) attends to the keys (across) that are coloured; what is grey is left out.{anchor}"


def _whole(layout: PackedLayout) -> Markup:
    """Documents as triangles (and blocks, where one comes in pieces), the anchor as a band."""
    unit = SIZE / layout.length
    offsets = layout.doc_offsets
    ids = layout.doc_ids or tuple(range(len(offsets) - 1))
    order, spans = ranks(layout, ids), list(zip(ids, offsets, offsets[1:], strict=False))
    body = [_area([(0, 0), (0, layout.length), (layout.length, layout.length)], unit, "left-out")]
    for i, (doc, start, stop) in enumerate(spans):
        css, words = f"doc{order[doc] % 2}", f"tokens {start:,} to {stop - 1:,}"
        body.append(_area([(start, start), (start, stop), (stop, stop)], unit, css, words))
        for other, a, b in spans[:i]:
            if other == doc:
                body.append(_area([(a, start), (b, start), (b, stop), (a, stop)], unit, css, words))
    if layout.anchor_len:
        width = band_width(layout)
        corners = [(0, 0), (width, width), (width, layout.length), (0, layout.length)]
        body.append(_area(corners, unit, "anchor", "the anchor, seen by all"))
    for part in range(5):
        token = part * layout.length // 4
        body.append(text(LEFT + token * unit, TOP + SIZE + 18, number(token), "tick"))
        body.append(text(LEFT - 6, TOP + token * unit + 4, number(token), "tick", "end"))
    return picture([*body, *_labels(SIZE)], "Which keys each query of one packed row attends to", TOP + SIZE + 44, 420)


def _area(corners: list[tuple[float, float]], unit: float, css: str, words: str = "") -> Markup:
    points = " ".join(f"{LEFT + x * unit:.1f},{TOP + y * unit:.1f}" for x, y in corners)
    return Markup('<polygon class="{}" points="{}">{}</polygon>').format(css, points, tooltip(words) if words else "")


def _close(layout: PackedLayout) -> Markup:
    """Single tokens around the first boundary between documents, beside the row's first keys."""
    boundary = first_boundary(layout)
    queries = np.arange(max(boundary - REACH, 0), min(boundary + REACH, layout.length))
    first = np.arange(min(layout.anchor_len + 3, int(queries[0])))
    keys = np.concatenate([first, queries])
    gap = 1.2 if len(first) and first[-1] + 1 < queries[0] else 0.0
    unit = SIZE / (len(keys) + gap)
    left = [LEFT + (i + (gap if i >= len(first) else 0.0)) * unit for i in range(len(keys))]
    body = []
    docs = layout.token_docs()
    order = ranks(layout, docs.tolist())
    for row, query in enumerate(queries.tolist()):
        for x, key in zip(left, keys.tolist(), strict=True):
            if css := _css(layout.anchor_len, docs, order, query, key):
                body.append(
                    Markup('<rect class="{}" x="{}" y="{}" width="{w}" height="{w}" rx="1.5">{}</rect>').format(
                        css, f"{x:.1f}", f"{TOP + row * unit:.1f}",
                        tooltip(f"query {query:,}, key {key:,}"), w=f"{unit - 1.2:.1f}",
                    )
                )  # fmt: skip
    if gap:
        body.append(text(left[len(first)] - gap * unit / 2 - 1, TOP + len(queries) * unit / 2, "…", "label"))
    bottom = len(queries) * unit
    for i in [0, *range(len(first), len(keys), 6)]:
        body.append(text(left[i] + unit / 2, TOP + bottom + 18, f"{keys[i]:,}", "tick"))
    for row in range(0, len(queries), 6):
        body.append(text(LEFT - 6, TOP + (row + 0.5) * unit + 4, f"{queries[row]:,}", "tick", "end"))
    return picture([*body, *_labels(bottom)], "The same, token by token", TOP + bottom + 44, 420)


def _css(anchor: int, docs: np.ndarray, order: dict[int, int], query: int, key: int) -> str:
    """How a (query, key) pair is drawn; empty for the future, which is not."""
    if key > query:
        return ""
    if key < anchor:
        return "anchor"
    return f"doc{order[int(docs[query])] % 2}" if docs[query] == docs[key] else "left-out"


def _labels(height: float) -> list[Markup]:
    return [
        text(LEFT + SIZE / 2, TOP + height + 38, "key position (tokens)", "label"),
        text(2, 14, "query position (tokens)", "label", "start"),
    ]

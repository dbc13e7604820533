"""What the tokens of one packed row may see."""

from __future__ import annotations

from pathlib import Path

from anchorctx.layout import PackedLayout
from anchorctx.report.blocks import Figure, Section
from anchorctx.report.collect import Material
from anchorctx.report.figures.pattern import band_width, close_chart, first_boundary, whole_chart
from anchorctx.report.numbers import percent


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
    blocks = [
        Figure("One packed row", whole_chart(layout), _caption(layout)),
        Figure("Close-up", close_chart(layout), close),
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

"""Hypothesis strategies: random packed layouts, shapes and tensors."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from anchorctx.layout import PackedLayout, Positions


@st.composite
def layouts(
    draw: st.DrawFn,
    max_tokens: int = 160,
    anchor_len: int | None = None,
    interleaved: bool | None = None,
    length: int | None = None,
) -> PackedLayout:
    """A layout of at most `max_tokens` tokens (or exactly `length`), biased towards the corners.

    One-token documents, a single document, one document that fills the row, and (where `interleaved` allows)
    documents that come in several segments. `anchor_len` None draws 0..3.
    """
    anchor = draw(st.integers(0, 3)) if anchor_len is None else anchor_len
    total = draw(st.integers(max(anchor, 1), max_tokens)) if length is None else length
    body = total - anchor
    shape = draw(st.sampled_from(["single", "ones", "cuts", "short cuts"]))
    if shape == "single" or body < 2:
        cuts: set[int] = set()
    elif shape == "ones":
        cuts = set(range(1, body))
    else:
        span = body - 1 if shape == "cuts" else min(body - 1, 6)
        cuts = draw(st.sets(st.integers(1, span), max_size=12))
    inner = sorted({0, body} | cuts) if body else [0]
    offsets = (0, *(anchor + x for x in inner)) if anchor else tuple(inner)
    split = draw(st.booleans()) if interleaved is None else interleaved
    doc_ids = _doc_ids(draw, len(offsets) - 1, anchor) if split else None
    return PackedLayout(offsets, anchor, draw(st.sampled_from(list(Positions))), doc_ids)


def _doc_ids(draw: st.DrawFn, segments: int, anchor: int) -> tuple[int, ...]:
    """Random documents for the segments, numbered in no order; an anchor gets a number of its own."""
    ids = draw(st.lists(st.integers(0, max(segments // 2, 1)), min_size=segments, max_size=segments))
    return (segments + 7, *ids[1:]) if anchor else tuple(ids)


def tensors(
    batch: int,
    heads: int,
    kv_heads: int,
    tokens: int,
    dim: int,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    value_dim: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Seeded query (B, Hq, T, D), key (B, Hkv, T, D), value (B, Hkv, T, Dv) and output gradient (B, Hq, T, Dv)."""
    generator = torch.Generator().manual_seed(seed)

    def draw(h: int, dim: int) -> torch.Tensor:
        return torch.randn(batch, h, tokens, dim, generator=generator, dtype=torch.float64).to(dtype)

    value_dim = value_dim or dim
    return draw(heads, dim), draw(kv_heads, dim), draw(kv_heads, value_dim), draw(heads, value_dim)

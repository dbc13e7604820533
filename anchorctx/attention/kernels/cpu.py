"""torch's own flash attention for the CPU, one call a document; short documents share a call.

The operators are those behind `scaled_dot_product_attention` on a CPU; called directly they hand out the log-sum-exp.
They take float64, float32, bfloat16 and float16, and grouped-query heads without copies.

Of documents of a few tokens the calls, not the arithmetic, are the cost: neighbours that fit into `RUN` tokens go
through one call under a small block-diagonal mask. The operators know no sliding window: a document longer than the
window is cut into blocks of `window` queries that see the previous block and their own through a band mask, which
keeps the cost linear in the document.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch

from anchorctx.attention.kernels.base import Attended, Score, Tile
from anchorctx.layout import PackedLayout

RUN = 128
"""Tokens of neighbouring short documents in one call. On two cores, forward and backward over 2,048 documents of 8
tokens (8 heads of 64, float32) fell from 0.83 s, with one call and one merge each, to 0.27 s."""

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class CpuKernel:
    """See the module docstring; implements `Kernel`."""

    def tiles(self, layouts: Sequence[PackedLayout], device: torch.device) -> Sequence[Tile]:
        """One tile a document and row; neighbours that fit into `RUN` tokens share one."""
        return [
            _tile(row, layout.doc_offsets[first : last + 1])
            for row, layout in enumerate(layouts)
            for first, last in _runs(layout.doc_offsets)
        ]

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tile: Tile, score: Score
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Kernel.forward`."""
        if tile.cu_seqlens is not None:
            mask = _document_mask(tile.cu_seqlens, score.window, q.dtype)
            return _forward(q, k, v, 0.0, False, attn_mask=mask, scale=score.scale)
        if score.window is None or tile.max_seqlen <= score.window:
            return _forward(q, k, v, 0.0, True, scale=score.scale)
        parts = [
            _forward(q[:, :, rows], k[:, :, keys], v[:, :, keys], 0.0, False, attn_mask=mask, scale=score.scale)
            for rows, keys, mask in _bands(tile.max_seqlen, score.window, q.dtype)
        ]
        return torch.cat([o for o, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)

    def backward(
        self, do: torch.Tensor, attended: Attended, tile: Tile, score: Score
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `Kernel.backward`."""
        if tile.cu_seqlens is not None:
            mask = _document_mask(tile.cu_seqlens, score.window, do.dtype)
            return _backward(do, *attended, 0.0, False, attn_mask=mask, scale=score.scale)
        if score.window is None or tile.max_seqlen <= score.window:
            return _backward(do, *attended, 0.0, True, scale=score.scale)
        q, k, v, o, lse = attended
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for rows, keys, mask in _bands(tile.max_seqlen, score.window, q.dtype):
            tensors = do[:, :, rows], q[:, :, rows], k[:, :, keys], v[:, :, keys], o[:, :, rows], lse[:, :, rows]
            gq, gk, gv = _backward(*tensors, 0.0, False, attn_mask=mask, scale=score.scale)
            dq[:, :, rows] = gq
            # neighbouring blocks share the keys of a window
            dk[:, :, keys] += gk
            dv[:, :, keys] += gv
        return dq, dk, dv


def _runs(offsets: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Indices `[first, last)` of documents to a call: as many as fit into `RUN` tokens, or one longer document."""
    first = 0
    # documents of 40, 50, 60 and 300 tokens: calls for 40 + 50, 60 and 300, that is (0, 2), (2, 3), (3, 4)
    for last in range(1, len(offsets)):
        if last + 1 == len(offsets) or offsets[last + 1] - offsets[first] > RUN:
            yield first, last
            first = last


def _tile(row: int, offsets: Sequence[int]) -> Tile:
    start, stop = offsets[0], offsets[-1]
    lengths = [b - a for a, b in zip(offsets, offsets[1:], strict=False)]
    several = len(lengths) > 1
    cu_seqlens = torch.tensor([x - start for x in offsets], dtype=torch.int32) if several else None
    return Tile(slice(row, row + 1), slice(start, stop), cu_seqlens, max(lengths))


def _document_mask(cu_seqlens: torch.Tensor, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """(L, L) additive mask of a tile of several documents."""
    # cu_seqlens [0, 2, 5] -> docs [0, 0, 1, 1, 1]
    docs = torch.repeat_interleave(cu_seqlens.diff())
    banned = (docs[:, None] != docs[None, :]).logical_or_(_band(len(docs), 0, window or len(docs)))
    return torch.zeros(banned.shape, dtype=dtype).masked_fill_(banned, float("-inf"))


def _bands(length: int, window: int, dtype: torch.dtype) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    # 10 tokens, window 4: queries 0-3 see keys 0-3, queries 4-7 keys 1-7, queries 8-9 keys 5-9
    for start in range(0, length, window):
        stop, first = min(start + window, length), max(start - window + 1, 0)
        yield slice(start, stop), slice(first, stop), _band_mask(stop - start, start - first, window, dtype)


@functools.lru_cache(maxsize=16)
def _band_mask(queries: int, before: int, window: int, dtype: torch.dtype) -> torch.Tensor:
    """(queries, before + queries) additive mask of a block of a long document."""
    with torch.inference_mode(False):
        banned = _band(queries, before, window)
        return torch.zeros(banned.shape, dtype=dtype).masked_fill_(banned, float("-inf"))


@functools.lru_cache(maxsize=256)
def _band(queries: int, before: int, window: int) -> torch.Tensor:
    """(queries, before + queries) bool: keys that come later than the query or `window` tokens earlier."""
    with torch.inference_mode(False):
        distance = (torch.arange(queries) + before)[:, None] - torch.arange(queries + before)[None, :]
        return (distance < 0) | (distance >= window)

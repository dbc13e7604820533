"""torch's own flash attention for the CPU; documents of equal length that lie next to each other share a call.

The operators are those behind `scaled_dot_product_attention` on a CPU; called directly they hand out the log-sum-exp.
They take float64, float32, bfloat16 and float16, grouped-query heads without copies, and any strides: n neighbours of
one length are a batch of n, seen through a view. Pieces are sorted by length, so that such runs are long. Values of
another head dimension than queries and keys are widened with zeros, or they are.

Of documents of a few tokens the calls, not the arithmetic, are the cost: neighbours of other lengths that fit into
`RUN` tokens go through one call under a small block-diagonal mask. The operators know no sliding window: documents
longer than the window are cut into blocks of `window` queries that see the previous block and their own through a band
mask, which keeps the cost linear in the document.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch

from anchorctx.attention.kernels.base import Attended, Score, Tile, empty_heads_last, widened
from anchorctx.layout import PackedLayout

RUN = 128
"""Tokens of neighbouring short documents of several lengths in one call. On two cores, forward and backward over 2,048
documents of 8 tokens (8 heads of 64, float32) took 0.27 s under such masks, 0.83 s with one call and one merge each."""
CALL = 4096
"""Tokens of equally long documents in one call, at most: what it returns stays small beside a long row's."""

_aten_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_aten_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class CpuKernel:
    """See the module docstring; implements `Kernel`."""

    def tiles(self, layouts: Sequence[PackedLayout], device: torch.device) -> Sequence[Tile]:
        """One tile a row for each run of equally long documents, or of short ones; nothing is cut inside a document."""
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
            return _forward(q, k, v, False, score, mask)
        o, lse = _causal_forward(_apart(q, tile), _apart(k, tile), _apart(v, tile), score)
        return _joined(o), _joined(lse)

    def backward(
        self, do: torch.Tensor, attended: Attended, tile: Tile, score: Score
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `Kernel.backward`."""
        if tile.cu_seqlens is not None:
            mask = _document_mask(tile.cu_seqlens, score.window, do.dtype)
            return _backward(do, attended, False, score, mask)
        dq, dk, dv = _causal_backward(_apart(do, tile), Attended(*(_apart(x, tile) for x in attended)), score)
        return _joined(dq), _joined(dk), _joined(dv)


def _causal_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, score: Score
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each batch entry is a document: q (n, Hq, L, D) -> o (n, Hq, L, D), lse (n, Hq, L), both heads last in memory."""
    length, window = q.shape[2], score.window
    if window is None or length <= window:
        return _forward(q, k, v, True, score)
    o = empty_heads_last(q, v.shape[-1])
    lse = o.new_empty(o.shape[0], length, o.shape[1], dtype=torch.promote_types(q.dtype, torch.float32)).transpose(1, 2)
    for rows, keys, mask in _bands(length, window, q.dtype):
        tensors = q[:, :, rows], k[:, :, keys], v[:, :, keys]
        o[:, :, rows], lse[:, :, rows] = _forward(*tensors, False, score, mask)
    return o, lse


def _causal_backward(
    do: torch.Tensor, attended: Attended, score: Score
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v, o, lse = attended
    length, window = q.shape[2], score.window
    if window is None or length <= window:
        return _backward(do, attended, True, score)
    dq, dk, dv = empty_heads_last(q), empty_heads_last(k).zero_(), empty_heads_last(v).zero_()
    for rows, keys, mask in _bands(length, window, q.dtype):
        part = Attended(q[:, :, rows], k[:, :, keys], v[:, :, keys], o[:, :, rows], lse[:, :, rows])
        gq, gk, gv = _backward(do[:, :, rows], part, False, score, mask)
        dq[:, :, rows] = gq
        # neighbouring blocks share the keys of a window
        dk[:, :, keys] += gk
        dv[:, :, keys] += gv
    return dq, dk, dv


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, score: Score, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(q.shape[-1], v.shape[-1])
    wide = (widened(x, width) for x in (q, k, v))
    o, lse = _aten_forward(*wide, 0.0, causal, attn_mask=mask, scale=score.scale)
    return _narrowed(o, v.shape[-1]), lse


def _backward(
    do: torch.Tensor, attended: Attended, causal: bool, score: Score, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    *tensors, lse = attended
    dim, value_dim = attended.q.shape[-1], attended.v.shape[-1]
    wide = (widened(x, max(dim, value_dim)) for x in (do, *tensors))
    dq, dk, dv = _aten_backward(*wide, lse, 0.0, causal, attn_mask=mask, scale=score.scale)
    return _narrowed(dq, dim), _narrowed(dk, dim), _narrowed(dv, value_dim)


def _narrowed(x: torch.Tensor, dim: int) -> torch.Tensor:
    """The first `dim` of each head, without the memory of the others, in memory as (n, L, H, dim)."""
    return x if x.shape[-1] == dim else x.transpose(1, 2)[..., :dim].contiguous().transpose(1, 2)


def _apart(x: torch.Tensor, tile: Tile) -> torch.Tensor:
    """(1, H, n*L, ...) of n documents of L tokens -> (n, H, L, ...), a view."""
    return x[0].unflatten(1, (-1, tile.max_seqlen)).transpose(0, 1)


def _joined(x: torch.Tensor) -> torch.Tensor:
    """(n, H, L, ...) -> (1, H, n*L, ...), a view where memory is (n, L, H, ...)."""
    return x.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None]


def _runs(offsets: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Indices `[first, last)` of the documents to a call.

    Neighbours of one length, up to `CALL` tokens; where that is fewer than `RUN`, as many of any length as fit into it.
    """
    # documents of 40, 50, 60, 300, 300 and 200 tokens: calls for 40 + 50, 60, 300 + 300 and 200
    lengths = [stop - start for start, stop in zip(offsets, offsets[1:], strict=False)]
    first = 0
    while first < len(lengths):
        most = min(first + max(CALL // lengths[first], 1), len(lengths))
        last = first + 1
        while last < most and lengths[last] == lengths[first]:
            last += 1
        while last < len(lengths) and offsets[last + 1] - offsets[first] <= RUN:
            last += 1
        yield first, last
        first = last


def _tile(row: int, offsets: Sequence[int]) -> Tile:
    start, stop = offsets[0], offsets[-1]
    lengths = {b - a for a, b in zip(offsets, offsets[1:], strict=False)}
    cu_seqlens = torch.tensor([x - start for x in offsets], dtype=torch.int32) if len(lengths) > 1 else None
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

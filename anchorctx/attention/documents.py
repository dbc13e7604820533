"""Attention inside documents: a flash kernel's own forward and backward, and nothing else.

This is the path of training. Under AnchorAttention each document carries its own copy of the anchor, as its first token
(`PackedLayout.with_copies`), so that nothing is left to do around the kernel. Where one call serves the batch, its
outputs are handed on as they are; where it takes several, each is written once, into its place. Attention sinks
follow it (`attention.sinks`).

With a shared anchor, on a card with Triton, one fused kernel follows each way (`attention.fused.merge`): see
`attention.merge`, which decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from anchorctx.attention.kernels.base import Attended, Kernel, Score, Tile, empty_heads_last
from anchorctx.attention.sinks import merge_sinks, sinks_gradient
from anchorctx.layout import PackedLayout


def document_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layouts: Sequence[PackedLayout],
    score: Score,
    kernel: Kernel,
    anchor: int = 0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """query (B, Hq, T, D), key (B, Hkv, T, D), value (B, Hkv, T, Dv), documents together -> (B, Hq, T, Dv).

    Differentiable once. `anchor` is how many tokens the layouts share, to be merged in by fused kernels; `sinks` are
    (Hq,). The output lies in memory as (B, T, Hq, Dv) if the query does.
    """
    return _DocumentAttention.apply(query, key, value, tuple(layouts), score, kernel, anchor, sinks)


class _DocumentAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layouts: tuple[PackedLayout, ...],
        score: Score,
        kernel: Kernel,
        anchor: int = 0,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        tiles = kernel.tiles(layouts, q.device)
        attended = Attended(q, k, v, *_forward_over(tiles, q, k, v, score, kernel))
        if anchor:
            from anchorctx.attention.fused.merge import merge_forward

            merge_forward(attended, score, anchor)
        if sinks is not None:
            merge_sinks(attended.o, attended.lse, sinks)
        ctx.save_for_backward(*attended, sinks)
        ctx.tiles, ctx.score, ctx.kernel, ctx.anchor = tiles, score, kernel, anchor
        return attended.o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        *tensors, sinks = ctx.saved_tensors
        attended = Attended(*tensors)
        grads = _backward_over(ctx.tiles, do, attended, ctx.score, ctx.kernel)
        if ctx.anchor:
            from anchorctx.attention.fused.merge import merge_backward

            merge_backward(do, attended, grads, ctx.score, ctx.anchor)
        dsinks = None
        if sinks is not None and ctx.needs_input_grad[7]:
            dsinks = sinks_gradient(do, attended.o, attended.lse, sinks)
        return *grads, None, None, None, None, dsinks


def _forward_over(
    tiles: Sequence[Tile], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, score: Score, kernel: Kernel
) -> tuple[torch.Tensor, torch.Tensor]:
    """o (B, Hq, T, Dv) and lse (B, Hq, T) of documents, by as many calls as there are tiles; both are the caller's."""
    if len(tiles) == 1:
        return kernel.forward(q, k, v, tiles[0], score)
    o = empty_heads_last(q, v.shape[-1])
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    for tile in tiles:
        parts = kernel.forward(tile.view(q), tile.view(k), tile.view(v), tile, score)
        for whole, part in zip((o, lse), parts, strict=True):
            tile.view(whole).copy_(part)
    return o, lse


def _backward_over(
    tiles: Sequence[Tile], do: torch.Tensor, attended: Attended, score: Score, kernel: Kernel
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq (B, Hq, T, D), dk (B, Hkv, T, D) and dv (B, Hkv, T, Dv) of the documents' scores, the caller's."""
    if len(tiles) == 1:
        return kernel.backward(do, attended, tiles[0], score)
    dq, dk, dv = (empty_heads_last(x) for x in attended[:3])
    for tile in tiles:
        parts = kernel.backward(tile.view(do), Attended(*(tile.view(x) for x in attended)), tile, score)
        for whole, part in zip((dq, dk, dv), parts, strict=True):
            tile.view(whole).copy_(part)
    return dq, dk, dv

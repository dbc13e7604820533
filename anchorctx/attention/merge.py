"""AnchorAttention on top of any intra-document flash kernel, without copying a key or building a mask.

A kernel attends inside documents and returns o and the log-sum-exp of its scores. The anchor adds one column of scores
per anchor token, `a = scale * q.k_anchor`, merged by the usual rule for partial softmaxes:

    lse' = logaddexp(lse, a)        p = exp(a - lse')        o' = o * (1 - p) + v_anchor * p

Backward, the kernel's own backward is given (o', lse'). It computes P = exp(s - lse') and D = rowsum(do * o'), which
are the *total* softmax's, and so yields exactly the documents' part of dq, dk, dv. The anchor's columns add

    p = exp(a - lse')    ds = p * (do.v_anchor - D) * scale
    dq += ds * k_anchor    dk_anchor += sum ds * q    dv_anchor += sum p * do

The partial-softmax rule is FlashAttention's (Dao et al., 2205.14135, section 3.1); that the total lse makes an
unmodified backward exact is what ring attention relies on too. Cost: the documents' own, plus a few passes over o, q
and do in blocks that stay in cache; on a card with Triton, one pass forward and one backward
(`anchorctx.attention.fused.merge`).

A copy of the anchor in front of each document (`PackedLayout.with_copies`) gives the same numbers by the kernel alone,
for one token more a document: that is what training does. The merge is the better way where a copy is much beside its
document, and where a sliding window must not hide the anchor. On a CPU it pays below some 8 tokens a document (0.91 of
the copies' time at 4, 1.01 at 8, 1.13 at 16, 1.07 at 128; two cores of an AMD EPYC, benchmarks/attention.py). On an
H200, with the fused kernels, both take the same at documents of 1,024 tokens and more; at 256 the merge takes 6.5 ms
and copies 7.6, since a copy makes them longer than the kernel's tiles (benchmarks/gpu/README.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from anchorctx.attention.documents import document_attention
from anchorctx.attention.fused import launch
from anchorctx.attention.kernels.base import Attended, Kernel, Score, Tile, empty_heads_last
from anchorctx.attention.sinks import merge_sinks, sinks_gradient
from anchorctx.layout import PackedLayout

FUSED_ANCHOR = 8
"""Anchor tokens that the fused kernels take, at most: their backward pass reads everything once for each."""
BLOCK = 4096
"""Tokens merged at once, at most: bounds the float32 temporaries on a GPU, where a tile is the whole row."""
GROUP = 1024
"""Tokens merged at once, at least, where tiles are small: fewer calls, and the pass still finds o in cache."""


def anchor_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layouts: Sequence[PackedLayout],
    score: Score,
    kernel: Kernel,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """query (B, Hq, T, D), key (B, Hkv, T, D), value (B, Hkv, T, Dv), documents together -> (B, Hq, T, Dv).

    Differentiable once. The layouts share one anchor length, at least 1; `sinks` (Hq,) are one more column, for the
    anchor's tokens too. The output lies in memory as (B, T, Hq, Dv) if the query does.
    """
    anchor = layouts[0].anchor_len
    if _fuses(query, key, value, anchor):
        return document_attention(query, key, value, layouts, score, kernel, anchor, sinks)
    return _AnchorAttention.apply(query, key, value, tuple(layouts), score, kernel, sinks)


def _fuses(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, anchor: int) -> bool:
    return (
        anchor <= FUSED_ANCHOR
        and key.shape == value.shape
        and query.dtype.itemsize <= 4
        and all(x.stride(-1) == 1 for x in (query, key, value))
        and launch.serves(query, key, value)
    )


class _AnchorAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layouts: tuple[PackedLayout, ...],
        score: Score,
        kernel: Kernel,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        anchor = layouts[0].anchor_len
        tiles = kernel.tiles(layouts, q.device)
        o = empty_heads_last(q, v.shape[-1])
        lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
        a = lse.new_empty(*q.shape[:3], anchor)
        heads = _anchor_heads(k, v, anchor, q.shape[1], lse.dtype)
        for group, span in _groups(tiles):
            for tile in group:
                o_tile, lse_tile = kernel.forward(tile.view(q), tile.view(k), tile.view(v), tile, score)
                tile.view(lse).copy_(lse_tile)
                tile.view(o).copy_(o_tile)
            for block in _blocks(span, anchor):
                _merge_forward(block, q, heads, o, lse, a, score)
        if sinks is not None:
            merge_sinks(o, lse, sinks)
        ctx.save_for_backward(q, k, v, o, lse, a, sinks)
        ctx.tiles, ctx.score, ctx.kernel, ctx.anchor = tiles, score, kernel, anchor
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        q, k, v, o, lse, a, sinks = ctx.saved_tensors
        score, kernel, anchor = ctx.score, ctx.kernel, ctx.anchor
        dq, dk, dv = (empty_heads_last(x) for x in (q, k, v))
        sums = [lse.new_zeros(*q.shape[:2], anchor, x.shape[3]) for x in (k, v)]  # dk, dv of the anchor
        heads = _anchor_heads(k, v, anchor, q.shape[1], lse.dtype)
        for group, span in _groups(ctx.tiles):
            for tile in group:
                attended = Attended(*(tile.view(x) for x in (q, k, v, o, lse)))
                grads = kernel.backward(tile.view(do), attended, tile, score)
                for grad, part in zip((dq, dk, dv), grads, strict=True):
                    tile.view(grad).copy_(part)
            for block in _blocks(span, anchor):
                _merge_backward(block, do, q, heads, o, lse, a, dq, sums, score)
        for grad, total in zip((dk, dv), sums, strict=True):
            grad[:, :, :anchor] += total.unflatten(1, (grad.shape[1], -1)).sum(2)
        dsinks = None
        if sinks is not None and ctx.needs_input_grad[6]:
            dsinks = sinks_gradient(do, o, lse, sinks)
        return dq, dk, dv, None, None, None, dsinks


def _merge_forward(
    block: Tile,
    q: torch.Tensor,
    heads: tuple[torch.Tensor, torch.Tensor],
    o: torch.Tensor,
    lse: torch.Tensor,
    a: torch.Tensor,
    score: Score,
) -> None:
    """Add the anchor's columns to the block's o and lse, in place, and keep their scores in `a` (B, Hq, T, A)."""
    k_anchor, v_anchor = (x[block.rows] for x in heads)
    scores = block.view(q).to(lse.dtype) @ k_anchor.mT * score.scale  # (b, Hq, L, A)
    if score.softcap is not None:
        scores = torch.tanh(scores / score.softcap) * score.softcap
    block.view(a).copy_(scores)
    total, out = block.view(lse), block.view(o)
    merged = out.to(lse.dtype)
    for j, column in enumerate(scores.unbind(-1)):  # one after the other: the weights of o and v_anchor add up to 1
        torch.logaddexp(total, column, out=total)
        merged.lerp_(v_anchor[:, :, j : j + 1], (column - total).exp_()[..., None])
    out.copy_(merged)


def _merge_backward(
    block: Tile,
    do: torch.Tensor,
    q: torch.Tensor,
    heads: tuple[torch.Tensor, torch.Tensor],
    o: torch.Tensor,
    lse: torch.Tensor,
    a: torch.Tensor,
    dq: torch.Tensor,
    sums: list[torch.Tensor],
    score: Score,
) -> None:
    """Add the anchor's columns to the block's dq, in place, and to the anchor's own gradients in `sums`."""
    k_anchor, v_anchor = (x[block.rows] for x in heads)
    do_b, o_b, q_b = (block.view(x).to(lse.dtype) for x in (do, o, q))
    scores = block.view(a)
    prob = (scores - block.view(lse)[..., None]).exp_()
    delta = (do_b * o_b).sum(-1, keepdim=True)
    ds = prob * (do_b @ v_anchor.mT - delta) * score.scale
    if score.softcap is not None:
        ds = ds * (1 - (scores / score.softcap) ** 2)
    for j in range(a.shape[-1]):
        block.view(dq).addcmul_(ds[..., j : j + 1], k_anchor[:, :, j : j + 1])
    sums[0][block.rows].add_(ds.mT @ q_b)
    sums[1][block.rows].add_(prob.mT @ do_b)


def _anchor_heads(
    k: torch.Tensor, v: torch.Tensor, anchor: int, heads: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows' anchor keys (B, Hq, A, D) and values (B, Hq, A, Dv), one per query head."""
    k_anchor, v_anchor = (x[:, :, :anchor].to(dtype).repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    return k_anchor, v_anchor


def _groups(tiles: Sequence[Tile]) -> Iterator[tuple[list[Tile], Tile]]:
    """Neighbouring tiles of the same rows, until they hold `GROUP` tokens, and the tile that spans them."""
    group: list[Tile] = []
    for tile, following in zip(tiles, [*tiles[1:], None], strict=True):
        group.append(tile)
        span = Tile(tile.rows, slice(group[0].tokens.start, tile.tokens.stop))
        joins = following is not None and (following.rows, following.tokens.start) == (tile.rows, tile.tokens.stop)
        if span.tokens.stop - span.tokens.start >= GROUP or not joins:
            yield group, span
            group = []


def _blocks(tile: Tile, anchor: int) -> Iterator[Tile]:
    """The tile's tokens that see the anchor through merging: all but the anchor's own, whose scores are causal."""
    for start in range(max(tile.tokens.start, anchor), tile.tokens.stop, BLOCK):
        yield Tile(tile.rows, slice(start, min(start + BLOCK, tile.tokens.stop)))

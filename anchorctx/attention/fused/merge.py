"""The anchor's columns merged into a flash kernel's outputs and gradients, in one pass over each: Triton kernels.

The formulas are those of `attention.merge`. Forward reads q and the kernel's o and writes o in its place; backward
reads do, q, o and dq and writes dq in its place: no copy, no float32 temporary. What all tokens add to the anchor's own
gradients is summed in two steps, without atomics, so that it is the same at every run.
"""
# pyright: reportMissingImports=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from anchorctx.attention.fused.launch import launched_on
from anchorctx.attention.kernels.base import Attended, Score

ELEMENTS = 8192
"""Elements of q that a program of the forward pass holds at a time, half as many in the backward pass, which holds
twice as many tensors. As measured on an H200: 64 and 32 tokens with heads of 128."""
TILES = 16
"""Blocks of tokens that one program of the backward pass sums up, one after the other."""
LAUNCH = {"num_warps": 8, "enable_fp_fusion": True}


def merge_forward(attended: Attended, score: Score, anchor: int) -> None:
    """Add the anchor's columns to o (B, Hq, T, D) and lse (B, Hq, T) float32, in place.

    Of `attended`, q (B, Hq, T, D), k and v (B, Hkv, T, D) are read. Any strides, but 1 in the last dimension.
    """
    q, k, v, o, lse = attended
    batch, heads, tokens, dim = q.shape
    block = _block(dim)
    grid = (triton.cdiv(tokens - anchor, block), heads, batch)
    if all(grid):
        with launched_on(q):
            _forward[grid](
                q,
                *_anchors(k, v, anchor),
                o,
                lse,
                *_factors(score),
                tokens,
                *q.stride()[:3],
                *o.stride()[:3],
                *lse.stride(),
                **_constants(q, k, anchor, score),
                BLOCK=block,
                **LAUNCH,
            )


def merge_backward(
    do: torch.Tensor,
    attended: Attended,
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    score: Score,
    anchor: int,
) -> None:
    """Add the anchor's columns to dq (B, Hq, T, D), and to the anchor's rows of dk and dv (B, Hkv, T, D), in place.

    `attended` holds o and lse as `merge_forward` left them, do is o's gradient.
    """
    q, k, v, o, lse = attended
    dq, *dk_dv = grads
    do = do if do.stride(-1) == 1 else do.contiguous()  # a sum's gradient is expanded: a stride of 0
    batch, heads, tokens, dim = q.shape
    block = _block(dim) // 2
    programs = triton.cdiv(tokens - anchor, block * TILES)
    grid = (programs, heads, batch)
    if not all(grid):
        return
    parts = q.new_empty(2, programs, batch, heads, anchor, dim, dtype=torch.float32)  # of dk and dv
    with launched_on(q):
        _backward[grid](
            do,
            q,
            *_anchors(k, v, anchor),
            o,
            lse,
            dq,
            *parts,
            *_factors(score),
            tokens,
            *do.stride()[:3],
            *q.stride()[:3],
            *o.stride()[:3],
            *lse.stride(),
            *dq.stride()[:3],
            **_constants(q, k, anchor, score),
            BLOCK=block,
            TILES=TILES,
            **LAUNCH,
        )
    for grad, total in zip(dk_dv, parts.sum(1), strict=True):
        grad[:, :, :anchor] += total.unflatten(1, (k.shape[1], -1)).sum(2)  # the query heads of each key head


def _anchors(k: torch.Tensor, v: torch.Tensor, anchor: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The anchor's keys and values, (B, Hkv, A, D) without gaps."""
    return k[:, :, :anchor].contiguous(), v[:, :, :anchor].contiguous()


def _block(dim: int) -> int:
    return max(ELEMENTS // triton.next_power_of_2(max(dim, 128)), 2)


def _factors(score: Score) -> tuple[float, float]:
    return score.scale, score.softcap or 1.0


def _constants(q: torch.Tensor, k: torch.Tensor, anchor: int, score: Score) -> dict[str, int]:
    """What the kernels are compiled for."""
    dim = q.shape[-1]
    return {
        "ANCHOR": anchor,
        "GROUP": q.shape[1] // k.shape[1],
        "D": dim,
        "WIDTH": triton.next_power_of_2(dim),
        "CAPPED": score.softcap is not None,
    }


@triton.jit
def _score(q, key, scale, softcap, CAPPED: tl.constexpr):
    """Scores (BLOCK,) of queries (BLOCK, WIDTH) with one key (WIDTH,)."""
    score = tl.sum(q * key[None, :], 1) * scale
    if CAPPED:  # tanh x = 1 - 2 / (1 + exp 2x), which overflows to 1
        score = softcap * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * score / softcap)))
    return score


@triton.jit
def _forward(
    q, k, v, o, lse, scale, softcap, tokens,
    q_row, q_head, q_token, o_row, o_head, o_token, lse_row, lse_head, lse_token,
    ANCHOR: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A program merges `BLOCK` tokens of one head; the anchor's own stay as they are. k and v: (B, Hkv, ANCHOR, D)."""
    t = ANCHOR + tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    d = tl.arange(0, WIDTH)
    live = t < tokens
    mask = live[:, None] & (d < D)[None, :]
    q_at = q + b * q_row + h * q_head + t[:, None] * q_token + d[None, :]
    o_at = o + b * o_row + h * o_head + t[:, None] * o_token + d[None, :]
    lse_at = lse + b * lse_row + h * lse_head + t * lse_token
    queries = tl.load(q_at, mask=mask, other=0.0).to(tl.float32)
    out = tl.load(o_at, mask=mask, other=0.0).to(tl.float32)
    total = tl.load(lse_at, mask=live, other=0.0)
    own = (b * (tl.num_programs(1) // GROUP) + h // GROUP) * (ANCHOR * D)
    for j in tl.static_range(ANCHOR):
        key = tl.load(k + own + j * D + d, mask=d < D, other=0.0).to(tl.float32)
        value = tl.load(v + own + j * D + d, mask=d < D, other=0.0).to(tl.float32)
        score = _score(queries, key, scale, softcap, CAPPED)
        top = tl.maximum(total, score)
        total = top + tl.log(tl.exp(total - top) + tl.exp(score - top))
        out += tl.exp(score - total)[:, None] * (value[None, :] - out)
    tl.store(o_at, out.to(o.dtype.element_ty), mask=mask)
    tl.store(lse_at, total, mask=live)


@triton.jit
def _backward(
    do, q, k, v, o, lse, dq, dk_part, dv_part, scale, softcap, tokens,
    do_row, do_head, do_token, q_row, q_head, q_token, o_row, o_head, o_token, lse_row, lse_head, lse_token,
    dq_row, dq_head, dq_token,
    ANCHOR: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, CAPPED: tl.constexpr,
    BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """A program sums `TILES` blocks of one head into its own part (programs, B, Hq, ANCHOR, D) of dk and of dv."""
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    d = tl.arange(0, WIDTH)
    own = (b * (tl.num_programs(1) // GROUP) + h // GROUP) * (ANCHOR * D)
    first = tl.program_id(0).to(tl.int64) * (BLOCK * TILES) + ANCHOR
    tiles = tl.minimum(tl.cdiv(tokens - first, BLOCK), TILES)
    part = ((tl.program_id(0).to(tl.int64) * tl.num_programs(2) + b) * tl.num_programs(1) + h) * (ANCHOR * D)
    for j in tl.static_range(ANCHOR):
        key = tl.load(k + own + j * D + d, mask=d < D, other=0.0).to(tl.float32)
        value = tl.load(v + own + j * D + d, mask=d < D, other=0.0).to(tl.float32)
        dk = tl.zeros([BLOCK, WIDTH], tl.float32)  # summed over the block once, at the end: that needs all warps
        dv = tl.zeros([BLOCK, WIDTH], tl.float32)
        for tile in range(tiles):
            t = first + tile * BLOCK + tl.arange(0, BLOCK)
            live = t < tokens
            mask = live[:, None] & (d < D)[None, :]
            do_at = do + b * do_row + h * do_head + t[:, None] * do_token + d[None, :]
            q_at = q + b * q_row + h * q_head + t[:, None] * q_token + d[None, :]
            o_at = o + b * o_row + h * o_head + t[:, None] * o_token + d[None, :]
            dq_at = dq + b * dq_row + h * dq_head + t[:, None] * dq_token + d[None, :]
            grad = tl.load(do_at, mask=mask, other=0.0).to(tl.float32)
            queries = tl.load(q_at, mask=mask, other=0.0).to(tl.float32)
            out = tl.load(o_at, mask=mask, other=0.0).to(tl.float32)
            total = tl.load(lse + b * lse_row + h * lse_head + t * lse_token, mask=live, other=0.0)
            score = _score(queries, key, scale, softcap, CAPPED)
            p = tl.where(live, tl.exp(score - total), 0.0)
            ds = p * (tl.sum(grad * value[None, :], 1) - tl.sum(grad * out, 1)) * scale
            if CAPPED:
                ds *= 1.0 - (score / softcap) * (score / softcap)
            sum_q = tl.load(dq_at, mask=mask, other=0.0).to(tl.float32) + ds[:, None] * key[None, :]
            tl.store(dq_at, sum_q.to(dq.dtype.element_ty), mask=mask)
            dk += ds[:, None] * queries
            dv += p[:, None] * grad
        tl.store(dk_part + part + j * D + d, tl.sum(dk, 0), mask=d < D)
        tl.store(dv_part + part + j * D + d, tl.sum(dv, 0), mask=d < D)

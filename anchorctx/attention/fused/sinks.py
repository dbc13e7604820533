"""The gradient of attention sinks, in one pass over the output and its gradient: a Triton kernel.

The formula is that of `attention.sinks`. A program sums over its tokens in float32, without atomics, so that the result
is the same at every run.
"""
# pyright: reportMissingImports=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from anchorctx.attention.fused.launch import launched_on

ELEMENTS = 8192
"""Elements of o that a program holds at a time."""
TILES = 16
"""Blocks of tokens that one program sums up, one after the other."""


def sinks_backward(do: torch.Tensor, o: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """The gradient (Hq,) of `sinks` (Hq,), in their dtype.

    do and o (B, Hq, T, D) and lse (B, Hq, T) float32, of the softmax that holds the sinks; of any strides.
    """
    do = do if do.stride(-1) == 1 else do.contiguous()  # a sum's gradient is expanded: a stride of 0
    batch, heads, tokens, dim = o.shape
    width = triton.next_power_of_2(dim)
    block = max(ELEMENTS // max(width, 128), 2)
    programs = triton.cdiv(tokens, block * TILES)
    parts = o.new_empty(programs, batch, heads, dtype=torch.float32)
    with launched_on(o):
        _backward[(programs, heads, batch)](
            do,
            o,
            lse,
            sinks,
            parts,
            tokens,
            *do.stride()[:3],
            *o.stride()[:3],
            *lse.stride(),
            D=dim,
            WIDTH=width,
            BLOCK=block,
            TILES=TILES,
            num_warps=8,
        )
    return parts.sum((0, 1)).to(sinks.dtype)


@triton.jit
def _backward(
    do, o, lse, sinks, parts, tokens,
    do_row, do_head, do_token, o_row, o_head, o_token, lse_row, lse_head, lse_token,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """A program sums `TILES` blocks of one head into its own entry of `parts` (programs, B, Hq)."""
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    d = tl.arange(0, WIDTH)
    sink = tl.load(sinks + h).to(tl.float32)
    first = tl.program_id(0).to(tl.int64) * (BLOCK * TILES)
    summed = tl.zeros([BLOCK], tl.float32)
    for tile in range(tl.minimum(tl.cdiv(tokens - first, BLOCK), TILES)):
        t = first + tile * BLOCK + tl.arange(0, BLOCK)
        live = t < tokens
        mask = live[:, None] & (d < D)[None, :]
        grad = tl.load(do + b * do_row + h * do_head + t[:, None] * do_token + d[None, :], mask=mask, other=0.0)
        out = tl.load(o + b * o_row + h * o_head + t[:, None] * o_token + d[None, :], mask=mask, other=0.0)
        total = tl.load(lse + b * lse_row + h * lse_head + t * lse_token, mask=live, other=float("inf"))
        summed -= tl.exp(sink - total) * tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    at = (tl.program_id(0).to(tl.int64) * tl.num_programs(2) + b) * tl.num_programs(1) + h
    tl.store(parts + at, tl.sum(summed, 0))

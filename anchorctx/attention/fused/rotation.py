"""Rotary embeddings of 16-bit queries and keys by float32 angles, in one pass: a Triton kernel.

The R rotary dimensions of a head are turned in pairs (a, b), by cosines and sines that each of the two has of its own:

    y[a] = x[a] * cos[a] - x[b] * sin[a]        dx[a] = dy[a] * cos[a] + dy[b] * sin[b]
    y[b] = x[b] * cos[b] + x[a] * sin[b]        dx[b] = dy[b] * cos[b] - dy[a] * sin[a]

A pair is (i, i + R/2), or (2i, 2i + 1) where `neighbours` are paired. Dimensions from R on are copied. Every product
and sum is rounded to float32, as by operators of their own, and the result to 16 bits: no product may be contracted
into a fused multiply-add (`enable_fp_fusion`), whose last bit differs. Where `rounds_products`, the backward pass
rounds its products to 16 bits before it adds them: so does autograd after `x * cos`, whose gradient has x's dtype.

Liger's rotary kernel (`liger_kernel.ops.rope`) keeps float32 angles too; it contracts, and overwrites its input.
"""
# pyright: reportMissingImports=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from anchorctx.attention.fused.launch import launched_on
from anchorctx.attention.kernels.base import empty_heads_last

BLOCK = 16
"""Tokens of a program: as many as keep its angles in registers (4 float32 a pair and token)."""
HEADS = 8
"""Heads of a program, for which its angles are read once."""
LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}


def rotate(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, neighbours: bool, rounds_products: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """q (B, Hq, T, D) and k (B, Hk, T, D) in 16 bits, cos and sin (B or 1, T, R) float32 -> q and k, rotated.

    Any strides, but 1 in the last dimension; the outputs lie in memory as (B, T, H, D). Differentiable once, by q and
    k. `neighbours` and `rounds_products`: see above.
    """
    return _Rotation.apply(q, k, cos, sin, neighbours, rounds_products)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        neighbours: bool,
        rounds_products: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.form = {"NEIGHBOURS": neighbours, "ROUNDS": rounds_products}
        return _launch(q, k, cos, sin, BACKWARD=False, **ctx.form)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: torch.Tensor, dk: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        # gradients that come from a sum are expanded: a stride of 0
        dq, dk = (x if x.stride(-1) == 1 else x.contiguous() for x in (dq, dk))
        return *_launch(dq, dk, *ctx.saved_tensors, BACKWARD=True, **ctx.form), None, None, None, None


def _launch(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, **switches: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    outputs = empty_heads_last(q), empty_heads_last(k)
    batch, _, tokens, dim = q.shape
    width = cos.shape[-1]
    groups = [triton.cdiv(x.shape[1], HEADS) for x in (q, k)]
    grid = (sum(groups) * triton.cdiv(tokens, BLOCK), batch)
    if all(grid):
        with launched_on(q):
            _rotation[grid](
                q,
                k,
                *outputs,
                cos,
                sin,
                tokens,
                *q.stride()[:3],
                *k.stride()[:3],
                *(x.stride(0) if x.shape[0] > 1 else 0 for x in (cos, sin)),
                *(x.stride(1) for x in (cos, sin)),
                **_constants(q.shape[1], k.shape[1], dim, width),
                **switches,
                **LAUNCH,
            )
    return outputs


def _constants(q_heads: int, k_heads: int, dim: int, width: int) -> dict[str, int]:
    """What the kernel is compiled for, beside its switches."""
    return {
        "Q_HEADS": q_heads,
        "K_HEADS": k_heads,
        "D": dim,
        "R": width,
        "PAIRS": triton.next_power_of_2(width // 2),
        "REST": triton.next_power_of_2(dim - width) if dim > width else 0,
        "BLOCK": BLOCK,
        "HEADS": HEADS,
    }


@triton.jit
def _rotation(
    q, k, q_out, k_out, cos, sin, tokens,
    q_row, q_head, q_token, k_row, k_head, k_token, cos_row, sin_row, cos_token, sin_token,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, D: tl.constexpr, R: tl.constexpr, PAIRS: tl.constexpr,
    REST: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr,
    NEIGHBOURS: tl.constexpr, BACKWARD: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """A program turns `HEADS` heads of q, or of k, of `BLOCK` tokens of a row.

    Programs that share the angles follow each other, so that all but the first find them in the L2 cache.
    """
    q_groups: tl.constexpr = (Q_HEADS + HEADS - 1) // HEADS
    groups: tl.constexpr = q_groups + (K_HEADS + HEADS - 1) // HEADS
    group = (tl.program_id(0) % groups).to(tl.int64)
    t = ((tl.program_id(0) // groups).to(tl.int64) * BLOCK + tl.arange(0, BLOCK))[:, None]
    b = tl.program_id(1).to(tl.int64)
    pair = tl.arange(0, PAIRS)[None, :]
    if NEIGHBOURS:
        first = 2 * pair
        second = 2 * pair + 1
    else:
        first = pair
        second = pair + R // 2
    mask = (t < tokens) & (pair < R // 2)
    cos_at = cos + b * cos_row + t * cos_token
    sin_at = sin + b * sin_row + t * sin_token
    cos_a = tl.load(cos_at + first, mask=mask, other=0.0)
    cos_b = tl.load(cos_at + second, mask=mask, other=0.0)
    sin_a = tl.load(sin_at + first, mask=mask, other=0.0)
    sin_b = tl.load(sin_at + second, mask=mask, other=0.0)
    if group < q_groups:
        _turn(
            q + b * q_row + t * q_token, q_out + (b * tokens + t) * (Q_HEADS * D), q_head, group * HEADS,
            t < tokens, mask, first, second, cos_a, cos_b, sin_a, sin_b, Q_HEADS, D, R, REST, HEADS, BACKWARD, ROUNDS,
        )  # fmt: skip
    else:
        _turn(
            k + b * k_row + t * k_token, k_out + (b * tokens + t) * (K_HEADS * D), k_head, (group - q_groups) * HEADS,
            t < tokens, mask, first, second, cos_a, cos_b, sin_a, sin_b, K_HEADS, D, R, REST, HEADS, BACKWARD, ROUNDS,
        )  # fmt: skip


@triton.jit
def _turn(
    source, target, stride, head, live, mask, first, second, cos_a, cos_b, sin_a, sin_b,
    COUNT: tl.constexpr, D: tl.constexpr, R: tl.constexpr, REST: tl.constexpr, HEADS: tl.constexpr,
    BACKWARD: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """Heads `head` to `head + HEADS`, of `COUNT`. `source` and `target` (BLOCK, 1) point at each token's head 0."""
    dtype = target.dtype.element_ty
    for h in range(head, tl.minimum(head + HEADS, COUNT)):
        x = source + h * stride
        y = target + h * D
        a = tl.load(x + first, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(x + second, mask=mask, other=0.0).to(tl.float32)
        if BACKWARD:
            a_cos = a * cos_a
            b_sin = b * sin_b
            b_cos = b * cos_b
            a_sin = a * sin_a
            if ROUNDS:
                a_cos = a_cos.to(dtype).to(tl.float32)
                b_sin = b_sin.to(dtype).to(tl.float32)
                b_cos = b_cos.to(dtype).to(tl.float32)
                a_sin = a_sin.to(dtype).to(tl.float32)
            y_a = a_cos + b_sin
            y_b = b_cos - a_sin
        else:
            y_a = a * cos_a - b * sin_a
            y_b = b * cos_b + a * sin_b
        tl.store(y + first, y_a.to(dtype), mask=mask)
        tl.store(y + second, y_b.to(dtype), mask=mask)
        if REST:
            rest = R + tl.arange(0, REST)[None, :]
            others = live & (rest < D)
            tl.store(y + rest, tl.load(x + rest, mask=others, other=0.0), mask=others)

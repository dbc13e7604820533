"""Attention for a model on the meta device, whose tensors have shapes and no values; also Ulysses' exchanges around it.

Nothing is computed, but as much is allocated as by the real code: `attention.merge` runs as it is (with nothing to
merge where documents carry copies of the anchor), on a kernel that makes outputs of the right shape, and
FlashAttention-2's temporaries of the backward pass (its mha_varlen_bwd: a float32 dq, the softmax's row sums, and the
keys' and values' gradients for every query head).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from anchorctx.attention.kernels.base import Attended, Score, Tile
from anchorctx.attention.kernels.cpu import CpuKernel
from anchorctx.attention.registry import kernel_attention
from anchorctx.layout import PackedLayout

NAME = "anchor_plan"
"""Its name among transformers' attention implementations."""


class MetaKernel:
    """Allocates what a real kernel would, and computes nothing; implements `attention.kernels.base.Kernel`."""

    def __init__(self, cuda: bool) -> None:
        self._cuda = cuda

    def tiles(self, layouts: Sequence[PackedLayout], device: torch.device) -> Sequence[Tile]:
        """All documents of a row in one call, as CUDA's kernels take them, else cut as for the CPU's kernel."""
        if not self._cuda:
            return CpuKernel().tiles(layouts, torch.device("cpu"))
        return [Tile(slice(0, len(layouts)), slice(0, layouts[0].length), None, layouts[0].length)]

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tile: Tile, score: Score
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Outputs of the shapes of `Kernel.forward`: (B, H, T, D) like q, and the log-sum-exp (B, H, T) float32."""
        return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)

    def backward(
        self, do: torch.Tensor, attended: Attended, tile: Tile, score: Score
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of q, k and v; the temporaries of a CUDA kernel exist until all three are made."""
        q, k, v, _, lse = attended
        temporaries = [q.new_empty(q.shape, dtype=torch.float32), torch.empty_like(lse)] if self._cuda else []
        if self._cuda and k.shape != q.shape:  # grouped heads: dk and dv are made for each query head, then summed
            temporaries += [torch.empty_like(q), torch.empty_like(q)]
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        del temporaries
        return grads


class _Exchange(torch.autograd.Function):
    """An all-to-all: DeepSpeed copies the input into one buffer, exchanges it, and copies the output into place."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:  # type: ignore[override]
        ctx.shape = x.shape
        return _copies(x, shape)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return _copies(grad, ctx.shape), None


def _copies(x: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    # at most two of the three exist at a time, beside x
    sent = x.new_empty(x.shape)
    received = torch.empty_like(sent)
    del sent
    placed = received.new_empty(tuple(shape))
    del received
    return placed


def register(cuda: bool) -> None:
    """Add it to transformers' attention implementations, allocating as a GPU's (`cuda`) or a CPU's kernel does."""
    kernel = MetaKernel(cuda)

    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        layouts: tuple[PackedLayout, ...],
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        query, key = query.to(value.dtype), key.to(value.dtype)
        local = query.shape  # (B, H, T / sequence, D): layouts are of whole rows
        sequence = layouts[0].length // local[2]
        if sequence > 1:
            query, key, value = (_heads_for_tokens(x, sequence) for x in (query, key, value))
        out = kernel_attention(query, key, value, layouts, Score(1.0), kernel)
        if sequence > 1:
            out = _Exchange.apply(out, local)
            assert isinstance(out, torch.Tensor)
        return out.transpose(1, 2), None

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)


def _heads_for_tokens(x: torch.Tensor, sequence: int) -> torch.Tensor:
    """(B, H, T / N, D), all heads of some tokens, to (B, max(H, N) / N, T, D), some heads of all; N = `sequence`."""
    # 8 key heads on 16 processes: each head is repeated twice first, so that every process has one
    rows, heads, tokens, dim = x.shape
    if heads < sequence:
        x = x.repeat_interleave(sequence // heads, dim=1)
    out = _Exchange.apply(x, (rows, max(heads, sequence) // sequence, tokens * sequence, dim))
    assert isinstance(out, torch.Tensor)
    return out

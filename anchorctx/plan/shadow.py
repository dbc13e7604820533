"""Stand-ins that move no data, for a model without values (meta device): attention, and Ulysses' exchanges around it.

They allocate what the real ones do: `attention.merge` runs as it is, on a kernel that makes outputs of the right shape,
and FlashAttention-2's backward temporaries (its mha_varlen_bwd: a float32 dq, the softmax's row sums, and keys'
gradients for every query head). Head-last memory as in the real kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from anchorctx.attention.kernels.base import Attended, Score, Tile
from anchorctx.attention.kernels.cpu import CpuKernel
from anchorctx.attention.merge import anchor_attention
from anchorctx.layout import PackedLayout

NAME = "anchor_plan"
"""The attention implementation of models that are planned with."""


class ShadowKernel:
    """A kernel that computes nothing; implements `attention.kernels.base.Kernel`."""

    def __init__(self, cuda: bool) -> None:
        self._cuda = cuda

    def tiles(self, layouts: Sequence[PackedLayout], device: torch.device) -> Sequence[Tile]:
        """The whole row where kernels take documents together (CUDA), else as the CPU's kernel cuts it."""
        if not self._cuda:
            return CpuKernel().tiles(layouts, torch.device("cpu"))
        return [Tile(slice(0, len(layouts)), slice(0, layouts[0].length), None, layouts[0].length)]

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tile: Tile, score: Score
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Kernel.forward`."""
        return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)

    def backward(
        self, do: torch.Tensor, attended: Attended, tile: Tile, score: Score
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `Kernel.backward`."""
        q, k, v, _, lse = attended
        inside = [q.new_empty(q.shape, dtype=torch.float32), torch.empty_like(lse)] if self._cuda else []
        if self._cuda and k.shape != q.shape:
            inside += [torch.empty_like(q), torch.empty_like(q)]
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        del inside
        return grads


class _Exchange(torch.autograd.Function):
    """An all-to-all: DeepSpeed copies the input together, exchanges, and copies the output into place."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:  # type: ignore[override]
        ctx.shape = x.shape
        return _copies(x, shape)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return _copies(grad, ctx.shape), None


def _copies(x: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    together = x.new_empty(x.shape)
    exchanged = torch.empty_like(together)
    del together
    placed = exchanged.new_empty(tuple(shape))
    del exchanged
    return placed


def register(cuda: bool) -> None:
    """Add the stand-in to transformers' attention implementations, as a GPU's or a CPU's kernel would allocate."""
    kernel = ShadowKernel(cuda)

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
        local = query.shape
        sequence = layouts[0].length // local[2]
        if sequence > 1:
            query, key, value = (_heads_for_tokens(x, sequence) for x in (query, key, value))
        out = anchor_attention(query, key, value, layouts, Score(1.0), kernel)
        if sequence > 1:
            out = _Exchange.apply(out, local)
            assert isinstance(out, torch.Tensor)
        return out.transpose(1, 2), None

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)


def _heads_for_tokens(x: torch.Tensor, sequence: int) -> torch.Tensor:
    """(B, H, S, D) -> (B, max(H, SP)/SP, S*SP, D)."""
    rows, heads, tokens, dim = x.shape
    if heads < sequence:
        x = x.repeat_interleave(sequence // heads, dim=1)
    out = _Exchange.apply(x, (rows, max(heads, sequence) // sequence, tokens * sequence, dim))
    assert isinstance(out, torch.Tensor)
    return out

"""What the varlen kernels on CUDA share: many documents in one call, told apart by their boundaries.

Such a kernel takes q (N, Hq, D) and k, v (N, Hkv, D), N tokens of all documents one after the other, `cu_seqlens`, and
returns o (N, Hq, D) and the log-sum-exp (Hq, N) in float32. Projections leave q, k and v in memory as (B, T, H, D), so
that a whole batch is such a sequence of tokens without a copy. Grouped-query heads are the kernels' own. Where values
have another head dimension than queries and keys, the narrower ones are copied with zeros behind them.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch._guards import detect_fake_mode

from anchorctx.attention.kernels.base import Attended, Score, Tile, widened
from anchorctx.layout import PackedLayout

MAX_SEQUENCES = 1024
"""Documents in one call, at most.

CUDA's grid ends at 65,535 sequences. Memory ends sooner: FlashAttention-2's backward keeps a float32 accumulator of dq
with 128 extra tokens a sequence, which for 65,535 sequences of 32 heads of 128 is 137 GB; here it is 2.1 GB. A call of
1,024 documents fills any card, so cutting there costs nothing that could be measured against it.
"""
ALIGNMENT = 8
"""The kernels take head dimensions that are multiples of 8; others are padded with zeros, which changes no score."""

_Cached = TypeVar("_Cached", bound=Callable[..., Any])


class Packed(NamedTuple):
    """q, k, v of one call, (N, H, D) with a contiguous last dimension."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


class VarlenKernel(abc.ABC):
    """Implements `Kernel` by means of `varlen_forward` and `varlen_backward`, which subclasses provide."""

    def __init__(self, max_sequences: int = MAX_SEQUENCES) -> None:
        """`max_sequences`: documents in one call, at most."""
        self.max_sequences = max_sequences

    @abc.abstractmethod
    def varlen_forward(self, packed: Packed, tile: Tile, score: Score) -> tuple[torch.Tensor, torch.Tensor]:
        """Causal attention inside documents: o (N, Hq, D), lse (Hq, N) float32."""

    @abc.abstractmethod
    def varlen_backward(
        self, do: torch.Tensor, attended: Attended, tile: Tile, score: Score
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """dq (N, Hq, D), dk and dv (N, Hkv, D) from do and `attended`, its tensors packed and lse (Hq, N)."""

    def tiles(self, layouts: Sequence[PackedLayout], device: torch.device) -> Sequence[Tile]:
        """One tile for the whole batch, or several a row where it has more than `max_sequences` documents."""
        return uncached_under_fake(_tiles)(tuple(layouts), device, self.max_sequences)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tile: Tile, score: Score
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Kernel.forward`."""
        width = max(q.shape[-1], v.shape[-1])
        o, lse = self.varlen_forward(Packed(*(pack(x, width) for x in (q, k, v))), tile, score)
        return unpack(o, q, v.shape[-1]), lse.unflatten(1, (q.shape[0], -1)).transpose(0, 1)

    def backward(
        self, do: torch.Tensor, attended: Attended, tile: Tile, score: Score
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `Kernel.backward`."""
        *tensors, lse = attended
        q, k, v, _ = tensors
        heads_first = lse.transpose(0, 1).flatten(1).contiguous()  # (b, Hq, L) -> (Hq, b*L)
        width = max(q.shape[-1], v.shape[-1])
        packed = Attended(*(pack(x, width) for x in tensors), lse=heads_first)
        dq, dk, dv = self.varlen_backward(pack(do, width), packed, tile, score)
        return unpack(dq, q), unpack(dk, k), unpack(dv, v)


def pack(x: torch.Tensor, width: int = 0) -> torch.Tensor:
    """(b, H, L, D) -> (b*L, H, D'), D' the next multiple of 8 from `width` on; a view where memory is (b, L, H, D')."""
    packed = x.transpose(1, 2).flatten(0, 1)
    packed = widened(packed, -(-max(width, x.shape[-1]) // ALIGNMENT) * ALIGNMENT)
    # Gradients that come from a sum are expanded: a stride of 0, which no kernel takes.
    return packed if packed.stride(-1) == 1 else packed.contiguous()


def unpack(packed: torch.Tensor, like: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """(b*L, H, D') -> (b, H, L, D), in memory as (b, L, H, D); a view where D' is D: `dim`, or that of `like`."""
    dim = like.shape[-1] if dim is None else dim
    return packed[..., :dim].contiguous().unflatten(0, (like.shape[0], -1)).transpose(1, 2)


def uncached_under_fake(cached: _Cached) -> _Cached:
    """The `functools.lru_cache`d function, past its cache while tensors are fake: neither kind may meet the other's."""
    return cached.__wrapped__ if detect_fake_mode() is not None else cached  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=64)
def _tiles(layouts: tuple[PackedLayout, ...], device: torch.device, limit: int) -> tuple[Tile, ...]:
    if sum(len(layout.doc_offsets) - 1 for layout in layouts) <= limit:
        length = layouts[0].length
        # two rows of 5 tokens with documents of 2, 3 and of 5: [0, 2, 5, 10] over the batch laid end to end
        ends = (row * length + end for row, layout in enumerate(layouts) for end in layout.doc_offsets[1:])
        return (_tile(slice(0, len(layouts)), slice(0, length), [0, *ends], device),)
    return tuple(
        _tile(slice(row, row + 1), slice(ends[0], ends[-1]), [end - ends[0] for end in ends], device)
        for row, layout in enumerate(layouts)
        for ends in _chunks(layout.doc_offsets, limit)
    )


def _chunks(offsets: Sequence[int], limit: int) -> Iterator[Sequence[int]]:
    """Boundaries of at most `limit` documents at a time; neighbours share one boundary."""
    # limit 2, offsets [0, 3, 5, 9] -> [0, 3, 5], [5, 9]
    for first in range(0, len(offsets) - 1, limit):
        yield offsets[first : first + limit + 1]


def _tile(rows: slice, tokens: slice, offsets: Sequence[int], device: torch.device) -> Tile:
    longest = max(b - a for a, b in zip(offsets, offsets[1:], strict=False))
    with torch.inference_mode(False):  # cached, and a later backward could not save an inference tensor
        cu_seqlens = torch.tensor(offsets, dtype=torch.int32).to(device)
    return Tile(rows, tokens, cu_seqlens, longest)

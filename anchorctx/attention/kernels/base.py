"""What a flash kernel must offer to carry AnchorAttention: intra-document causal attention that hands out its lse.

Shapes: B rows, T tokens, Hq query heads, Hkv key heads (Hq a multiple of Hkv), D head dimension of queries and keys, Dv
of values and outputs (another in multi-head latent attention), L tokens of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from anchorctx.layout import PackedLayout


@dataclass(frozen=True, slots=True)
class Score:
    """How a score is made from q and k: `softcap * tanh(scale * q.k / softcap)`, within a sliding `window`."""

    scale: float
    window: int | None = None
    """Tokens of its own document that a token sees, itself included; None is all of them."""
    softcap: float | None = None


@dataclass(frozen=True, slots=True)
class Tile:
    """The documents that one kernel call covers: the same token range of some rows, documents whole."""

    rows: slice
    tokens: slice
    cu_seqlens: torch.Tensor | None = None
    """(N+1,) int32 document boundaries over the tile's tokens, row after row; None where all are equally long."""
    max_seqlen: int = 0
    """Tokens of the tile's longest document."""

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """(B, H, T, ...) -> (b, H, L, ...), a view."""
        return tensor[self.rows, :, self.tokens]


class Attended(NamedTuple):
    """What a forward pass took and gave, which its backward pass needs."""

    q: torch.Tensor
    """(b, Hq, L, D)."""
    k: torch.Tensor
    """(b, Hkv, L, D)."""
    v: torch.Tensor
    """(b, Hkv, L, Dv)."""
    o: torch.Tensor
    """(b, Hq, L, Dv), of the total softmax: documents and anchor."""
    lse: torch.Tensor
    """(b, Hq, L), natural log, of the total softmax."""


class Kernel(Protocol):
    """Causal attention inside documents, forward and backward, over one tile."""

    def tiles(self, layouts: Sequence[PackedLayout], device: torch.device) -> Sequence[Tile]:
        """Cut the batch into kernel calls. Layouts have their documents together and share one anchor length."""
        ...

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tile: Tile, score: Score
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q (b, Hq, L, D), k (b, Hkv, L, D), v (b, Hkv, L, Dv) -> o (b, Hq, L, Dv), lse (b, Hq, L).

        lse is a natural logarithm, at least float32. o lies in memory as (b, L, Hq, D) if q does, and is the caller's.
        """
        ...

    def backward(
        self, do: torch.Tensor, attended: Attended, tile: Tile, score: Score
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients dq, dk, dv of the documents' own scores, given the o and lse of the *total* softmax.

        They lie in memory as (b, L, H, D) if q, k and v do, and are the caller's.
        """
        ...


def empty_heads_last(like: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """(b, H, L, D) laid out in memory as (b, L, H, D), as projections and flash kernels use; D is `dim` or `like`'s."""
    b, heads, tokens, own = like.shape
    return like.new_empty(b, tokens, heads, own if dim is None else dim).transpose(1, 2)


def widened(x: torch.Tensor, dim: int) -> torch.Tensor:
    """`x` with zeros behind its last dimension, up to `dim`; itself where none is missing.

    A kernel that takes one head dimension gets queries, keys and values so: zeros add nothing to a score, and the
    output's are cut off again.
    """
    missing = dim - x.shape[-1]
    assert missing >= 0, "would cut numbers off"
    return torch.nn.functional.pad(x, (0, missing)) if missing else x

"""KV segments: keys and values of a run of tokens, all layers in one tensor, and pure functions on them.

Shapes: L layers, B batch, H key heads, T tokens, D head dimension. A segment never changes: every function returns a
new one, which may share memory with its source. Keys are stored *un-rotated* (`rotated_at` is None) and rotated once,
in float32, when they are placed (`rope`): rotating an already rotated key again and again drifts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from anchorctx.kvcomm import memory


@dataclass(frozen=True, slots=True)
class KV:
    """Keys and values of T neighbouring tokens."""

    keys: torch.Tensor
    """(L, B, H, T, D)."""
    values: torch.Tensor
    """(L, B, H, T, D); its D may differ from the keys'."""
    rotated_at: int | None = None
    """Position of the first token when the keys carry their rotation; None when they are un-rotated."""

    def __post_init__(self) -> None:
        if self.keys.shape[:4] != self.values.shape[:4]:
            raise ValueError(f"keys {tuple(self.keys.shape)} and values {tuple(self.values.shape)} do not match")

    @property
    def length(self) -> int:
        """Tokens, `T`."""
        return self.keys.shape[3]

    @property
    def nbytes(self) -> int:
        """Bytes of the entries (of the storage only when it is not shared)."""
        return self.keys.nbytes + self.values.nbytes

    def cut(self, start: int, stop: int | None = None) -> KV:
        """Tokens `start` to `stop`, a view; negative numbers count from the end, as in a slice."""
        first, last, _ = slice(start, stop).indices(self.length)
        # A segment of 10 tokens rotated at 100: cut(-4) holds its tokens 6..9, rotated at 106.
        at = None if self.rotated_at is None else self.rotated_at + first
        span = slice(first, max(last, first))
        return KV(self.keys[:, :, :, span], self.values[:, :, :, span], at)

    def layers(self, start: int) -> KV:
        """Layers `start` and above, a view."""
        return KV(self.keys[start:], self.values[start:], self.rotated_at)

    def copy(self) -> KV:
        """The same in memory of its own, so that a short slice does not keep a long buffer alive."""
        return replace(self, keys=_own(self.keys), values=_own(self.values))

    def minus(self, other: KV) -> KV:
        """The offset from `other` to this; both un-rotated and of equal length."""
        _same_frame(self, other)
        return KV(self.keys - other.keys, self.values - other.values)

    def plus(self, offset: KV, weight: float = 1.0) -> KV:
        """This plus `weight` times an offset, which may leave out lower layers: these stay as they are."""
        return self.weighted_sum([offset], [weight])

    def weighted_sum(self, offsets: Sequence[KV], weights: Sequence[float] | torch.Tensor) -> KV:
        """This plus the weighted offsets (KVCOMM, equations 6 and 7), in one pass over each.

        `weights` are one an offset, or (offsets, T): one a token.
        """
        # k = k_base + sum_i w_i (k_i - k_i,base), un-rotated; the same for v. Placing rotates the sum once.
        return KV(
            _weighted_sum(self.keys, [_same_frame(self, offset).keys for offset in offsets], weights),
            _weighted_sum(self.values, [offset.values for offset in offsets], weights),
        )


def concatenate(parts: Sequence[KV]) -> KV:
    """Segments one behind the other; rotated ones must follow each other without a gap."""
    for a, b in zip(parts, parts[1:], strict=False):
        if (a.rotated_at is None) != (b.rotated_at is None):
            raise ValueError("rotated and un-rotated segments cannot be joined: un-rotate them first")
        if a.rotated_at is not None and a.rotated_at + a.length != b.rotated_at:
            raise ValueError(f"a segment at {b.rotated_at} does not follow one that ends at {a.rotated_at + a.length}")
    return KV(
        torch.cat([part.keys for part in parts], dim=3),
        torch.cat([part.values for part in parts], dim=3),
        parts[0].rotated_at,
    )


def _own(x: torch.Tensor) -> torch.Tensor:
    """`x`, copied where it is a part of something larger."""
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone()


def _same_frame(a: KV, b: KV) -> KV:
    """`b`, after a check that both are un-rotated."""
    if a.rotated_at is not None or b.rotated_at is not None:
        raise ValueError("offsets are between un-rotated segments: un-rotate both first")
    return b


def _weighted_sum(
    base: torch.Tensor, offsets: Sequence[torch.Tensor], weights: Sequence[float] | torch.Tensor
) -> torch.Tensor:
    """base (L, ...) plus the weighted offsets (l <= L, ...) of its upper layers; the first one writes the result."""
    if not offsets:
        return base
    # Layers 0..31 and offsets of layers 1..31: skipped = 1, and layer 0 is copied as it is.
    skipped = base.shape[0] - offsets[0].shape[0]
    # Each offset is read once and nothing is copied besides: long contents have large offsets.
    total = memory.empty_like(base)
    total[:skipped] = base[:skipped]
    if isinstance(weights, torch.Tensor):
        columns = weights[:, :, None].unbind()  # (T, 1) each, against (l, B, H, T, D)
        torch.addcmul(base[skipped:], offsets[0], columns[0], out=total[skipped:])
        for offset, column in zip(offsets[1:], columns[1:], strict=True):
            total[skipped:].addcmul_(offset, column)
        return total
    torch.add(base[skipped:], offsets[0], alpha=weights[0], out=total[skipped:])
    for offset, weight in zip(offsets[1:], weights[1:], strict=True):
        total[skipped:].add_(offset, alpha=weight)
    return total

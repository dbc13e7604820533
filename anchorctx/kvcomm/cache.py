"""KV segments: keys and values of a run of tokens, all layers in one tensor, and pure functions on them.

Shapes: L layers, B batch, H key heads, T tokens, D head dimension. A segment never changes: every function returns a
new one, which may share memory with its source. Keys are kept *un-rotated* (`rotated_at` is None) wherever they are
stored and rotated once, in float32, when they are placed: rotating an already rotated key again and again drifts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch


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
        at = None if self.rotated_at is None else self.rotated_at + first
        span = slice(first, max(last, first))
        return KV(self.keys[:, :, :, span], self.values[:, :, :, span], at)

    def layers(self, start: int) -> KV:
        """Layers `start` and above, a view."""
        return KV(self.keys[start:], self.values[start:], self.rotated_at)

    def copy(self) -> KV:
        """The same in memory of its own, so that a long buffer is not kept alive for a short slice."""
        return replace(self, keys=self.keys.clone(), values=self.values.clone())

    def minus(self, other: KV) -> KV:
        """The offset from `other` to this: both un-rotated (the de-rotated frame) and of equal length."""
        _same_frame(self, other)
        return KV(self.keys - other.keys, self.values - other.values)

    def plus(self, offset: KV, weight: float = 1.0) -> KV:
        """This plus `weight` times an offset, which may leave out lower layers: these stay as they are."""
        return self.weighted_sum([offset], [weight])

    def weighted_sum(self, offsets: Sequence[KV], weights: Sequence[float]) -> KV:
        """This plus the weighted offsets (KVCOMM, equations 6 and 7), in one pass over each."""
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


def token_bytes(layers: int, heads: int, head_dim: int, itemsize: int) -> int:
    """Bytes of one token's KV: 2 * L * H * D * itemsize (Llama-3.1-8B in bfloat16: 128 KiB)."""
    return 2 * layers * heads * head_dim * itemsize


def _same_frame(a: KV, b: KV) -> KV:
    """`b`, after a check that both are un-rotated."""
    if a.rotated_at is not None or b.rotated_at is not None:
        raise ValueError("offsets live in the de-rotated frame: un-rotate both segments first")
    return b


def _weighted_sum(base: torch.Tensor, offsets: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """base (L, ...) plus the weighted offsets (l <= L, ...) of its upper layers; the first one writes the result."""
    if not offsets:
        return base
    skipped = base.shape[0] - offsets[0].shape[0]
    total = torch.empty_like(base)
    total[:skipped] = base[:skipped]
    torch.add(base[skipped:], offsets[0], alpha=weights[0], out=total[skipped:])
    for offset, weight in zip(offsets[1:], weights[1:], strict=True):
        total[skipped:].add_(offset, alpha=weight)
    return total

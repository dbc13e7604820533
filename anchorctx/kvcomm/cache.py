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
        return _add(self.copy(), offset, weight)

    def weighted_sum(self, offsets: Sequence[KV], weights: Sequence[float]) -> KV:
        """This plus the weighted offsets (KVCOMM, equations 6 and 7), in one pass over each."""
        total = self.copy()
        for offset, weight in zip(offsets, weights, strict=True):
            _add(total, offset, weight)
        return total


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


def _same_frame(a: KV, b: KV) -> None:
    if a.rotated_at is not None or b.rotated_at is not None:
        raise ValueError("offsets live in the de-rotated frame: un-rotate both segments first")


def _add(total: KV, offset: KV, weight: float) -> KV:
    """In place, on memory that `total` owns."""
    _same_frame(total, offset)
    skipped = total.keys.shape[0] - offset.keys.shape[0]
    total.keys[skipped:].add_(offset.keys, alpha=weight)
    total.values[skipped:].add_(offset.values, alpha=weight)
    return total

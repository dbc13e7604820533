"""KV segments: keys and values of a run of tokens, all layers in one tensor; pure functions on them; and rotation.

Shapes: L layers, B batch, H key heads, T tokens, D head dimension. A segment never changes: every function returns a
new one, which may share memory with its source. Keys are stored *un-rotated* (`rotated_at` is None) and rotated once,
in float32, when they are placed: rotating an already rotated key again and again drifts.

Keys are rotated by the model's own rotary embeddings, in any variant whose frequencies do not depend on the prompt. The
cosines and sines come from the model's rotary module, so theta, linear, YaRN and llama3 scaling need no code here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from anchorctx.attention.rope import LENGTH_BOUND, rotary_modules
from anchorctx.errors import UserError


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
        """The same in new memory, so that a short slice does not keep a long buffer alive."""
        return replace(self, keys=self.keys.clone(), values=self.values.clone())

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
    total = torch.empty_like(base)
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


# -- rotation ---------------------------------------------------------------------------------------------------------


class Rope:
    """The rotation of one model's keys."""

    def __init__(self, module: torch.nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        self._module, self._device = module, device
        self.dtype = torch.float64 if dtype is torch.float64 else torch.float32
        """In which keys are rotated; they are cast once, afterwards."""
        self._tables = self._compute(1024)

    @classmethod
    def of(cls, model: PreTrainedModel) -> Rope:
        """The rotation of `model`; UserError that names it where its keys cannot be moved."""
        name, modules = type(model).__name__, rotary_modules(model)
        if not modules:
            raise UserError(f"{name} has no rotary position embeddings, so its keys cannot be moved: use a RoPE model")
        if len(modules) > 1:
            raise UserError(
                f"{name} has {len(modules)} sets of rotary embeddings, but keys are moved by one: use a model whose "
                "layers share theirs"
            )
        parameters = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
        kind = parameters.get("rope_type", "default")
        if kind in LENGTH_BOUND:  # a key cannot move from one prompt to another
            raise UserError(
                f"{name} has {kind} RoPE scaling, whose frequencies depend on the prompt's length, so keys cannot move "
                "between prompts: set rope_type to default, linear, yarn or llama3"
            )
        return cls(modules[0], model.dtype, model.device)

    def tables(self, start: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines (T, R) of positions `start` to `start + length`; R <= D are the rotated dimensions."""
        if start + length > self._tables[0].shape[0]:  # grow to at least twice the size, so that it happens rarely
            self._tables = self._compute(max(start + length, 2 * self._tables[0].shape[0]))
        cos, sin = self._tables
        return cos[start : start + length], sin[start : start + length]

    def rotated(self, kv: KV, start: int) -> KV:
        """The segment with its first token at position `start`."""
        if kv.rotated_at == start:
            return kv
        keys = torch.empty_like(kv.keys)
        self.write(kv, start, keys)
        return KV(keys, kv.values, start)

    def unrotated(self, kv: KV) -> KV:
        """The segment without its rotation."""
        if kv.rotated_at is None:
            return kv
        # Placing is R_p k = k cos(p) + rotate_half(k) sin(p). Its inverse has -sin and divides by cos^2 + sin^2, which
        # is not 1: YaRN multiplies both by a temperature s (hence s^2), and a cosine rounded to float32 is off by 1e-8.
        # So it undoes exactly what was done, in any precision.
        cos, sin = self.tables(kv.rotated_at, kv.length)
        scale = cos.square() + sin.square()
        keys = torch.empty_like(kv.keys)
        self._rotate(kv.keys, cos / scale, -sin / scale, keys)
        return KV(keys, kv.values)

    def write(self, kv: KV, start: int, out: torch.Tensor) -> None:
        """Rotate the keys to `start` into `out` (L, B, H, T, D), which may be a part of a larger tensor."""
        if kv.rotated_at == start:
            out.copy_(kv.keys)
        else:
            self._rotate(self.unrotated(kv).keys, *self.tables(start, kv.length), out)

    def _rotate(self, keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor) -> None:
        # bfloat16 keys are rotated in float32 and cast once; float32 and float64 need no copy.
        if out.dtype is self.dtype and keys.dtype is self.dtype:
            _rotate_into(keys, cos, sin, out)
        else:
            wide = torch.empty(keys.shape, dtype=self.dtype, device=keys.device)
            _rotate_into(keys.to(self.dtype), cos, sin, wide)
            out.copy_(wide)

    @torch.no_grad()
    def _compute(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        positions = torch.arange(length, device=self._device)[None]
        found = self._module(torch.empty(0, dtype=self.dtype, device=self._device), positions)
        if not isinstance(found, tuple):
            raise UserError(
                f"{type(self._module).__name__} gives a {type(found).__name__}, not cosines and sines, so keys "
                "cannot be moved by it: use a model like Llama, Qwen or Mistral"
            )
        cos, sin = found
        # Tables made in inference mode could not be used outside of it later.
        with torch.inference_mode(False):
            return cos[0].to(self.dtype, copy=True), sin[0].to(self.dtype, copy=True)


def _rotate_into(keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor) -> None:
    """`k * cos + rotate_half(k) * sin` without temporaries; dimensions beyond R are copied."""
    # rotate_half([a, b]) = [-b, a], a and b being the halves of the rotated dimensions. With R = 4 the pairs (k0, k2)
    # and (k1, k3) turn together: k0' = k0 cos - k2 sin and k2' = k2 cos + k0 sin.
    width = cos.shape[-1]
    half = width // 2
    rotated = keys[..., :width]
    torch.mul(rotated, cos, out=out[..., :width])
    out[..., :half].addcmul_(rotated[..., half:], sin[..., :half], value=-1)
    out[..., half:width].addcmul_(rotated[..., :half], sin[..., half:])
    if width < keys.shape[-1]:
        out[..., width:] = keys[..., width:]

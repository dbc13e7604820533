"""The rotation of one model's keys, so that they can be moved. How a layer rotates is found on the model itself.

Angles come from the model's own rotary modules, so theta, linear, YaRN and llama3 scaling need no code here; only
scalings whose frequencies depend on the prompt are refused. Which dimensions turn, in which pairs, by which angles, or
that a layer does not rotate at all: all of it is tried on two tokens at two places, for every layer. RoPE is relative,
so that a prompt that moves as a whole keeps its un-rotated keys.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from transformers import PreTrainedModel

from anchorctx.attention.rope import LENGTH_BOUND, rotary_modules
from anchorctx.errors import UserError
from anchorctx.kvcomm import memory
from anchorctx.kvcomm.cache import KV

Tables = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines (T, P) of positions 0 to T - 1, for P pairs of dimensions."""
LIMITS = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 0.03, torch.bfloat16: 0.2}
"""Relative error of a layer's keys in the check, by the model's dtype. Measured on random models of 4, 32 and 80
layers: up to 6e-7 in float32 (3e-7 on SmolLM2 135M), 3e-3 in float16, 2.5e-2 in bfloat16. Wrong rotations leave 0.05
to 1: the least error is taken, and has to be this small."""


@dataclass(frozen=True, slots=True)
class Rotation:
    """How vectors (..., T, D) turn with their position."""

    table: int
    """Which of the model's sets of angles."""
    pairs: int
    """Pairs of dimensions that turn; those of no pair do not."""
    first: int = 0
    """The first dimension that turns."""
    neighbours: bool = False
    """Dimensions 2i and 2i + 1 are a pair (GPT-J, GLM); otherwise i and i + pairs (Llama)."""
    backwards: bool = False
    """They turn against the usual direction (nanochat)."""

    def turn(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor) -> None:
        """Rotate `x` into `out` without temporaries; dimensions of no pair are copied."""
        # (a, b) becomes (a cos - b sin, b cos + a sin). Both cosines in one product: a third quicker than one by one.
        stop = self.first + 2 * self.pairs
        turned, to = x[..., self.first : stop], out[..., self.first : stop]
        both = cos.repeat_interleave(2, -1) if self.neighbours else cos.repeat(1, 2)
        torch.mul(turned, both, out=to)
        (a, b), (to_a, to_b), sign = self._split(turned), self._split(to), -1 if self.backwards else 1
        to_a.addcmul_(b, sin, value=-sign)
        to_b.addcmul_(a, sin, value=sign)
        for rest in (slice(0, self.first), slice(stop, None)):
            if x[..., rest].shape[-1]:
                out[..., rest] = x[..., rest]

    def _split(self, turned: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The first and the second dimension of each pair, views (..., pairs)."""
        if self.neighbours:
            return turned[..., 0::2], turned[..., 1::2]
        return turned[..., : self.pairs], turned[..., self.pairs :]


@dataclass(frozen=True, slots=True)
class Layers:
    """Neighbouring layers that rotate alike; None does not rotate."""

    span: slice
    rotation: Rotation | None


class Rope:
    """See the module. `find` has to be called before anything is moved."""

    def __init__(self, name: str, angles: Sequence[Callable[[int], Tables]], dtype: torch.dtype, reach: int) -> None:
        self._name, self._angles, self._reach = name, angles, reach
        self.dtype = _working(dtype)
        """In which keys are rotated; they are cast once, afterwards."""
        self._limit = LIMITS.get(dtype, max(LIMITS.values()))
        self._tables = [one(min(1024, reach)) for one in angles]
        self.keys: tuple[Layers, ...] = ()
        self.values: tuple[Layers, ...] = ()
        """Of caches in which the second tensor is what turns: DeepSeek V3 keeps a latent and the rotated part of the
        keys, in place of keys and values."""

    @classmethod
    def of(cls, model: PreTrainedModel, reach: int = 2**31) -> Rope:
        """The angles of `model`, for up to `reach` positions; UserError that names it where its keys cannot move."""
        name, config, modules = type(model).__name__, model.config.get_text_config(), rotary_modules(model)
        if not modules:
            raise UserError(f"{name} has no rotary position embeddings, so its keys cannot be moved: use a RoPE model")
        parameters = getattr(config, "rope_parameters", None) or {}
        for own in (parameters, *(value for value in parameters.values() if isinstance(value, dict))):
            if own.get("rope_type") in LENGTH_BOUND:  # a key cannot move from one prompt to another
                raise UserError(
                    f"{name} has {own['rope_type']} RoPE scaling, whose frequencies depend on the prompt's length, so "
                    "keys cannot move between prompts: set rope_type to default, linear, yarn or llama3"
                )
        angles = [
            partial(_tables, module, kind, _working(model.dtype), model.device)
            for module in modules
            for kind in _kinds(module, getattr(config, "layer_types", None) or ())
        ]
        return cls(name, _distinct(angles) if model.device.type != "meta" else angles[:1], model.dtype, reach)

    def rotated(self, kv: KV, start: int) -> KV:
        """The segment with its first token at position `start`."""
        if kv.rotated_at == start:
            return kv
        out = KV(memory.empty_like(kv.keys), memory.empty_like(kv.values), start)
        self.write(kv, start, out)
        return out

    def unrotated(self, kv: KV) -> KV:
        """The segment without its rotation."""
        if kv.rotated_at is None:
            return kv
        at = kv.rotated_at
        return KV(self._turned_back(kv.keys, self.keys, at), self._turned_back(kv.values, self.values, at))

    def write(self, kv: KV, start: int, out: KV) -> None:
        """Rotate a segment to `start` into `out`, which may be a part of a larger one."""
        if kv.rotated_at == start:
            out.keys.copy_(kv.keys)
            out.values.copy_(kv.values)
            return
        kv = self.unrotated(kv)
        for x, layers, to in ((kv.keys, self.keys, out.keys), (kv.values, self.values, out.values)):
            for own in layers:
                self._turn(x[own.span], own.rotation, start, to[own.span])

    def tables(self, table: int, start: int, length: int) -> Tables:
        """Cosines and sines (T, P) of positions `start` to `start + length`."""
        known = self._tables[table][0].shape[0]
        if start + length > known:  # grow to at least twice the size, so that it happens rarely
            self._tables[table] = self._angles[table](max(start + length, min(2 * known, self._reach)))
        cos, sin = self._tables[table]
        return cos[start : start + length], sin[start : start + length]

    def _turned_back(self, x: torch.Tensor, layers: Sequence[Layers], at: int) -> torch.Tensor:
        if all(own.rotation is None for own in layers):
            return x
        out = memory.empty_like(x)
        for own in layers:
            self._turn(x[own.span], own.rotation, at, out[own.span], back=True)
        return out

    def _turn(
        self, x: torch.Tensor, rotation: Rotation | None, at: int, out: torch.Tensor, *, back: bool = False
    ) -> None:
        if rotation is None:
            out.copy_(x)
            return
        cos, sin = self.tables(rotation.table, at, x.shape[-2])
        if back:
            # The inverse has -sin and divides by cos^2 + sin^2, which is not 1: YaRN multiplies both by a temperature s
            # (hence s^2), and a cosine rounded to float32 is off by 1e-8. So it undoes exactly what was done.
            scale = cos.square() + sin.square()
            cos, sin = cos / scale, -sin / scale
        # bfloat16 keys are rotated in float32 and cast once; float32 and float64 need no copy.
        if out.dtype is self.dtype and x.dtype is self.dtype:
            rotation.turn(x, cos, sin, out)
        else:
            wide = memory.empty(x.shape, self.dtype, x.device)
            rotation.turn(x.to(self.dtype), cos, sin, wide)
            out.copy_(wide)

    # -- finding how the layers rotate --------------------------------------------------------------------------------

    def find(self, here: KV, there: KV) -> None:
        """Take each layer's rotation from the same tokens at two places; UserError where none explains both."""
        self.keys = self._found(here.keys, there.keys, here.rotated_at or 0, there.rotated_at or 0, "keys")
        self.values = self._found(here.values, there.values, here.rotated_at or 0, there.rotated_at or 0, "values")

    def _found(self, here: torch.Tensor, there: torch.Tensor, a: int, b: int, what: str) -> tuple[Layers, ...]:
        whole = slice(0, here.shape[0])
        candidates = [None, *self._candidates(here.shape[-1])]
        errors = []
        for rotation in candidates:
            # |here - moved| / |here| by layer, both un-rotated.
            one, other = (
                self._turned_back(x.to(self.dtype), [Layers(whole, rotation)], at) for x, at in ((here, a), (there, b))
            )
            errors.append((one - other).flatten(1).norm(dim=1) / one.flatten(1).norm(dim=1))
        least, best = torch.stack(errors).min(0)
        for layer, error in enumerate(least.tolist()):
            if not error < self._limit:  # not `>=`, so that nan is refused too
                raise UserError(
                    f"{self._name} does not rotate the {what} of layer {layer} by any rule that is known here (moving "
                    f"them leaves an error of {error:.1%}), so its caches cannot be shared: use a model like Llama, "
                    "Qwen or Mistral"
                )
        found = [candidates[i] for i in best.tolist()]
        # Layers r r r - r r r -: spans 0..2, 3, 4..6, 7.
        spans = [list(group) for _, group in itertools.groupby(range(len(found)), key=lambda layer: found[layer])]
        return tuple(Layers(slice(span[0], span[-1] + 1), found[span[0]]) for span in spans)

    def _candidates(self, dim: int) -> Iterator[Rotation]:
        for table, (cos, _) in enumerate(self._tables):
            pairs = cos.shape[1]
            places = dict.fromkeys((0, dim - 2 * pairs)) if 2 * pairs <= dim else ()
            for first, neighbours, backwards in itertools.product(places, (False, True), (False, True)):
                yield Rotation(table, pairs, first, neighbours, backwards)


def _working(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _kinds(module: torch.nn.Module, layer_types: Sequence[str]) -> tuple[str | None, ...]:
    """The kinds of layers for which a rotary module has angles of their own; (None,) where all have the same."""
    if "layer_type" not in inspect.signature(type(module).forward).parameters:
        return (None,)
    known = getattr(module, "rope_type", None)  # by kind; of fewer than the model has where some do not rotate
    return tuple(kind for kind in dict.fromkeys(layer_types) if not isinstance(known, dict) or kind in known)


def _distinct(angles: Sequence[Callable[[int], Tables]]) -> list[Callable[[int], Tables]]:
    """Those that differ: some models have a rotary module in each layer."""
    seen: list[torch.Tensor] = []
    found = []
    for one in angles:
        cos = one(64)[0]
        if not any(torch.equal(cos, other) for other in seen):
            seen.append(cos)
            found.append(one)
    return found


@torch.no_grad()
def _tables(module: torch.nn.Module, kind: str | None, dtype: torch.dtype, device: torch.device, length: int) -> Tables:
    """A rotary module's cosines and sines, each pair's once, whatever form it gives them in."""
    positions = torch.arange(length, device=device)[None]
    found = module(torch.empty(0, dtype=dtype, device=device), positions, **({"layer_type": kind} if kind else {}))
    if isinstance(found, torch.Tensor) and found.is_complex():  # DeepSeek V2
        found = found.real, found.imag
    if not isinstance(found, tuple) or len(found) != 2 or found[0].shape[:2] != positions.shape:
        raise UserError(
            f"{type(module).__name__} gives something else than cosines and sines of each position, so keys cannot be "
            "moved by it: use a model like Llama, Qwen or Mistral"
        )
    # Tables made in inference mode could not be used outside of it later.
    with torch.inference_mode(False):
        cos, sin = (x[0].to(dtype, copy=True) for x in found)
    if device.type == "meta":
        return cos, sin
    if not cos[0].any():  # GPT-J gives the sines first: those of position 0 are 0
        cos, sin = sin, cos
    # Angles a b c come as a b c a b c (Llama), a a b b c c (Cohere), or once (DeepSeek V2): one row tells.
    half, row = cos.shape[1] // 2, cos[1]
    if torch.equal(row[:half], row[half:]):
        return cos[:, :half].contiguous(), sin[:, :half].contiguous()
    if torch.equal(row[0::2], row[1::2]):
        return cos[:, 0::2].contiguous(), sin[:, 0::2].contiguous()
    return cos, sin

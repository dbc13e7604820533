"""Rotating keys by the model's own rotary embeddings: any variant whose frequencies do not depend on the prompt.

The cosines and sines come from the model's rotary module, so theta, linear, YaRN and llama3 scaling need no code here.
`R_p k = k * cos(p) + rotate_half(k) * sin(p)`; YaRN multiplies both by a temperature s, and a cosine rounded to float32
is off by 1e-8, so the inverse divides by `cos^2 + sin^2`: it undoes exactly what was done, in any precision.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from anchorctx.attention.rope import rotary_modules
from anchorctx.errors import UserError
from anchorctx.kvcomm.cache import KV

PROMPT_DEPENDENT = ("dynamic", "longrope")
"""Scalings whose frequencies change with the prompt's length: a key cannot move from one prompt to another."""


class Rope:
    """The rotation of one model's keys."""

    def __init__(self, module: torch.nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        self._module, self._device = module, device
        self.dtype = torch.float64 if dtype is torch.float64 else torch.float32
        """In which keys are rotated; they are cast once, afterwards."""
        self._tables = self._compute(1024)

    @classmethod
    def of(cls, model: PreTrainedModel) -> Rope:
        """UserError, by name, for a model whose keys cannot be moved."""
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
        if kind in PROMPT_DEPENDENT:
            raise UserError(
                f"{name} has {kind} RoPE scaling, whose frequencies depend on the prompt's length, so keys cannot move "
                "between prompts: set rope_type to default, linear, yarn or llama3"
            )
        return cls(modules[0], model.dtype, model.device)

    def tables(self, start: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines (T, R) of positions `start` to `start + length`; R <= D are the rotated dimensions."""
        if start + length > self._tables[0].shape[0]:
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
        with torch.inference_mode(False):
            return cos[0].to(self.dtype, copy=True), sin[0].to(self.dtype, copy=True)


def _rotate_into(keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor) -> None:
    """`k * cos + rotate_half(k) * sin` without temporaries; dimensions beyond R are copied."""
    width = cos.shape[-1]
    half = width // 2
    rotated = keys[..., :width]
    torch.mul(rotated, cos, out=out[..., :width])
    out[..., :half].addcmul_(rotated[..., half:], sin[..., :half], value=-1)
    out[..., half:width].addcmul_(rotated[..., :half], sin[..., half:])
    if width < keys.shape[-1]:
        out[..., width:] = keys[..., width:]

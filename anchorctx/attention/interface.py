"""`attend` as an attention implementation of transformers: `attn_implementation="anchor"`, no file patched.

A model's forward hands keyword arguments through to the attention function, so `model(ids, position_ids=...,
layouts=layouts)` reaches `attend`. A call without `layouts` raises: a mask must never vanish silently.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from anchorctx.attention.registry import BACKENDS, attend
from anchorctx.errors import UserError
from anchorctx.layout import PackedLayout


def register() -> None:
    """Add `anchor` (the best backend here) and one name a backend to transformers' attention implementations.

    Idempotent. Load or configure a model with `attn_implementation="anchor"` afterwards.
    """
    # The mask function makes none: transformers would build (B, 1, T, T) where it finds no such function.
    for backend in ("auto", *BACKENDS):
        name = implementation(backend)
        AttentionInterface.register(name, partial(_anchor_forward, backend=backend))
        AttentionMaskInterface.register(name, _no_mask)


def implementation(backend: str = "auto") -> str:
    """The `attn_implementation` name under which `backend` is registered.

    transformers takes any name with `flash` in it for a kernel of its own, to be found on the hub.
    """
    return "anchor" if backend == "auto" else f"anchor_{backend.replace('flash_attn', 'fa')}"


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The layout is the mask."""
    return None


def _anchor_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    backend: str,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    layouts: tuple[PackedLayout, ...] | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention contract: (B, H, T, D) in, ((B, T, Hq, D), no weights) out."""
    name = type(module).__name__
    if layouts is None:
        raise UserError(f"{name} with attn_implementation='anchor' needs the forward argument layouts=, one a row")
    if attention_mask is not None:
        raise UserError(f"{name} got an attention mask beside layouts: the layout is the mask, pass only layouts")
    if dropout and module.training:
        raise UserError(f"{name} asks for attention dropout {dropout}, which no backend computes: set it to 0")
    if s_aux is not None:
        raise UserError(f"{name} uses attention sinks, which no backend computes: use a model without them")
    # Rotation in float32 (see attention.rope) leaves q and k in float32: cast once, here.
    query, key = query.to(value.dtype), key.to(value.dtype)
    out = attend(query, key, value, layouts, scale=scaling, window=sliding_window, softcap=softcap, backend=backend)
    return out.transpose(1, 2), None

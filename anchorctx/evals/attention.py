"""How an evaluated model attends: transformers' own attention, or ours, with queries and keys cast once.

Ours take a layout, which `generate` and lm-eval do not give. A prompt that is read at once and unpadded is one
document, so its layout is known; every other call (a generated token, a padded batch) goes to torch's `sdpa`, which
computes the same. Rotation in float32 leaves q and k in float32; plain `sdpa` would refuse them beside bfloat16 values.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from anchorctx.attention import BACKENDS
from anchorctx.attention.config import RopeDtype
from anchorctx.attention.interface import implementation, register
from anchorctx.errors import UserError
from anchorctx.layout import PackedLayout

OURS = [implementation(), *map(implementation, BACKENDS)]
"""Names of our attention: `anchor`, `anchor_cpu` and so on."""


def attention_name(attention: str, rope_dtype: RopeDtype) -> str | None:
    """transformers' `attn_implementation` for an evaluation, registered; None leaves the choice to transformers.

    Args:
        attention: `auto`, one of `OURS`, or a name of transformers' own.
        rope_dtype: in which dtype the model rotates.
    """
    if attention in OURS:
        return _registered(attention)
    if rope_dtype is RopeDtype.bfloat16:
        return None if attention == "auto" else attention
    if attention not in ("auto", "sdpa"):
        raise UserError(
            f"attention={attention} with rope_dtype=float32 would meet queries in float32 beside other values: "
            f"use attention=sdpa or one of {', '.join(OURS)}"
        )
    return _registered("sdpa")


def _registered(attention: str) -> str:
    register()
    name = f"evaluated_{attention}"
    AttentionInterface.register(name, partial(_attend, attention))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    return name


def _attend(
    attention: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """transformers' attention contract: (B, H, T, D) in, ((B, T, Hq, D), no weights) out."""
    functions: dict[str, Callable[..., Any]] = ALL_ATTENTION_FUNCTIONS  # type: ignore[assignment]
    query, key = query.to(value.dtype), key.to(value.dtype)
    rows, _, length, _ = query.shape
    prompt = attention_mask is None and length == key.shape[2] and length > 1
    if attention not in OURS or not prompt:
        return functions["sdpa"](module, query, key, value, attention_mask, **kwargs)
    layouts = (PackedLayout((0, length)),) * rows
    return functions[attention](module, query, key, value, None, layouts=layouts, **kwargs)

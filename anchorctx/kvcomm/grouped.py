"""Attention for a few tokens over a long cache that does not copy it: `attn_implementation="grouped_sdpa"`.

transformers' own `sdpa` repeats each key head for its group of query heads as soon as there is a mask and more than one
query: for 20 recomputed tokens behind 3,500 cached ones that copy takes longer than the attention. Here the queries of
a group are laid one behind the other instead, so that one call serves the key head as it is. The numbers are the same.
A model has to be loaded with this implementation or set to it; nothing is patched.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

NAME = "grouped_sdpa"


def register() -> str:
    """Make the implementation known to transformers; idempotent. Returns its name."""
    AttentionInterface.register(NAME, grouped_attention)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    return NAME


def copies(model: PreTrainedModel) -> int:
    """How often a model with this implementation needs the rows of a mask; 1 with any other implementation."""
    config = model.config.get_text_config()
    if config._attn_implementation != NAME:
        return 1
    return config.num_attention_heads // (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' contract: query (B, Hq, S, D), key and value (B, H, T, D), mask (B or 1, 1, S, T).

    The mask's rows may be there Hq/H times already (`copies`), which saves every layer from making them.
    """
    batch, heads, length, _ = query.shape
    groups = heads // key.shape[1]
    options: dict[str, Any] = {"scale": scaling, "dropout_p": dropout if module.training else 0.0}
    if attention_mask is None and length > 1:
        out = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=groups > 1, **options)
        return out.transpose(1, 2).contiguous(), None
    # Hq = 4, H = 2, S = 3: heads 0 and 1 share key head 0, and their queries become its rows 0-2 and 3-5. So the mask's
    # three rows are needed twice.
    packed = query.reshape(batch, key.shape[1], groups * length, query.shape[-1])
    mask = attention_mask
    if mask is not None and mask.shape[2] == length:
        mask = mask.repeat(1, 1, groups, 1)
    out = scaled_dot_product_attention(packed, key, value, attn_mask=mask, **options)
    return out.reshape(batch, heads, length, value.shape[-1]).transpose(1, 2).contiguous(), None

"""Random queries and keys, rotated by transformers' own code: what the arithmetic does without any weights.

With 128 dimensions and theta 5e5 (Llama 3's), 1,024 tokens and shifts from 16 to 130,000, the mean absolute change of
the scaled scores is 2.5e-6 to 6.0e-4 in float32, 2.3e-3 to 2.7e-3 rotated in float32 and cast once, and 3.6e-3 to
4.2e-3 in bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from anchorctx.evals.evaluators.precision.config import Arithmetic


def random_score_changes(
    arithmetic: Arithmetic,
    shifts: Sequence[int],
    *,
    head_dim: int = 128,
    theta: float = 5e5,
    length: int = 1024,
    heads: int = 4,
    seed: int = 0,
) -> list[torch.Tensor]:
    """For every shift, (heads * length,) each query's mean absolute change of its scaled scores over all keys."""
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, 1, heads, length, head_dim, generator=generator)  # normal: scores of unit size
    rotary = LlamaRotaryEmbedding(
        LlamaConfig(head_dim=head_dim, rope_parameters={"rope_type": "default", "rope_theta": theta})
    )
    unshifted = _scores(rotary, query, key, 0, arithmetic)
    return [
        (_scores(rotary, query, key, shift, arithmetic) - unshifted).abs().double().mean(-1).flatten()
        for shift in shifts
    ]


def _scores(
    rotary: LlamaRotaryEmbedding, query: torch.Tensor, key: torch.Tensor, shift: int, arithmetic: Arithmetic
) -> torch.Tensor:
    """(1, H, T, D) twice -> (1, H, T, T) scaled scores, summed in float32."""
    dtype = torch.float32 if arithmetic is Arithmetic.float32 else torch.bfloat16
    rotation = torch.bfloat16 if arithmetic is Arithmetic.bfloat16 else torch.float32
    positions = torch.arange(query.shape[2])[None] + shift
    cos, sin = rotary(torch.empty(0, dtype=rotation), positions)
    query, key = (x.to(dtype).float() for x in apply_rotary_pos_emb(query.to(dtype), key.to(dtype), cos, sin))
    return query @ key.mT * query.shape[-1] ** -0.5

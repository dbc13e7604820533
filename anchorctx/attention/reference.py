"""The specification: dense masked attention in plain torch, any dtype and device. Quadratic in memory.

Optimised backends are tested against this file and never import it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from anchorctx.attention.kernels.base import Score
from anchorctx.layout import PackedLayout


def reference_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layouts: Sequence[PackedLayout],
    score: Score,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """query (B, Hq, T, D), key (B, Hkv, T, D), value (B, Hkv, T, Dv), one layout a row -> (B, Hq, T, Dv).

    Differentiable. `sinks` (Hq,) are the logits of one more column, which has no value.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.mT * score.scale  # (B, Hq, T, T)
    if score.softcap is not None:
        scores = torch.tanh(scores / score.softcap) * score.softcap
    allowed = torch.stack([layout.allowed(query.device, score.window) for layout in layouts])
    # No row is empty: every token sees itself, so that the softmax never divides by zero.
    scores = scores.masked_fill(~allowed[:, None], float("-inf"))
    if sinks is not None:
        column = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    return torch.softmax(scores, dim=-1)[..., : key.shape[2]] @ value

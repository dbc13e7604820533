"""How attention changes when only positions change: an attention function that compares copies of a row.

A forward pass gets one row several times, each copy with its own position ids. In every layer the probe compares the
attention of each copy with that of the first. With `isolate` it then hands the *first* copy's output to all copies, so
that all enter the next layer with the same hidden states and each layer's change comes from its rotation alone; without
`isolate` every copy goes its own way. Isolated copies have equal states, so that most models can compute them once: the
row goes in once with the positions of all copies, and only rotated queries and keys are as many as those. It works
through transformers' attention interface and so needs no knowledge of how a model rotates.

Shapes: B copies, H query heads, N measured queries, T tokens, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from anchorctx.attention import attend
from anchorctx.layout import PackedLayout

NAME = "precision_probe"
"""Its `attn_implementation`."""


@dataclass(frozen=True, slots=True)
class Change:
    """One copy's attention against the first copy's, in one layer; float64 on the CPU, means over heads."""

    attention: torch.Tensor
    """(N,) share of each query's attention that moved to other keys, 0..1 (half the sum of absolute differences)."""
    hidden: torch.Tensor
    """(N,) the same when the first token is hidden: its score left out of the softmax."""
    first: torch.Tensor
    """(N,) absolute change of the attention to the first token of the query's document."""
    first_attention: torch.Tensor
    """(N,) attention of the first copy to that token."""
    score: torch.Tensor
    """(N,) mean absolute change of the scaled scores over the keys that the query sees."""
    first_score: torch.Tensor
    """(N,) absolute change of the first token's scaled score."""
    keys: torch.Tensor
    """(T,) absolute change of the attention to each key, mean over queries; halves add up to `attention`."""


@dataclass(slots=True)
class Probe:
    """What to compare in a forward pass, and what was found."""

    layout: PackedLayout
    """Who sees whom; the same for every copy."""
    queries: torch.Tensor
    """(N,) int64: the tokens whose attention is compared."""
    layers: frozenset[int]
    """Layers that are compared."""
    isolate: bool
    """See the module."""
    copies: int = 1
    """Sets of positions in the forward pass."""
    found: dict[int, list[Change]] = field(default_factory=dict)
    """Each layer's changes of copies 1, 2, ..."""


def register() -> None:
    """Add the probe to transformers' attention implementations; a model's forward then needs `probe=`."""
    AttentionInterface.register(NAME, _probe_attention)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)  # the probe's layout is the mask


def _probe_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    probe: Probe,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention contract: (B, H, T, D) in, ((B, T, H, D), no weights) out."""
    query, key = query.to(value.dtype), key.to(value.dtype)  # a float32 rotation is cast once, as in training
    # One row of shared states in a layer that does not rotate (Cohere 2 has such): the same for every copy.
    query, key = (x.expand(max(len(x), probe.copies), -1, -1, -1) for x in (query, key))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    if layer in probe.layers:
        allowed = allowed_rows(probe.layout, probe.queries.cpu().numpy(), sliding_window)
        first = first_keys(probe.layout)[probe.queries.cpu().numpy()]
        # (H, N, T) for each copy: scores of the N measured queries, never of all T.
        scores = [_scores(q, k, probe.queries, scale, softcap) for q, k in zip(query, key, strict=True)]
        seen, starts = torch.from_numpy(allowed).to(query.device), torch.from_numpy(first).to(query.device)
        probe.found.setdefault(layer, []).extend(compare(scores[0], other, seen, starts) for other in scores[1:])
    # Isolated, the first copy's output serves all: only that one needs computing.
    copies = 1 if probe.isolate else len(query)
    out = _output(query[:copies], key[:copies], value[:copies], probe.layout, scale, sliding_window, softcap)
    return out.expand(len(value), -1, -1, -1).transpose(1, 2), None  # values have as many rows as the hidden states


def compare(before: torch.Tensor, after: torch.Tensor, allowed: torch.Tensor, first: torch.Tensor) -> Change:
    """The change between two sets of scaled scores.

    Args:
        before, after: (H, N, T) scaled scores, float32.
        allowed: (N, T) bool, the keys that each query sees.
        first: (N,) int64, the first key of each query's document.
    """
    # With exact arithmetic a constant shift would leave after == before: RoPE's scores depend on distances alone.
    at = first[None, :, None].expand(len(before), -1, 1)
    moved = _softmax(after, allowed) - (old := _softmax(before, allowed))  # (H, N, T), sums to 0 over T
    rest = allowed.scatter(1, first[:, None], False)
    hidden = _softmax(after, rest) - _softmax(before, rest)
    score = (after - before).abs().double() * allowed
    tensors = {
        "attention": moved.abs().sum(-1).mean(0) / 2,
        "hidden": hidden.abs().sum(-1).mean(0) / 2,
        "first": moved.gather(2, at)[..., 0].abs().mean(0),
        "first_attention": old.gather(2, at)[..., 0].mean(0),
        "score": score.sum(-1).mean(0) / allowed.sum(-1),
        "first_score": score.gather(2, at)[..., 0].mean(0),
        "keys": moved.abs().mean((0, 1)),
    }
    return Change(**{name: tensor.cpu() for name, tensor in tensors.items()})


def allowed_rows(layout: PackedLayout, queries: np.ndarray, window: int | None = None) -> np.ndarray:
    """(N, T) bool: the rows `queries` of `layout.allowed_array(window)`, without its T x T."""
    docs, index, ranks = layout.token_docs(), np.arange(layout.length), layout.token_ranks()
    # (N, 1) against (1, T): causal, and the same document (within the window) or the anchor.
    same = docs[queries][:, None] == docs[None, :]
    if window is not None:
        same &= ranks[queries][:, None] - ranks[None, :] < window
    return (index[None, :] <= queries[:, None]) & (same | (index < layout.anchor_len)[None, :])


def first_keys(layout: PackedLayout) -> np.ndarray:
    """(T,) int64: the first token that each token's document has in the row; the row's own where there is an anchor."""
    if layout.anchor_len:
        return np.zeros(layout.length, dtype=np.int64)
    # docs [5, 5, 2, 2, 2]: unique finds 2 and 5, first at [2, 0]; inverse is [1, 1, 0, 0, 0], so [0, 0, 2, 2, 2].
    docs = layout.token_docs()
    _, first, inverse = np.unique(docs, return_index=True, return_inverse=True)
    return first[inverse.reshape(-1)]


def _scores(
    query: torch.Tensor, key: torch.Tensor, queries: torch.Tensor, scale: float, softcap: float | None
) -> torch.Tensor:
    """(Hq, T, D) and (Hkv, T, D) -> (Hq, N, T) scaled scores, summed in float32 as flash kernels do."""
    # Hq = 4 query heads on Hkv = 2 key heads: key heads 0 0 1 1.
    key = key.repeat_interleave(len(query) // len(key), 0)
    scores = query[:, queries].float() @ key.float().mT * scale
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap


def _softmax(scores: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """Float64, so that what is measured is the scores' change and not the softmax's rounding; 0 where none is seen."""
    return torch.softmax(scores.double().masked_fill(~allowed, float("-inf")), dim=-1).nan_to_num(0.0)


def _output(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: PackedLayout,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Attention of all tokens. On a CPU bfloat16 is computed in float32 and rounded once, at the end: quicker there.

    Kernels also round the probabilities before they meet the values; how differs between them, and the comparison
    of scores does not see it.
    """
    # bfloat16 inputs are exact in float32, so that only the inside of the attention is wider.
    inside = torch.float32 if query.device.type == "cpu" else query.dtype
    query, key, value = query.to(inside), key.to(inside), (given := value).to(inside)
    layouts = (layout,) * len(query)
    return attend(query, key, value, layouts, scale=scale, window=window, softcap=softcap).to(given.dtype)

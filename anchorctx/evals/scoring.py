"""How a model predicts chosen tokens: losses and guesses, without a row's logits ever existing in full.

At 64K tokens and a vocabulary of 128,256 these would take 33.6 GB in float32; here the head sees one tile of the chosen
tokens at a time. Rows are padded on the right, which causal attention needs no mask for: no token sees what follows it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from anchorctx.evals.base import Subject
from anchorctx.layout import PackedLayout
from anchorctx.models.loss import LogitTransform, call_as, default_tile


@dataclass(frozen=True, slots=True)
class Scores:
    """The N chosen tokens of a batch, row by row."""

    loss: np.ndarray
    """(N,) float64: minus the log-likelihood of each, in nats."""
    hit: np.ndarray
    """(N,) bool: is it the most likely of the whole vocabulary?"""


@torch.no_grad()  # not inference mode: parameters gathered under it could not be trained afterwards
def score(subject: Subject, ids: np.ndarray, chosen: np.ndarray) -> Scores:
    """Predict the `chosen` (B, T) bool among the tokens `ids` (B, T), each from those before it in its row.

    A row's first token has nothing before it and cannot be chosen.
    """
    assert not chosen[:, 0].any(), "a row's first token cannot be predicted"
    tokens, wanted = (torch.from_numpy(x).to(subject.model.device) for x in (ids, chosen))
    if subject.root is None:
        found = _score(subject.model, tokens, wanted, live=False)
    else:  # as one call of the module that the engine knows: its hooks gather the parameters
        found = call_as(subject.root, lambda _, *x: _score(subject.model, *x, live=True), tokens, wanted)
    loss, hit = found
    return Scores(loss.double().cpu().numpy(), hit.cpu().numpy())


def pad(rows: list[np.ndarray], value: int = 0) -> np.ndarray:
    """Rows of different lengths as one array (B, longest), filled up on the right with `value`."""
    padded = np.full((len(rows), max(map(len, rows))), value, dtype=rows[0].dtype)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return padded


def _score(
    model: PreTrainedModel, ids: torch.Tensor, chosen: torch.Tensor, *, live: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(N,) losses in float32 (float64 for a float64 model), and (N,) hits."""
    body = model.base_model(input_ids=ids, use_cache=False, **_layouts(model, ids))
    hidden = body.last_hidden_state[:, :-1]  # (B, T-1, D), of several devices' last where the model is spread
    chosen = chosen[:, 1:].to(hidden.device)
    hidden, targets = hidden[chosen], ids[:, 1:].to(hidden.device)[chosen]  # (N, D), (N,)
    head = model.get_output_embeddings()
    assert isinstance(head, torch.nn.Linear)
    transform = LogitTransform.of(model.config)
    tile = default_tile(model.config.get_text_config().vocab_size, hidden.shape[1])
    if not live:
        return _tiles(head, hidden, targets, transform, tile)
    # One call of the head, whatever the number of tiles: processes that gather it together must call it alike.
    return call_as(head, lambda m, h, t: _tiles(_linear(m), h, t, transform, tile), hidden, targets)


def _tiles(
    head: Any, hidden: torch.Tensor, targets: torch.Tensor, transform: LogitTransform, tile: int
) -> tuple[torch.Tensor, torch.Tensor]:
    losses, hits = [hidden.new_zeros(0, dtype=torch.float32)], [targets.new_zeros(0, dtype=torch.bool)]
    for start in range(0, len(targets), tile):
        logits = head(hidden[start : start + tile])
        logits = transform(logits.to(torch.promote_types(logits.dtype, torch.float32)))  # (L, V)
        y = targets[start : start + tile].to(logits.device)
        losses.append(F.cross_entropy(logits, y, reduction="none").to(hidden.device))
        hits.append((logits.argmax(-1) == y).to(hidden.device))
    return torch.cat(losses), torch.cat(hits)


def _linear(head: Any) -> Any:
    return lambda x: F.linear(x, head.weight, head.bias)


def _layouts(model: PreTrainedModel, ids: torch.Tensor) -> dict[str, Any]:
    """What a model that attends by layouts needs: each row is one document."""
    if not str(model.config._attn_implementation).startswith("anchor"):
        return {}
    rows, length = ids.shape
    positions = torch.arange(length, device=ids.device).expand(rows, -1)
    return {"layouts": (PackedLayout((0, length)),) * rows, "position_ids": positions}

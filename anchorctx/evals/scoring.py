"""How a model predicts chosen tokens: losses and hits, without a row's logits ever existing in full.

At 64K tokens and a vocabulary of 128,256 these would take 33.6 GB in float32; here the head sees one tile of the chosen
tokens at a time. Rows are padded on the right, which causal attention needs no mask for: no token sees what follows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from anchorctx.data.sources.facts import FactTokens
from anchorctx.evals.base import Subject
from anchorctx.layout import PackedLayout
from anchorctx.models.cross_entropy import default_tile
from anchorctx.models.head import LogitTransform, Parts, Tail, linear_transform
from anchorctx.models.loss import call_as


@dataclass(frozen=True, slots=True)
class Scores:
    """The N chosen tokens of a batch, row by row."""

    loss: np.ndarray
    """(N,) float64: minus the log-likelihood of each, in nats."""
    hit: np.ndarray
    """(N,) bool: is it the most likely of the whole vocabulary?"""


@dataclass(frozen=True, slots=True)
class Piece:
    """One input: a document, or a window of it, behind the anchor."""

    document: int
    """Its number."""
    ids: np.ndarray
    """(T,) int64, the anchor first."""
    first: int
    """Index of the first token that is scored here: 2 at a document's start, whose first token is given, as in
    training; later windows score what no earlier one did."""


# Not inference mode: parameters that ZeRO-3 gathers under it could not be trained afterwards.
@torch.no_grad()
def score(subject: Subject, ids: np.ndarray, chosen: np.ndarray) -> Scores:
    """Predict the `chosen` (B, T) bool among the tokens `ids` (B, T), each from those before it in its row.

    A row's first token has nothing before it and cannot be chosen.
    """
    assert not chosen[:, 0].any(), "a row's first token cannot be predicted"
    tokens, wanted = (torch.from_numpy(x).to(subject.model.device) for x in (ids, chosen))
    if subject.root is None:
        found = _score(subject.model, tokens, wanted, live=False)
    else:  # one call of the module that the engine knows, so that its hooks gather the parameters
        found = call_as(subject.root, lambda _, *x: _score(subject.model, *x, live=True), tokens, wanted)
    loss, hit = found
    return Scores(loss.double().cpu().numpy(), hit.cpu().numpy())


def score_pieces(
    subject: Subject, pieces: Sequence[Piece], facts: FactTokens | None = None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each piece, the positions (n,) of its scored tokens and their losses (n,) in nats; `facts` are left out."""
    ids = pad([piece.ids for piece in pieces])
    chosen = np.zeros(ids.shape, dtype=bool)
    for row, piece in zip(chosen, pieces, strict=True):
        row[piece.first : len(piece.ids)] = True
        if facts is not None:
            row[: len(piece.ids)] &= ~facts.is_fact(piece.ids)
    loss = score(subject, ids, chosen).loss
    # Losses come row by row: rows with 3, 0 and 2 scored tokens end at [3, 3, 5].
    ends = np.cumsum(chosen.sum(1))
    return [(np.flatnonzero(row), loss[end - row.sum() : end]) for row, end in zip(chosen, ends.tolist(), strict=True)]


def batches(pieces: Sequence[Piece], batch_tokens: int) -> list[list[Piece]]:
    """Pieces of similar lengths together, so that little is padded."""
    groups: list[list[Piece]] = []
    # Lengths 3 4 4 9 at 12 tokens a batch: [3 4 4] (padded to 4 each, 12 in all) and [9].
    for piece in sorted(pieces, key=lambda piece: len(piece.ids)):
        if not groups or len(piece.ids) * (len(groups[-1]) + 1) > batch_tokens:
            groups.append([])
        groups[-1].append(piece)
    return groups


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
    base, head = Parts.of(model)
    body = base(input_ids=ids, use_cache=False, **_layouts(model, ids))
    hidden = body.last_hidden_state[:, :-1]  # (B, T-1, D), of several devices' last where the model is spread
    # Token t is predicted from the hidden state at t - 1.
    chosen = chosen[:, 1:].to(hidden.device)
    hidden, targets = hidden[chosen], ids[:, 1:].to(hidden.device)[chosen]  # (N, D), (N,)
    transform = linear_transform(model)
    # Tokens of a tile, so that its logits take a bounded part of the memory.
    tile = default_tile(model.config.get_text_config().vocab_size, hidden.shape[1])
    if transform is None:  # more than a linear head: the model's own code
        return _tiles(Tail(model), hidden, targets, LogitTransform(), tile)
    if not live:
        return _tiles(head, hidden, targets, transform, tile)
    # One call of the head, whatever the number of tiles: processes that gather it together must call it alike.
    return call_as(head, lambda m, h, t: _tiles(_linear(m), h, t, transform, tile), hidden, targets)


def _tiles(
    head: Any, hidden: torch.Tensor, targets: torch.Tensor, transform: LogitTransform, tile: int
) -> tuple[torch.Tensor, torch.Tensor]:
    losses, hits = [hidden.new_zeros(0, dtype=torch.float32)], [targets.new_zeros(0, dtype=torch.bool)]
    for start in range(0, len(targets), tile):  # L tokens and their logits (L, V) at a time
        logits = head(hidden[start : start + tile])
        logits = transform(logits.to(torch.promote_types(logits.dtype, torch.float32)))
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

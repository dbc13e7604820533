"""Training written out plainly: each document by itself behind the anchor, through transformers' eager attention."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch


class Document(NamedTuple):
    """One document, without the anchor."""

    ids: list[int]
    labels: list[int]
    """Unshifted, -100 where not trained; of the first, what the anchor predicts."""
    start: int | list[int]
    """Position of its first token, or of each."""
    weights: list[float] | None = None
    """Of the loss of each token; None is 1."""


def loss_of(model: Any, document: Document, anchor: int) -> torch.Tensor:
    """The sum of its tokens' losses."""
    start = document.start
    positions = torch.tensor([[0, *(range(start, start + len(document.ids)) if isinstance(start, int) else start)]])
    ids = torch.tensor([[anchor, *document.ids]])
    logits = model(input_ids=ids, position_ids=positions, attention_mask=torch.ones_like(ids), use_cache=False).logits
    losses = torch.nn.functional.cross_entropy(logits[0, :-1], torch.tensor(document.labels), reduction="none")
    return (losses if document.weights is None else losses * torch.tensor(document.weights)).sum()


def curve(
    model: Any, steps: Iterable[list[Document]], learning_rate: float, anchor: int = 1, clip: float | None = None
) -> list[float]:
    """The loss of each step under AdamW without decay: the mean over the trained tokens of its documents."""
    model.set_attn_implementation("eager")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], learning_rate, weight_decay=0.0)
    losses = []
    for documents in steps:
        trained = sum(label != -100 for document in documents for label in document.labels)
        loss = torch.stack([loss_of(model, document, anchor) for document in documents]).sum() / trained
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def placed(texts: list[tuple[list[int], list[int]]], row_length: int, anchor: int = 1) -> list[Document]:
    """(ids, labels) of documents as a row has them: one behind the other from 1 on, at 1 again where one does not fit.

    A document that begins with the anchor has it taken off.
    """
    documents, at = [], 1
    for ids, labels in texts:
        skip = int(ids[0] == anchor)
        ids, labels = ids[skip:], labels[skip:]
        at = 1 if at + len(ids) > row_length else at
        documents.append(Document(ids, labels, at))
        at += len(ids)
    return documents


def split(batch: dict[str, torch.Tensor]) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of the documents of a flattened batch whose positions restart."""
    starts = [i for i, position in enumerate(batch["position_ids"][0].tolist()) if position == 0]
    spans = list(zip(starts, [*starts[1:], batch["input_ids"].shape[1]], strict=True))
    return [tuple(batch[name][0, a:b].tolist() for name in ("input_ids", "labels")) for a, b in spans]  # type: ignore[misc]


class Recorder:
    """A collator that keeps what another one returned."""

    def __init__(self, collator: Any) -> None:
        self.collator, self.batches = collator, []

    def __call__(self, examples: Any) -> dict[str, torch.Tensor]:
        batch = self.collator(examples)
        self.batches.append({name: value.clone() for name, value in batch.items() if isinstance(value, torch.Tensor)})
        return batch

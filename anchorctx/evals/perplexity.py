"""Held-out perplexity: each document scored alone behind the anchor, by the model's own plain attention.

That is what a packed row trains (a document sees the anchor and itself), without any packing: so packing cannot flatter
the number, and any Hugging Face folder can be scored, trained with anchors or not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from anchorctx.data.facts import FactTokens
from anchorctx.evals.base import Progress, anchor_token
from anchorctx.results import Result


@dataclass(kw_only=True, slots=True)
class PerplexityConfig:
    """Which documents are scored, and how."""

    documents: int = 200
    """Held-out documents scored, in the corpus' order, every so many of them; 0 scores all."""
    max_length: int = 4096
    """Longest input in tokens, the anchor included; longer documents are cut there, and the rest is not scored."""
    batch_tokens: int = 8192
    """Tokens a forward pass, padding included; a document longer than this is a batch of its own."""
    exclude_facts: bool = True
    """Leave planted keys and values out of the average, so that the number is about text."""


class Perplexity:
    """See the module; `texts` are the held-out documents."""

    name = "perplexity"

    def __init__(self, config: PerplexityConfig, texts: Sequence[str]) -> None:
        self.config, self._texts = config, _every(texts, config.documents)

    def longest(self) -> int:
        """See Evaluator."""
        return self.config.max_length

    def run(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, progress: Progress) -> Iterator[Result]:
        """One row, `perplexity`: exp of the mean loss over all scored tokens, with a 95 % interval over documents."""
        anchor = anchor_token(tokenizer)
        encoded = tokenizer(list(self._texts), add_special_tokens=False)["input_ids"]
        documents = [np.array([anchor, *ids[: self.config.max_length - 1]]) for ids in encoded]  # type: ignore[index]
        facts = FactTokens.of(tokenizer) if self.config.exclude_facts and _knows_facts(tokenizer) else None
        total = sum(len(ids) for ids in documents)
        losses, counts = [], []
        for batch in _batches(documents, self.config.batch_tokens):
            for loss, count in score_documents(model, batch, facts):
                losses.append(loss)
                counts.append(count)
            progress(sum(len(ids) for ids in batch), total)
        yield _result(np.array(losses), np.array(counts))


@torch.inference_mode()
def score_documents(
    model: PreTrainedModel, documents: Sequence[np.ndarray], facts: FactTokens | None = None
) -> list[tuple[float, int]]:
    """Sum of token losses (nats) and number of scored tokens of each document, whose first token is the anchor.

    As in training, the first token after the anchor is given, not predicted. `facts` are left out where given.
    """
    lengths = [len(ids) for ids in documents]
    ids = torch.zeros(len(documents), max(lengths), dtype=torch.long)  # (B, T), padded on the right
    scored = torch.zeros_like(ids, dtype=torch.bool)
    for i, document in enumerate(documents):
        ids[i, : len(document)] = torch.from_numpy(document)
        scored[i, 2 : len(document)] = True
        if facts is not None:
            scored[i, : len(document)] &= torch.from_numpy(~facts.is_fact(document))
    ids, scored = ids.to(model.device), scored.to(model.device)
    mask = None
    if len(set(lengths)) > 1:
        mask = torch.arange(ids.shape[1], device=ids.device) < torch.tensor(lengths, device=ids.device)[:, None]
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()  # (B, T-1, V)
    losses = torch.nn.functional.cross_entropy(logits.mT, ids[:, 1:], reduction="none").double()
    sums = (losses * scored[:, 1:]).sum(1).tolist()
    return list(zip(sums, scored.sum(1).tolist(), strict=True))


def _batches(documents: Sequence[np.ndarray], batch_tokens: int) -> Iterator[list[np.ndarray]]:
    """Documents of similar lengths together, so that little is padded."""
    batch: list[np.ndarray] = []
    for document in sorted(documents, key=len):
        if batch and len(document) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(document)
    if batch:
        yield batch


def _result(losses: np.ndarray, counts: np.ndarray) -> Result:
    """Ratio estimate over documents: mean loss a token, and its spread by how documents differ from it."""
    tokens = int(counts.sum())
    if not tokens:
        return Result(metric="perplexity", value=math.nan, unit="1", n=0)
    mean = losses.sum() / tokens
    low = high = None
    if len(losses) > 1:
        spread = np.square(losses - mean * counts).sum() * len(losses) / (len(losses) - 1)
        half = 1.959964 * math.sqrt(spread) / tokens
        low, high = math.exp(mean - half), math.exp(mean + half)
    context = {"documents": len(losses), "tokens": tokens, "loss_nats": float(mean)}
    return Result(
        metric="perplexity", value=math.exp(mean), unit="1", n=len(losses), low=low, high=high, context=context
    )


def _every(texts: Sequence[str], count: int) -> list[str]:
    """`count` texts spread evenly over all."""
    if not count or count >= len(texts):
        return list(texts)
    return [texts[i * len(texts) // count] for i in range(count)]


def _knows_facts(tokenizer: PreTrainedTokenizerBase) -> bool:
    return "<key_00>" in tokenizer.get_vocab()

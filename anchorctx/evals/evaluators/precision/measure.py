"""One row of text under several sets of positions, in one arm: what changes in each layer, and at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from anchorctx.evals.evaluators.precision.bfloat16 import arithmetic_context
from anchorctx.evals.evaluators.precision.probe import Change, Probe
from anchorctx.evals.evaluators.precision.texts import TextRow
from anchorctx.layout import PackedLayout


@dataclass(frozen=True, slots=True)
class Instrument:
    """A loaded arm and how it is measured."""

    model: PreTrainedModel
    layers: frozenset[int]
    rows_per_pass: int
    """Copies of a row in one forward pass, beside the first."""
    emulated: bool
    """Compute bfloat16 products in float32 and round."""

    def changes(
        self, row: TextRow, layout: PackedLayout, positions: Sequence[torch.Tensor], queries: torch.Tensor
    ) -> list[dict[int, Change]]:
        """Each layer's change from `positions[0]` to every other; (T,) int64 position ids, all layers isolated."""
        found: list[dict[int, Change]] = []
        for chunk in self._chunks(positions):
            probe = Probe(layout, queries, self.layers, isolate=True)
            self._forward(row, chunk, probe, queries[:1])
            found += [{layer: probe.found[layer][i] for layer in probe.found} for i in range(len(chunk) - 1)]
        return found

    def log_probabilities(
        self, row: TextRow, layout: PackedLayout, positions: Sequence[torch.Tensor], queries: torch.Tensor
    ) -> list[torch.Tensor]:
        """For every set of positions, (N,) float64 log-probability (nats) of the token after each query."""
        answers = torch.from_numpy(row.ids)[queries + 1]
        found: list[torch.Tensor] = []
        for chunk in self._chunks(positions):
            probe = Probe(layout, queries, frozenset(), isolate=False)
            logits = self._forward(row, chunk, probe, queries)  # (B, N, V)
            logp = torch.log_softmax(logits.double(), -1).cpu()
            scored = logp.gather(2, answers[None, :, None].expand(len(chunk), -1, 1))[..., 0]
            found += scored[1 if found else 0 :]
        return found

    def _chunks(self, positions: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
        """The first set of positions with a few of the others at a time."""
        others = positions[1:]
        return [[positions[0], *others[i : i + self.rows_per_pass]] for i in range(0, len(others), self.rows_per_pass)]

    @torch.inference_mode()
    def _forward(
        self, row: TextRow, positions: Sequence[torch.Tensor], probe: Probe, kept: torch.Tensor
    ) -> torch.Tensor:
        device = self.model.device
        with arithmetic_context(self.emulated):
            return self.model(
                input_ids=torch.from_numpy(row.ids).expand(len(positions), -1).to(device),
                position_ids=torch.stack(list(positions)).to(device),
                use_cache=False,
                logits_to_keep=kept.to(device),
                probe=probe,
            ).logits


def late_queries(length: int, count: int) -> torch.Tensor:
    """(N,) `count` tokens spread evenly over the second half of a row, the last left out: it has no next token."""
    first, last = length // 2, length - 2
    return torch.linspace(first, last, min(count, last - first + 1)).long()


def document_queries(layout: PackedLayout, count: int, before: int = 8) -> torch.Tensor:
    """(N,) `count` tokens spread evenly over all that have so many tokens of their document before them.

    Nor are they their document's last, so that the next token is their own document's.
    """
    ranks, docs = layout.token_ranks(), layout.token_docs()
    good = torch.from_numpy((ranks[:-1] >= before) & (docs[:-1] == docs[1:])).nonzero()[:, 0]
    return good[torch.linspace(0, len(good) - 1, min(count, len(good))).long()]

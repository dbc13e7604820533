"""A mixture of experts' load-balancing loss over a step: the same whatever its pieces and processes.

The loss (`anchorctx.models.router`) multiplies, for each expert, the fraction of tokens that went to it with its mean
probability. Taken piece by piece, as trainers take it by micro-batch, it would ask each piece, often one document, to
use all experts alike, which costs quality (arXiv 2501.11873), and would change with the number of pieces. Here both are
means over the tokens of the whole step, the anchor's copies and padding left out.

The fractions must be known before the first piece's backward pass. They are those of the step before: of as many
tokens, one update older. Finding this step's own would take a forward pass more, a quarter or a third of the step. Only
the first step, and the first after a checkpoint without them, does that. Nothing is lost by it: fractions of other
tokens than the probabilities' make the product's gradient unbiased. For a tiny Mixtral with random weights its cosine
with the gradient over 131,072 tokens was 0.54, 0.86 and 0.98 with 512, 4,096 and 32,768 tokens a step, and with the
step's own fractions 0.47, 0.84 and 0.98. What is logged is the loss of the step's own tokens in both factors.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from anchorctx.layout import PackedLayout
from anchorctx.models.router import Routed, RouterLoss
from anchorctx.parallel import dist


class Balance:
    """The load-balancing loss of one step after the other, in this process."""

    def __init__(self, rule: RouterLoss, device: torch.device, fractions: list[float] | None = None) -> None:
        """`fractions` are those of the step before, where a checkpoint has them."""
        self.rule, self.fractions, self._device = rule, fractions, device

    def begin(self, layouts: Iterable[PackedLayout]) -> None:
        """Begin a step of these whole rows, which all processes share."""
        # documents of one token are in no piece (`data.pieces`)
        lengths = (document.length for layout in layouts for document in layout.documents())
        self._tokens = max(sum(length for length in lengths if length > 1), 1)
        self._done: list[Routed] = []

    def measure(self, pieces: Iterable[Routed]) -> None:
        """Take the fractions from this step, given what routers did with each of this process's pieces."""
        self.fractions = self._total(list(pieces))[0].tolist()

    def loss(self, piece: Routed) -> torch.Tensor:
        """The piece's part of the step's loss, to be differentiated; these parts add up."""
        assert self.fractions is not None, "measure() comes first"
        self._done.append(piece._replace(probabilities=piece.probabilities.detach()))
        fractions = torch.tensor(self.fractions, dtype=torch.float64).to(piece.probabilities)
        return self.rule.value(fractions, piece.probabilities, self._tokens * piece.layers)

    def end(self) -> float:
        """The loss of the step's tokens, of all processes; the next step takes their fractions."""
        fractions, probabilities, pairs = self._total(self._done)
        self.fractions = fractions.tolist()
        return self.rule.value(fractions, probabilities, pairs).item()

    def _total(self, pieces: list[Routed]) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Over all processes: the f_e and the summed probabilities, (E,) float64, and the (token, layer) pairs."""
        counts = torch.stack([piece.counts for piece in pieces]).sum(0)
        probabilities = torch.stack([piece.probabilities.double() for piece in pieces]).sum(0)
        totals = dist.total([*counts.tolist(), *probabilities.tolist()], self._device)
        pairs, experts = self._tokens * pieces[0].layers, len(counts)
        found = torch.tensor(totals, dtype=torch.float64)
        return found[:experts] / pairs, found[experts:], pairs

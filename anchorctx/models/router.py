"""Losses that a model's own forward adds to the next token's: the load balance of a mixture of experts, or none.

Over some tokens and all layers with a router (Switch Transformer, arXiv 2101.03961, equations 4 to 6), with E experts,

    loss = coefficient * E * sum over experts e of  f_e * P_e
    f_e    how often e was among a token's top k, over the number of (token, layer) pairs; it has no gradient
    P_e    the mean over these pairs of the router's probability of e

A product of two means is no sum over pieces of a step. But once the f_e of a step are given, what is differentiated is
linear in the sums of probabilities, and those add up: `anchorctx.train.balance`.

Shapes: N tokens, E experts.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from anchorctx.errors import UserError
from anchorctx.models.head import PROBED, LowRankHead, Parts, Tail, close, generator, linear_transform
from anchorctx.models.load import reason

logger = logging.getLogger(__name__)

LAYERS = 2
"""Layers whose router logits a measurement makes up."""


class Routed(NamedTuple):
    """What routers did with some tokens, summed over these and over layers."""

    counts: torch.Tensor
    """(E,) float64: how often each expert was among a token's top k."""
    probabilities: torch.Tensor
    """(E,) the routers' probabilities; differentiable."""
    layers: int
    """Layers with a router."""


@dataclass(frozen=True, slots=True)
class RouterLoss:
    """A model's load-balancing loss."""

    coefficient: float
    """Its weight beside the mean loss of a token (`router_aux_loss_coef`)."""
    top_k: int
    """Experts of a token."""

    def sums(self, router_logits: Sequence[torch.Tensor], counted: torch.Tensor) -> Routed:
        """Over the layers' router logits (N, E), of the tokens that `counted`, (N,) bool, names."""
        parts = [self._layer(logits.flatten(0, -2), counted[:, None]) for logits in router_logits]
        counts, probabilities = (torch.stack(each).sum(0) for each in zip(*parts, strict=True))
        return Routed(counts, probabilities, len(parts))

    def value(self, fractions: torch.Tensor, probabilities: torch.Tensor, pairs: float) -> torch.Tensor:
        """The loss, given the f_e (E,), from probabilities (E,) summed over any part of so many pairs."""
        return self.coefficient * len(fractions) * (fractions * probabilities).sum() / pairs

    def _layer(self, logits: torch.Tensor, counted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        probabilities = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        chosen = torch.zeros_like(probabilities, dtype=torch.bool)
        chosen.scatter_(1, probabilities.detach().topk(self.top_k, dim=-1).indices, True)
        return (chosen & counted).sum(0, dtype=torch.float64), (probabilities * counted).sum(0)


def added_loss(model: PreTrainedModel) -> RouterLoss | None:
    """The load-balancing loss that the model's forward adds to the next token's, None where it adds nothing.

    Measured, on made-up hidden states and router logits.

    Raises:
        UserError: it adds anything else, or does not run without its base model.
    """
    name, plain = type(model).__name__, linear_transform(model) is not None
    if not plain and any(parameter.is_meta for parameter in Parts.of(model).head.parameters()):
        return None  # a plan has no weights to measure with
    routed = getattr(model.config, "output_router_logits", False)
    experts = getattr(model, "num_experts", None) or 8
    layers = torch.randn(LAYERS, PROBED, experts, generator=generator()).unbind() if routed else ()
    token, own = _losses(model, layers, plain)
    rule = _balance(model, layers, own.get("aux_loss")) if routed else None
    if rule is not None and close(token + rule.coefficient * own.aux_loss, own.loss):
        return rule
    if own.loss is None or close(token, own.loss):
        if routed:
            logger.info("%s adds no loss of its routers, though its configuration has output_router_logits set", name)
        return None
    remedy = "set output_router_logits=false in its configuration" if routed else "use another model"
    raise UserError(
        f"{name}'s own loss is {own.loss:.4g} where the next token's is {token:.4g}, by a rule that is not known here: "
        f"{remedy}"
    )


def _balance(model: PreTrainedModel, layers: Sequence[torch.Tensor], own: torch.Tensor | None) -> RouterLoss | None:
    """The rule by the model's own settings, None where it does not give the `own` loss (before its coefficient)."""
    top_k = getattr(model, "num_experts_per_tok", None)
    coefficient = getattr(model, "router_aux_loss_coef", getattr(model, "aux_loss_coef", None))
    if not top_k or coefficient is None or not isinstance(own, torch.Tensor):
        return None
    counts, probabilities, _ = RouterLoss(1.0, top_k).sums(layers, torch.ones(PROBED, dtype=torch.bool))
    pairs = len(layers) * PROBED
    ours = RouterLoss(1.0, top_k).value(counts / pairs, probabilities, pairs)
    return RouterLoss(coefficient, top_k) if close(ours, own) else None


@torch.no_grad()
def _losses(model: PreTrainedModel, routed: Sequence[torch.Tensor], plain: bool) -> tuple[torch.Tensor, Any]:
    """The next token's mean loss from the model's own logits, and what its forward returned with it."""
    head: Any = Parts.of(model).head
    tail = Tail(model, LowRankHead(head) if plain else None)
    try:
        logits = tail(hidden := tail.probe())
        labels = torch.randint(logits.shape[-1], (PROBED,), generator=generator()).to(logits.device)
        return F.cross_entropy(logits[:-1].float(), labels[1:]), tail.run(hidden, labels, routed)
    except Exception as error:
        raise UserError(
            f"{type(model).__name__} does not run from its last hidden states on ({reason(error)}), so that its loss "
            "is not known: use another model"
        ) from error

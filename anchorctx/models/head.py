"""What a model does between its last hidden states and its logits: read from its configuration, checked on its forward.

Nearly all decoders apply one linear head and then perhaps scale or cap its output. That much the fast losses compute
themselves, but no name of a field is trusted with it: the model's own forward is run once on made-up hidden states of a
few tokens, its base model left out (`Tail`), and must give the same logits. Where it does not (a head that scales each
token by a learned factor, a projection before it, padding cut off), logits come from that forward itself.

Shapes: N tokens, D hidden size, V vocabulary, E experts.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel

from anchorctx.errors import UserError

PROBED = 6
"""Tokens of a measurement."""
RANK = 4
"""Rank of the head that stands for the model's in it: any matrix of its shape would do, and this one is small."""
TOLERANCE = 1e-5
"""Of the largest value: forwards that go through float32 agree to 1e-7 at most, wrong rules differ by 1e-2 and more."""


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """What a model does to its linear head's output: `softcap * tanh(scale * x / softcap)`, or `scale * x`."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def readings(cls, config: PretrainedConfig) -> list[LogitTransform]:
        """What a configuration may mean, the likeliest first; `linear_transform` finds out which it is."""
        names = ("logit_scale", "logits_scaling", "logits_mup_width_multiplier")
        scale, divisor, width = (getattr(config, name, None) or 1.0 for name in names)
        softcap = getattr(config, "final_logit_softcapping", None)
        # Granite divides by `logits_scaling`, HyperCLOVA X multiplies by it
        return [cls(scale / divisor / width, softcap), cls(scale * divisor, softcap)]

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """The transformed logits; may change `logits` in place."""
        if self.scale != 1.0:
            logits = logits.mul_(self.scale)
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def backward(self, grad: torch.Tensor, transformed: torch.Tensor) -> torch.Tensor:
        """Gradient with respect to the head's output, given that for the `transformed` logits; in place on both."""
        if self.softcap is not None:
            # d/dx (c tanh(x / c)) = 1 - tanh(x / c)^2, and transformed / c is that tanh
            grad = grad.mul_(transformed.div_(self.softcap).square_().neg_().add_(1.0))
        return grad if self.scale == 1.0 else grad.mul_(self.scale)


def linear_transform(model: PreTrainedModel) -> LogitTransform | None:
    """How the logits follow from the linear head's output, or None where they do not follow from it alone.

    No weight of the model is used: they may be elsewhere (ZeRO 3), or not there at all (a plan).

    Raises:
        UserError: as `Parts.of`.
    """
    head = Parts.of(model).head
    if type(head) is not nn.Linear:
        return None
    tail = Tail(model, stand_in := LowRankHead(head))
    hidden = tail.probe()
    try:
        with torch.no_grad():
            own = tail(hidden)
    except Exception:  # beside the head there is a module, of another dtype or with weights that are not here
        return None
    readings = LogitTransform.readings(model.config.get_text_config())
    return next((reading for reading in readings if close(reading(stand_in(hidden)), own)), None)


class Parts(NamedTuple):
    """What a causal language model is made of."""

    base: nn.Module
    """From ids to the last hidden states."""
    head: nn.Module
    """Its output embeddings: the last module before the logits."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> Parts:
        """Those of `model`; UserError where it has not both."""
        # Llama 4's text model names as its base model a module that only the multimodal wrapper has
        base = model.base_model if model.base_model is not model else getattr(model, "model", None)
        head = model.get_output_embeddings()
        if base is None or head is None:
            raise UserError(f"{type(model).__name__} is not made of a base model and a head: use another model")
        return cls(base, head)


class Tail:
    """A model's own forward from its last hidden states on: its base model is left out."""

    def __init__(self, model: PreTrainedModel, head: nn.Module | None = None) -> None:
        """`head` takes the place of the model's output embeddings; None keeps them. UserError: as `Parts.of`."""
        base, own = Parts.of(model)
        # The copy shares every module but these two; the model itself stays as it is.
        self.head, self._base, self._model = head or own, _Given(), copy.copy(model)
        instead = {id(own): self.head, id(base): self._base}
        modules = {name: instead.get(id(module), module) for name, module in model._modules.items()}
        self._model.__dict__["_modules"] = modules

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """(N, V) logits of (N, D) hidden states."""
        return self.run(hidden).logits[0]

    def run(self, hidden: torch.Tensor, labels: torch.Tensor | None = None, routed: Sequence[torch.Tensor] = ()) -> Any:
        """What the forward returns for hidden states (N, D): `logits` (1, N, V), and with `labels` (N,) its `loss`.

        `routed` are router logits (N, E), one a layer that has a router; without them no loss of theirs is added.
        """
        self._base.answer = _Answer(last_hidden_state=hidden[None], router_logits=tuple(routed) or None)
        more: dict[str, Any] = {} if labels is None else {"labels": labels[None]}
        if hasattr(self._model.config, "output_router_logits"):
            more["output_router_logits"] = bool(routed)
        # the class's own: what wraps or hooks the model's forward is not for this
        return type(self._model).forward(self._model, inputs_embeds=hidden[None], **more)

    def probe(self) -> torch.Tensor:
        """(N, D) made-up hidden states that the head takes."""
        like = next(self.head.parameters())
        width = getattr(self.head, "in_features", None) or self._model.config.get_text_config().hidden_size
        return torch.randn(PROBED, width, generator=generator()).to(like)


class LowRankHead(nn.Module):
    """A linear map of a head's shape, in float64, whose matrix is never made."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = head.in_features, head.out_features
        source, dtype = generator(), torch.float64
        # logits of a few units: enough to see a cap of 30, and not all beyond one of 3
        down = torch.randn(RANK, head.in_features, generator=source, dtype=dtype) / head.in_features**0.5
        weight = torch.randn(head.out_features, RANK, generator=source, dtype=dtype)
        self.down, self.weight = (nn.Parameter(each, requires_grad=False) for each in (down, weight))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., V) of hidden states (..., D)."""
        return F.linear(F.linear(hidden.to(self.weight), self.down), self.weight)


def close(ours: torch.Tensor, own: torch.Tensor) -> bool:
    """Are two results of one computation the same but for rounding?"""
    return ours.shape == own.shape and bool((ours - own).abs().max() <= TOLERANCE * own.abs().max().clamp(min=1.0))


def generator() -> torch.Generator:
    """The one source of a measurement's numbers: every process measures the same."""
    return torch.Generator().manual_seed(0)


class _Given(nn.Module):
    """Stands for a base model: its answer is given beforehand."""

    answer: _Answer

    @property
    def decoder(self) -> _Given:
        """OPT's forward asks a part of its base model."""
        return self

    def forward(self, *args: Any, **kwargs: Any) -> _Answer:
        return self.answer


class _Answer(SimpleNamespace):
    """A base model's output, of any class: what was not given is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def __getitem__(self, index: int) -> Any:
        return (self.last_hidden_state, None)[index]

"""Exemplars: stored samples of a placeholder with the offsets that its readers observed, and how far apart they are.

What the KVCOMM paper calls an anchor is an exemplar here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from anchorctx.kvcomm.agents import Ids
from anchorctx.kvcomm.arms.names import Feature
from anchorctx.kvcomm.cache import KV

Reader = tuple[str, int]
"""An agent, and which of its placeholders of that name."""


@dataclass(frozen=True, slots=True)
class Offset:
    """What one reader saw: observed minus base KV, un-rotated, layers 1 and above."""

    text: KV
    glue: KV | None = None
    """Of the fixed text right behind the placeholder; None where there is none or it is recomputed."""
    glue_ids: Ids = ()

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.text.nbytes + (0 if self.glue is None else self.glue.nbytes)


@dataclass(frozen=True, slots=True)
class Content:
    """A placeholder's content, to be compared with exemplars."""

    ids: Ids
    embed: Callable[[Ids], torch.Tensor]
    """Input embeddings (T, E)."""
    base: Callable[[], KV]
    """Its base KV, computed when it is asked for."""

    def parts(self, feature: Feature) -> list[torch.Tensor]:
        """h in pieces (..., T, D), one a layer where h are keys or values."""
        if feature is Feature.embeddings:
            return [self.embed(self.ids)]
        kv = self.base()
        return [*kv.values, *(kv.keys if feature is Feature.keys_values else ())]


@dataclass(slots=True)
class Exemplar:
    """One request's content of one placeholder."""

    request: int
    """The first to bring these tokens."""
    ids: Ids
    """No two exemplars of a placeholder have the same."""
    offsets: dict[Reader, Offset] = field(default_factory=dict)
    base: KV | None = None
    """Un-rotated; only where distances need it."""
    uses: int = 0
    """Contents that it was the nearest exemplar of."""

    @property
    def nbytes(self) -> int:
        """Bytes of ids, offsets and base KV."""
        kept = 0 if self.base is None else self.base.nbytes
        return 8 * len(self.ids) + kept + sum(offset.nbytes for offset in self.offsets.values())

    def beginning(self, length: int, embed: Callable[[Ids], torch.Tensor]) -> Content:
        """Its first tokens, as a content."""

        def base() -> KV:
            assert self.base is not None
            return self.base.cut(0, length)

        return Content(self.ids[:length], embed, base)


@dataclass(frozen=True, slots=True)
class Match:
    """Exemplars that a content is approximated from, and their weights, which sum to 1."""

    offsets: tuple[Offset, ...]
    weights: tuple[float, ...]
    by_token: torch.Tensor | None = None
    """(offsets, T) float32, where each token has weights of its own; the glue behind has those above."""


def distance(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> torch.Tensor:
    """Frobenius norm over all pieces."""
    return torch.linalg.vector_norm(torch.stack([torch.dist(x.float(), y.float()) for x, y in zip(a, b, strict=True)]))


def token_distances(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> torch.Tensor:
    """(T,): each token's mean absolute difference over all pieces (..., T, D)."""
    sums = [(x.float() - y.float()).abs().sum(-1).reshape(-1, x.shape[-2]).sum(0) for x, y in zip(a, b, strict=True)]
    return torch.stack(sums).sum(0) / sum(x.numel() // x.shape[-2] for x in a)

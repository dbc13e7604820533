"""The pool of exemplars: stored samples of a placeholder with the offsets that its readers observed.

What the KVCOMM paper calls an anchor is an exemplar here. A content is *shared* (approximated) when exemplars at least
as long lie near enough to tell which of them it resembles, and *stored* (computed and observed) otherwise (equation 5):

    w = softmax(-|h - h_psi| / temperature),   store if too few exemplars are as long or H(w) > gamma * log |A|

h are the tokens' input embeddings, |.| is the Frobenius norm over the content's tokens, in float32.

The pool keeps less than the paper's: no base KV (only the distance needs the content, and its token ids give that) and
no offsets of layer 0, which are zero in the de-rotated frame. So an exemplar of T tokens takes
8 T + sum over readers of (T + P) * 2 (L - 1) H D * itemsize bytes, P being the glue behind the placeholder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from anchorctx.errors import UserError
from anchorctx.kvcomm.agents import Ids
from anchorctx.kvcomm.cache import KV

Reader = tuple[str, int]
"""An agent, and which of its placeholders of that name."""
NEGLIGIBLE = 2.0**-26
"""Weights below this do not change a float32 sum near 1: their offsets are not read."""


@dataclass(frozen=True, slots=True)
class PoolConfig:
    """When contents are shared, and how much is kept; gamma, V and window are the paper's."""

    gamma: float = 0.3
    """Share below this part of the greatest entropy, 0..1: higher shares more; 1 shares whatever is short enough."""
    temperature: float = 1.0
    """Divides the distances, in units of the embeddings' norm."""
    min_exemplars: int = 4
    """Store while fewer are as long. The rule alone (1) shares with a single exemplar, whose entropy is 0: every later
    content of its length would be approximated from the first request's, and the pool would never grow."""
    max_exemplars: int = 20
    """Exemplars a placeholder, at most (V)."""
    window: int = 5
    """On overflow the least used of this many oldest exemplars goes."""
    max_bytes: int | None = None
    """Bytes of all exemplars together, at most; None is no limit."""

    def __post_init__(self) -> None:
        limits = {"gamma": 0.0, "temperature": 1e-9, "min_exemplars": 1, "max_exemplars": 1, "window": 1}
        for name, least in limits.items():
            if not getattr(self, name) >= least:  # nan is not
                raise UserError(f"kvcomm {name}={getattr(self, name)} must be at least {least:g}")
        if self.max_bytes is not None and self.max_bytes < 1:
            raise UserError(f"kvcomm max_bytes={self.max_bytes} must be at least 1; null is no limit")
        if self.min_exemplars > self.max_exemplars:
            raise UserError(
                f"kvcomm min_exemplars={self.min_exemplars} must not exceed max_exemplars={self.max_exemplars}: "
                "nothing would ever be shared"
            )


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


@dataclass(slots=True)
class Exemplar:
    """One request's content of one placeholder."""

    request: int
    ids: torch.Tensor
    """(T,) int64."""
    offsets: dict[Reader, Offset] = field(default_factory=dict)
    uses: int = 0
    """Contents that it was the nearest exemplar of."""

    @property
    def nbytes(self) -> int:
        """Bytes of ids and offsets."""
        return self.ids.nbytes + sum(offset.nbytes for offset in self.offsets.values())


@dataclass(frozen=True, slots=True)
class Match:
    """Exemplars that a content is approximated from, and their weights, which sum to 1."""

    offsets: tuple[Offset, ...]
    weights: tuple[float, ...]


class Pool:
    """Exemplars by placeholder, oldest first."""

    def __init__(self, config: PoolConfig) -> None:
        self.config = config
        self._held: dict[str, list[Exemplar]] = {}

    def __iter__(self) -> Iterator[Exemplar]:
        return (exemplar for held in self._held.values() for exemplar in held)

    def held(self, name: str) -> tuple[Exemplar, ...]:
        """A placeholder's exemplars, oldest first."""
        return tuple(self._held.get(name, ()))

    @property
    def nbytes(self) -> int:
        """Bytes of all exemplars."""
        return sum(exemplar.nbytes for exemplar in self)

    def match(
        self,
        name: str,
        reader: Reader,
        ids: torch.Tensor,
        embed: Callable[[torch.Tensor], torch.Tensor],
        known: dict[tuple[str, int], float] | None = None,
        count: bool = True,
    ) -> Match | None:
        """Equation 5 for a content `ids` (T,): what to share it from, or None to compute and store it.

        `known` has this request's distances, by placeholder and the exemplar's request; it is added to. Every reader of
        a content asks for the same ones, and measuring them takes as long as a pass over the offsets. `count` the use
        of the nearest exemplar, by which the pool chooses what to drop.
        """
        # A (T,) content is compared with the first T tokens of exemplars that are at least as long.
        length = len(ids)
        found = [e for e in self._held.get(name, ()) if reader in e.offsets and len(e.ids) >= length]
        if len(found) < self.config.min_exemplars:
            return None
        known = {} if known is None else known
        new = [e for e in found if (name, e.request) not in known]
        if new:
            content = embed(ids)
            measured = torch.stack([_distance(content, embed(e.ids[:length])) for e in new]).tolist()
            known.update(zip(((name, e.request) for e in new), measured, strict=True))
        distances = torch.tensor([known[name, e.request] for e in found])
        weights = torch.softmax(-distances / self.config.temperature, 0).tolist()
        # Exemplars at equal distances have weights 1/n and entropy log n: nothing tells which the content resembles, so
        # it is computed. One near exemplar among far ones gives an entropy near 0.
        entropy = -sum(w * math.log(w) for w in weights if w)
        if self.config.gamma < 1 and entropy > self.config.gamma * math.log(len(found)):
            return None
        found[weights.index(max(weights))].uses += count
        # What is dropped is below rounding, and saves a pass over offsets of a whole content.
        kept = [(e.offsets[reader], w) for e, w in zip(found, weights, strict=True) if w > NEGLIGIBLE]
        return Match(tuple(offset for offset, _ in kept), tuple(w for _, w in kept))

    def add(self, name: str, request: int, ids: torch.Tensor, reader: Reader, offset: Offset) -> None:
        """Keep what a reader observed of a request's content; makes room first, so that the bound always holds."""
        held = self._held.setdefault(name, [])
        exemplar = next((e for e in held if e.request == request), None)
        if exemplar is not None and not torch.equal(exemplar.ids, ids):  # said again, in other words
            held.remove(exemplar)
            exemplar = None
        if exemplar is None:  # else another reader of a content that is stored already
            while len(held) >= self.config.max_exemplars:
                held.remove(_victim(held[: self.config.window]))
            exemplar = Exemplar(request, ids)
            held.append(exemplar)
        exemplar.offsets[reader] = offset
        self._fit(exemplar)

    def _fit(self, latest: Exemplar) -> None:
        """Drop exemplars of any placeholder until the bytes fit; the latest goes last."""
        limit = self.config.max_bytes
        while limit is not None and self.nbytes > limit:
            # By request over all placeholders; the one just added goes only when nothing else is left.
            oldest = sorted((e for e in self if e is not latest), key=lambda e: e.request)[: self.config.window]
            victim = _victim(oldest) if oldest else latest
            for held in self._held.values():
                held[:] = [e for e in held if e is not victim]


def _victim(candidates: list[Exemplar]) -> Exemplar:
    return min(candidates, key=lambda e: e.uses)  # the oldest of the least used: min keeps the first


def _distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.dist(a.float(), b.float())

"""The pool of exemplars (`exemplars.py`): stored samples of a placeholder with the offsets that its readers observed.

A content is *shared* (approximated) when exemplars at least as long lie near enough to tell which of them it resembles,
and *stored* (computed and observed) otherwise (equation 5):

    w = softmax(-|h - h_psi| / temperature),   store if too few exemplars are as long or H(w) > gamma * log |A|

h are the tokens' input embeddings, |.| is the Frobenius norm over the content's tokens, in float32. The paper's public
code takes h from base keys and values and weighs token by token: `h`, `weights_h` and `reduce` choose. A content that
an exemplar begins with is at distance 0 and is shared whatever the rule says: k equal exemplars would have the entropy
log k, and equal requests would be stored again and again.

The pool keeps less than the paper's: no base KV where h are embeddings (the token ids give them) and no offsets of
layer 0, which are zero in the de-rotated frame. So an exemplar of T tokens takes
8 T + sum over readers of (T + P) * 2 (L - 1) H D * itemsize bytes, P being the glue behind the placeholder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from anchorctx.errors import UserError
from anchorctx.kvcomm.agents import Ids
from anchorctx.kvcomm.arms.exemplars import Content, Exemplar, Match, Offset, Reader, distance, token_distances
from anchorctx.kvcomm.arms.names import POOL, SETTINGS, Feature, Reduce, Setting
from anchorctx.kvcomm.cache import KV

NEGLIGIBLE = 2.0**-26
"""Weights below this do not change a float32 sum near 1: their offsets are not read."""


@dataclass(frozen=True, slots=True)
class PoolConfig:
    """When contents are shared, and how much is kept; gamma, V and window are the paper's."""

    gamma: float = 0.3
    """Share below this part of the greatest entropy, 0..1: higher shares more; 1 shares whatever is short enough."""
    temperature: float = 1.0
    """Divides the distances, in units of h."""
    min_exemplars: int = 4
    """Store while fewer are as long. The rule alone (1) shares with a single exemplar, whose entropy is 0: every later
    content of its length would be approximated from the first request's, and the pool would never grow."""
    max_exemplars: int = 20
    """Exemplars a placeholder, at most (V)."""
    window: int = 5
    """On overflow the least used of this many oldest exemplars goes."""
    max_bytes: int | None = None
    """Bytes of all exemplars together, at most; None is no limit."""
    h: Feature = Feature.embeddings
    """What the rule compares, and the weights too unless `weights_h` says otherwise."""
    weights_h: Feature | None = None
    """What the weights compare; None is h."""
    reduce: Reduce = Reduce.frobenius
    """How the weights are made of it; the rule always takes the norm over the whole content."""

    @property
    def weighs_by(self) -> Feature:
        """What the weights compare."""
        return self.weights_h or self.h

    @property
    def keeps_base(self) -> bool:
        """Whether exemplars need their base KV, which then counts in their bytes."""
        return {self.h, self.weighs_by} != {Feature.embeddings}

    def __post_init__(self) -> None:
        whole = Setting("max_bytes", whole=True, least=1)
        for name, setting in {"gamma": SETTINGS["kvcomm"], **POOL, "max_bytes": whole}.items():
            value = getattr(self, name)
            if value is not None or name not in ("weights_h", "max_bytes"):
                object.__setattr__(self, name, setting.of("kvcomm", value))
        if self.min_exemplars > self.max_exemplars:
            raise UserError(
                f"kvcomm min_exemplars={self.min_exemplars} must not exceed max_exemplars={self.max_exemplars}: "
                "nothing would ever be shared"
            )


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
        content: Content,
        known: dict[tuple[str, int], float] | None = None,
        count: bool = True,
    ) -> Match | None:
        """Equation 5 for a content of T tokens: what to share it from, or None to compute and store it.

        `known` has this request's distances, by placeholder and the exemplar's request; it is added to. Every reader of
        a content asks for the same ones, and measuring them takes as long as a pass over the offsets. `count` the use
        of the nearest exemplar, by which the pool chooses what to drop.
        """
        # A (T,) content is compared with the first T tokens of exemplars that are at least as long.
        length = len(content.ids)
        found = [e for e in self._held.get(name, ()) if reader in e.offsets and len(e.ids) >= length]
        same = [e for e in found if e.ids[:length] == content.ids]
        if same:
            nearest = min(same, key=lambda e: len(e.ids))  # the content itself, where it is there, else one longer
            nearest.uses += count
            return Match((nearest.offsets[reader],), (1.0,))
        if len(found) < self.config.min_exemplars:
            return None
        weights = self._weights(self._distances(name, content, found, {} if known is None else known))
        # Exemplars at equal distances have weights 1/n and entropy log n: nothing tells which the content resembles, so
        # it is computed. One near exemplar among far ones gives an entropy near 0.
        if self.config.gamma < 1 and _entropy(weights) > self.config.gamma * math.log(len(found)):
            return None
        found[int(weights.argmax())].uses += count
        return self._match(content, reader, found, weights)

    def _distances(
        self, name: str, content: Content, found: list[Exemplar], known: dict[tuple[str, int], float]
    ) -> torch.Tensor:
        """(n,) from the whole content to each exemplar, by h."""
        new = [e for e in found if (name, e.request) not in known]
        if new:
            parts, length = content.parts(self.config.h), len(content.ids)
            others = (e.beginning(length, content.embed).parts(self.config.h) for e in new)
            measured = torch.stack([distance(parts, other) for other in others]).tolist()
            known.update(zip(((name, e.request) for e in new), measured, strict=True))
        return torch.tensor([known[name, e.request] for e in found])

    def _match(self, content: Content, reader: Reader, found: list[Exemplar], weights: torch.Tensor) -> Match:
        """The exemplars' offsets with the weights that the configuration asks for, those of no weight left out."""
        config, by_token = self.config, None
        feature, length = config.weighs_by, len(content.ids)
        if feature is not config.h or config.reduce is Reduce.per_token:
            parts = content.parts(feature)
            others = [e.beginning(length, content.embed).parts(feature) for e in found]
            if config.reduce is Reduce.per_token:
                distances = torch.stack([token_distances(parts, other) for other in others]).cpu()  # (n, T)
                weights, by_token = self._weights(distances.mean(1)), self._weights(distances)
            else:
                weights = self._weights(torch.stack([distance(parts, other) for other in others]).cpu())
        # What is dropped is below rounding, and saves a pass over offsets of a whole content.
        most = weights if by_token is None else torch.maximum(weights, by_token.amax(1))
        kept = (most > NEGLIGIBLE).nonzero()[:, 0].tolist()
        offsets = tuple(found[i].offsets[reader] for i in kept)
        return Match(offsets, tuple(weights[kept].tolist()), None if by_token is None else by_token[kept])

    def _weights(self, distances: torch.Tensor) -> torch.Tensor:
        return torch.softmax(-distances / self.config.temperature, 0)

    def add(
        self,
        name: str,
        request: int,
        ids: Ids,
        reader: Reader,
        offset: Offset,
        base: Callable[[], KV] | None = None,
    ) -> None:
        """Keep what a reader observed of a request's content; makes room first, so that the bound always holds."""
        held = self._held.setdefault(name, [])
        # Said again by this request in other words: what was observed of the former goes.
        held[:] = [e for e in held if e.request != request or e.ids == ids]
        exemplar = next((e for e in held if e.ids == ids), None)
        if exemplar is None:  # else another reader, or another request, of a content that is stored already
            while len(held) >= self.config.max_exemplars:
                _drop(held, _victim(held[: self.config.window]))
            kept = base().copy() if base is not None and self.config.keeps_base else None
            exemplar = Exemplar(request, ids, base=kept)
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
                _drop(held, victim)


def _drop(held: list[Exemplar], victim: Exemplar) -> None:
    held[:] = [e for e in held if e is not victim]  # remove() would compare their tensors


def _victim(candidates: list[Exemplar]) -> Exemplar:
    return min(candidates, key=lambda e: e.uses)  # the oldest of the least used: min keeps the first


def _entropy(weights: torch.Tensor) -> float:
    return -sum(w * math.log(w) for w in weights.tolist() if w)

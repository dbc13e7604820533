"""Which documents are packed, and how often: token weights, a repetition cap, length upsampling, exact deduplication.

Each source (or domain) gets its weight's share of all tokens: if it has fewer, its documents are repeated; if it has
more, some are drawn at random. Length upsampling divides a source's tokens between documents of at least `long_from`
tokens and shorter ones, which leaves the shares of the sources as they are (Fu et al., arXiv 2402.10171).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated

import numpy as np
from annotated_types import Ge, Gt

from anchorctx.errors import UserError
from anchorctx.settings import Seed, Share, check_ranges

OTHERS = "*"
"""Key of `long_share` that stands for everything that has no key of its own."""


class MixtureBy(StrEnum):
    """What the weights' names are."""

    source = "source"
    """Names of sources."""
    domain = "domain"
    """Domains of documents, whatever source they are in."""


@dataclass(kw_only=True, slots=True)
class MixtureConfig:
    """How much of what. Without weights every document is taken once."""

    by: MixtureBy = MixtureBy.source
    """What weights and long_share are keyed by, and the account too: source or domain."""
    weights: dict[str, Annotated[float, Gt(0), "remove the source to leave it out"]] = field(default_factory=dict)
    """Share of the tokens by name, in any unit, for each source (or domain); empty takes every document once."""
    tokens: Annotated[int, Ge(1), "use null for all there are"] | None = None
    """Tokens of documents in all; null is as many as max_repeats allows."""
    max_repeats: Annotated[float, Gt(0), "1 repeats nothing"] = 1.0
    """Times that the tokens of a source may be used, at most; 1 repeats nothing."""
    long_from: Annotated[int, Ge(2), "raise it, or use null"] | None = None
    """Tokens from which a document is long; null does not tell long from short."""
    long_share: dict[str, Share] = field(default_factory=dict)
    """Share of its tokens that a source (or domain) takes from long documents, 0 to 1, by name; the name '*' is all
    others. What has no share here keeps its own."""
    deduplicate: bool = False
    """Leave out documents whose token ids are exactly those of an earlier one."""
    seed: Seed = 0
    """Seed of drawing a part of a source."""

    def validate(self) -> None:
        """UserError for values out of range, and for settings that need others."""
        check_ranges(self, "mixture")
        if bool(self.long_share) != (self.long_from is not None):
            raise UserError("mixture.long_from and mixture.long_share belong together: set both, or neither")
        if not self.weights and (self.tokens is not None or self.long_share):
            raise UserError("mixture.tokens and mixture.long_share need mixture.weights: give each source a weight")


@dataclass(frozen=True, slots=True)
class Stratum:
    """Documents that are drawn with the same probability: all of a source, or its long or its short ones."""

    name: str
    """For messages."""
    group: int
    """Source (or domain)."""
    share: float
    """Of all tokens."""
    members: np.ndarray
    """(m,) the documents' numbers."""
    tokens: int
    """All their tokens."""


def duplicates(hashes: np.ndarray) -> np.ndarray:
    """(D,) bool: documents with the same 128-bit hash (D, 2) as an earlier one."""
    # hashes a, b, a, a: sorted they are documents 0, 2, 3, 1, and 2 and 3 equal the one before them
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: the earliest of equals comes first
    ordered = hashes[order]
    result = np.zeros(len(hashes), bool)
    result[order[1:]] = (ordered[1:] == ordered[:-1]).all(axis=1)
    return result


def draw(
    config: MixtureConfig, names: Sequence[str], group: np.ndarray, lengths: np.ndarray, usable: np.ndarray
) -> np.ndarray:
    """(D,) int64: how often each document is taken.

    Args:
        config: with weights.
        names: of the sources (or domains).
        group: (D,) each document's, as an index into `names`.
        lengths: (D,) tokens.
        usable: (D,) bool, false for duplicates.
    """
    strata = _strata(config, names, group, lengths, usable)
    # two sources of 100 and 50 tokens, equal shares, max_repeats 1: 200 would exhaust the first, 100 the second, so
    # total is 100, of which the first gives half of its own
    total = config.tokens or min(config.max_repeats * s.tokens / s.share for s in strata)
    copies = np.zeros(len(lengths), np.int64)
    for number, stratum in enumerate(strata):
        passes = total * stratum.share / stratum.tokens
        if passes > config.max_repeats * (1 + 1e-9):  # equal but for rounding where `total` was computed from it
            raise UserError(
                f"{stratum.name} has {stratum.tokens:,} tokens, but {stratum.share:.1%} of mixture.tokens={total:,} "
                f"needs them {passes:.2f} times, above mixture.max_repeats={config.max_repeats:g}: lower tokens or its "
                "weight, or raise max_repeats"
            )
        # seeded apart, so that a change to one stratum leaves the draw of those before it alone
        rng = np.random.default_rng([config.seed, number])
        copies[stratum.members] = _copies(lengths[stratum.members], total * stratum.share, rng)
    return copies


def _copies(lengths: np.ndarray, wanted: float, rng: np.random.Generator) -> np.ndarray:
    """(m,) how often each is taken so that all together have `wanted` tokens, to the nearest document."""
    # lengths = [4, 3, 2], wanted = 13: all once (9 tokens), then 4 more in random order, say [2, 0, 1]:
    # totals = [0, 2, 6, 9], the nearest to 4 is 2, so document 2 is taken once more
    full = int(wanted // lengths.sum())
    order = rng.permutation(len(lengths))
    totals = np.concatenate([[0], np.cumsum(lengths[order])])
    rest = wanted - full * totals[-1]
    taken = int(np.argmin(np.abs(totals - rest)))
    copies = np.full(len(lengths), full)
    copies[order[:taken]] += 1
    return copies


def _strata(
    config: MixtureConfig, names: Sequence[str], group: np.ndarray, lengths: np.ndarray, usable: np.ndarray
) -> list[Stratum]:
    check_names(config, names)
    # weights 3 and 1, long_share 0.4 of the first: strata of 0.3 (long), 0.45 (short) and 0.25 of all tokens
    whole = sum(config.weights.values())
    long = lengths >= (config.long_from or 0)
    strata = []
    for index, name in enumerate(names):
        members, share = usable & (group == index), config.weights[name] / whole
        long_share = config.long_share.get(name, config.long_share.get(OTHERS))
        if config.long_from is None or long_share is None:
            strata.append(_stratum(name, index, share, members, lengths))
            continue
        kinds = ((f"documents of {config.long_from:,} tokens or more", long, long_share),)
        kinds += ((f"documents of less than {config.long_from:,} tokens", ~long, 1 - long_share),)
        for kind, chosen, part in kinds:
            if part:
                strata.append(_stratum(f"{name} ({kind})", index, share * part, members & chosen, lengths))
    return strata


def _stratum(name: str, group: int, share: float, chosen: np.ndarray, lengths: np.ndarray) -> Stratum:
    members = np.flatnonzero(chosen)
    if not len(members):
        raise UserError(f"{name} has no document, but {share:.1%} of the mixture: change its weight or long_share")
    return Stratum(name, group, share, members, int(lengths[members].sum()))


def check_names(config: MixtureConfig, names: Sequence[str]) -> None:
    """UserError unless the weights name just these sources (or domains)."""
    known = ", ".join(names)
    for option, keys in (("weights", config.weights), ("long_share", config.long_share)):
        for name in keys:
            if name not in names and name != OTHERS:
                raise UserError(f"mixture.{option} names {name}, but the {config.by.value}s are {known}: correct it")
    for name in names:
        if name not in config.weights:
            raise UserError(
                f"mixture.weights has no weight for {config.by.value} {name or '(none)'}: give each of {known} one"
            )

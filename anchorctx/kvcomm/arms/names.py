"""The arms by name. Imports no torch until an arm is made, so that a configuration can name arms quickly."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import TYPE_CHECKING

from anchorctx.errors import UserError

if TYPE_CHECKING:
    from anchorctx.kvcomm.arms.basic import Arm

ARMS = (
    "dense",
    "dense_prefix_cache",
    "naive",
    "rotate",
    "rotate_glue",
    "kvcomm",
    "kvcomm_ungated",
    "mean_offset",
    "anchored",
)
"""Ways to reuse."""
CONTROLS = ("dense_chunked", "zeroed", "random", "other_request")
"""The numerics floor, and what an arm must beat."""


class Feature(StrEnum):
    """What tells two contents apart."""

    embeddings = "embeddings"
    """Their tokens' input embeddings: the paper's text."""
    values = "values"
    """Base values of all layers: the gate of the paper's public code."""
    keys_values = "keys_values"
    """Base keys and values of all layers: the weights of the paper's public code."""


class Reduce(StrEnum):
    """How distances between contents become weights."""

    frobenius = "frobenius"
    """One norm over the whole content, and so one weight an exemplar."""
    per_token = "per_token"
    """The mean absolute difference of each token, and so weights by token."""


def makers() -> dict[str, Callable[[], Arm]]:
    """Every arm and control by name, with its default settings."""
    from anchorctx.kvcomm.arms import basic, offsets

    arms = (
        *(basic.Dense, basic.DensePrefixCache, basic.Naive, basic.Rotate, basic.RotateGlue),
        *(offsets.Kvcomm, offsets.KvcommUngated, offsets.MeanOffset, basic.Anchored),
    )
    controls = (basic.DenseChunked, basic.Zeroed, basic.RandomMoments, basic.OtherRequest)
    return dict(zip((*ARMS, *CONTROLS), (*arms, *controls), strict=True))


def make_arm(name: str) -> Arm:
    """A new arm of that name, with nothing learnt; UserError lists the names."""
    known = makers()
    if name not in known:
        raise UserError(f"unknown arm {name!r}: choose {', '.join(known)}")
    return known[name]()

"""The arms by name."""

from __future__ import annotations

from collections.abc import Callable

from anchorctx.errors import UserError
from anchorctx.kvcomm.arms import names
from anchorctx.kvcomm.arms.basic import Anchored, Arm, Dense, DensePrefixCache, Naive, Rotate, RotateGlue
from anchorctx.kvcomm.arms.controls import DenseChunked, OtherRequest, RandomMoments, Zeroed
from anchorctx.kvcomm.arms.offsets import Kvcomm, KvcommUngated, MeanOffset

ARMS: dict[str, Callable[[], Arm]] = dict(
    zip(
        names.ARMS,
        (Dense, DensePrefixCache, Naive, Rotate, RotateGlue, Kvcomm, KvcommUngated, MeanOffset, Anchored),
        strict=True,
    )
)
"""Ways to reuse, with their default settings."""
CONTROLS: dict[str, Callable[[], Arm]] = dict(
    zip(names.CONTROLS, (DenseChunked, Zeroed, RandomMoments, OtherRequest), strict=True)
)
"""The numerics floor, and what an arm must beat."""


def make_arm(name: str) -> Arm:
    """A new arm of that name, with nothing learnt; UserError lists the names."""
    known = ARMS | CONTROLS
    if name not in known:
        raise UserError(f"unknown arm {name!r}: choose {', '.join(known)}")
    return known[name]()

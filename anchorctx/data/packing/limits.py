"""`min_length`: documents and left-over pieces that are too short to teach anything are dropped, and counted."""

from __future__ import annotations

import numpy as np

from anchorctx.data.packing.accounting import Accounting

SHORT = "shorter than min_length"
"""The reason under which they are counted."""


def drop_short(pieces: np.ndarray, min_length: int, accounting: Accounting) -> np.ndarray:
    """The pieces (P,) PIECE of at least `min_length` tokens."""
    if min_length == 1:
        return pieces
    short = pieces["length"] < min_length
    accounting.drop(SHORT, pieces["source"][short], pieces["length"][short])
    return pieces[~short]

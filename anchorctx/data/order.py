"""The order of an epoch's rows: a pure function of (seed, epoch, packed set).

In packed rows attention costs the sum of the squared lengths of the documents (`PackedSet.row_cost`), which differs
from row to row by a factor of ten and more. Processes that train together wait for the one with the costliest rows. So
a shuffled epoch is cut into windows, and inside a window rows of similar cost stand together: any run of 2**k rows that
begins at a multiple of 2**k, up to BLOCK_ROWS, is of similar rows, so that steps are too, whatever their size. Runs,
and the rows in them, are in random order. As with other grouping by length, a step is then less mixed than by chance
(in lengths, not in content); `data.balance=false` leaves the epoch as it was shuffled.
"""

from __future__ import annotations

import numpy as np

WINDOW_ROWS = 1024
"""Rows that are sorted by cost together; a row moves no further than this."""
BLOCK_ROWS = 64
"""Rows of similar cost that stand together; a power of two."""


def epoch_order(costs: np.ndarray, seed: int, epoch: int, fingerprint: int, balance: bool) -> np.ndarray:
    """(R,) int64: the rows of an epoch, each once.

    Args:
        costs: (R,) what each row costs in attention, in tokens squared.
        seed, epoch, fingerprint: of the run, from 0 on, and of the packed set as a number: they seed the shuffle.
        balance: rows of similar cost stand together.
    """
    rng = np.random.default_rng([seed, epoch, fingerprint])
    order = rng.permutation(len(costs))
    if not balance:
        return order
    windows = [order[start : start + WINDOW_ROWS] for start in range(0, len(order), WINDOW_ROWS)]
    return np.concatenate([_together(window[np.argsort(costs[window], kind="stable")], rng) for window in windows])


def _together(rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rows sorted by cost, as blocks of neighbours in random order; inside a block runs are swapped at random."""
    # 1,000 rows: whole = 960 in 15 blocks; the other 40 are neighbours too, cut out at a random place
    whole = len(rows) // BLOCK_ROWS * BLOCK_ROWS
    start = int(rng.integers(0, whole + 1))
    rest, rows = rows[start : start + len(rows) - whole], np.delete(rows, slice(start, start + len(rows) - whole))
    blocks = _turned(rows.reshape(-1, BLOCK_ROWS), rng)
    return np.concatenate([*blocks[rng.permutation(len(blocks))], rng.permutation(rest)])


def _turned(blocks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(B, BLOCK_ROWS): each half swapped with the other or not, and so on inside the halves down to single rows."""
    # with blocks of 4: [0, 1, 2, 3] -> halves swapped [2, 3, 0, 1] -> the first pair swapped [3, 2, 0, 1]
    half = BLOCK_ROWS // 2
    while half:
        pairs = blocks.reshape(len(blocks), BLOCK_ROWS // (2 * half), 2, half)
        swap = rng.integers(0, 2, pairs.shape[:2], dtype=bool)[..., None, None]
        blocks = np.where(swap, pairs[:, :, ::-1], pairs).reshape(len(blocks), BLOCK_ROWS)
        half //= 2
    return blocks

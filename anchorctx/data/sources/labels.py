"""Which tokens of a row are trained, as pre-tokenised instruction data says it: by labels, or by a mask of 0 and 1.

Both lie beside the token ids and are as long. They become loss weights of 0 and 1, which the packer carries with the
tokens through every policy and writes into the rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from anchorctx.data.sources.documents import BadRow, shown, wrong_type

MASKED = -100
"""Label of a token that is not trained: what torch's cross-entropy ignores."""


def trained_by_labels(value: Any, ids: np.ndarray, where: str, name: str) -> np.ndarray:
    """(n,) bool: tokens whose label is the token itself; the others' is -100. BadRow for any other label.

    Args:
        value: the labels, as they were read.
        ids: (n,) the row's token ids.
        where: the row, for messages.
        name: the labels' field, for messages.
    """
    # ids [5, 6, 7, 8], a prompt of two: labels [-100, -100, 7, 8] -> [False, False, True, True]
    labels = flat_array(value, "iu")
    if labels is None:
        wrong_type("labels not integers", where, value, name, "a list of integers")
    _check_length(labels, ids, where, name)
    trained = labels != MASKED
    wrong = np.flatnonzero(trained & (labels != ids))
    if len(wrong):
        at = int(wrong[0])
        raise BadRow(
            "bad labels",
            f"{where} has label {labels[at]} at token {at} of {name}, which is {ids[at]}: write {MASKED} or the token "
            "itself, not the one after it",
        )
    return trained


def trained_by_mask(value: Any, ids: np.ndarray, where: str, name: str) -> np.ndarray:
    """(n,) bool: tokens of mask 1 (or true), the others having 0 (or false); arguments as for `trained_by_labels`."""
    mask = flat_array(value, "iub")
    if mask is None or not np.isin(mask, (0, 1)).all():
        raise BadRow("bad mask", f"{where} has {shown(value)} as field {name}, not a list of 0 and 1: mend the row")
    _check_length(mask, ids, where, name)
    return mask != 0


def flat_array(value: Any, kinds: str) -> np.ndarray | None:
    """(n,) of one of numpy's `kinds` ("i" int, "u" unsigned, "b" bool); None when the value is no such flat list."""
    if not isinstance(value, list | tuple | np.ndarray):
        return None
    if not len(value):
        return np.empty(0, np.int64)
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError):  # lists of different lengths
        return None
    return array if array.ndim == 1 and array.dtype.kind in kinds else None


def _check_length(values: np.ndarray, ids: np.ndarray, where: str, name: str) -> None:
    if len(values) != len(ids):
        raise BadRow(
            "labels of another length",
            f"{where} has {len(values):,} entries in {name} for {len(ids):,} tokens, not as many: mend the row",
        )

"""Layouts of typical rows: read from a packed set, or packed from document lengths that are listed or drawn."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from anchorctx.data.packed_set import PackedSet
from anchorctx.errors import UserError
from anchorctx.layout import PackedLayout
from anchorctx.plan.config import CorpusConfig

LONGEST = 2**40
"""Tokens of a drawn document at most: longer than any row."""


def typical_rows(corpus: CorpusConfig, row_length: int | None) -> tuple[PackedLayout, ...]:
    """`corpus.rows` rows of the corpus (all of a smaller packed set), with AnchorAttention's layout.

    Raises:
        UserError: no row length, a packed set with rows of another length, or a file of lengths that cannot be used.
    """
    if corpus.packed is not None:
        return _packed(corpus.packed, corpus.rows, row_length)
    if row_length is None:
        raise UserError("the plan needs a row length: give row_length=..., model.max_length=... or corpus.packed=...")
    if row_length < 3:
        raise UserError(f"row_length={row_length} must be at least 3: an anchor and a document of two tokens")
    documents = _documents(corpus)
    return tuple(_row(documents, row_length) for _ in range(corpus.rows))


def _packed(folder: str, rows: int, row_length: int | None) -> tuple[PackedLayout, ...]:
    packed = PackedSet.open(folder, verify=False)
    if row_length not in (None, packed.row_length):
        raise UserError(
            f"row_length={row_length} differs from the {packed.row_length} tokens of the rows in {folder}: leave "
            "row_length out, or prepare a set of that length"
        )
    # evenly spread over the set; duplicates where it has fewer rows than asked for
    chosen = np.unique(np.linspace(0, len(packed) - 1, rows).astype(int))
    return tuple(packed.row(int(row)).layout for row in chosen)


def _documents(corpus: CorpusConfig) -> Iterator[int]:
    """Lengths in tokens, without end: drawn from the list, or from a log-normal distribution."""
    rng = np.random.default_rng(corpus.seed)
    listed = None if corpus.lengths is None else _listed(Path(corpus.lengths))
    while True:
        # the logarithm of a log-normal variable is normal, with mean log(median)
        drawn = rng.lognormal(np.log(corpus.median), corpus.sigma) if listed is None else rng.choice(listed)
        yield max(int(min(drawn, corpus.longest or LONGEST)), 1)


def _listed(path: Path) -> np.ndarray:
    if not path.is_file():
        raise UserError(f"corpus.lengths={path} is not a file: name a text file with the tokens of one document a line")
    lengths = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip().isdigit() or int(line) < 1:
            raise UserError(f"{path}:{number} is no positive number of tokens ({line.strip()[:20]!r}): mend the line")
        lengths.append(int(line))
    if not lengths:
        raise UserError(f"corpus.lengths={path} is empty: write the tokens of one document a line")
    return np.array(lengths)


def _row(documents: Iterator[int], length: int) -> PackedLayout:
    """Documents one after the other behind an anchor; the last is cut at the row's end."""
    # a row of 20 with documents of 7, 7, 7: offsets = [0, 1, 8, 15, 20]
    offsets = [0, 1]
    while offsets[-1] < length:
        offsets.append(min(offsets[-1] + next(documents), length))
    return PackedLayout(tuple(offsets), 1)

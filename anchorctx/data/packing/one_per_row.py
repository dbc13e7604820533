"""`one_per_row`: each document has a row of its own; the rest of the row is padding."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from anchorctx.data.packing.pieces import Rows


class OnePerRow:
    """Each piece in a row of its own."""

    def add(self, pieces: np.ndarray) -> Iterator[Rows]:
        """The pieces are the rows."""
        if len(pieces):
            yield Rows(pieces, np.arange(1, len(pieces) + 1))

    def finish(self) -> Iterator[Rows]:
        """Nothing is left."""
        return iter(())

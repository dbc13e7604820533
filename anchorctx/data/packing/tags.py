"""What stands in front of a document and is never trained: BOS (`prepend_bos`), its domain's name (`domain_tags`)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(slots=True)
class Tags:
    """Different tags, by number; tag 0 is none."""

    ids: list[np.ndarray] = field(default_factory=lambda: [np.empty(0, np.uint32)])
    """(m,) token ids of each."""

    @property
    def lengths(self) -> np.ndarray:
        """(number of tags,) int64: tokens of each."""
        return np.array([len(ids) for ids in self.ids], np.int64)

    def add(self, ids: np.ndarray) -> int:
        """The number of a new tag; 0 if it is empty."""
        if not len(ids):
            return 0
        self.ids.append(ids)
        return len(self.ids) - 1

    @property
    def longest(self) -> int:
        """Tokens of the longest tag."""
        return int(self.lengths.max())

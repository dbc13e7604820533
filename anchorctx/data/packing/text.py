"""Where the tokens are that pieces refer to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np


class Text(Protocol):
    """The tokens of many documents end to end, and their loss weights."""

    @property
    def dtype(self) -> np.dtype:
        """Of the tokens: uint16 or uint32."""
        ...

    @property
    def has_weights(self) -> bool:
        """Are there loss weights? Else each is 1."""
        ...

    def read_tokens(self, start: int, into: np.ndarray) -> None:
        """Fill `into` (n,) with the tokens from `start` on."""
        ...

    def read_weights(self, start: int, into: np.ndarray) -> None:
        """Fill `into` (n,) float16 with the loss weights from `start` on."""
        ...


@dataclass(frozen=True, slots=True)
class ArrayText:
    """In memory."""

    tokens: np.ndarray
    """(N,)."""
    weights: np.ndarray | None = None
    """(N,) float16, or None."""

    @property
    def dtype(self) -> np.dtype:
        """Of the tokens."""
        return self.tokens.dtype

    @property
    def has_weights(self) -> bool:
        """Are there loss weights?"""
        return self.weights is not None

    def read_tokens(self, start: int, into: np.ndarray) -> None:
        """Copy tokens."""
        into[:] = self.tokens[start : start + len(into)]

    def read_weights(self, start: int, into: np.ndarray) -> None:
        """Copy loss weights."""
        assert self.weights is not None
        into[:] = self.weights[start : start + len(into)]

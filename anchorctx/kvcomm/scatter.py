"""A buffer of keys and values as transformers sees it in one forward: a cache whose new entries go to chosen slots."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin


class Filled(Exception):
    """The last layer that was asked for has its keys and values."""


class ScatterCache(Cache):
    """A buffer in one forward, as transformers sees it: new entries go to their slots, attention reads up to `stop`.

    `keys` and `values` (L, B, H, capacity, D) are a buffer's. With fewer than all `layers`, the last of them raises
    `Filled` in place of going on.
    """

    def __init__(
        self, keys: torch.Tensor, values: torch.Tensor, slots: range | torch.Tensor, stop: int, layers: int
    ) -> None:
        pairs = zip(keys, values, strict=True)
        super().__init__(layers=[_ScatterLayer(keys, values, slots, stop) for keys, values in pairs])
        last: Any = self.layers[layers - 1]
        last.ends = layers < len(self.layers)


class _ScatterLayer(CacheLayerMixin):
    ends = False

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, slots: range | torch.Tensor, stop: int) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self._slots, self._stop = slots, stop

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Memory is the buffer's."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.keys is not None and self.values is not None
        for held, new in ((self.keys, key_states), (self.values, value_states)):
            if isinstance(self._slots, range):  # neighbours: a slice is quicker than an index
                held[:, :, self._slots.start : self._slots.stop] = new
            else:
                held.index_copy_(2, self._slots, new.to(held.dtype))
        if self.ends:
            raise Filled
        return self.keys[:, :, : self._stop], self.values[:, :, : self._stop]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._stop, 0

    def get_seq_length(self) -> int:
        """Tokens before the new ones; asked for only when these are neighbours."""
        return int(self._slots[0])

    def get_max_length(self) -> int:
        return -1


class RowCache(Cache):
    """The first rows of a buffer, which hold different prompts, in a forward of one token each: each in its own slot.

    keys and values (L, B, H, capacity, D), slots (n,) with n at most B; attention reads up to `stop`.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, stop: int) -> None:
        n = len(slots)
        pairs = zip(keys[:, :n], values[:, :n], strict=True)
        super().__init__(layers=[_RowLayer(k, v, slots, stop) for k, v in pairs])


class _RowLayer(_ScatterLayer):
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.keys is not None and self.values is not None and isinstance(self._slots, torch.Tensor)
        rows = torch.arange(len(self._slots), device=self._slots.device)
        for held, new in ((self.keys, key_states), (self.values, value_states)):
            held[rows, :, self._slots] = new[:, :, 0].to(held.dtype)
        return self.keys[:, :, : self._stop], self.values[:, :, : self._stop]

    def get_seq_length(self) -> int:
        """Tokens before the new one, in the longest row."""
        return self._stop - 1

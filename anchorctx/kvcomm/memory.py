"""CPU memory that is used again. A block of some megabytes that comes fresh from the system costs up to seven times
what filling it takes, in page faults, and every turn fills a prompt's keys and values.

The caching allocator does this on a GPU. Here a block is lent as a numpy array, which torch holds for as long as any
tensor shares its memory; when the array goes, the block is free again.
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch

LEAST = 2**20
"""Bytes from which on a block is lent; less comes from memory that the process has already."""
_free: deque[np.ndarray] = deque(maxlen=4)  # a turn's keys and values, and those of the turn before


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """As `torch.empty`."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < LEAST:
        return torch.empty(*shape, dtype=dtype, device=device)
    block = _block(size)
    lent = block[:size]
    # The array alone knows when nothing uses it any more: views of a tensor share memory without naming the tensor.
    weakref.finalize(lent, _free.append, block).atexit = False
    return torch.from_numpy(lent).view(dtype).view(*shape)


def empty_like(x: torch.Tensor) -> torch.Tensor:
    """As `torch.empty_like`, contiguous."""
    return empty(x.shape, x.dtype, x.device)


def _block(size: int) -> np.ndarray:
    """A free block of that many bytes and at most twice as many, or a new one."""
    fitting = [i for i, block in enumerate(_free) if size <= len(block) <= 2 * size]
    if not fitting:
        return np.empty(size, dtype=np.uint8)
    best = min(fitting, key=lambda i: len(_free[i]))
    block = _free[best]
    del _free[best]
    return block

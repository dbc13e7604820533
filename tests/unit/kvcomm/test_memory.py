from __future__ import annotations

import gc
from collections import deque
from collections.abc import Iterator

import pytest
import torch

from anchorctx.kvcomm import memory
from anchorctx.kvcomm.cache import KV

CPU = torch.device("cpu")
SHAPE = (2, 1, 2, memory.LEAST // 16, 8)


@pytest.fixture(autouse=True)
def nothing_free(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(memory, "_free", deque(maxlen=4))
    yield


def address(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


def test_memory_is_lent_again_once_no_view_of_it_is_left() -> None:
    first = memory.empty(SHAPE, torch.float32, CPU)
    assert first.shape == SHAPE and first.is_contiguous() and first.dtype is torch.float32
    at, part = address(first), first.fill_(1.0)[1, :, :, 5:9]
    del first
    gc.collect()
    other = memory.empty(SHAPE, torch.float32, CPU)
    assert address(other) != at  # a view still reads it
    other.fill_(2.0)
    assert part.eq(1.0).all()
    del part
    gc.collect()
    assert address(memory.empty(SHAPE, torch.bfloat16, CPU)) == at  # half of the bytes still fit
    assert address(memory.empty(SHAPE, torch.float64, CPU)) not in (at, address(other))


def test_little_memory_is_torchs_own_and_few_blocks_are_kept() -> None:
    small = memory.empty((3, 4), torch.float32, CPU)
    assert small.shape == (3, 4)
    del small
    blocks = [memory.empty(SHAPE, torch.float32, CPU) for _ in range(6)]
    blocks.clear()
    gc.collect()
    assert len(memory._free) == 4


def test_a_copy_has_memory_of_its_own() -> None:
    whole = KV(torch.ones(2, 1, 2, 10, 4), torch.ones(2, 1, 2, 10, 4))
    part = whole.cut(2, 5)
    assert address(part.keys) == address(whole.keys)
    copied = part.copy()
    assert copied.keys.untyped_storage().nbytes() == copied.keys.nbytes and torch.equal(copied.keys, part.keys)
    assert address(copied.copy().values) == address(copied.values)  # nothing larger is kept alive: no second copy

"""FlexAttention on a CPU: the mask function in eager mode, the block mask against dense truth, the compiled kernel."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from anchorctx.attention import attend, flex
from anchorctx.attention.kernels.base import Score
from anchorctx.attention.reference import reference_attention
from anchorctx.errors import BackendUnavailableError
from anchorctx.layout import PackedLayout
from anchorctx.testing.numerics import max_error

from .strategies import layouts, tensors

CPU = torch.device("cpu")
ROWS = (PackedLayout((0, 2, 50, 51, 300, 333), 2), PackedLayout((0, 2, 128, 256, 330, 333), 2))
SCORES = [Score(0.3), Score(0.3, window=40), Score(0.3, softcap=1.5), Score(0.3, window=40, softcap=1.5)]


def dense_blocks(layout: PackedLayout, window: int | None, block: int) -> tuple[np.ndarray, np.ndarray]:
    """(n, n) each, from the dense mask: is any pair of a block allowed, and are all?"""
    allowed = layout.allowed_array(window)
    cuts = range(0, layout.length, block)
    cells = [[allowed[q : q + block, k : k + block] for k in cuts] for q in cuts]
    return tuple(np.array([[f(cell) for cell in line] for line in cells]) for f in (np.any, np.all))  # type: ignore[return-value]


def listed(counts: torch.Tensor, indices: torch.Tensor) -> np.ndarray:
    """(n, n) bool of one row's block lists."""
    found = np.zeros((counts.shape[-1],) * 2, dtype=bool)
    for q, (count, line) in enumerate(zip(counts[0].tolist(), indices[0].tolist(), strict=True)):
        found[q, line[:count]] = True
    return found


@settings(max_examples=150, deadline=None, derandomize=True)
@given(row=layouts(), window=st.none() | st.integers(3, 60))
def test_block_mask_is_the_dense_mask_in_blocks(row: PackedLayout, window: int | None) -> None:
    """The blocks to visit are exactly those with an allowed pair; a block listed as full is full."""
    row, block = row.by_document(), 16
    first = flex.first_keys(row, window)[None]
    partial, full = (x[0] for x in flex._visible_blocks(first, row.anchor_len, block))
    some, every = dense_blocks(row, window, block)
    assert not (partial & full).any()
    np.testing.assert_array_equal(partial | full, some)
    assert not (full & ~every).any()
    if not row.anchor_len:  # off the diagonal, where a mask is needed anyway, no full block is missed
        np.testing.assert_array_equal(full, every & ~np.eye(len(every), dtype=bool))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(row=layouts(), window=st.none() | st.integers(3, 60))
def test_mask_function_is_the_layouts(row: PackedLayout, window: int | None) -> None:
    row = row.by_document()
    mask = flex.block_mask((row,), CPU, window).mask_mod
    index = torch.arange(row.length)
    zero = torch.tensor(0)
    assert torch.equal(mask(zero, zero, index[:, None], index[None, :]), row.allowed(window=window))


@pytest.mark.parametrize("window", [None, 40])
def test_block_mask_of_a_batch(window: int | None) -> None:
    mask = flex.block_mask(ROWS, CPU, window)
    assert mask.shape == (2, 1, 333, 333)
    assert mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None
    for b, row in enumerate(ROWS):
        found = listed(mask.kv_num_blocks[b], mask.kv_indices[b])
        found |= listed(mask.full_kv_num_blocks[b], mask.full_kv_indices[b])
        np.testing.assert_array_equal(found, dense_blocks(row, window, flex.BLOCK)[0])


def test_block_lists_are_contiguous() -> None:
    """The compiled kernels index them as contiguous: strides of another order give wrong numbers, silently."""
    mask = flex.block_mask(ROWS, CPU)
    lists = (mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices)
    for x in lists:
        assert x is not None and x.is_contiguous() and x.dtype is torch.int32
        assert x.stride() == torch.empty(x.shape).stride()


def test_block_mask_is_cached_but_never_fake() -> None:
    with FakeTensorMode():
        fake = flex.block_mask(ROWS, CPU)
    real = flex.block_mask(ROWS, CPU)
    assert type(fake.kv_indices).__name__ == "FakeTensor" and type(real.kv_indices) is torch.Tensor
    assert flex.block_mask(ROWS, CPU) is real


def test_long_rows_get_larger_blocks_not_larger_masks() -> None:
    assert [flex.block_size(t) for t in (1, 131_072, 262_144, 262_145, 1_048_576)] == [128, 128, 128, 256, 512]
    row = PackedLayout((0, 1, *range(1024, 131_072, 1024), 131_072), 1)
    mask = flex.block_mask((row,), CPU)
    assert mask.kv_indices.numel() == 1024**2  # of 128K x 128K pairs
    assert int(mask.kv_num_blocks.max()) <= 9 and int(mask.full_kv_num_blocks.max()) <= 7  # type: ignore[union-attr]


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """FlexAttention without compiling: it computes dense scores, by the mask function alone."""
    monkeypatch.setattr(flex, "_compiled", lambda: flex._with_sinks)
    yield


EAGER_WARNING = "ignore:flex_attention called without torch.compile:UserWarning"


@pytest.mark.filterwarnings(EAGER_WARNING)
@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
@pytest.mark.parametrize("score", SCORES, ids=str)
def test_numbers_in_eager_mode(score: Score, heads: tuple[int, int]) -> None:
    q, k, v, _ = tensors(2, *heads, 333, 16)
    out = flex.flex_attention(q, k, v, ROWS, score)
    assert max_error(out, reference_attention(q, k, v, ROWS, score)) < 1e-13


@pytest.mark.filterwarnings(EAGER_WARNING)
@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("score", SCORES, ids=str)
def test_sinks_in_eager_mode(score: Score) -> None:
    """Output, and the sinks' own gradient, which goes by the log-sum-exp."""
    q, k, v, do = tensors(2, 4, 2, 333, 16)
    sinks = torch.tensor([0.5, -2.0, 3.0, 0.0], dtype=torch.float64)
    results = []
    for attention in (flex.flex_attention, reference_attention):
        leaf = sinks.clone().requires_grad_()
        out = attention(q, k, v, ROWS, score, leaf)
        out.backward(do)
        results.append((out, leaf.grad))
    assert all(max_error(a, b) < 1e-12 for a, b in zip(*results, strict=True))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for the CPU with g++")
@pytest.mark.filterwarnings("ignore")  # the compiler's own imports warn, differently in each of its versions
@pytest.mark.parametrize("score", SCORES[:1] + SCORES[-1:], ids=str)
def test_numbers_compiled(score: Score, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel that reads the block lists; on a CPU torch 2.13 compiles it for fixed shapes only."""
    torch._dynamo.reset()
    monkeypatch.setattr(flex, "_compiled", lambda: torch.compile(flex._attend, fullgraph=True, dynamic=False))
    q, k, v, _ = tensors(2, 4, 2, 333, 16, torch.float32)
    exact = reference_attention(q.double(), k.double(), v.double(), ROWS, score)
    eager = max_error(reference_attention(q, k, v, ROWS, score), exact)
    assert max_error(flex.flex_attention(q, k, v, ROWS, score), exact) <= 2 * eager + 1e-6


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The product's own function, traced but not compiled; grows by the number of nodes of each graph."""
    found: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        found.append(len(graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    flex._compiled.cache_clear()
    yield found
    flex._compiled.cache_clear()
    torch._dynamo.reset()


def kinds_of_call() -> Iterator[tuple[list[torch.Tensor], tuple[PackedLayout, ...], Score]]:
    """Thirty, of three dtypes, five lengths and batch sizes, two head dimensions, anchors, windows and soft caps."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for n, (length, batch) in enumerate([(150, 1), (333, 2), (258, 3), (97, 1), (600, 2)]):
            for score, dim in ((Score(0.3), 16), (Score(0.2, window=40, softcap=1.5 + n), 32)):
                anchor = n % 3
                offsets = (0, anchor, 90, length) if anchor else (0, 90, length)
                q, k, v, _ = tensors(batch, 4, 2, length, dim, dtype)
                yield [q, k, v], (PackedLayout(offsets, anchor),) * batch, score


def test_more_kinds_of_call_than_torch_compiles_by_itself(compilations: list[int]) -> None:
    """Torch's own limit is 8, behind which it goes on with dense scores; `_attend` raises where it is not compiled."""
    for qkv, rows, score in kinds_of_call():
        out = flex.flex_attention(*qkv, rows, score)
        exact = reference_attention(*(x.double() for x in qkv), rows, score)
        eager = max_error(reference_attention(*qkv, rows, score), exact)
        assert max_error(out, exact) <= 2 * eager + 1e-6
    kinds = len(compilations)
    assert 8 < kinds < flex.COMPILATIONS
    for qkv, rows, score in kinds_of_call():
        flex.flex_attention(*qkv, rows, score)
    assert len(compilations) == kinds


@pytest.mark.usefixtures("compilations")
def test_an_error_where_torch_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "COMPILATIONS", 2)
    calls = kinds_of_call()
    with pytest.raises(BackendUnavailableError, match="compiled for 2 kinds of call.*use attention=auto"):
        for qkv, rows, score in calls:
            flex.flex_attention(*qkv, rows, score)
    assert len(list(calls)) > 20  # long before the end
    with torch.compiler.set_stance("force_eager"), pytest.raises(BackendUnavailableError, match="does not compile it"):
        flex.flex_attention(*qkv, rows, score)


def test_few_block_masks_are_kept() -> None:
    """One of a long row is 67 MB."""
    flex._block_mask.cache_clear()
    for length in range(200, 220):
        flex.block_mask((PackedLayout((0, 1, length), 1),), CPU)
    assert flex._block_mask.cache_info().currsize == flex.MASKS == 4


@pytest.mark.filterwarnings(EAGER_WARNING)
@pytest.mark.usefixtures("eager")
def test_gradients_on_a_cpu_are_refused() -> None:
    q, k, v, _ = tensors(2, 2, 2, 333, 16)
    with pytest.raises(BackendUnavailableError, match="no gradients on a CPU: use attention=cpu"):
        flex.flex_attention(q, k, v.requires_grad_(), ROWS, SCORES[0])
    assert flex.flex_attention(q, k, v.detach(), ROWS, SCORES[0]).shape == q.shape


def test_not_a_backend_for_the_cpu() -> None:
    q, k, v, _ = tensors(2, 2, 2, 333, 16, torch.float32)
    with pytest.raises(BackendUnavailableError, match="'flex' runs on cuda"):
        attend(q, k, v, ROWS, backend="flex")

"""The `cpu` backend (a flash kernel a run of documents, merged with a shared anchor) against the dense reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anchorctx.attention import attend
from anchorctx.attention.kernels.base import Score
from anchorctx.attention.kernels.cpu import CpuKernel
from anchorctx.layout import PackedLayout
from anchorctx.testing.numerics import assert_within_eager, deviations

from .strategies import layouts, tensors

DIM = 16
FLOAT64_BOUND = 2e-13
"""Absolute, for values of order one: over twice the largest error seen in 3,900 random layouts (8.0e-14)."""


def check(
    rows: tuple[PackedLayout, ...],
    dtype: torch.dtype,
    heads: tuple[int, int] = (2, 2),
    window: int | None = None,
    scale: float | None = None,
    seed: int = 0,
) -> None:
    """Output and gradients of the cpu backend: by measured tolerance, and in float64 also by an absolute bound."""
    args = tensors(len(rows), *heads, rows[0].length, DIM, dtype, seed)
    found = deviations(
        lambda q, k, v: attend(q, k, v, rows, scale=scale, window=window, backend="cpu"),
        args,
        rows,
        Score(DIM**-0.5 if scale is None else scale, window),
    )
    if dtype is torch.float64:
        assert max(d.error for d in found) < FLOAT64_BOUND, found
    else:
        assert_within_eager(found)


@st.composite
def batches(draw: st.DrawFn) -> tuple[PackedLayout, ...]:
    """One to three rows of one length and one anchor length, cut differently."""
    first = draw(layouts())
    others = layouts(anchor_len=first.anchor_len, length=first.length)
    return (first, *draw(st.lists(others, max_size=2)))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=batches(),
    heads=st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    window=st.none() | st.integers(3, 40),
    scale=st.none() | st.sampled_from([0.05, 1.0]),
    seed=st.integers(0, 2**31),
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_random_layouts(
    dtype: torch.dtype,
    rows: tuple[PackedLayout, ...],
    heads: tuple[int, int],
    window: int | None,
    scale: float | None,
    seed: int,
) -> None:
    check(rows, dtype, heads, window, scale, seed)


def repeated(lengths: list[int], anchor: int) -> PackedLayout:
    offsets = [0, anchor] if anchor else [0]
    for length in lengths:
        offsets.append(offsets[-1] + length)
    return PackedLayout(tuple(offsets), anchor)


CASES = {
    "anchor alone": ([], 1),
    "one token, no anchor": ([1], 0),
    "one document fills the row": ([700], 0),
    "one document behind the anchor": ([700], 1),
    "one-token documents": ([1] * 300, 2),
    "thousands of tiny documents": ([1, 2, 1] * 700, 1),
    "long beside tiny": ([1, 600, 1, 1, 2, 300, 5], 3),
    "runs of exactly 128 tokens": ([64, 64, 127, 1, 128, 129, 128], 0),
    "equal neighbours": ([9] * 40 + [300] * 2 + [30] * 2 + [70] * 9 + [1], 0),
    "equal neighbours behind the anchor": ([69, 70, 70, 70, 5, 5], 1),
    "equal neighbours beyond one call": ([150] * 30 + [600, 600], 0),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_corner_layouts(case: str, dtype: torch.dtype) -> None:
    check((repeated(*CASES[case]),), dtype, heads=(2, 1))


@pytest.mark.parametrize("window", [5, 64, 100, 1000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_windows_shorter_and_longer_than_documents(dtype: torch.dtype, window: int) -> None:
    check((repeated([300, 3, 4, 90, 64, 1], 1),), dtype, heads=(4, 2), window=window)
    check((repeated([150, 150, 150, 12, 5, 5], 0), repeated([160, 160, 6, 6, 70, 70], 0)), dtype, (4, 2), window)


@pytest.mark.parametrize(
    ("lengths", "calls"),
    [
        ([40, 50, 60, 300, 300, 200], [2, 1, 2, 1]),
        ([300] * 20, [13, 7]),  # 4,096 tokens at most
        ([5000, 5000], [1, 1]),
        ([8] * 600, [512, 88]),
        ([3, 8, 8, 8], [4]),
    ],
)
def test_documents_in_each_call(lengths: list[int], calls: list[int]) -> None:
    tiles = CpuKernel().tiles((repeated(lengths, 0),), torch.device("cpu"))
    found = [
        len(tile.cu_seqlens) - 1
        if tile.cu_seqlens is not None
        else (tile.tokens.stop - tile.tokens.start) // tile.max_seqlen
        for tile in tiles
    ]
    assert found == calls


@pytest.mark.parametrize("lengths", [[1500, 700], [20] * 100, [3000]], ids=lambda x: f"{len(x)}x{x[0]}")
def test_passes_longer_than_one_block(lengths: list[int]) -> None:
    """Rows beyond what is merged at once, and kernels beyond their inner block of 512 keys."""
    check((repeated(lengths, 1),) * 2, torch.float32, heads=(1, 1))


def test_dense_tensors_and_strided_views_agree_bit_for_bit() -> None:
    row = repeated([40, 200, 3], 1)
    wide = torch.randn(2, row.length, 5, 3 * DIM, generator=torch.Generator().manual_seed(0))
    q, k, v = (x.transpose(1, 2) for x in wide.split(DIM, dim=-1))
    assert not q.is_contiguous()
    strided, dense = (
        attend(*(f(x) for x in (q, k, v)), (row, row), backend="cpu") for f in (lambda x: x, torch.Tensor.contiguous)
    )
    assert torch.equal(strided, dense)


@pytest.mark.parametrize("row", [repeated([40, 200, 3], 1), repeated([40, 200, 3], 0), repeated([81, 81, 81], 0)])
def test_gradients_accept_strided_output_gradients(row: PackedLayout) -> None:
    q, k, v, do = tensors(1, 2, 2, row.length, DIM)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = attend(*leaves, (row,), backend="cpu")
    dense = torch.autograd.grad(out, leaves, do, retain_graph=True)
    strided = torch.autograd.grad(out, leaves, do.transpose(1, 2).contiguous().transpose(1, 2), retain_graph=True)
    broadcast = torch.autograd.grad(out.sum(), leaves)
    ones = torch.autograd.grad(attend(*leaves, (row,), backend="cpu"), leaves, torch.ones_like(do))
    # The kernel picks its matmul by stride: sums of 200 terms in another order, 1.4e-15 measured.
    for x, y in zip(dense + broadcast, strided + ones, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-14)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("anchor", [0, 1, 2])
def test_gradcheck(anchor: int, window: int | None) -> None:
    row = repeated([4, 1, 3], anchor)
    leaves = [x.requires_grad_() for x in tensors(1, 2, 1, row.length, 3)[:3]]
    assert torch.autograd.gradcheck(lambda *x: attend(*x, (row,), window=window, backend="cpu"), leaves)


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("rows", [(repeated([3, 5], 1),) * 2, (repeated([4, 5], 0),) * 2, (repeated([3] * 60, 0),)])
def test_output_lies_in_memory_as_projections_want_it(rows: tuple[PackedLayout, ...], window: int | None) -> None:
    q, k, v, _ = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors(len(rows), 4, 2, rows[0].length, DIM))
    out = attend(q, k, v, rows, window=window, backend="cpu")
    assert out.shape == q.shape and out.transpose(1, 2).is_contiguous()


def test_one_call_hands_on_what_the_kernel_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is copied where equally long documents fill the row."""
    returned: list[int] = []

    def spy(function: Callable[..., tuple[torch.Tensor, ...]]) -> Callable[..., tuple[torch.Tensor, ...]]:
        def spied(*args: Any) -> tuple[torch.Tensor, ...]:
            found = function(*args)
            returned.extend(x.data_ptr() for x in found)
            return found

        return spied

    for name in ("forward", "backward"):
        monkeypatch.setattr(CpuKernel, name, spy(getattr(CpuKernel, name)))
    row = repeated([50] * 8, 0)
    q, k, v, do = tensors(1, 2, 2, row.length, DIM)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = attend(*leaves, (row,), backend="cpu")
    gradients = torch.autograd.grad(out, leaves, do)
    o, _, *grads = returned
    assert [o, *grads] == [x.data_ptr() for x in (out, *gradients)]


def test_second_derivatives_are_refused() -> None:
    row = repeated([4], 1)
    leaves = [x.requires_grad_() for x in tensors(1, 1, 1, 5, 4)[:3]]
    first = torch.autograd.grad(attend(*leaves, (row,), backend="cpu").square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first[0].sum().backward()

"""Attention sinks against a dense oracle written here, outputs and gradients, the sinks' own included."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anchorctx.attention import attend, sinks
from anchorctx.attention.kernels.base import Score
from anchorctx.layout import PackedLayout
from anchorctx.testing.numerics import assert_within_eager, deviations, max_error, output_and_gradients

from .strategies import tensors
from .test_backends import batches

DIM, SCALE = 16, 0.3
FLOAT64_BOUND = 5e-14
"""Absolute, for values of order one: over twice the largest error seen in 800 random batches (1.8e-14)."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = (PackedLayout((0, 2, 50, 51, 90), 2), PackedLayout((0, 2, 30, 60, 90), 2))
COPIES = tuple(PackedLayout((0, 1, a, 89), 1).with_copies()[0] for a in (30, 60))


def oracle(rows: Sequence[PackedLayout], window: int | None = None, scale: float = SCALE) -> Any:
    """Softmax as it is written in books: one more term in the denominator, of each head."""
    allowed = torch.stack([row.allowed(window=window) for row in rows])[:, None]

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        weights = torch.exp(q @ k.mT * scale) * allowed
        return weights @ v / (weights.sum(-1, keepdim=True) + logits.exp()[:, None, None])

    return attention


def attention_by(backend: str, rows: Sequence[PackedLayout], window: int | None = None) -> Any:
    return lambda q, k, v, logits: attend(q, k, v, rows, scale=SCALE, window=window, sinks=logits, backend=backend)


def inputs(
    rows: Sequence[PackedLayout],
    heads: tuple[int, int] = (4, 2),
    dtype: torch.dtype = torch.float64,
    sink_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> list[torch.Tensor]:
    """q, k, v, sinks and the output's gradient."""
    q, k, v, do = tensors(len(rows), *heads, rows[0].length, DIM, dtype, seed)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(heads[0], generator=generator, dtype=torch.float64) * 3
    return [q, k, v, logits.to(sink_dtype or dtype), do]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=batches(),
    heads=st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    window=st.none() | st.integers(3, 40),
    copied=st.booleans(),
    seed=st.integers(0, 2**31),
)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_random_layouts(
    backend: str,
    rows: tuple[PackedLayout, ...],
    heads: tuple[int, int],
    window: int | None,
    copied: bool,
    seed: int,
) -> None:
    """With and without a shared anchor, with copies of it, in windows, interleaved."""
    if copied and 0 < rows[0].anchor_len < rows[0].length:
        rows = (rows[0].with_copies()[0],)
    args = inputs(rows, heads, seed=seed)
    found, exact = (
        output_and_gradients(attention, *args)
        for attention in (attention_by(backend, rows, window), oracle(rows, window))
    )
    assert max(max_error(a, b) for a, b in zip(found, exact, strict=True)) < FLOAT64_BOUND


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("rows", [ROWS, COPIES])
@pytest.mark.parametrize(
    ("dtype", "sink_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),  # flint keeps them so
        (torch.float16, torch.float32),
    ],
)
def test_low_precision(
    dtype: torch.dtype, sink_dtype: torch.dtype, rows: tuple[PackedLayout, ...], window: int | None
) -> None:
    args = inputs(rows, dtype=dtype, sink_dtype=sink_dtype)
    assert_within_eager(deviations(attention_by("cpu", rows, window), args, rows, Score(SCALE, window)))
    logits = args[3].clone().requires_grad_()
    out = attention_by("cpu", rows, window)(*args[:3], logits)
    out.backward(args[4])
    assert out.dtype is dtype and logits.grad is not None and logits.grad.dtype is sink_dtype


def test_gradcheck() -> None:
    row = PackedLayout((0, 1, 4, 8), 1)
    leaves = [x.requires_grad_() for x in (*tensors(1, 2, 1, 8, 3)[:3], torch.tensor([0.5, -1.0], dtype=torch.float64))]
    assert torch.autograd.gradcheck(lambda *x: attend(*x[:3], (row,), sinks=x[3], backend="cpu"), leaves)


@pytest.mark.parametrize("rows", [ROWS, COPIES])
def test_extreme_logits(rows: tuple[PackedLayout, ...]) -> None:
    """A sink of minus infinity takes nothing, bit for bit; one far above all scores takes everything, without NaN."""
    q, k, v, _, do = inputs(rows)
    without = output_and_gradients(lambda *x: attend(*x, rows, scale=SCALE, backend="cpu"), q, k, v, do)
    none = output_and_gradients(attention_by("cpu", rows), q, k, v, torch.full((4,), float("-inf")), do)
    assert all(map(torch.equal, without, none[:4])) and not none[4].any()
    whole = output_and_gradients(attention_by("cpu", rows), q, k, v, torch.full((4,), 1e4), do)
    assert not any(x.any() for x in whole)


@pytest.mark.parametrize("rows", [ROWS, COPIES])
def test_frozen_sinks_cost_no_gradient(rows: tuple[PackedLayout, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do tensors that need none: sinks alone may be trained."""
    q, k, v, logits, do = inputs(rows)
    attention = attention_by("cpu", rows)
    trained = logits.clone().requires_grad_()
    attention(q, k, v, trained).backward(do)
    assert trained.grad is not None and trained.grad.all()
    for home in ("documents", "merge"):
        module = importlib.import_module(f"anchorctx.attention.{home}")
        monkeypatch.setattr(module, "sinks_gradient", lambda *x: pytest.fail("a gradient that nobody wants"))
    attention(q.requires_grad_(), k, v, logits).backward(do)
    assert q.grad is not None and q.grad.any()


@pytest.mark.parametrize("shape", [(2,), (4, 1), (1, 4, 1, 1)])
def test_one_logit_a_head(shape: tuple[int, ...]) -> None:
    q, k, v, *_ = inputs(ROWS)
    with pytest.raises(ValueError, match="must hold one logit for each of 4 query heads"):
        attend(q, k, v, ROWS, sinks=torch.zeros(shape))


# -- the fused gradient -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("rounded_bfloat16")
@pytest.mark.parametrize("dim", [16, 20, 192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fused_gradient(dtype: torch.dtype, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several programs a head, the last one not full; against torch's operators in float64."""
    pytest.importorskip("triton")
    fused = importlib.import_module("anchorctx.attention.fused.sinks")
    monkeypatch.setattr(fused, "TILES", 2)
    tokens = 150
    o, do = (x.to(DEVICE) for x in tensors(2, 3, 3, tokens, dim, dtype)[::3])
    o, do = o.transpose(1, 2).contiguous().transpose(1, 2), do[..., :1].expand(o.shape)
    lse = torch.randn(2, tokens, 3, device=DEVICE).transpose(1, 2) + 2
    logits = torch.tensor([0.5, -2.0, 3.0], device=DEVICE, dtype=dtype)
    exact = sinks.sinks_gradient(do.double(), o.double(), lse.double(), logits.double())
    by_torch = sinks.sinks_gradient(do, o, lse, logits) if DEVICE == "cpu" else exact
    if DEVICE == "cpu":
        monkeypatch.setattr(sinks, "launch", SimpleNamespace(serves=lambda *x: True))
    found = sinks.sinks_gradient(do, o, lse, logits)
    assert found.dtype is logits.dtype and found.shape == (3,)
    # terms that cancel are summed in float32, and the sum is rounded to the sinks' dtype once
    terms = (logits.double()[:, None] - lse).exp() * (do.double() * o.double()).abs().sum(-1)
    bound = torch.finfo(torch.float32).eps * terms.sum((0, 2)) + torch.finfo(dtype).eps / 2 * exact.abs()
    assert all(((x.double() - exact).abs() <= bound).all() for x in (found, by_torch))

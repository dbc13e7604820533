"""Values of another head dimension than queries and keys, as multi-head latent attention has them.

Outputs and gradients against a dense oracle written here; the CUDA kernels behind stand-ins and with fake tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from anchorctx.attention import attend, flex
from anchorctx.attention.kernels.base import Score
from anchorctx.attention.kernels.flash_attn import FlashAttnKernel
from anchorctx.attention.kernels.torch_varlen import TorchVarlenKernel
from anchorctx.errors import BackendUnavailableError
from anchorctx.layout import PackedLayout
from anchorctx.testing.numerics import assert_within_eager, deviations, max_error, output_and_gradients

from .flash_attn_contract import Recorder
from .strategies import tensors
from .test_flex import EAGER_WARNING
from .test_gpu_path import PACKAGES, ROWS, SCORES, check, fake_step, heads_last

DIMS = [(24, 16), (12, 7), (8, 20), (192, 128)]
"""Of queries and keys, and of values: narrower and wider, multiples of 8 or not, and DeepSeek's."""
FLOAT64_BOUND = 5e-14
"""Absolute, for values of order one: four times the largest error of five seeds of each case (1.2e-14)."""
CASES = {
    "shared anchor": (PackedLayout((0, 2, 50, 51, 90), 2), PackedLayout((0, 2, 30, 60, 90), 2)),
    "copies": tuple(PackedLayout((0, 1, a, 89), 1).with_copies()[0] for a in (30, 60)),
    "short documents": (PackedLayout((0, 3, 8, 10, 11, 90)), PackedLayout((0, 45, 90))),
    "interleaved": (PackedLayout((0, 1, 20, 40, 90), 1, doc_ids=(0, 1, 2, 1)),) * 2,
}


def oracle(rows: Sequence[PackedLayout], score: Score) -> Any:
    allowed = torch.stack([row.allowed(window=score.window) for row in rows])[:, None]

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        groups = q.shape[1] // k.shape[1]
        weights = torch.exp(q @ k.repeat_interleave(groups, 1).mT * score.scale) * allowed
        return weights / weights.sum(-1, keepdim=True) @ v.repeat_interleave(groups, 1)

    return attention


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dim", "value_dim"), DIMS)
def test_against_the_oracle(dim: int, value_dim: int, case: str, window: int | None, backend: str) -> None:
    """The scale is that of the queries' own dimension, however wide the kernel's is."""
    rows = CASES[case]
    args = [heads_last(x) for x in tensors(2, 4, 2, 90, dim, value_dim=value_dim)]
    found = output_and_gradients(lambda *x: attend(*x, rows, window=window, backend=backend), *args)
    exact = output_and_gradients(oracle(rows, Score(dim**-0.5, window)), *args)
    assert max(max_error(a, b) for a, b in zip(found, exact, strict=True)) < FLOAT64_BOUND
    if case != "interleaved":  # whose tokens are put back by their index
        assert found[0].transpose(1, 2).is_contiguous() or backend == "reference"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_low_precision_with_sinks(case: str, dtype: torch.dtype) -> None:
    """MiMo has both."""
    rows, score = CASES[case], Score(0.3, 7)
    q, k, v, do = tensors(2, 4, 2, 90, 24, dtype, value_dim=16)
    args = [q, k, v, torch.linspace(-2, 3, 4, dtype=dtype), do]

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
        return attend(q, k, v, rows, scale=score.scale, window=score.window, sinks=sinks, backend="cpu")

    assert_within_eager(deviations(attention, args, rows, score))


@pytest.mark.filterwarnings(EAGER_WARNING)
def test_flex_in_eager_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "_compiled", lambda: flex._with_sinks)
    rows, score = CASES["shared anchor"], Score(0.3, 7)
    q, k, v, _ = tensors(2, 4, 2, 90, 24, value_dim=16)
    assert max_error(flex.flex_attention(q, k, v, rows, score), oracle(rows, score)(q, k, v)) < FLOAT64_BOUND


# -- the CUDA kernels, which take one dimension -----------------------------------------------------------------------


@pytest.mark.parametrize(("dim", "value_dim"), DIMS)
@pytest.mark.parametrize("rows", ["anchor 2", "copies"])
def test_torch_varlen(rows: str, dim: int, value_dim: int, aten: Recorder) -> None:
    check(TorchVarlenKernel(), ROWS[rows], SCORES["window"], torch.float64, dim=dim, value_dim=value_dim, sinks=True)
    width = -(-max(dim, value_dim) // 8) * 8
    assert {a[name].shape[-1] for _, a in aten.calls for name in ("query", "key", "value")} == {width}


@pytest.mark.parametrize("flash", PACKAGES, indirect=True)
@pytest.mark.parametrize("rows", ["anchor 2", "copies"])
def test_flash_attn(rows: str, flash: Recorder) -> None:
    check(FlashAttnKernel(), ROWS[rows], SCORES["softcap"], torch.float64, dim=24, value_dim=16)
    assert len(flash.calls) == 2


@pytest.mark.usefixtures("cuda_guard")
@pytest.mark.parametrize(("dim", "value_dim"), DIMS)
@pytest.mark.parametrize("rows", ["anchor 1", "copies"])
def test_fake_cuda_shapes(rows: str, dim: int, value_dim: int) -> None:
    (q, k, v, o), grads, _ = fake_step(ROWS[rows], SCORES["plain"], TorchVarlenKernel(), dim, value_dim)
    assert o.shape == (*q.shape[:3], value_dim) and o.transpose(1, 2).is_contiguous() and o.dtype is torch.bfloat16
    for like, x in zip((q, k, v), grads, strict=True):
        assert (x.shape, x.stride(), x.dtype, x.device) == (like.shape, like.stride(), like.dtype, like.device)


def test_the_wider_dimension_decides_who_serves_the_call() -> None:
    with FakeTensorMode(), pytest.raises(BackendUnavailableError, match="up to 256, but the model's is 320"):
        q, v = (torch.empty(1, 2, 4, dim, dtype=torch.bfloat16, device="cuda") for dim in (64, 320))
        attend(q, q, v, (PackedLayout((0, 4)),), backend="torch_varlen")


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # what compilers warn of on a card is theirs
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["torch_varlen", "flash_attn", "flex"])
@pytest.mark.parametrize("rows", ["anchor 2", "copies"])
def test_on_a_gpu(rows: str, backend: str) -> None:
    layouts, score = ROWS[rows], Score(192**-0.5)
    args = [heads_last(x).cuda() for x in tensors(2, 4, 4, layouts[0].length, 192, torch.bfloat16, value_dim=128)]
    try:
        attend(*args[:3], layouts, backend=backend)
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    assert_within_eager(deviations(lambda *x: attend(*x, layouts, backend=backend), args, layouts, score))

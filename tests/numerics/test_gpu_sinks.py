"""Attention sinks behind the CUDA kernels: numbers by stand-ins, shapes by fake tensors, and on a card."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from anchorctx.attention import attend
from anchorctx.attention.kernels.flash_attn import FlashAttnKernel
from anchorctx.attention.kernels.torch_varlen import TorchVarlenKernel
from anchorctx.errors import BackendUnavailableError
from anchorctx.testing.numerics import assert_within_eager, deviations

from .flash_attn_contract import Recorder
from .strategies import tensors
from .test_gpu_path import PACKAGES, ROWS, SCORES, check, fake_step, heads_last


@pytest.mark.parametrize("score", ["plain", "window"])
@pytest.mark.parametrize("rows", ROWS)
def test_torch_varlen(rows: str, score: str, aten: Recorder) -> None:
    check(TorchVarlenKernel(), ROWS[rows], SCORES[score], torch.float64, sinks=True)
    assert [name for name, _ in aten.calls] == ["forward", "backward"]


@pytest.mark.parametrize("flash", PACKAGES, indirect=True)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("rows", ["anchor 1", "copies"])
def test_flash_attn(rows: str, score: str, flash: Recorder) -> None:
    check(FlashAttnKernel(), ROWS[rows], SCORES[score], torch.float64, sinks=True)
    assert len(flash.calls) == 2


@pytest.mark.usefixtures("cuda_guard")
@pytest.mark.parametrize("rows", ROWS)
def test_fake_cuda_shapes(rows: str) -> None:
    """The output is written in its place, in its dtype; the sinks' gradient has theirs."""
    (q, k, v, o), (*grads, dsinks), launched = fake_step(ROWS[rows], SCORES["window"], TorchVarlenKernel(), sinks=True)
    for like, x in zip((q, q, k, v), (o, *grads), strict=True):
        assert (x.shape, x.stride(), x.dtype, x.device) == (like.shape, like.stride(), like.dtype, like.device)
    assert (dsinks.shape, dsinks.dtype, dsinks.device.type) == ((8,), torch.bfloat16, "cuda")
    assert launched.count("_flash_attention_forward") == launched.count("_flash_attention_backward") == 1


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # what compilers warn of on a card is theirs
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["torch_varlen", "flash_attn", "flex"])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("rows", ROWS)
def test_on_a_gpu(rows: str, score: str, backend: str) -> None:
    layouts, s = ROWS[rows], SCORES[score]
    options: dict[str, Any] = {"scale": s.scale, "window": s.window, "softcap": s.softcap, "backend": backend}
    q, k, v, do = (heads_last(x).cuda() for x in tensors(2, 4, 2, layouts[0].length, 64, torch.bfloat16))
    sinks = torch.linspace(-2, 3, 4).cuda()

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
        return attend(q, k, v, layouts, sinks=sinks, **options)

    try:
        attention(q, k, v, sinks)
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    assert_within_eager(deviations(attention, [q, k, v, sinks, do], layouts, s))

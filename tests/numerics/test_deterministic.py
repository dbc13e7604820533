"""Attention's gradients on a CUDA card under torch's switch for deterministic algorithms."""

from __future__ import annotations

import pytest
import torch

from anchorctx.attention import attend
from anchorctx.errors import BackendUnavailableError
from anchorctx.layout import PackedLayout

from .strategies import tensors


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["torch_varlen", "flash_attn", "flex"])
def test_the_same_bits_each_time(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long documents of few heads, so that many blocks add to the same gradients: ten times the same bits."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    rows = (PackedLayout((0, 5000, 5300, 16_384)),)
    q, k, v, do = (x.cuda().requires_grad_() for x in tensors(1, 4, 2, 16_384, 64, torch.bfloat16))

    def gradients() -> list[torch.Tensor]:
        return list(torch.autograd.grad(attend(q, k, v, rows, backend=backend), (q, k, v), do))

    torch.use_deterministic_algorithms(True)
    try:
        first = gradients()
        for _ in range(9):
            assert all(map(torch.equal, gradients(), first))
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    finally:
        torch.use_deterministic_algorithms(False)

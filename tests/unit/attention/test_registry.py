"""Which backend serves a call: explicit requests never fall back, refusals say why, `auto` says what it chose."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from torch._subclasses import FakeTensorMode

from anchorctx.attention import BACKENDS, attend, registry
from anchorctx.attention.kernels.base import Score
from anchorctx.attention.registry import choose
from anchorctx.errors import BackendUnavailableError, UserError
from anchorctx.layout import PackedLayout

ROW = PackedLayout((0, 1, 5, 8), 1)
CUDA_ONLY = [name for name, backend in BACKENDS.items() if backend.devices == ("cuda",)]


def qkv(dtype: torch.dtype = torch.float32, dim: int = 16, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(1, 2, ROW.length, dim).to(device, dtype) for _ in range(3))


def fake_cuda(dtype: torch.dtype, dim: int) -> torch.Tensor:
    """A query that claims to be on CUDA: capability checks look at device, dtype and shape alone."""
    with FakeTensorMode():
        return torch.empty(1, 2, ROW.length, dim, dtype=dtype, device="cuda")


def test_order_prefers_the_fastest() -> None:
    assert list(BACKENDS) == ["flash_attn", "torch_varlen", "cpu", "flex", "reference"]
    assert all(name == backend.name and backend.summary for name, backend in BACKENDS.items())


@pytest.mark.parametrize("name", CUDA_ONLY)
def test_cuda_backends_refuse_cpu_tensors_and_never_fall_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in BACKENDS:
        monkeypatch.setitem(registry.BACKENDS, other, replace_attend(BACKENDS[other]))
    with pytest.raises(BackendUnavailableError) as error:
        attend(*qkv(torch.bfloat16), (ROW,), backend=name)
    message = f"attention backend '{name}' runs on cuda, but the tensors are on cpu: use attention=cpu"
    assert str(error.value) == message


def replace_attend(backend: registry.Backend) -> registry.Backend:
    def called(*args: object, **options: object) -> torch.Tensor:
        raise AssertionError(f"{backend.name} was called")

    return replace(backend, attend=called)


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_explicit_requests_are_served_by_their_own_backend(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in BACKENDS:
        monkeypatch.setitem(registry.BACKENDS, other, replace_attend(BACKENDS[other]))
    with pytest.raises(AssertionError, match=f"^{name} was called$"):
        attend(*qkv(), (ROW,), backend=name)


def test_dtype_refusals() -> None:
    query = fake_cuda(torch.float32, 64)
    for name in ("flash_attn", "torch_varlen"):
        with pytest.raises(BackendUnavailableError, match="takes bfloat16, float16, but the tensors are float32: use"):
            choose(name, query, Score(1.0))
    with pytest.raises(BackendUnavailableError, match="'cpu' takes .*, but the tensors are complex64"):
        choose("cpu", qkv(torch.complex64)[0], Score(1.0))


def test_softcap_refusals() -> None:
    with pytest.raises(BackendUnavailableError) as error:
        attend(*qkv(), (ROW,), softcap=50.0, backend="cpu")
    assert str(error.value) == (
        "attention backend 'cpu' cannot soft-cap scores, but the model asks for softcap=50.0: use attention=reference"
    )
    assert choose("auto", qkv()[0], Score(1.0, softcap=50.0)).name == "reference"


@pytest.mark.parametrize("name", ["flash_attn", "torch_varlen"])
def test_head_dimension_refusals(name: str) -> None:
    with pytest.raises(BackendUnavailableError, match="takes head dimensions up to 256, but the model's is 320"):
        choose(name, fake_cuda(torch.bfloat16, 320), Score(1.0))


def test_unknown_names() -> None:
    with pytest.raises(UserError) as error:
        attend(*qkv(), (ROW,), backend="flash")
    names = "flash_attn, torch_varlen, cpu, flex, reference"
    assert str(error.value) == f"unknown attention backend 'flash': choose auto, {names}"


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = replace(BACKENDS["cpu"], missing=lambda: "needs the package example: pip install example")
    monkeypatch.setitem(registry.BACKENDS, "cpu", absent)
    with pytest.raises(BackendUnavailableError, match="'cpu' needs the package example"):
        attend(*qkv(), (ROW,), backend="cpu")
    assert choose("auto", qkv()[0], Score(1.0)).name == "reference"


def test_auto_takes_cpu_here_and_logs_why(caplog: pytest.LogCaptureFixture) -> None:
    registry._log_choice.cache_clear()
    with caplog.at_level(logging.INFO, logger=registry.__name__):
        out = attend(*qkv(), (ROW,))
        attend(*qkv(), (ROW,))
    assert out.isfinite().all()
    assert len(caplog.records) == 1, "said once, not at every layer and step"
    message = caplog.records[0].getMessage()
    assert message.startswith("attention backend: cpu (others: flash_attn runs on cuda, but the tensors are on cpu")
    assert "torch_varlen runs on cuda" in message


def test_auto_without_any_backend_lists_every_reason() -> None:
    with pytest.raises(BackendUnavailableError) as error:
        choose("auto", qkv(torch.complex64)[0], Score(1.0))
    assert all(name in str(error.value) for name in BACKENDS)


def shaped(heads: int = 4, kv_heads: int = 2, tokens: int = 8, kv_tokens: int = 8, batch: int = 1) -> tuple:
    kv = (batch, kv_heads, kv_tokens, 16)
    return torch.randn(batch, heads, tokens, 16), torch.randn(kv), torch.randn(kv)


@pytest.mark.parametrize(
    ("tensors", "layouts", "message"),
    [
        (shaped(kv_tokens=7), (ROW,), r"query \(1, 4, 8, 16\), key \(1, 2, 7, 16\) and value .* agree in B and T"),
        (shaped(heads=3), (ROW,), "3 query heads must be a multiple of 2 key heads"),
        (shaped(batch=2), (ROW,), r"2 rows of 8 tokens need as many layouts of that length, got \[8\]"),
        (shaped(tokens=9, kv_tokens=9), (ROW,), r"1 rows of 9 tokens .* got \[8\]"),
        (shaped(batch=2), (ROW, PackedLayout((0, 8))), r"rows of a batch must share one anchor_len, got \[1, 0\]"),
    ],
)
def test_shapes_that_do_not_agree(tensors: tuple, layouts: tuple[PackedLayout, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attend(*tensors, layouts)


def test_dtypes_that_do_not_agree() -> None:
    q, k, v = qkv()
    with pytest.raises(ValueError, match=r"key torch.float64 and value torch.float32 must have one dtype"):
        attend(q, k.double(), v, (ROW,))


@pytest.mark.parametrize(("window", "anchor"), [(0, 1), (1, 2), (-5, 1)])
def test_windows_that_cannot_hold_the_anchor(window: int, anchor: int) -> None:
    row = PackedLayout((0, anchor, 8), anchor)
    with pytest.raises(ValueError, match=f"a window of {window} tokens must hold the anchor, which is {anchor} tokens"):
        attend(*qkv(), (row,), window=window)


def test_windows_that_cannot_hold_a_copy_of_the_anchor() -> None:
    copied, _ = PackedLayout((0, 2, 5), 2).with_copies()
    tensors = tuple(torch.randn(1, 2, copied.length, 16) for _ in range(3))
    with pytest.raises(ValueError, match="a window of 1 tokens must hold the anchor, which is 2 tokens long"):
        attend(*tensors, (copied,), window=1)
    assert attend(*tensors, (copied,), window=2).shape == tensors[0].shape


@pytest.mark.parametrize(("row", "merged"), [(ROW, True), (ROW.with_copies()[0], False), (PackedLayout((0, 8)), False)])
def test_only_a_shared_anchor_is_merged(row: PackedLayout, merged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    for name in ("anchor_attention", "document_attention"):
        function = getattr(registry, name)
        monkeypatch.setattr(registry, name, lambda *x, n=name, f=function, **y: called.append(n) or f(*x, **y))
    attend(*(torch.randn(1, 2, row.length, 16) for _ in range(3)), (row,), backend="cpu")
    assert called == ["anchor_attention" if merged else "document_attention"]

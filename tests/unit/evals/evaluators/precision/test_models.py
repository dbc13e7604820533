"""Emulated bfloat16 against torch's real bfloat16 kernels, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from anchorctx.attention.config import RopeDtype
from anchorctx.attention.rope import set_rope_dtype
from anchorctx.evals.evaluators.precision import probe
from anchorctx.evals.evaluators.precision.config import Emulate
from anchorctx.evals.evaluators.precision.measure import Instrument, TextRow, late_queries
from anchorctx.evals.evaluators.precision.models import EmulatedBfloat16, arithmetic_context, emulates
from anchorctx.layout import PackedLayout
from anchorctx.testing.tiny import ARCHITECTURES

PRODUCTS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "mm": lambda a, b, bias: a @ b,
    "linear": lambda a, b, bias: torch.nn.functional.linear(a, b.T.contiguous()),
    "linear with bias": lambda a, b, bias: torch.nn.functional.linear(a, b.T.contiguous(), bias),
    "bmm": lambda a, b, bias: a.expand(3, -1, -1) @ b.expand(3, -1, -1),
    "baddbmm": lambda a, b, bias: torch.baddbmm(bias, a.expand(3, -1, -1), b.expand(3, -1, -1), beta=0.5),
}


def grid(*shape: int) -> torch.Tensor:
    """Multiples of 1/64 up to 2: sums of a few hundred products fit float32, so that no order of adding matters."""
    return torch.randint(-128, 129, shape).div(64).bfloat16()


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("inner", [1, 16, 300])
def test_products_are_bit_equal_where_no_order_of_adding_matters(name: str, inner: int):
    torch.manual_seed(0)
    a, b, bias = grid(33, inner), grid(inner, 20), grid(20)
    real = PRODUCTS[name](a, b, bias)
    with EmulatedBfloat16():
        emulated = PRODUCTS[name](a, b, bias)
    assert emulated.dtype is torch.bfloat16
    assert torch.equal(emulated, real)
    exact = PRODUCTS[name](a.double(), b.double(), bias.double())
    assert torch.equal(real, exact.bfloat16())  # both are the exact result, rounded once
    assert not torch.equal(real.double(), exact) or inner == 1


def test_other_dtypes_and_operations_are_left_alone():
    a = torch.randn(4, 4)
    with EmulatedBfloat16():
        assert (a @ a).dtype is torch.float32 and torch.equal(a @ a, a.mm(a))
        assert torch.equal(a.bfloat16() * a.bfloat16(), (a.bfloat16().float() * a.bfloat16().float()).bfloat16())


@pytest.mark.parametrize("rope", [RopeDtype.bfloat16, RopeDtype.float32])
@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3", "gpt_neox"])
def test_a_small_model_is_bit_equal(name: str, rope: RopeDtype):
    """Logits and every measured change: real kernels against the emulation.

    The row's sums meet no tie. Of four rows and these eight models two had one, which moved a log-probability by 3e-10
    and by 6e-3 nats.
    """
    probe.register()
    model = ARCHITECTURES[name].build(torch.bfloat16).eval()
    set_rope_dtype(model, rope)
    model.set_attn_implementation(probe.NAME)
    row = TextRow(torch.arange(4, 28).numpy(), PackedLayout((0, 24)))
    positions, queries = [torch.arange(24) + shift for shift in (0, 16, 4096)], late_queries(24, 8)
    real, emulated = (Instrument(model, frozenset((0, 1)), 8, flag) for flag in (False, True))
    pairs = zip(
        real.changes(row, row.layout, positions, queries),
        emulated.changes(row, row.layout, positions, queries),
        strict=True,
    )
    for a, b in pairs:
        for layer in (0, 1):
            assert torch.equal(a[layer].attention, b[layer].attention)
            assert torch.equal(a[layer].score, b[layer].score)
    spoken = [tool.log_probabilities(row, row.layout, positions, queries) for tool in (real, emulated)]
    assert all(torch.equal(a, b) for a, b in zip(*spoken, strict=True))


class Products(TorchDispatchMode):
    """Notes the dtypes that matrix products are computed in; linear layers that stay whole count as one."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("mm", "addmm", "linear", "matmul"):
            self.dtypes.add(args[-1].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("emulated", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_an_instrument_computes_as_it_says(emulated: bool, dtype: torch.dtype):
    """The results are the same, so that only the products themselves tell."""
    probe.register()
    model = ARCHITECTURES["qwen2"].build(torch.bfloat16).eval()
    model.set_attn_implementation(probe.NAME)
    tool = Instrument(model, frozenset((0, 1)), 8, emulated)
    row = TextRow(torch.arange(3, 27).numpy(), PackedLayout((0, 24)))
    with Products() as seen:
        tool.log_probabilities(row, row.layout, [torch.arange(24), torch.arange(24) + 16], late_queries(24, 8))
    assert seen.dtypes == {dtype}


def test_when_to_emulate(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert emulates(Emulate.auto, torch.device("cpu"))
    assert not emulates(Emulate.auto, torch.device("cuda"))
    assert not emulates(Emulate.never, torch.device("cpu"))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert not emulates(Emulate.auto, torch.device("cpu"))
    assert emulates(Emulate.always, torch.device("cuda"))
    assert isinstance(arithmetic_context(True), EmulatedBfloat16)

"""The merge's kernels against the dense reference in float64; in Triton's interpreter where there is no card."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from anchorctx.attention import merge
from anchorctx.attention.kernels import flash_attn
from anchorctx.attention.kernels.base import Kernel, Score
from anchorctx.attention.kernels.cpu import CpuKernel
from anchorctx.attention.kernels.flash_attn import FlashAttnKernel
from anchorctx.attention.merge import FUSED_ANCHOR, anchor_attention
from anchorctx.layout import PackedLayout
from anchorctx.testing.numerics import assert_within_eager, deviations, output_and_gradients

from .flash_attn_contract import Recorder, install
from .strategies import tensors

pytest.importorskip("triton")
kernels = importlib.import_module("anchorctx.attention.fused.merge")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = {
    "two rows": (PackedLayout((0, 1, 30, 31, 90), 1), PackedLayout((0, 1, 2, 3, 90), 1)),
    "three anchor tokens": (PackedLayout((0, 3, 40, 41, 90), 3), PackedLayout((0, 3, 90), 3)),
    "several programs": (PackedLayout((0, 1, 400, 600), 1),),
    "anchor alone": (PackedLayout((0, 1), 1),) * 2,
}
HEADS = {"grouped": (4, 2, 16), "one key head": (3, 1, 24), "odd width": (2, 2, 20), "wide": (2, 1, 192)}
"""Query heads, key heads, dimensions."""
SCORES = {"plain": Score(0.3), "window": Score(0.3, window=7), "softcap": Score(0.3, softcap=1.5)}


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch, rounded_bfloat16: None) -> Iterator[list[str]]:
    """Lets the kernels serve CPU tensors, behind a stand-in of flash-attn; yields which ran."""
    install(monkeypatch, "FA2", Recorder())
    for cached in (flash_attn._module, flash_attn._select):
        cached.cache_clear()
    if DEVICE == "cpu":
        monkeypatch.setattr(merge, "launch", SimpleNamespace(serves=lambda *tensors: True))
    ran: list[str] = []
    for name in ("merge_forward", "merge_backward"):
        monkeypatch.setattr(kernels, name, noting(ran, name))
    yield ran
    for cached in (flash_attn._module, flash_attn._select):
        cached.cache_clear()


def noting(ran: list[str], name: str) -> Any:
    own = getattr(kernels, name)

    def noted(*args: Any) -> None:
        ran.append(name)
        own(*args)

    return noted


def attention(rows: tuple[PackedLayout, ...], score: Score, kernel: Kernel | None = None) -> Any:
    chosen = kernel or FlashAttnKernel()
    return lambda q, k, v, *sinks: anchor_attention(q, k, v, rows, score, chosen, *sinks)


def inputs(rows: str, heads: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """q, k, v and the output's gradient, in memory as behind a projection."""
    made = tensors(len(ROWS[rows]), *HEADS[heads][:2], ROWS[rows][0].length, HEADS[heads][2], dtype)
    return [x.to(DEVICE).transpose(1, 2).contiguous().transpose(1, 2) for x in made]


def check(rows: str, score: str, dtype: torch.dtype = torch.float32, heads: str = "grouped") -> None:
    found = deviations(attention(ROWS[rows], SCORES[score]), inputs(rows, heads, dtype), ROWS[rows], SCORES[score])
    assert_within_eager(found)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("rows", ROWS)
def test_float32(rows: str, score: str, launches: list[str]) -> None:
    check(rows, score)
    assert launches == ["merge_forward", "merge_backward"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", ["two rows", "several programs"])
def test_16_bits(rows: str, dtype: torch.dtype) -> None:
    check(rows, "plain", dtype)


def test_sinks_behind_the_anchor(launches: list[str]) -> None:
    rows, score = ROWS["three anchor tokens"], SCORES["window"]
    q, k, v, do = inputs("three anchor tokens", "grouped", torch.float32)
    sinks = torch.linspace(-2, 3, 4, device=DEVICE)
    assert_within_eager(deviations(attention(rows, score), [q, k, v, sinks, do], rows, score))
    assert launches == ["merge_forward", "merge_backward"]


@pytest.mark.parametrize("heads", HEADS)
def test_heads(heads: str) -> None:
    check("three anchor tokens", "softcap", heads=heads)


def test_memory_and_gradients_of_any_stride() -> None:
    """Heads first, and the gradient of a sum, which is expanded."""
    rows, score = ROWS["two rows"], SCORES["plain"]
    q, k, v, _ = (x.contiguous() for x in inputs("two rows", "grouped", torch.float32))
    ones = torch.ones((), device=DEVICE).expand(q.shape)
    assert_within_eager(deviations(attention(rows, score), [q, k, v, ones], rows, score))


@pytest.mark.skipif(DEVICE == "cuda", reason="the CPU's kernel, which takes several calls")
def test_a_kernel_of_several_calls(launches: list[str]) -> None:
    rows, score = ROWS["two rows"], SCORES["window"]
    args = inputs("two rows", "grouped", torch.float32)
    assert_within_eager(deviations(attention(rows, score, CpuKernel()), args, rows, score))
    assert launches == ["merge_forward", "merge_backward"]


def test_same_bits_at_every_run() -> None:
    args = inputs("several programs", "grouped", torch.bfloat16)
    runs = [output_and_gradients(attention(ROWS["several programs"], SCORES["plain"]), *args) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_what_goes_the_other_way(launches: list[str]) -> None:
    """float64, anchors of many tokens, and tensors that no kernel serves."""
    q, k, v, _ = inputs("two rows", "grouped", torch.float32)
    assert merge._fuses(q, k, v, FUSED_ANCHOR) and not merge._fuses(q, k, v, FUSED_ANCHOR + 1)
    assert not merge._fuses(q.double(), k.double(), v.double(), 1)
    attention(ROWS["two rows"], SCORES["plain"])(q.double(), k.double(), v.double())
    assert not launches

"""The CUDA kernels without a GPU: shapes by fake tensors, numbers by plain-torch stand-ins of the same contract."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from anchorctx.attention import attend
from anchorctx.attention.documents import _DocumentAttention
from anchorctx.attention.kernels import flash_attn, torch_varlen
from anchorctx.attention.kernels.base import Kernel, Score
from anchorctx.attention.kernels.flash_attn import FlashAttnKernel, gathered_attention
from anchorctx.attention.kernels.torch_varlen import TorchVarlenKernel
from anchorctx.attention.kernels.varlen import MAX_SEQUENCES
from anchorctx.attention.merge import _AnchorAttention
from anchorctx.attention.registry import kernel_attention
from anchorctx.errors import BackendUnavailableError
from anchorctx.layout import PackedLayout
from anchorctx.testing.numerics import assert_within_eager, deviations

from .dispatch_modes import Launched, NoHostCopies
from .flash_attn_contract import MODULES, RECORDED, USED, VERSIONS, Recorder, stand_in
from .strategies import tensors

ROOT = Path(__file__).parents[2]
FLOAT64_BOUND = 1e-12
"""Absolute, for values of order one: the float64 stand-ins and the reference only differ by rounding."""
PACKAGES = list(RECORDED)
ROWS = {
    "anchor 1": (PackedLayout((0, 1, 30, 31, 90), 1), PackedLayout((0, 1, 2, 3, 90), 1)),
    "anchor 2": (PackedLayout((0, 2, 40, 41, 90), 2), PackedLayout((0, 2, 90), 2)),
    "no anchor": (PackedLayout((0, 30, 31, 90)), PackedLayout((0, 90))),
    "copies": tuple(PackedLayout((0, 1, a, 89), 1).with_copies()[0] for a in (30, 88)),
    "anchor alone": (PackedLayout((0, 1), 1),) * 2,
}
SCORES = {"plain": Score(0.3), "window": Score(0.3, window=7), "softcap": Score(0.3, softcap=1.5)}
SCORES["window and softcap"] = Score(0.3, window=7, softcap=1.5)


def heads_last(x: torch.Tensor) -> torch.Tensor:
    """The same values, in memory as (B, T, H, D): what a projection leaves."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def check(
    kernel: Kernel,
    rows: tuple[PackedLayout, ...],
    score: Score,
    dtype: torch.dtype,
    heads: tuple[int, int] = (4, 2),
    dim: int = 16,
    value_dim: int | None = None,
    sinks: bool = False,
) -> None:
    """Output and gradients of a kernel in its path, against the dense reference."""
    args = [heads_last(x) for x in tensors(len(rows), *heads, rows[0].length, dim, dtype, value_dim=value_dim)]
    if sinks:
        args.insert(3, torch.linspace(-2, 3, heads[0], dtype=dtype))
    found = deviations(lambda q, k, v, *s: kernel_attention(q, k, v, rows, score, kernel, *s), args, rows, score)
    if dtype is torch.float64:
        assert max(d.error for d in found) < FLOAT64_BOUND, found
    else:
        assert_within_eager(found)


# -- torch's varlen operators ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("score", ["plain", "window"])
@pytest.mark.parametrize("rows", ROWS)
def test_torch_varlen_numbers(rows: str, score: str, dtype: torch.dtype, aten: Recorder) -> None:
    check(TorchVarlenKernel(), ROWS[rows], SCORES[score], dtype)
    assert [name for name, _ in aten.calls] == ["forward", "backward"]  # the whole batch in one call each


def test_torch_varlen_takes_views_of_heads_last_memory(aten: Recorder) -> None:
    rows = ROWS["anchor 1"]
    q, k, v, _ = (heads_last(x) for x in tensors(2, 4, 2, 90, 16))
    kernel_attention(q, k, v, rows, SCORES["plain"], TorchVarlenKernel())
    _, arguments = aten.calls[0]
    assert [arguments[n].data_ptr() for n in ("query", "key", "value")] == [x.data_ptr() for x in (q, k, v)]


def test_torch_varlen_pads_odd_head_dimensions(aten: Recorder) -> None:
    check(TorchVarlenKernel(), ROWS["anchor 2"], SCORES["plain"], torch.float64, dim=12)
    assert aten.calls[0][1]["query"].shape[-1] == 16


def test_more_documents_than_a_call_takes(aten: Recorder) -> None:
    rows = tuple(PackedLayout((0, 2, *range(5 + row, 90, 3), 90), 2) for row in range(2))
    check(TorchVarlenKernel(max_sequences=11), rows, SCORES["plain"], torch.float64)
    sizes = [len(a["cum_seq_q"]) - 1 for name, a in aten.calls if name == "forward"]
    assert len(sizes) > 2 and max(sizes) == 11
    assert sum(sizes) == sum(len(row.doc_offsets) - 1 for row in rows)


def test_default_limit_cuts_rows_of_tiny_documents() -> None:
    row = PackedLayout(tuple(range(70_001)))
    tiles = TorchVarlenKernel().tiles((row, row), torch.device("cpu"))
    documents = [len(tile.cu_seqlens) - 1 for tile in tiles if tile.cu_seqlens is not None]
    assert sum(documents) == 140_000 and max(documents) == MAX_SEQUENCES <= 65_535
    assert [tile.tokens.stop for tile in tiles][-1] == 70_000
    assert TorchVarlenKernel().tiles((row, row), torch.device("cpu")) is tiles  # built once


def test_gradient_of_a_sum(aten: Recorder) -> None:
    """autograd's gradient of a sum is expanded: a stride of 0 in the last dimension, which no kernel takes."""
    q, k, v, _ = (heads_last(x).requires_grad_() for x in tensors(2, 4, 2, 90, 16))
    kernel_attention(q, k, v, ROWS["anchor 1"], SCORES["plain"], TorchVarlenKernel()).sum().backward()
    assert q.grad is not None and q.grad.isfinite().all()


def test_torch_varlen_gives_a_window_only_where_there_is_one(aten: Recorder) -> None:
    """FlashAttention-4, which may stand behind torch's operators, takes bounds for a window though they are open."""
    args = [heads_last(x).requires_grad_() for x in tensors(2, 4, 2, 90, 16)[:3]]
    for score, bounds in ((SCORES["plain"], set()), (SCORES["window"], {"window_size_left", "window_size_right"})):
        kernel_attention(*args, ROWS["copies"], score, TorchVarlenKernel()).sum().backward()
        calls = [a for _, a in aten.calls[-2:]]
        assert [{name for name in a if name.startswith("window")} for a in calls] == [bounds, bounds]
        assert [a["is_causal"] for a in calls] == [not bounds] * 2


def test_torch_varlen_refuses_softcap() -> None:
    with pytest.raises(BackendUnavailableError, match="soft-cap"):
        kernel_attention(*tensors(1, 2, 2, 90, 16)[:3], ROWS["no anchor"][1:], SCORES["softcap"], TorchVarlenKernel())


# -- fake CUDA tensors ----------------------------------------------------------------------------------------------


def fake_step(
    rows: tuple[PackedLayout, ...],
    score: Score,
    kernel: Kernel,
    dim: int = 64,
    value_dim: int | None = None,
    sinks: bool = False,
) -> tuple[Any, Any, list[str]]:
    """Forward and backward on fake CUDA tensors in bfloat16, 8 query and 2 key heads, and what they launch.

    Calls the autograd function's two halves itself: torch's autograd engine needs a real device guard.
    """
    shape = len(rows), rows[0].length
    function = _AnchorAttention if rows[0].anchor_len else _DocumentAttention

    def empty(heads: int, dim: int = dim) -> torch.Tensor:
        return torch.empty(*shape, heads, dim, dtype=torch.bfloat16, device="cuda").transpose(1, 2)

    ctx = SimpleNamespace(save_for_backward=lambda *saved: setattr(ctx, "saved_tensors", saved))
    ctx.needs_input_grad = (True,) * 8
    with FakeTensorMode(), NoHostCopies():
        q, k, v = empty(8), empty(2), empty(2, value_dim or dim)
        logits = {"sinks": torch.empty(8, dtype=torch.bfloat16, device="cuda")} if sinks else {}
        tiles = kernel.tiles(rows, q.device)  # kept from one call to the next, but not while tensors are fake
        with Launched() as launched, mock.patch.object(kernel, "tiles", return_value=tiles):
            o = function.forward(ctx, q, k, v, rows, score, kernel, **logits)
            grads = function.backward(ctx, torch.empty_like(o))
        return (q, k, v, o), [*grads[:3], *(grads[-1:] if sinks else ())], launched.names


@pytest.mark.usefixtures("cuda_guard")
@pytest.mark.parametrize("dim", [64, 20])
@pytest.mark.parametrize("score", ["plain", "window"])
@pytest.mark.parametrize("rows", ROWS)
def test_fake_cuda_shapes(rows: str, score: str, dim: int) -> None:
    """Runs the CUDA operators' own shape functions; reading a value back to the host would raise."""
    (q, k, v, o), grads, _ = fake_step(ROWS[rows], SCORES[score], TorchVarlenKernel(), dim)
    assert o.device.type == "cuda" and o.dtype is torch.bfloat16
    for like, x in zip((q, q, k, v), (o, *grads), strict=True):
        assert (x.shape, x.stride(), x.dtype, x.device) == (like.shape, like.stride(), like.dtype, like.device)


@pytest.mark.usefixtures("cuda_guard")
@pytest.mark.parametrize("rows", ["no anchor", "copies"])
def test_without_a_shared_anchor_the_kernel_is_all_there_is(rows: str) -> None:
    """One launch forward and one backward; the merge of a shared anchor has some sixty."""
    *_, launched = fake_step(ROWS[rows], SCORES["plain"], TorchVarlenKernel())
    assert launched == ["_flash_attention_forward", "_flash_attention_backward"]
    *_, merged = fake_step(ROWS["anchor 1"], SCORES["plain"], TorchVarlenKernel())
    assert len(merged) > 50


@pytest.mark.usefixtures("cuda_guard")
def test_fake_cuda_notices_host_copies() -> None:
    with pytest.raises(AssertionError, match="copies to the host"), FakeTensorMode(), NoHostCopies():
        torch.empty(2, device="cuda").cpu()


@pytest.mark.usefixtures("cuda_guard")
def test_fake_cuda_with_several_calls_a_row() -> None:
    (q, *_), grads, _ = fake_step(ROWS["anchor 1"], SCORES["plain"], TorchVarlenKernel(max_sequences=2))
    assert grads[0].shape == q.shape


def test_fake_tensors_do_not_poison_the_cache() -> None:
    rows, kernel, device = (PackedLayout((0, 1, 17, 33), 1),), TorchVarlenKernel(), torch.device("cpu")
    with FakeTensorMode():
        fake = kernel.tiles(rows, device)[0].cu_seqlens
    real = kernel.tiles(rows, device)[0].cu_seqlens
    with FakeTensorMode() as mode:
        again = kernel.tiles(rows, device)[0].cu_seqlens
    assert real is not None and real.tolist() == [0, 1, 17, 33]
    assert type(fake).__name__ == type(again).__name__ == "FakeTensor" and again.fake_mode is mode


def test_tiles_made_in_inference_mode_serve_training(aten: Recorder) -> None:
    rows = (PackedLayout((0, 1, 19, 35), 1),)
    with torch.inference_mode():
        TorchVarlenKernel().tiles(rows, torch.device("cpu"))
    check(TorchVarlenKernel(), rows, SCORES["plain"], torch.float64)


# -- flash-attn -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flash", PACKAGES, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("rows", ROWS)
def test_flash_attn_numbers(rows: str, score: str, dtype: torch.dtype, flash: Recorder) -> None:
    check(FlashAttnKernel(), ROWS[rows], SCORES[score], dtype)
    assert len(flash.calls) == 2


@pytest.mark.parametrize("flash", PACKAGES, indirect=True)
@pytest.mark.parametrize("score", ["plain", "softcap"])
@pytest.mark.parametrize("rows", ROWS)
def test_public_function_over_gathered_keys(rows: str, score: str, flash: Recorder) -> None:
    """The anchor's key and value copied in front of each document: a second way to the same numbers."""
    layouts = ROWS[rows]
    args = [heads_last(x) for x in tensors(2, 4, 2, layouts[0].length, 16)]
    found = deviations(
        lambda q, k, v: gathered_attention(q, k, v, layouts, SCORES[score]), args, layouts, SCORES[score]
    )
    assert max(d.error for d in found) < FLOAT64_BOUND, found
    assert [name for name, _ in flash.calls] == ["flash_attn_varlen_func"]


@pytest.mark.parametrize("flash", PACKAGES, indirect=True)
def test_public_function_with_a_window(flash: Recorder) -> None:
    layouts, score = ROWS["no anchor"], SCORES["window"]
    found = deviations(
        lambda q, k, v: gathered_attention(q, k, v, layouts, score), tensors(2, 4, 2, 90, 16), layouts, score
    )
    assert max(d.error for d in found) < FLOAT64_BOUND, found
    with pytest.raises(ValueError, match="window of 7"):
        gathered_attention(*tensors(2, 4, 2, 90, 16)[:3], ROWS["anchor 1"], score)


@pytest.mark.parametrize("package", VERSIONS)
def test_the_installed_package_has_the_recorded_names(package: str) -> None:
    """Those of the arguments that the adapter gives; FA3's functions may also be operators."""
    try:
        found = importlib.util.find_spec(MODULES[package])
    except ModuleNotFoundError:
        found = None
    if found is None:
        pytest.skip(f"{MODULES[package]} is not installed: only {VERSIONS[package]}'s recorded signature is tested")
    module = importlib.import_module(MODULES[package])
    absent = {
        variant: {
            (name, parameter)
            for name, signature in RECORDED[variant].items()
            for parameter in {part.split("=")[0] for part in signature.split()} & USED
            if parameter not in flash_attn._parameters(getattr(module, name))
        }
        for variant in PACKAGES
        if variant.startswith(package)
    }
    assert set() in absent.values(), absent


def test_the_stand_ins_have_the_recorded_signatures() -> None:
    for package, functions in RECORDED.items():
        module = stand_in(package, Recorder())
        for name, signature in functions.items():
            found = str(inspect.signature(getattr(module, name)))
            assert found.replace(" ", "") == f"({','.join(signature.split())})".replace(" ", "")


def test_a_release_without_a_needed_argument_is_refused_by_name() -> None:
    def _flash_attn_varlen_forward(q: Any, k: Any, v: Any, cu_seqlens_q: Any) -> None: ...

    with pytest.raises(BackendUnavailableError, match=r"_flash_attn_varlen_forward takes no softcap"):
        flash_attn.call(_flash_attn_varlen_forward, q=0, k=0, v=0, cu_seqlens_q=0, softcap=0.0)


def test_custom_operators_are_read_by_their_schema() -> None:
    @torch.library.custom_op("anchorctx_test::scaled", mutates_args=())
    def scaled(x: torch.Tensor, factor: float = 2.0) -> torch.Tensor:
        return x * factor

    assert flash_attn._parameters(scaled) == {"x": True, "factor": False}
    assert flash_attn.call(scaled, x=torch.ones(1), factor=3.0).item() == 3.0
    with pytest.raises(BackendUnavailableError, match="takes no softcap"):
        flash_attn.call(scaled, x=torch.ones(1), softcap=1.0)


@pytest.mark.parametrize(
    ("capability", "dim", "softcap", "serving"),
    [
        ((8, 0), 64, None, ["FA2"]),
        ((9, 0), 256, 30.0, ["FA4", "FA3", "FA2"]),
        ((10, 0), 128, 30.0, ["FA4", "FA2"]),
        ((10, 0), 192, None, ["FA2"]),
        ((10, 0), 256, 30.0, ["FA2"]),
        ((12, 0), 64, 30.0, ["FA2"]),
        ((7, 5), 64, None, []),
    ],
)
def test_which_release_serves_which_card(
    capability: tuple[int, int], dim: int, softcap: float | None, serving: list[str]
) -> None:
    assert [r.name for r in flash_attn.RELEASES if not r.needs(capability, dim, softcap)] == serving


@pytest.mark.parametrize("flash", ["FA2"], indirect=True)
def test_a_wanted_release_is_not_replaced_by_another(flash: Recorder) -> None:
    with pytest.raises(BackendUnavailableError, match="needs FA3, which is not installed"):
        check(FlashAttnKernel(release="FA3"), ROWS["anchor 1"], SCORES["plain"], torch.float64)


@pytest.mark.parametrize("flash", ["FA4"], indirect=True)
def test_limits_name_what_the_installed_release_needs(flash: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (10, 0))
    assert flash_attn.limits(torch.empty(1, 1, 1, 128), Score(1.0)) is None
    reason = flash_attn.limits(torch.empty(1, 1, 1, 192), Score(1.0))
    assert reason == "has FA4, which needs a head dimension up to 128, or 256"


# -- what is missing, and what runs on a GPU --------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU lacks")
def test_missing_names_what_is_missing() -> None:
    for reason in (torch_varlen.missing(), flash_attn.missing()):
        assert reason is not None and reason.startswith("needs ") and "CUDA" in reason


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # what compilers warn of on a card is theirs
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["torch_varlen", "flash_attn", "flex"])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("rows", ROWS)
def test_on_a_gpu(rows: str, score: str, backend: str) -> None:
    layouts, s = ROWS[rows], SCORES[score]
    args = [heads_last(x).cuda() for x in tensors(2, 4, 2, layouts[0].length, 64, torch.bfloat16)]

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attend(q, k, v, layouts, scale=s.scale, window=s.window, softcap=s.softcap, backend=backend)

    try:
        attention(*args[:3])
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    assert_within_eager(deviations(attention, args, layouts, s))

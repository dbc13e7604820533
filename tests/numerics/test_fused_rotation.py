"""The rotation's kernel and transformers' operators agree to the last bit: without a card, in Triton's interpreter."""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import io
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import DynamicCache, LlamaForCausalLM

from anchorctx.attention import rotation
from anchorctx.attention.config import RopeDtype
from anchorctx.attention.rope import set_rope_dtype
from anchorctx.attention.rotation import Form, agrees, form_of, hands_on
from anchorctx.layout import PackedLayout
from anchorctx.models import checkpoint_activations
from anchorctx.testing.tiny import ARCHITECTURES

from .dispatch_modes import Moved

pytest.importorskip("triton")
kernel = importlib.import_module("anchorctx.attention.fused.rotation")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = (torch.bfloat16, torch.float16)
T = 37
"""Tokens: no whole number of blocks."""
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
"""What transformers calls a forward's cache: the former since 5.24 at the latest."""
FORMS = {
    "llama": Form(neighbours=False, rounds_products=True),
    "phi3": Form(neighbours=False, rounds_products=True),
    "gpt_neox": Form(neighbours=False, rounds_products=True),
    "olmo2": Form(neighbours=False, rounds_products=True),
    "cohere2": Form(neighbours=True, rounds_products=False),
}
"""One model of each way to rotate that transformers has, and what it does."""
SHAPES = {
    "grouped heads": (2, 4, 2, 16, 16),
    "more heads than a program has": (1, 19, 9, 8, 8),
    "odd width": (2, 3, 1, 80, 80),
    "some dimensions stay": (2, 4, 4, 24, 10),
}
"""Rows, query heads, key heads, dimensions, rotary dimensions."""


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch, rounded_bfloat16: None) -> Iterator[list[tuple[torch.Tensor, ...]]]:
    """Lets the kernel serve CPU tensors, and collects what models call it with."""
    calls: list[tuple[torch.Tensor, ...]] = []
    own = kernel.rotate

    def counted(*args):  # noqa: ANN002, ANN202
        if threading.current_thread() is threading.main_thread():  # not `agrees`
            calls.append(args)
        return own(*args)

    monkeypatch.setattr(kernel, "rotate", counted)
    if DEVICE == "cpu":
        monkeypatch.setattr(rotation, "launch", SimpleNamespace(serves=lambda *tensors: True))
    yield calls


def own_rotation(name: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}").apply_rotary_pos_emb


def inputs(shape: str, dtype: torch.dtype, rows_differ: bool) -> tuple[torch.Tensor, ...]:
    """q, k as behind a projection, cos and sin of far positions, and gradients of q and k."""
    batch, heads, kv_heads, dim, width = SHAPES[shape]
    draw = torch.Generator().manual_seed(0)

    def heads_of(count: int) -> torch.Tensor:
        return torch.randn(batch, T, count, dim, generator=draw).to(DEVICE, dtype).transpose(1, 2)

    first = torch.randint(0, 1_000_000, (batch if rows_differ else 1, 1, 1), generator=draw)
    angles = (first + torch.arange(T)[:, None]) / 10_000 ** (torch.arange(width // 2) * 2 / width)
    angles = torch.cat([angles, angles], -1).float().to(DEVICE)
    q, k, dq, dk = (heads_of(count) for count in (heads, kv_heads, heads, kv_heads))
    return q, k, angles.cos(), angles.sin(), dq, dk


def both_ways(rotate: Callable[..., tuple[torch.Tensor, ...]], tensors: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """q and k rotated and cast as attention casts them, and their gradients."""
    q, k, cos, sin, *gradients = tensors
    leaves = [q.detach().requires_grad_(), k.detach().requires_grad_()]
    outputs = [x.to(q.dtype) for x in rotate(*leaves, cos, sin)]
    return [*outputs, *torch.autograd.grad(outputs, leaves, gradients)]


# -- the kernel -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows_differ", [False, True], ids=["one row of angles", "angles of each row"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FORMS)
def test_to_the_last_bit(name: str, shape: str, dtype: torch.dtype, rows_differ: bool, served: list) -> None:
    """Results and gradients; OLMo and Cohere cast by themselves, GPT-NeoX and Phi leave dimensions as they are."""
    *_, dim, width = SHAPES[shape]
    if width < dim and name not in ("phi3", "gpt_neox"):
        pytest.skip("this function rotates all dimensions")
    tensors, own = inputs(shape, dtype, rows_differ), own_rotation(name)
    expected = both_ways(own, tensors)
    found = both_ways(lambda *x: rotation.rotate(own, *x), tensors)
    assert len(served) == 1 and served[0][4:] == FORMS[name]
    for one, other in zip(found, expected, strict=True):
        assert one.dtype is dtype and torch.equal(one, other)


def test_memory_in_and_out(served: list) -> None:
    """Slices of one projection of q, k and v, and keys with heads first: read where they lie, written heads last."""
    own = own_rotation("llama")
    q, k, cos, sin, dq, dk = inputs("grouped heads", torch.bfloat16, rows_differ=False)
    joined = torch.cat([q, k], 1).transpose(1, 2).contiguous().transpose(1, 2)
    tensors = (joined[:, :4], k.contiguous(), cos, sin, dq, dk.contiguous())
    expected = both_ways(own, tensors)
    found = both_ways(lambda *x: rotation.rotate(own, *x), tensors)
    assert len(served) == 1
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other) and one.transpose(1, 2).is_contiguous()
    ones = torch.ones((), device=DEVICE, dtype=torch.bfloat16)
    expanded = (*tensors[:4], ones.expand(q.shape), ones.expand(k.shape))
    for one, other in zip(
        both_ways(lambda *x: rotation.rotate(own, *x), expanded), both_ways(own, expanded), strict=True
    ):
        assert torch.equal(one, other)


def test_no_product_is_contracted() -> None:
    """Compiled for an H100: no fused multiply-add, whose last bit differs; and no rounding is optimised away."""
    code = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from anchorctx.attention.fused import rotation

def ptx(backward, rounds, **options):
    kernel = rotation._rotation
    pointers = dict.fromkeys(("q", "k", "q_out", "k_out"), "*bf16") | dict.fromkeys(("cos", "sin"), "*fp32")
    constants = rotation._constants(32, 8, 128, 128) | dict(NEIGHBOURS=False, BACKWARD=backward, ROUNDS=rounds)
    types = dict.fromkeys(kernel.arg_names, "i32") | pointers | dict.fromkeys(constants, "constexpr")
    indices = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=types, constexprs=indices)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=rotation.LAUNCH | options)
    return made.asm["ptx"]

for backward in (False, True):
    assert "fma.rn.f32" not in ptx(backward, rounds=False)
    assert "fma.rn.f32" in ptx(backward, rounds=False, enable_fp_fusion=True)
once, each = (ptx(True, rounds).count("cvt.rn.bf16") for rounds in (False, True))
assert 0 < 2 * once <= each, (once, each)
"""
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("cuda_guard")
def test_bytes() -> None:
    """q and k once in and once out, and the angles: at most 1.2 times that. In operators it is 8 times as much."""
    tokens, heads, kv_heads, dim = 65_536, 32, 8, 128
    with FakeTensorMode():
        q, k, dq, dk = (
            torch.empty(1, tokens, count, dim, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
            for count in (heads, kv_heads, heads, kv_heads)
        )
        cos, sin = (torch.empty(1, tokens, dim, device="cuda") for _ in range(2))
        floor = 2 * (q.nbytes + k.nbytes) + cos.nbytes + sin.nbytes
        with Moved() as eager:
            [x.to(torch.bfloat16) for x in own_rotation("llama")(q, k, cos, sin)]
        for gradients, backward in (((q, k), False), ((dq, dk), True)):
            with Moved() as moved, mock.patch.object(kernel, "_rotation", moved), mock.patch("torch.cuda.device"):
                kernel._launch(*gradients, cos, sin, NEIGHBOURS=False, ROUNDS=True, BACKWARD=backward)
            assert floor <= moved.bytes <= 1.2 * floor
    assert eager.bytes > 7 * floor


# -- where it is used -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMS)
def test_functions_are_recognised(name: str) -> None:
    assert form_of(own_rotation(name), torch.bfloat16, 16, 16) == FORMS[name]


def test_other_functions_are_not() -> None:
    llama = own_rotation("llama")

    def turned_back(q, k, cos, sin):  # noqa: ANN001, ANN202
        return llama(q, k, cos, -sin)

    def scaled(q, k, cos, sin):  # noqa: ANN001, ANN202
        return tuple(x * 1.001 for x in llama(q, k, cos, sin))

    def rounded_angles(q, k, cos, sin):  # noqa: ANN001, ANN202
        return llama(q, k, cos.to(q.dtype), sin.to(q.dtype))

    for function in (turned_back, scaled, rounded_angles):
        assert form_of(function, torch.bfloat16, 16, 16) is None
    assert form_of(llama, torch.bfloat16, 16, 8) is None  # it cannot
    assert form_of(own_rotation("phi3"), torch.bfloat16, 16, 8) is not None


def test_a_kernel_that_computes_anything_else_here_is_not_used(
    served: list, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As a compiler might that contracts products, or a card that rounds otherwise."""
    own = kernel.rotate
    shapes = (1, 2, 8, 16), (1, 1, 8, 16), (1, 8, 16), (1, 8, 16)
    q, k, cos, sin = (torch.randn(shape, device=DEVICE) for shape in shapes)
    q, k = q.to(torch.bfloat16), k.to(torch.bfloat16)
    llama = own_rotation("llama")
    expected = tuple(x.to(q.dtype) for x in llama(q, k, cos, sin))

    def flawed(*args):  # noqa: ANN002, ANN202
        q, k = own(*args)
        return q, k * 1.01

    agrees.cache_clear()
    monkeypatch.setattr(kernel, "rotate", flawed)
    assert equal([x.to(q.dtype) for x in rotation.rotate(llama, q, k, cos, sin)], list(expected))
    assert "the fused rotation differs from torch's operators" in caplog.text and not served
    agrees.cache_clear()
    monkeypatch.setattr(kernel, "rotate", own)
    assert equal(list(rotation.rotate(llama, q, k, cos, sin)), list(expected)) and len(served) == 1


@pytest.mark.parametrize(
    ("model", "attention", "expected"),
    [
        ("llama", "LlamaAttention", True),
        ("gpt_neox", "GPTNeoXAttention", True),
        ("gemma3", "Gemma3Attention", True),
        ("hunyuan_v1_dense", "HunYuanDenseV1Attention", False),  # normalises q and k after the rotation
        ("ministral3", "Ministral3Attention", False),  # scales q by its position
        ("stablelm", "StableLmAttention", False),  # joins what was rotated with the rest
        ("llama", "LlamaMLP", False),
    ],
)
def test_what_happens_between_rotation_and_attention(model: str, attention: str, expected: bool) -> None:
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    assert hands_on(getattr(module, attention).forward) is expected


def build(name: str, rope_dtype: RopeDtype = RopeDtype.float32) -> torch.nn.Module:
    backend = "reference" if ARCHITECTURES[name].softcap or DEVICE == "cuda" else "cpu"
    return ARCHITECTURES[name].build(torch.bfloat16, attention=backend, rope_dtype=rope_dtype).to(DEVICE)


def run(model: torch.nn.Module) -> list[torch.Tensor]:
    """The logits of one row of documents, and every parameter's gradient."""
    ids = torch.randint(3, 96, (1, T), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    positions = 1000 + torch.arange(T, device=DEVICE)[None]
    logits = model(ids, position_ids=positions, layouts=(PackedLayout((0, 1, 7, T), 1),), use_cache=False).logits
    model.zero_grad()
    logits.float().square().mean().backward()
    return [logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture(name: str, served: list) -> None:
    model = build(name)
    with mock.patch.object(rotation, "_fits", return_value=False):
        expected = run(model)
    assert not served
    assert equal(run(model), expected)
    # cohere2's full layers do not rotate; gpt-oss has each angle once and not for both dimensions of its pair; DeepSeek
    # rotates a part of each head, by a function of another name
    assert len(served) == {"cohere2": 1, "gpt_oss": 0, "deepseek_v3": 0}.get(name, model.config.num_hidden_layers)


def test_recomputed_copied_pickled_and_undone(served: list) -> None:
    form_of.cache_clear()  # so that the function is compared inside a recomputed layer
    model = build("gemma3")
    with mock.patch.object(rotation, "_fits", return_value=False):
        expected = run(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    recomputed = copy.deepcopy(model)
    checkpoint_activations(recomputed)
    for twin, calls in ((recomputed, 4), (torch.load(file, weights_only=False), 2)):
        served.clear()
        assert equal(run(twin), expected) and len(served) == calls
    with torch.inference_mode():
        form_of.cache_clear()
        ids = torch.arange(5, device=DEVICE)[None]
        layouts = (PackedLayout((0, 5)),)
        assert model(ids, layouts=layouts, use_cache=False).logits.isfinite().all()
    served.clear()
    set_rope_dtype(model, RopeDtype.bfloat16)
    assert not [name for name, module in model.named_modules() if "forward" in module.__dict__]
    assert equal(run(model), run(build("gemma3", RopeDtype.bfloat16))) and not served


def test_with_a_cache(served: list) -> None:
    """transformers' own attention and cache take what the kernel made, a prompt and then token by token."""
    model = build("llama").eval()
    model.set_attn_implementation("sdpa")
    ids = torch.arange(3, 15, device=DEVICE)[None]
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        parts = [model(part, **{CACHE: cache}, use_cache=True).logits for part in ids.split([9, 1, 1, 1], 1)]
        whole = model(ids, use_cache=False).logits
    assert len(served) == 5 * model.config.num_hidden_layers
    # bfloat16 attention over one query or many: two units in the last place of logits below 4 in size
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=2**-6 * 2)


@pytest.mark.usefixtures("cuda_guard")
@pytest.mark.parametrize(("mode", "device"), [(FakeTensorMode, "cuda"), (contextlib.nullcontext, "meta")])
def test_tensors_without_values_rotate_as_before(mode: Callable, device: str) -> None:
    with mode():
        q, k = (torch.empty(1, count, 4, 8, dtype=torch.bfloat16, device=device) for count in (2, 1))
        cos, sin = torch.empty(2, 1, 4, 8, device=device)
        outputs = rotation.rotate(own_rotation("llama"), q, k, cos, sin)
    assert all(x.dtype is torch.float32 for x in outputs)

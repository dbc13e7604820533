"""Rotation is checked where it happens: the model's own apply function is watched, and redone in float64."""

from __future__ import annotations

import copy
import importlib
import io

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import anchorctx.attention.interface as interface
from anchorctx.attention.config import RopeDtype
from anchorctx.attention.rope import restore_frequencies, rotary_modules, set_rope_dtype
from anchorctx.errors import UserError
from anchorctx.layout import PackedLayout
from anchorctx.models import checkpoint_activations
from anchorctx.testing.numerics import observed_rope_dtype
from anchorctx.testing.tiny import ARCHITECTURES

T = 16
FAR = 100_000
"""Where the rows' positions start: far enough that a rounded position or frequency is radians wrong."""
ALWAYS_FLOAT32 = {"olmo2", "olmo3"}
CASTS_BACK = {"olmo2", "olmo3", "cohere2"}
INTERLEAVED = {"cohere2"}


def build(name: str, rope_dtype: RopeDtype, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    backend = "reference" if ARCHITECTURES[name].softcap else "cpu"
    return ARCHITECTURES[name].build(dtype, attention=backend, rope_dtype=rope_dtype)


def run(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.randint(3, 96, (1, T), generator=torch.Generator().manual_seed(0))
    layouts = (PackedLayout((0, 1, 7, T), 1),)
    return model(ids, position_ids=FAR + torch.arange(T)[None], layouts=layouts, use_cache=False).logits


class Watch:
    """Every rotation's input and output, its angles, and the query that reaches `attend`, layer by layer."""

    def __init__(
        self, model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch, function: str = "apply_rotary_pos_emb"
    ) -> None:
        self.rotations: list[tuple[torch.Tensor, ...]] = []
        self.attended: list[tuple[torch.Tensor, torch.Tensor]] = []
        module = importlib.import_module(type(model).__module__)
        rotate, attend = getattr(module, function), interface.attend

        def watched(q, k, cos, sin, *args, **kwargs):  # noqa: ANN001, ANN202
            out = rotate(q, k, cos, sin, *args, **kwargs)
            self.rotations.append((q, k, cos, sin, *out))
            return out

        def attended(q, k, v, *args, **kwargs):  # noqa: ANN001, ANN202
            self.attended.append((q, k))
            assert q.dtype == k.dtype == v.dtype
            return attend(q, k, v, *args, **kwargs)

        monkeypatch.setattr(module, function, watched)
        monkeypatch.setattr(interface, "attend", attended)


def rotated(x: torch.Tensor, angles: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """RoPE in float64: x (B, H, T, D), angles (T, R/2) of the first R dimensions, in pairs i, i + R/2 or 2i, 2i + 1."""
    x, width = x.double(), 2 * angles.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    pairs = turned.unflatten(-1, (-1, 2)) if interleaved else turned.unflatten(-1, (2, -1)).mT
    cos, sin = angles.cos(), angles.sin()
    a, b = pairs[..., 0], pairs[..., 1]
    pairs = torch.stack([a * cos - b * sin, b * cos + a * sin], -1)
    return torch.cat([(pairs if interleaved else pairs.mT).flatten(-2), rest], -1)


def all_angles(model: torch.nn.Module) -> list[torch.Tensor]:
    """(T, R/2) float64 of the float32 product of position and frequency, per set of frequencies."""
    buffers = dict(rotary_modules(model)[0].named_buffers())
    names = [n for n in buffers if n.endswith("inv_freq") and "original" not in n]
    positions = (FAR + torch.arange(T))[:, None].float()
    return [(positions * buffers[n]).double() for n in names]


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "deepseek_v3"])
def test_float32_rotation_is_exact_and_cast_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name, RopeDtype.float32)
    watch = Watch(model, monkeypatch)
    run(model)
    assert len(watch.rotations) >= 1 and len(watch.attended) == 2
    reached = {id_of(x) for q, k in watch.attended for x in (q, k)}
    for q, k, cos, sin, *out in watch.rotations:
        assert cos.dtype is sin.dtype is torch.float32 and q.dtype is torch.bfloat16
        for before, after in zip((q, k), out, strict=True):
            exact = [rotated(before, a, name in INTERLEAVED) for a in all_angles(model)]
            limit = 4 * torch.finfo(torch.float32).eps * before.abs().max().item()
            if name in CASTS_BACK:  # transformers has cast already: the one rounding to bfloat16
                assert after.dtype is torch.bfloat16
                assert min(distance_in_bfloat16(x, after) for x in exact) <= limit
            else:
                assert after.dtype is torch.float32
                assert min((x - after).abs().max().item() for x in exact) <= limit
            assert id_of(after.to(torch.bfloat16)) in reached


def test_float32_rotation_of_a_part_of_each_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSeek's last dimensions alone are rotated, neighbours in pairs, and come out with the pairs' halves apart."""
    model = build("deepseek_v3", RopeDtype.float32)
    watch = Watch(model, monkeypatch, "apply_rotary_pos_emb_interleave")
    run(model)
    assert len(watch.rotations) == len(watch.attended) == 2
    (angles,) = all_angles(model)
    for (*before, cos, _, _, _), attended in zip(watch.rotations, watch.attended, strict=True):
        assert cos.dtype is torch.float32
        for x, found in zip(before, attended, strict=True):
            exact = rotated(x, angles, interleaved=True).unflatten(-1, (-1, 2)).mT.flatten(-2)
            limit = 4 * torch.finfo(torch.float32).eps * x.abs().max().item()
            assert x.dtype is found.dtype is torch.bfloat16
            assert distance_in_bfloat16(exact, found[..., -exact.shape[-1] :]) <= limit


def id_of(x: torch.Tensor) -> bytes:
    return x.detach().contiguous().view(torch.int16).numpy().tobytes()


def distance_in_bfloat16(exact: torch.Tensor, found: torch.Tensor) -> float:
    """How far from `exact` a float32 would have to be so that its rounding to bfloat16 is `found`."""
    gap = torch.nextafter(found.abs(), torch.full_like(found, float("inf"))) - found.abs()
    return ((exact - found.double()).abs() - gap.double() / 2).clamp(min=0).max().item()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_bfloat16_is_plain_transformers_bit_for_bit(name: str) -> None:
    model = build(name, RopeDtype.bfloat16)
    fields = ARCHITECTURES[name].config().config
    plain = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**fields), dtype=torch.bfloat16, attn_implementation=model.config._attn_implementation
    )
    plain.load_state_dict(model.state_dict())
    expected = run(plain)
    assert torch.equal(run(model), expected)
    set_rope_dtype(model, RopeDtype.float32)
    assert torch.equal(run(model), expected) == (name in ALWAYS_FLOAT32)
    set_rope_dtype(model, RopeDtype.bfloat16)
    assert torch.equal(run(model), expected)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_float32_models_do_not_change(name: str) -> None:
    one, other = (build(name, d, torch.float32) for d in (RopeDtype.bfloat16, RopeDtype.float32))
    assert torch.equal(run(one), run(other))


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_emulated_bfloat16_rotates_as_a_bfloat16_model_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rotation's inputs rounded, its arithmetic and its results those of bfloat16; all else in float32."""
    model = build(name, RopeDtype.bfloat16_emulated, torch.float32)
    watch = Watch(model, monkeypatch)
    run(model).square().sum().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())
    assert len(watch.rotations) == len(watch.attended) == model.config.num_hidden_layers
    for q, k, cos, sin, *out in watch.rotations:
        assert {x.dtype for x in (q, k, cos, sin, *out)} == {torch.bfloat16}
        half = q.shape[-1] // 2
        turned = torch.cat([-q[..., half:], q[..., :half]], -1)
        assert torch.equal(out[0], q * cos[:, None] + turned * sin[:, None])
    for q, k in watch.attended:
        assert q.dtype == k.dtype == torch.float32 and torch.equal(q, q.to(torch.bfloat16).float())
    twin = copy.deepcopy(model)
    assert observed_rope_dtype(twin) is RopeDtype.bfloat16_emulated and torch.equal(run(twin), run(model))
    set_rope_dtype(model, RopeDtype.float32)
    assert torch.equal(run(model), run(build(name, RopeDtype.float32, torch.float32)))


def test_models_without_projections_of_their_own_cannot_emulate() -> None:
    with pytest.raises(UserError, match="no q_proj and k_proj"):
        build("phi3", RopeDtype.bfloat16_emulated, torch.float32)


def test_idempotent_and_without_parameters_or_buffers() -> None:
    model = build("llama", RopeDtype.bfloat16)
    state, expected = set(model.state_dict()), None
    names = {n for n, _ in model.named_buffers()}
    for _ in range(2):
        set_rope_dtype(model, RopeDtype.float32)
        assert set(model.state_dict()) == state and {n for n, _ in model.named_buffers()} == names
        found = run(model)
        assert expected is None or torch.equal(found, expected)
        expected = found
    assert observed_rope_dtype(model) is RopeDtype.float32


def test_survives_copies_pickles_and_checkpointing() -> None:
    model = build("gemma3", RopeDtype.float32)
    expected = run(model)
    other = copy.deepcopy(model)
    assert rotary_modules(other)[0].forward.args[0] is rotary_modules(other)[0]
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (other, torch.load(file, weights_only=False)):
        assert observed_rope_dtype(twin) is RopeDtype.float32 and torch.equal(run(twin), expected)
    run(model).float().square().sum().backward()
    checkpoint_activations(other)
    run(other).float().square().sum().backward()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)


def test_rounded_frequencies_are_noticed() -> None:
    model = build("llama", RopeDtype.float32).to(torch.bfloat16)
    with pytest.raises(RuntimeError, match="inv_freq was cast to torch.bfloat16"):
        run(model)


def test_tf32_is_off_inside_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama", RopeDtype.float32)
    module, seen, matmul = rotary_modules(model)[0], [], torch.backends.cuda.matmul
    forward = type(module).forward
    monkeypatch.setattr(type(module), "forward", lambda *a, **k: seen.append(matmul.fp32_precision) or forward(*a, **k))
    torch.set_float32_matmul_precision("high")
    try:
        run(model)
        assert seen == ["ieee"] and torch.get_float32_matmul_precision() == "high" and matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_model_without_rope_is_refused() -> None:
    with pytest.raises(UserError, match="Linear has no rotary"):
        set_rope_dtype(torch.nn.Linear(2, 2), RopeDtype.float32)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_frequencies_that_a_loader_rounded_are_made_anew(name: str) -> None:
    model = build(name, RopeDtype.bfloat16)
    expected = run(model)
    exact = [{**module._buffers} for module in rotary_modules(model)]
    for module in rotary_modules(model):
        for key, frequencies in module._buffers.items():
            module._buffers[key] = frequencies.to(torch.bfloat16)  # as DeepSpeed's zero.Init does
    restore_frequencies(model)
    for module, before in zip(rotary_modules(model), exact, strict=True):
        assert module._buffers.keys() == before.keys()
        assert all(x.dtype is torch.float32 and torch.equal(x, before[key]) for key, x in module._buffers.items())
    assert torch.equal(run(model), expected)


@pytest.mark.parametrize("offloaded_first", [True, False])
def test_offloaded_weights_still_come_in_time(offloaded_first: bool) -> None:
    """accelerate brings them in a forward of its own around each module's: taken away, the weights were never there."""
    from accelerate import cpu_offload

    model = ARCHITECTURES["llama"].build(torch.float32).eval()
    model.set_attn_implementation("sdpa")
    plain, ids = copy.deepcopy(model), torch.arange(3, 12)[None]
    if offloaded_first:
        cpu_offload(model, execution_device=torch.device("cpu"))
    set_rope_dtype(model, RopeDtype.float32)
    if not offloaded_first:
        cpu_offload(model, execution_device=torch.device("cpu"))
    set_rope_dtype(plain, RopeDtype.float32)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)
        for other in (model, plain):
            set_rope_dtype(other, RopeDtype.bfloat16)
        assert torch.equal(model(ids).logits, plain(ids).logits)
    assert not any("forward" in module.__dict__ for module in plain.modules())

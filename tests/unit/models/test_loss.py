from __future__ import annotations

import sys
import types
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from anchorctx.errors import UserError
from anchorctx.layout import PackedLayout
from anchorctx.models.config import LossKind
from anchorctx.models.cross_entropy import TILE_BYTES, default_tile
from anchorctx.models.loss import IGNORE, CausalLMLoss, trained_tokens
from anchorctx.testing.tiny import ARCHITECTURES, true_float64

T, V = 24, 96


def batch(seed: int = 0) -> dict:
    """Two rows with unlabelled anchors, document starts and a few more tokens, and uneven weights."""
    generator = torch.Generator().manual_seed(seed)
    layouts = (PackedLayout((0, 1, 9, T), 1), PackedLayout((0, 1, 17, T), 1))
    ids = torch.randint(3, V, (2, T), generator=generator)
    labels = ids.clone()
    for row, layout in zip(labels, layouts, strict=True):
        row[list(layout.doc_offsets[:-1])] = IGNORE
    labels[0, 12:15] = IGNORE
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
    weights = torch.rand(2, T, generator=generator)
    positions = torch.arange(T).expand(2, T)
    data = {"input_ids": ids, "position_ids": positions, "layouts": layouts}
    return data | {"targets": targets, "loss_weights": F.pad(weights[:, 1:], (0, 1))}


def plain_loss(model: torch.nn.Module, data: dict) -> torch.Tensor:
    """The same loss from the model's own full logits."""
    logits = model(
        data["input_ids"], position_ids=data["position_ids"], layouts=data["layouts"], use_cache=False
    ).logits
    losses = F.cross_entropy(logits.flatten(0, 1), data["targets"].flatten(), ignore_index=IGNORE, reduction="none")
    return (losses * data["loss_weights"].flatten()).sum()


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def compare(name: str, dtype: torch.dtype, tile: int, tolerance: float, **data_changes: object) -> None:
    backend = "reference" if ARCHITECTURES[name].softcap else "cpu"
    ours, theirs = (ARCHITECTURES[name].build(dtype, attention=backend) for _ in range(2))
    data = batch() | data_changes
    loss, expected = CausalLMLoss(ours, tile_tokens=tile)(**data), plain_loss(theirs, data)
    (loss * 0.37).backward()  # a scale that comes later must reach every gradient
    (expected * 0.37).backward()
    assert loss.dtype is torch.promote_types(dtype, torch.float32)
    assert abs(loss.item() - expected.item()) <= tolerance * max(1.0, abs(expected.item()))
    found, wanted = gradients(ours), gradients(theirs)
    assert found.keys() == wanted.keys()
    for key, gradient in wanted.items():
        assert (found[key] - gradient).abs().max() <= tolerance * max(1.0, gradient.abs().max().item()), key


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equals_cross_entropy_of_full_logits_in_float64(name: str) -> None:
    compare(name, torch.float64, tile=7, tolerance=1e-12)


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "cohere2"])
def test_equals_cross_entropy_of_full_logits_in_float32(name: str) -> None:
    compare(name, torch.float32, tile=7, tolerance=1e-5)


@pytest.mark.parametrize("tile", [1, 40, 10_000])
def test_tile_size_does_not_matter(tile: int) -> None:
    compare("cohere2", torch.float64, tile=tile, tolerance=1e-12)


def test_head_with_bias_and_tied_embeddings() -> None:
    for model in (build_biased(), ARCHITECTURES["gemma2"].build(torch.float64, attention="reference")):
        ours = CausalLMLoss(model, tile_tokens=5)
        data = batch()
        ours(**data).backward()
        found = {k: v.clone() for k, v in gradients(model).items()}
        model.zero_grad()
        plain_loss(model, data).backward()
        for key, gradient in gradients(model).items():
            assert (found[key] - gradient).abs().max() < 1e-11, key


def build_biased() -> torch.nn.Module:
    model = ARCHITECTURES["llama"].build(torch.float64)
    model.lm_head.bias = torch.nn.Parameter(torch.randn(V, dtype=torch.float64))
    return model


def test_weights_left_out_are_one() -> None:
    model, data = ARCHITECTURES["llama"].build(torch.float64), batch()
    ones = CausalLMLoss(model)(**data | {"loss_weights": torch.ones(2, T)})
    assert torch.equal(CausalLMLoss(model)(**data | {"loss_weights": None}), ones)


def test_the_index_of_trained_tokens_may_be_given() -> None:
    model, data = ARCHITECTURES["llama"].build(torch.float64), batch()
    trained = trained_tokens(data["targets"])
    assert torch.equal(data["targets"].flatten()[trained], data["targets"][data["targets"] != IGNORE])
    assert torch.equal(CausalLMLoss(model)(**data, trained=trained), CausalLMLoss(model)(**data))


def test_a_batch_without_targets_gives_zero_and_zero_gradients() -> None:
    model = ARCHITECTURES["llama"].build()
    loss = CausalLMLoss(model)(**batch() | {"targets": torch.full((2, T), IGNORE)})
    loss.backward()
    assert loss.item() == 0.0
    found = gradients(model)
    assert found.keys() == dict(model.named_parameters()).keys() and not any(g.any() for g in found.values())


def test_without_gradients_and_with_a_frozen_head() -> None:
    model, data = ARCHITECTURES["llama"].build(torch.float64), batch()
    module = CausalLMLoss(model)
    with torch.no_grad():
        assert abs(module(**data).item() - plain_loss(model, data).item()) < 1e-12
    model.lm_head.weight.requires_grad_(False)
    module(**data).backward()
    assert model.lm_head.weight.grad is None and model.model.embed_tokens.weight.grad is not None


def test_accumulates_over_micro_batches_and_refuses_a_second_backward() -> None:
    model = ARCHITECTURES["llama"].build(torch.float64)
    module = CausalLMLoss(model)
    for seed in (0, 1):
        module(**batch(seed)).backward()
    found = model.lm_head.weight.grad.clone()
    model.zero_grad()
    (plain_loss(model, batch(0)) + plain_loss(model, batch(1))).backward()
    assert (found - model.lm_head.weight.grad).abs().max() < 1e-12
    loss = module(**batch())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        loss.backward()


def test_the_head_runs_its_hooks_once_and_keeps_its_forward() -> None:
    model = ARCHITECTURES["llama"].build()
    calls: list[str] = []
    model.lm_head.register_forward_pre_hook(lambda *_: calls.append("before"))
    model.lm_head.register_forward_hook(lambda *_: calls.append("after"))
    CausalLMLoss(model, tile_tokens=3)(**batch()).backward()
    assert calls == ["before", "after"]
    assert "forward" not in model.lm_head.__dict__ and model.lm_head(torch.zeros(1, 32)).shape == (1, V)


class Largest(TorchDispatchMode):
    """The largest tensor with a vocabulary dimension that any operator made, the head's own gradient left out."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.hidden, self.elements = hidden, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple) else (out,):
            if isinstance(x, torch.Tensor) and V in x.shape and self.hidden not in x.shape:
                self.elements = max(self.elements, x.numel())
        return out


def test_no_tensor_of_logits_exceeds_a_tile() -> None:
    model, data = ARCHITECTURES["llama"].build(), batch()
    with Largest(32) as plain:
        plain_loss(model, data).backward()
    module = CausalLMLoss(model, tile_tokens=5)
    with Largest(32) as tiled:
        module(**data).backward()
    assert plain.elements >= 2 * T * V - 2 * V and tiled.elements == 5 * V


def test_default_tile() -> None:
    assert default_tile(1216, 64) * 1216 * 4 <= TILE_BYTES
    assert default_tile(128_256, 4096) == 1024  # 0.5 GB of logits beside 2.1 GB of the head's gradient
    assert default_tile(10**9, 2) == 1


def test_bfloat16_gradients_are_as_good_as_full_logits() -> None:
    """The head's gradient, summed over many tiles, is no further from float64 than that of one whole matmul."""
    torch.manual_seed(0)
    exact = ARCHITECTURES["llama"].build(torch.float64)
    models = [ARCHITECTURES["llama"].build(torch.bfloat16) for _ in range(2)]
    exact.load_state_dict(models[0].state_dict())
    plain_loss(exact, batch()).backward()
    CausalLMLoss(models[0], tile_tokens=2)(**batch()).backward()
    plain_loss(models[1], batch()).backward()
    errors = [(m.lm_head.weight.grad - exact.lm_head.weight.grad).norm().item() for m in models]
    assert errors[0] <= 1.1 * errors[1]


# -- liger: its kernels need CUDA, so a stand-in with its constructor and call carries these tests --------------------


class StandIn(torch.nn.Module):
    def __init__(self, ce_weight=None, ignore_index=-100, reduction="mean", softcap=None) -> None:  # noqa: ANN001
        super().__init__()
        assert reduction == "sum"
        self.softcap = softcap

    def forward(self, lin_weight, _input, target, bias=None):  # noqa: ANN001, ANN201
        logits = F.linear(_input, lin_weight, bias)
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return F.cross_entropy(logits, target, reduction="sum")


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> None:
    package, module = types.ModuleType("liger_kernel"), types.ModuleType("liger_kernel.transformers")
    module.LigerFusedLinearCrossEntropyLoss = StandIn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", module)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.usefixtures("liger")
def test_liger_equals_full_logits(name: str) -> None:
    model = ARCHITECTURES[name].build(torch.float32, attention="reference")
    data = batch() | {"loss_weights": torch.full((2, T), 0.5)}
    loss = CausalLMLoss(model, kind=LossKind.liger)(**data)
    assert abs(loss.item() - plain_loss(model, data).item()) < 1e-4 * loss.item()  # float32 sums in another order
    loss.backward()
    assert model.lm_head.weight.grad is not None


@pytest.mark.usefixtures("liger")
def test_liger_refuses_what_it_cannot() -> None:
    with pytest.raises(UserError, match="one loss weight"):
        CausalLMLoss(ARCHITECTURES["llama"].build(), kind=LossKind.liger)(**batch())
    with pytest.raises(UserError, match="cannot scale logits"):
        CausalLMLoss(ARCHITECTURES["cohere2"].build(), kind=LossKind.liger)


def test_liger_names_its_extra_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", None)
    with pytest.raises(UserError, match=r"anchorctx\[liger\]"):
        CausalLMLoss(ARCHITECTURES["llama"].build(), kind=LossKind.liger)


SCALINGS = {
    "dynamic": ("llama", {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}),
    "longrope": (
        "phi3",
        {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 4,
            "long_factor": [4.0] * 4,
            "original_max_position_embeddings": 8,
        },
    ),
}


@pytest.mark.parametrize("kind", SCALINGS)
def test_a_rows_pieces_have_its_angles_where_these_depend_on_its_length(kind: str) -> None:
    name, scaling = SCALINGS[kind]
    config = {"max_position_embeddings": 8 if kind == "dynamic" else T, "rope_parameters": scaling}
    ids = torch.randint(3, V, (T,), generator=torch.Generator().manual_seed(0))
    row = PackedLayout((0, 1, 6, T), 1)  # the first document ends before the scaling's original length
    targets = F.pad(ids[1:], (0, 1), value=IGNORE).index_fill(0, torch.tensor([0, 5]), IGNORE)
    config |= {"original_max_position_embeddings": 8} if name == "phi3" else {}  # it keeps this outside
    known = ARCHITECTURES[name]
    architecture = replace(known, fields=known.fields | config)

    def total(pieces: list, row_length: int | None) -> float:
        module = CausalLMLoss(architecture.build(torch.float64), row_length=row_length)
        with true_float64(), torch.no_grad():
            return sum(
                float(module(ids[None, i], layout.position_ids()[None], (layout,), targets[None, i]))
                for layout, i in pieces
            )

    whole = [(row, torch.arange(T))]
    pieces = [(layout, torch.from_numpy(index)) for layout, index in row.pieces(8)]
    assert len(pieces) == 2
    assert total(pieces, T) == pytest.approx(total(whole, None), rel=1e-12)
    assert total(whole, T) == pytest.approx(total(whole, None), rel=1e-12)
    assert abs(total(pieces, None) - total(whole, None)) > 1e-3  # what would go wrong

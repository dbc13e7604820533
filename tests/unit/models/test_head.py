"""Heads that scale, cap, project or do something of their own: the loss is the model's, whatever they do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from anchorctx.attention import register
from anchorctx.errors import UserError
from anchorctx.layout import PackedLayout
from anchorctx.models.config import LossKind
from anchorctx.models.head import LogitTransform, Tail, linear_transform
from anchorctx.models.loss import CausalLMLoss, check_loss
from anchorctx.testing.tiny import ARCHITECTURES, BASE, true_float64

register()
IDS = torch.randint(3, 96, (1, 20), generator=torch.Generator().manual_seed(0))
ROW = PackedLayout((0, 20))
BATCH = {"input_ids": IDS, "position_ids": torch.arange(20)[None], "layouts": (ROW,), "targets": IDS.roll(-1, 1)}


def build(model_type: str, dtype: torch.dtype = torch.float64, **fields: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(model_type, **BASE | fields)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="anchor")
        for parameter in model.parameters():
            parameter.data = (parameter + torch.randn_like(parameter) * 0.05).to(dtype)
    return model.train()


def own_sum(model: PreTrainedModel) -> torch.Tensor:
    """The summed cross-entropy of the logits of the model's own whole forward."""
    logits = model(IDS, position_ids=BATCH["position_ids"], layouts=(ROW,), use_cache=False).logits
    return F.cross_entropy(logits[0], BATCH["targets"][0], reduction="sum")


OWN: dict[str, dict[str, Any]] = {
    "dory": {},
    "modernbert-decoder": {"layer_types": ["full_attention"] * 2},
    "hyperclovax": {"logits_scaling": 0.3},
}
"""A learned factor for each token; a projection and a norm before the head; a scale that others divide by."""


@pytest.mark.parametrize("name", OWN)
def test_loss_and_gradients_are_those_of_the_models_own_logits(name: str) -> None:
    with true_float64():
        models = [build(name, **OWN[name]) for _ in range(2)]
        loss, own = CausalLMLoss(models[0], tile_tokens=6)(**BATCH), own_sum(models[1])
        (loss * 0.37).backward()
        (own * 0.37).backward()
    assert loss.item() == pytest.approx(own.item(), rel=1e-12)
    for (key, ours), theirs in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), key
        if ours.grad is not None and theirs.grad is not None:
            assert (ours.grad - theirs.grad).abs().max() <= 1e-11 * max(1.0, theirs.grad.abs().max().item()), key


def test_rules_are_read_and_measured() -> None:
    found = {n: linear_transform(a.build(attention="reference")) for n, a in ARCHITECTURES.items()}
    changed = {n: t for n, t in found.items() if t != LogitTransform()}
    assert changed == {
        "gemma2": LogitTransform(1.0, 3.0),
        "granite": LogitTransform(0.25),
        "cohere2": LogitTransform(0.25),
    }
    # by the same name Granite divides and HyperCLOVA X multiplies
    assert linear_transform(build("hyperclovax", logits_scaling=0.3)) == LogitTransform(0.3)
    assert linear_transform(build("granite", logits_scaling=0.3)) == LogitTransform(1 / 0.3)
    assert all(linear_transform(build(name, **OWN[name])) is None for name in ("dory", "modernbert-decoder"))


def test_a_field_that_the_forward_ignores_does_not_matter() -> None:
    model = ARCHITECTURES["llama"].build()
    model.config.logit_scale = 3.0
    model.config.logit_temperature = 2.0
    assert linear_transform(model) is None  # the field says what the forward does not do: the forward is right
    loss = CausalLMLoss(model)(**BATCH)
    assert loss.item() == pytest.approx(own_sum(model).item(), rel=1e-6)


class Cutting(LlamaForCausalLM):
    """Cuts off the vocabulary's padding, and shifts what is left."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        labels = kwargs.pop("labels", None)
        out: Any = super().forward(*args, **kwargs)
        out.logits = out.logits[..., :90].float() + torch.arange(90)
        if labels is not None:
            out.loss = self.loss_function(out.logits, labels, vocab_size=90)
        return out


class Penalised(LlamaForCausalLM):
    """Adds a loss on the size of its logits, as Bamba can."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        out: Any = super().forward(*args, **kwargs)
        if out.loss is not None:
            out.loss = out.loss + 1e-3 * out.logits.logsumexp(-1).square().mean()
        return out


class Headless(LlamaForCausalLM):
    """Keeps the base model's layers to itself."""

    base_model_prefix = "nothing"

    def get_output_embeddings(self) -> None:  # type: ignore[override]
        return None


def as_class(kind: type[LlamaForCausalLM]) -> PreTrainedModel:
    model = ARCHITECTURES["llama"].build()
    model.__class__ = kind
    return model


def test_a_forward_of_its_own_is_followed() -> None:
    model = as_class(Cutting)
    assert linear_transform(model) is None
    assert CausalLMLoss(model)(**BATCH | {"targets": IDS.clamp(max=89)}).isfinite()
    hidden = torch.randn(4, 32)
    assert torch.equal(Tail(model)(hidden), model.lm_head(hidden)[:, :90] + torch.arange(90))


def test_what_is_not_known_is_refused_with_its_size() -> None:
    with pytest.raises(
        UserError, match=r"Penalised's own loss is 8\.29\d* where the next token's is 8\.25\d*, .*: use another model"
    ):
        check_loss(as_class(Penalised), sharded=False)
    with pytest.raises(UserError, match="Headless is not made of a base model and a head"):
        check_loss(as_class(Headless), sharded=False)


def test_own_logits_under_zero_3_and_liger_are_refused() -> None:
    model = build("dory")
    check_loss(model, sharded=False)
    with pytest.raises(UserError, match="parallel.zero_stage=2"):
        check_loss(model, sharded=True)
    check_loss(ARCHITECTURES["granite"].build(), sharded=True)


def test_the_model_is_left_as_it_is() -> None:
    model = ARCHITECTURES["llama"].build()
    modules, calls = dict(model._modules), []
    model.register_forward_hook(lambda *_: calls.append("model"))
    model.lm_head.register_forward_hook(lambda *_: calls.append("head"))
    linear_transform(model)
    assert model._modules == modules and not calls
    assert all(p.grad is None for p in model.parameters())


def test_no_weight_is_needed_where_the_head_is_linear() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model("gemma2", **BASE | {"final_logit_softcapping": 2.0})
        )
    assert linear_transform(model) == LogitTransform(1.0, 2.0)
    CausalLMLoss(model)


def test_all_logits_at_once_by_the_models_own_forward() -> None:
    with true_float64():
        model = build("dory")
        losses = [
            CausalLMLoss(model, kind=kind, tile_tokens=3)(**BATCH).item() for kind in (LossKind.tiled, LossKind.whole)
        ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_a_batch_without_targets() -> None:
    model = build("dory", torch.float32)
    loss = CausalLMLoss(model)(**BATCH | {"targets": torch.full_like(IDS, -100)})
    loss.backward()
    assert loss.item() == 0.0 and not any(p.grad.any() for p in model.parameters() if p.grad is not None)

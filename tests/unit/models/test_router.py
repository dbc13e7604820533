"""Router losses: the model's own, over the tokens that count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, MixtralForCausalLM, PreTrainedModel

from anchorctx.attention import register
from anchorctx.errors import UserError
from anchorctx.layout import PackedLayout
from anchorctx.models import checkpoint_activations
from anchorctx.models.loss import CausalLMLoss, check_loss
from anchorctx.models.router import RouterLoss, added_loss
from anchorctx.testing.tiny import BASE, true_float64

EXPERTS = {
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.3,
}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4},
    "qwen3_moe": {"num_experts": 4, "decoder_sparse_step": 2},  # one layer in two has a router
    "olmoe": {"num_experts": 4},
    "granitemoe": {"num_local_experts": 4, "logits_scaling": 2.0},
    "phimoe": {"num_local_experts": 4, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 0},
}
register()
# 32 tokens: transformers divides counts in float32, which is exact for a power of two
IDS = torch.randint(3, 96, (1, 32), generator=torch.Generator().manual_seed(0))
ROW = PackedLayout((0, 1, 9, 32), 1)


def build(model_type: str, dtype: torch.dtype = torch.float64, **fields: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(model_type, **BASE | EXPERTS | MODELS[model_type] | fields)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="anchor")
        for parameter in model.parameters():
            parameter.data = (parameter + torch.randn_like(parameter) * 0.05).to(dtype)
    model.set_experts_implementation("eager")  # torch's grouped matmul has no float64
    return model.train()


def batch(layout: PackedLayout, index: torch.Tensor | None = None) -> dict[str, Any]:
    ids = IDS if index is None else IDS[:, index]
    positions = layout.position_ids()[None]
    return {
        "input_ids": ids,
        "position_ids": positions,
        "layouts": (layout,),
        "targets": F.pad(ids[:, 1:], (0, 1), value=-100),
    }


def whole_loss(module: CausalLMLoss, data: dict[str, Any], counted: torch.Tensor) -> torch.Tensor:
    """Mean token loss and the router's loss of a step that is this one batch."""
    tokens = module(**data, counted=counted) / (data["targets"] != -100).sum()
    assert module.router is not None and module.routed is not None
    pairs = int(counted.sum()) * module.routed.layers
    return tokens + module.router.value(module.routed.counts / pairs, module.routed.probabilities, pairs)


@pytest.mark.parametrize("name", MODELS)
def test_one_piece_without_copies_equals_the_models_own_loss_and_gradients(name: str) -> None:
    layout = PackedLayout((0, 9, 32))
    data = batch(layout)
    with true_float64():
        ours, theirs = build(name), build(name)
        checkpoint_activations(ours)
        loss = whole_loss(CausalLMLoss(ours), data, torch.ones_like(IDS, dtype=torch.bool))
        own = theirs(IDS, position_ids=data["position_ids"], layouts=(layout,), labels=IDS, use_cache=False)
        loss.backward()
        own.loss.backward()
    assert own.aux_loss * 0.3 > 0.1  # it matters
    assert loss.item() == pytest.approx(own.loss.item(), rel=1e-12)
    for (key, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if other.grad is not None:
            assert mine.grad is not None
            assert (mine.grad - other.grad).abs().max() <= 1e-11 * max(1.0, other.grad.abs().max().item()), key


def test_copies_of_the_anchor_do_not_count() -> None:
    """Documents alone behind their anchor, whose tokens are counted one document after the other."""
    layout, index = ROW.with_copies()
    rule = RouterLoss(0.3, 2)
    with true_float64():
        module = CausalLMLoss(build("mixtral"))
        text = torch.from_numpy(layout.text_array())[None]
        assert int(text.sum()) == 31 and text.shape == (1, 33)
        with torch.no_grad():
            module(**batch(layout, torch.from_numpy(index)), counted=text)
            packed = module.routed
            alone = []
            for start, stop in ((1, 9), (9, 32)):
                where = torch.tensor([0, *range(start, stop)])
                positions = where[None]
                body = module.model.base_model(
                    IDS[:, where],
                    position_ids=positions,
                    layouts=(PackedLayout((0, len(where))),),
                    output_router_logits=True,
                )
                alone.append(rule.sums(body.router_logits, torch.arange(len(where)) > 0))
    assert packed is not None and torch.equal(packed.counts, alone[0].counts + alone[1].counts)
    assert packed.counts.sum() == 31 * 2 * 2  # tokens, experts of each, layers
    assert (packed.probabilities - alone[0].probabilities - alone[1].probabilities).abs().max() < 1e-12


def test_it_is_off_where_the_configuration_says_so_and_in_evaluation() -> None:
    module = CausalLMLoss(build("mixtral", output_router_logits=False))
    module(**batch(ROW))
    assert module.router is None and module.routed is None
    module = CausalLMLoss(build("mixtral")).eval()
    module(**batch(ROW))
    assert module.router == RouterLoss(0.3, 2) and module.routed is None


def test_gradients_of_bfloat16_routers_are_finite_and_close() -> None:
    exact, rounded = (CausalLMLoss(build("mixtral", dtype)) for dtype in (torch.float32, torch.bfloat16))
    for module in (exact, rounded):
        whole_loss(module, batch(ROW), torch.ones_like(IDS, dtype=torch.bool))
    assert exact.routed is not None and rounded.routed is not None
    # 48 probabilities of each expert are summed: measured 0.06
    assert (exact.routed.probabilities - rounded.routed.probabilities).abs().max() < 0.1


class Squared(MixtralForCausalLM):
    """Adds its routers' loss by another rule."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        out: Any = super().forward(*args, **kwargs)
        if out.loss is not None and out.aux_loss is not None:
            out.loss = out.loss + 0.3 * out.aux_loss
        return out


def test_another_rule_is_refused_with_the_remedy() -> None:
    model = build("mixtral", torch.float32)
    model.__class__ = Squared
    with pytest.raises(UserError, match="rule that is not known here: set output_router_logits=false"):
        check_loss(model, sharded=False)
    model.config.output_router_logits = False
    check_loss(model, sharded=False)


def test_routers_whose_loss_the_forward_leaves_out() -> None:
    model = build("mixtral", torch.float32)

    class Silent(MixtralForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
            return super().forward(*args, **kwargs | {"output_router_logits": False})

    model.__class__ = Silent
    assert added_loss(model) is None


def test_a_model_all_of_whose_layers_are_dense() -> None:
    module = CausalLMLoss(build("qwen3_moe", torch.float32, mlp_only_layers=[0, 1]))
    with pytest.raises(UserError, match="has no router whose loss could be computed: set output_router_logits=false"):
        module(**batch(ROW))

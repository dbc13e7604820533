"""Layers that drop the forward's keywords: what they were given reaches their attention, also when computed again."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.nemotron.modeling_nemotron import NemotronDecoderLayer
from transformers.models.stablelm.modeling_stablelm import StableLmDecoderLayer

from anchorctx.attention import hand_on_keywords, register
from anchorctx.attention.keywords import dropping
from anchorctx.errors import UserError
from anchorctx.integrations import attach, check_model, detach
from anchorctx.layout import PackedLayout
from anchorctx.models import checkpoint_activations
from anchorctx.testing import decoders
from anchorctx.testing.tiny import true_float64


def test_layers_that_drop_keywords_are_found_by_their_source() -> None:
    assert dropping(NemotronDecoderLayer.forward) == dropping(StableLmDecoderLayer.forward) == ("self_attn",)
    assert dropping(LlamaDecoderLayer.forward) == ()


def test_hooks_are_put_on_once() -> None:
    register()
    model = decoders.build(decoders.tiny("nemotron"), "anchor")  # has them already
    before = sum(len(module._forward_pre_hooks) for module in model.modules())
    hand_on_keywords(model)
    assert before == sum(len(module._forward_pre_hooks) for module in model.modules()) == 2 * 2 + 2


def test_a_model_without_hooks_is_refused_until_it_has_them() -> None:
    register()
    model = decoders.build(decoders.tiny("nemotron"), "anchor")
    for module in model.modules():  # as of a model that comes out of a file
        module._forward_pre_hooks.clear()
    with pytest.raises(UserError, match=r"NemotronForCausalLM's layers drop .*hand_on_keywords\(model\) first"):
        check_model(model)
    hand_on_keywords(model)
    check_model(model)


@pytest.mark.parametrize("name", ["nemotron", "stablelm", "llama4"])
def test_attention_that_is_set_afterwards_is_exact_and_can_be_set_back(name: str) -> None:
    """Llama 4 scales queries from index 11 of the row on, which has 18 tokens."""
    register()
    row = decoders.row()
    with true_float64():
        model = decoders.build(decoders.tiny(name), "eager").double()
        alone, whole = decoders.logits_alone(model, row), model(input_ids=row.ids, use_cache=False).logits
        model.set_attn_implementation("anchor")
        found = model(input_ids=row.ids, position_ids=row.positions, layouts=(row.layout,), use_cache=False).logits
        assert decoders.difference(found, alone) < 1e-12  # as in test_every_decoder
        model.set_attn_implementation("eager")
        assert torch.equal(model(input_ids=row.ids, use_cache=False).logits, whole)


@torch.no_grad()
def test_llama4_scales_queries_while_it_generates_and_when_it_is_detached() -> None:
    model, row = decoders.build(decoders.tiny("llama4_text"), "sdpa"), decoders.row()
    ids = row.ids[:, :15]
    expected = model(input_ids=ids, use_cache=False).logits
    attach(model, rope_dtype="bfloat16")
    model(input_ids=row.ids[:, :9], attention_mask=torch.ones_like(row.ids[:, :9]))  # packed: without
    step = model.generate(ids, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True)
    # measured 0; the scale alone is a factor of 1.07
    assert decoders.difference(step.logits[0], expected[:, -1]) < 1e-5  # type: ignore[union-attr, index]
    detach(model)
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_layer_that_is_computed_again_finds_its_own_layout(reentrant: bool) -> None:
    """Two passes with one tensor of positions and different documents, before either goes backward."""
    register()
    row = decoders.row()
    whole = PackedLayout((0, row.layout.length))
    found = []
    for again in (False, True):
        model = decoders.build(decoders.tiny("nemotron"), "anchor").train()
        if again:
            checkpoint_activations(model, use_reentrant=reentrant)
            model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_())
        passes = [
            model(input_ids=row.ids, position_ids=row.positions, layouts=(layout,), use_cache=False).logits
            for layout in (row.layout, whole)
        ]
        (passes[0].square().sum() + passes[1].sum()).backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))

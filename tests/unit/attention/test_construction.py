"""A model whose attention is set after it was built, or that was built before `register`, is judged all the same."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from anchorctx.attention import construction, register
from anchorctx.errors import UserError
from anchorctx.testing import decoders

NEVER_ASK_FOR_A_MASK = ("mamba", "rwkv", "gpt_neox_japanese", "xlnet")
KEEP_THEIR_ATTENTION = ("bloom", "mpt")
"""transformers sets no other in these, and only warns."""


@pytest.mark.filterwarnings("ignore")  # old models' own
@pytest.mark.parametrize("before", [True, False], ids=["built_before", "built_after"])
@pytest.mark.parametrize("name", [*NEVER_ASK_FOR_A_MASK, *KEEP_THEIR_ATTENTION])
def test_a_model_that_never_asks_for_a_mask_refuses_layouts(name: str, before: bool) -> None:
    register()
    model = decoders.build(decoders.tiny(name), "eager")
    if before:
        for module in model.modules():
            module._forward_pre_hooks.clear()
        construction._watch_built_models()
    row = decoders.row()
    model(input_ids=row.ids)  # as before
    model.set_attn_implementation("anchor")
    with pytest.raises(UserError, match=f"^model type {name} .*: use a RoPE decoder such as llama or qwen3$"):
        model(input_ids=row.ids, layouts=(row.layout,))


def test_a_model_that_keeps_documents_apart_refuses_layouts_that_its_attention_would_ignore() -> None:
    """As of two models that are built of one configuration: the second sets the attention of both."""
    register()
    config, row = decoders.tiny("llama"), decoders.row()
    model = AutoModelForCausalLM.from_config(config, attn_implementation="anchor")
    model(input_ids=row.ids, layouts=(row.layout,))
    AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    with pytest.raises(UserError, match="LlamaForCausalLM got layouts=, which attn_implementation='sdpa' would ignore"):
        model(input_ids=row.ids, layouts=(row.layout,))
    model(input_ids=row.ids)
    model.set_attn_implementation("anchor")
    model(input_ids=row.ids, layouts=(row.layout,))
    assert not any(module._forward_pre_hooks for module in model.model.layers.modules())


def test_a_mask_that_numbers_documents_is_refused_beside_layouts() -> None:
    register()
    model, row = decoders.build(decoders.tiny("llama"), "anchor"), decoders.row()
    mask = torch.ones_like(row.ids)
    model(input_ids=row.ids, attention_mask=mask, layouts=(row.layout,))
    mask[:, 10:] = 2
    with pytest.raises(UserError, match="LlamaForCausalLM got layouts= and an attention_mask that numbers documents"):
        model(input_ids=row.ids, attention_mask=mask, layouts=(row.layout,))

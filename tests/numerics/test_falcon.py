"""Falcon's four shapes of attention through ours: documents alone, gradients, recomputation, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from anchorctx.attention import register
from anchorctx.attention.falcon import FalconAnchorAttention
from anchorctx.errors import UserError
from anchorctx.testing import decoders

from .test_every_decoder import packed

TOLERANCE = 1e-12
SHAPES: dict[str, dict[str, Any]] = {
    "7b": {"new_decoder_architecture": False, "multi_query": True, "parallel_attn": True},
    "40b": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "11b": {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    "a key for each head": {
        "new_decoder_architecture": False,
        "multi_query": False,
        "parallel_attn": False,
        "num_kv_heads": 4,
    },
}


def model(shape: str, attention: str, **more: Any) -> PreTrainedModel:
    register()
    config = decoders.tiny("falcon")
    for name, value in (SHAPES[shape] | {"num_attention_heads": 4} | more).items():
        setattr(config, name, value)
    return decoders.build(config, attention).double()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # the newest transformers has another name for it
@pytest.mark.parametrize("shape", SHAPES)
def test_documents_stay_apart(shape: str) -> None:
    """Also where layers are computed again for the backward pass, and after the attention was switched."""
    alone, ours, row = model(shape, "eager"), model(shape, "anchor"), decoders.row()
    expected = decoders.logits_alone(alone, row)
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    (expected * cotangent).sum().backward()
    ours.train()
    ours.gradient_checkpointing_enable({"use_reentrant": False})
    found = packed(ours, row, layouts=(row.layout,))
    (found * cotangent).sum().backward()
    assert decoders.difference(found, expected) < TOLERANCE
    assert decoders.gradient_difference(ours, alone) < TOLERANCE
    alone.set_attn_implementation("anchor")
    assert decoders.difference(packed(alone, row, layouts=(row.layout,)), expected) < TOLERANCE


@pytest.mark.parametrize("shape", SHAPES)
def test_keys_come_once_a_group(shape: str) -> None:
    attention = model(shape, "anchor").transformer.h[0].self_attention
    assert isinstance(attention, FalconAnchorAttention)
    fused = torch.randn(2, 5, attention.query_key_value.out_features, dtype=torch.float64)
    theirs = [x.transpose(1, 2) for x in attention._split_heads(fused)]
    ours = attention.heads(fused)
    assert [x.shape[1] for x in ours] == [4, attention.num_kv_heads, attention.num_kv_heads]
    assert ours[0].equal(theirs[0])
    for mine, whole in zip(ours[1:], theirs[1:], strict=True):
        assert mine.repeat_interleave(whole.shape[1] // mine.shape[1], 1).equal(whole)


def test_without_layouts_nothing_is_computed() -> None:
    row = decoders.row()
    with pytest.raises(UserError, match="FalconAnchorAttention .* needs the forward argument layouts="):
        packed(model("7b", "anchor"), row)


def test_alibi_is_refused() -> None:
    with pytest.raises(UserError, match="model type falcon adds a bias of its own to attention scores"):
        model("7b", "anchor", alibi=True)


def test_flash_attention_is_chosen_at_load() -> None:
    """Its class is another: switched to later it would be computed as eager attention, without a mask."""
    found = model("7b", "eager")
    found.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(UserError, match="load the model with attn_implementation='flash_attention_2'"):
        found.transformer.h[0].self_attention(torch.zeros(1, 3, found.config.hidden_size).double(), None, None)

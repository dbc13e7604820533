"""Models that also read images, of which text is trained; and models whose layers differ."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from anchorctx.flops import ModelFlops, head_dims
from anchorctx.models import ModelConfig, RopeConfig, check_attention, load_model, reach, save_model
from anchorctx.parallel.ulysses import key_heads
from anchorctx.testing import decoders


@pytest.mark.filterwarnings("ignore:.*")
def test_only_the_text_model_is_trained_and_all_is_exported(tmp_path: Path) -> None:
    decoders.build(decoders.tiny("gemma3"), "eager").save_pretrained(tmp_path / "base")
    model = load_model(ModelConfig(path=str(tmp_path / "base"), max_length=999, rope=RopeConfig(theta=3e6)))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all("language_model" in name for name in trained)
    others = {name for name, _ in model.named_parameters()} - trained
    assert others and all("vision_tower" in name or "projector" in name for name in others)
    row = decoders.row()
    inputs = {"input_ids": row.ids, "position_ids": row.positions, "layouts": (row.layout,), "use_cache": False}
    model(**inputs).logits.sum().backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if name in trained)

    save_model(model, tmp_path / "exported")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert again.config.text_config.rope_parameters["full_attention"]["rope_theta"] == 3e6
    assert reach(again.config) == again.config.text_config.max_position_embeddings == 999
    theirs = dict(again.named_parameters())
    assert all(torch.equal(parameter, theirs[name]) for name, parameter in model.named_parameters())


@pytest.mark.filterwarnings("ignore:.*")
def test_layers_of_several_head_dimensions_are_read_layer_by_layer(tmp_path: Path) -> None:
    decoders.build(decoders.tiny("gemma4"), "eager").save_pretrained(tmp_path)
    model = load_model(ModelConfig(path=str(tmp_path)))
    text = model.config.get_text_config()
    assert head_dims(text) == (32, 32) and key_heads(text) == 2
    assert ModelFlops.of(model).per_pair == 12.0 * 32 * 4
    check_attention(model, "cpu", torch.device("cpu"))


def test_thetas_of_single_layers_follow_the_models(tmp_path: Path) -> None:
    config = decoders.tiny("granite_swa")
    old = config.rope_parameters["rope_theta"]
    config.layer_rope_theta = [old, 77.0, 0.0][: config.num_hidden_layers]
    decoders.build(config, "eager").save_pretrained(tmp_path)
    changed = load_model(ModelConfig(path=str(tmp_path), rope=RopeConfig(theta=3e6))).config
    assert changed.layer_rope_theta == [3e6, 77.0, 0.0][: config.num_hidden_layers]
    assert changed.rope_parameters["rope_theta"] == 3e6

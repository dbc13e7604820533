"""Checkpoints whose config.json asks for another model than their weights are: shapes, layers, biases, kernels."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from anchorctx.errors import UserError
from anchorctx.models import ModelConfig, load_model
from anchorctx.models.save import save_model
from anchorctx.testing import readers
from anchorctx.testing.tiny import ARCHITECTURES, save, text_model, word_tokenizer

Change = Callable[[Path], None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = word_tokenizer(40)
    return save(text_model(tokenizer, 64), tokenizer, tmp_path / "model")


def config(**fields: object) -> Change:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def experts(folder: Path) -> None:
    """Of four experts the file has three."""
    save(ARCHITECTURES["mixtral"].build(), word_tokenizer(96), folder)
    weights(folder, lambda name: "experts.3." not in name)


def half_an_expert(folder: Path) -> None:
    save(ARCHITECTURES["mixtral"].build(), word_tokenizer(96), folder)
    weights(folder, lambda name: "layers.0.block_sparse_moe.experts.3.w1" not in name)


def weights(folder: Path, keep: Callable[[str], bool], **more: torch.Tensor) -> None:
    file = folder / "model.safetensors"
    kept = {name: weight for name, weight in load_file(file).items() if keep(name)}
    save_file(kept | more, file, metadata={"format": "pt"})


SHAPE = (
    r"weights of another shape than its configuration asks for \(first: model\.layers\.0\.{} is \({}\), "
    r"\w+ needs \({}\)\)"
)
REFUSED: dict[str, tuple[Change, str]] = {
    # meta-llama/llama #427, hiyouga/LlamaFactory #459, alibaba/Megatron-LLaMA #21: another number of key heads
    "key_heads": (config(num_key_value_heads=1), SHAPE.format(r"self_attn\.k_proj\.weight", "32, 32", "16, 32")),
    # ServiceNow/Fast-LLM #102, InternLM/lmdeploy #2761: heads of another width
    "head_dim": (config(head_dim=8), SHAPE.format(r"self_attn\.k_proj\.weight", "32, 32", "16, 32")),
    # TsinghuaAI/CPM-1-Generate #76: an MLP of another width
    "mlp": (config(intermediate_size=64), SHAPE.format(r"mlp\.down_proj\.weight", "32, 32", "32, 64")),
    # huggingface/optimum #1827: biases that a reader would draw at random
    "biases": (config(attention_bias=True), r"lacks 8 weights of LlamaForCausalLM \(first: .*k_proj\.bias\)"),
    # basveeling/wavenet #12: more layers than the files have
    "layers": (config(num_hidden_layers=3), r"lacks 9 weights of LlamaForCausalLM \(first: model\.layers\.2\."),
    # NVIDIA/Megatron-LM #5844, NVIDIA-NeMo/Megatron-Bridge #1716: experts that a conversion dropped
    "experts": (experts, SHAPE.format(r"mlp\.experts\.down_proj", "3, 32, 48", "4, 32, 48")),
    "half_an_expert": (half_an_expert, "has experts that do not fit each other, of which a weight is missing"),
    # mozilla-ai/any-guardrail #239, huggingface/transformers #46211: heads that do not divide the hidden size
    "heads": (
        config(num_attention_heads=5, num_key_value_heads=5),
        "32.* is not a multiple of the number of attention",
    ),
}


@pytest.mark.parametrize("command", [readers.train, readers.plan])
@pytest.mark.parametrize("name", REFUSED)
def test_what_contradicts_is_refused_in_a_sentence(name: str, command: Change, folder: Path) -> None:
    change, sentence = REFUSED[name]
    change(folder)
    with pytest.raises(UserError, match=f"^model {folder} .*{sentence}") as error:
        command(folder)
    assert "\n" not in str(error.value)


# deepseek-ai/DeepSeek-V3 #267: layers beyond the configuration's number (there for another way of training)
def test_layers_beyond_the_configuration_are_left_out_and_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    config(num_hidden_layers=1)(folder)
    found, held = load_model(ModelConfig(path=str(folder))).state_dict(), load_file(folder / "model.safetensors")
    assert len(held) - len(found) == 9 and all(found[name].equal(held[name]) for name in found)
    assert "9 weights that LlamaForCausalLM does not know (first: model.layers.1.input_layernorm" in caplog.text


# AutoGPTQ/AutoGPTQ #555, huggingface/transformers #29553: biases beside a configuration without
def test_biases_that_the_configuration_does_not_ask_for_are_said(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights(folder, lambda name: True, **{"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)})
    load_model(ModelConfig(path=str(folder)))
    assert "1 weight that LlamaForCausalLM does not know (first: model.layers.0.self_attn.q_proj.bias)" in caplog.text


READ: dict[str, Change] = {
    # hiyouga/EasyR1 #384: the kernel of the machine that wrote it, which is not installed here
    "kernel": config(_attn_implementation="flash_attention_2"),
    "kernel_by_its_other_name": config(attn_implementation="flash_attention_2"),
    # huggingface/transformers #29955: a data type that is not the weights'
    "dtype": config(dtype="float16"),
    # the class of another purpose, beside a language model's weights: vllm-project/vllm #11802
    "class": config(architectures=["LlamaForSequenceClassification"]),
    # gradients-ai/G.O.D #1229
    "head_dim_null": config(head_dim=None),
}


@pytest.mark.parametrize(
    "command", [readers.train, readers.train_sharded, readers.plan, readers.evaluation, readers.precision]
)
@pytest.mark.parametrize("name", READ)
def test_what_does_not_concern_the_weights_is_no_contradiction(name: str, command: Change, folder: Path) -> None:
    READ[name](folder)
    command(folder)
    found = load_model(ModelConfig(path=str(folder))).state_dict()
    held = load_file(folder / "model.safetensors")
    assert found.keys() == held.keys() and all(found[name].equal(held[name]) for name in held)


# huggingface/transformers #33780: the export says what its weights are, whatever the checkpoint said of its own
def test_an_export_has_the_data_type_that_it_says(folder: Path, tmp_path: Path) -> None:
    config(dtype="float16")(folder)
    save_model(load_model(ModelConfig(path=str(folder))), tmp_path / "out")
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (fields["dtype"], fields["torch_dtype"]) == ("float32", "float32")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype is torch.float32

"""Folders whose weights are not all there: no command draws the rest at random, each says in a sentence what is wrong.

That every command asks the same loader is tested in tests/unit/models/test_damaged.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForSequenceClassification

from anchorctx.errors import UserError
from anchorctx.models import ModelConfig, load_model
from anchorctx.testing.readers import evaluation, plan, precision, train, train_sharded
from anchorctx.testing.tiny import save, text_model, word_tokenizer

Damage = Callable[[Path], None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = word_tokenizer(40)
    return save(text_model(tokenizer, 64), tokenizer, tmp_path / "model")


def base_model(folder: Path) -> None:
    text_model(word_tokenizer(40), 64).model.save_pretrained(folder)


def classifier(folder: Path) -> None:
    LlamaForSequenceClassification(text_model(word_tokenizer(40), 64).config).save_pretrained(folder)


def renamed(folder: Path, name: Callable[[str], str]) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({name(n): weight for n, weight in weights.items()}, folder / "pytorch_model.bin")


def wrapped_head(folder: Path) -> None:
    renamed(folder, lambda name: name.replace("lm_head.", "lm_head.0."))


def compiled(folder: Path) -> None:
    renamed(folder, lambda name: f"_orig_mod.{name}")


def distributed(folder: Path) -> None:
    renamed(folder, lambda name: f"module.{name}")


def in_front(prefix: str) -> Damage:
    return lambda folder: renamed(folder, lambda name: f"{prefix}{name}")


def inside(folder: Path) -> None:
    """In the middle of names, which activation checkpointing leaves there."""
    renamed(folder, lambda name: name.replace(".self_attn.", "._checkpoint_wrapped_module.self_attn."))


def unmerged(folder: Path) -> None:
    renamed(folder, lambda name: name.replace("q_proj.weight", "q_proj.base_layer.weight"))


def shares(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({name: torch.zeros(0) for name in weights}, folder / "model.safetensors", metadata={"format": "pt"})


def of_a_trainer(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({"state_dict": weights, "epoch": 3}, folder / "pytorch_model.bin")


def without_a_shard(folder: Path) -> None:
    model = text_model(word_tokenizer(40), 64)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="10KB")
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def adapter(folder: Path) -> None:
    """Not even all of it: where peft is installed, transformers draws what an adapter lacks."""
    fields = {"base_model_name_or_path": "meta-llama/Llama-3.2-1B", "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    (folder / "config.json").unlink()


def adapter_beside(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": None}))


CASES = [
    # fabienfrfr/tptt #1, huggingface/transformers #17375
    (base_model, r"has no lm_head\.weight: name a causal language model, not a base model or a classifier"),
    # huggingface/transformers #17375
    (classifier, r"has no lm_head\.weight, but score\.weight: name a causal language model"),
    # shibing624/MedicalGPT #213
    (wrapped_head, r"has no lm_head\.weight, but lm_head\.0\.weight: name a causal language model"),
    # karpathy/nanoGPT #325, pytorch/pytorch #101107
    (compiled, r"has _orig_mod\. in front of the names of its weights \(such as _orig_mod\.lm_head\.weight\)"),
    # FareedKhan-dev/train-llm-from-scratch #37
    (distributed, r"has module\. in front of the names of its weights \(such as module\.lm_head\.weight\)"),
    # Lightning-AI/litgpt #1613, huggingface/peft #2681
    (in_front("_fsdp_wrapped_module."), r"has _fsdp_wrapped_module\. in front of the names of its weights"),
    # huggingface/peft #1579
    (in_front("base_model.model."), r"has base_model\.model\. in front of the names of its weights"),
    # apple/ml-fastvlm #21
    (in_front("language_model."), r"has language_model\. in front of the names of its weights"),
    # pytorch/pytorch #117399
    (inside, r"lacks 8 weights of LlamaForCausalLM \(first: model\.layers\.0\.self_attn\.k_proj\.weight\)"),
    # huggingface/peft #1689
    (unmerged, r"lacks 2 weights of LlamaForCausalLM \(first: model\.layers\.0\.self_attn\.q_proj\.weight\)"),
    # texttron/tevatron #203, salesforce/jaxformer #20
    (shares, r"has 21 weights without any number in it \(first: lm_head\.weight\), as a run under ZeRO 3 leaves them"),
    # Lightning-AI/pytorch-lightning #18055, #525
    (of_a_trainer, r"lacks 21 weights of LlamaForCausalLM \(first: lm_head\.weight\)"),
    # huggingface/transformers #36480
    (without_a_shard, r"lacks 1 of its \d+ files of weights \(first: model-00002-of-\d+\.safetensors\): download or"),
    # huggingface/transformers #36473, huggingface/sentence-transformers #3865
    (adapter, r"holds an adapter of meta-llama/Llama-3\.2-1B: merge it into that model"),
    (adapter_beside, r"holds an adapter of another model: merge it"),
]


@pytest.mark.parametrize("command", [train, train_sharded, plan, evaluation, precision])
@pytest.mark.parametrize(("damage", "sentence"), CASES, ids=lambda value: getattr(value, "__name__", ""))
def test_what_is_not_there_is_said(
    damage: Damage, sentence: str, command: Callable[[Path], None], folder: Path
) -> None:
    damage(folder)
    with pytest.raises(UserError, match=f"model {folder} {sentence}") as error:
        command(folder)
    assert "\n" not in str(error.value)


def as_file(name: str) -> Damage:
    return lambda folder: void((folder / "model.safetensors").rename(folder / name))


def dangling(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder.parent / "blobs" / "4d7a2146")


def void(_: object) -> None: ...


ELSEWHERE: dict[str, tuple[Damage, str]] = {
    # huggingface/transformers #24687: nothing but the configuration
    "nothing": (lambda folder: (folder / "model.safetensors").unlink(), "or pytorch_model.bin: download or export it"),
    # meta-llama/llama #1334, #1323, meta-llama/llama-models #159: as Meta publishes them
    "meta": (as_file("consolidated.00.pth"), "has no weights in .*, but consolidated.00.pth: .* or convert it to"),
    # shoarora/transformers-trainers #14: a trainer's own file
    "trainer": (as_file("last.ckpt"), "has no weights in .*, but last.ckpt: "),
    # huggingface/peft #309: an adapter's file without its configuration
    "adapter": (as_file("adapter_model.safetensors"), "has no weights in .*, but adapter_model.safetensors: "),
    # huggingface/huggingface_hub #1388, #4550, debpalash/VoiceStudio #1056: a cache whose links lead nowhere
    "link": (dangling, "has model.safetensors as a link to a file that is not there: download it again"),
}


# a plan needs no weights, and passes
@pytest.mark.parametrize("command", [train, evaluation, precision])
@pytest.mark.parametrize("name", ELSEWHERE)
def test_weights_that_are_nowhere_or_in_another_file(name: str, command: Callable[[Path], None], folder: Path) -> None:
    damage, sentence = ELSEWHERE[name]
    damage(folder)
    with pytest.raises(UserError, match=f"model {folder} .*{sentence}") as error:
        command(folder)
    assert "\n" not in str(error.value)


# vllm-project/vllm-omni #1633: a name that the index forgets, in a file that it names: the weight is there, and is read
def test_a_weight_that_only_the_index_lacks_is_read(folder: Path) -> None:
    expected = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    text_model(word_tokenizer(40), 64).save_pretrained(folder, max_shard_size="10KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    del index["weight_map"]["lm_head.weight"]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert load_model(ModelConfig(path=str(folder))).state_dict()["lm_head.weight"].equal(expected["lm_head.weight"])

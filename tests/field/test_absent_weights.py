"""Folders whose weights are not all there: no command draws the rest at random, each says in a sentence what is wrong.

That every command asks the same loader is tested in tests/unit/models/test_damaged.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForSequenceClassification

from anchorctx.errors import UserError
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

"""What a collator finds out about a model, a tokenizer and the examples that it is given."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from anchorctx.attention import register
from anchorctx.attention.interface import check_interface
from anchorctx.errors import UserError
from anchorctx.integrations import AnchorCollator, Excess, check_model
from anchorctx.testing.tiny import ARCHITECTURES

from .collators import collator, configured


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2", "anchor",
                                  "anchor_cpu"])  # fmt: skip
def test_implementations_that_keep_documents_apart_pass(name: str) -> None:
    register()
    check_model(configured(name))
    check_model(SimpleNamespace(module=configured(name)))  # DistributedDataParallel


@pytest.mark.parametrize("name", ["sdpa", "eager", "flex_attention", "paged|sdpa"])
def test_others_are_refused_with_the_remedy(name: str) -> None:
    with pytest.raises(UserError) as caught:
        check_model(configured(name))
    assert str(caught.value).startswith(f"attn_implementation='{name}' would mix documents")
    assert "'flash_attention_2' on CUDA" in str(caught.value) and "'anchor'" in str(caught.value)


def test_layers_that_carry_a_state_are_refused() -> None:
    with pytest.raises(UserError, match="model type llama has linear_attention layers, which would mix packed"):
        check_model(configured("flash_attention_2", layer_types=["linear_attention"] * 2))


@pytest.mark.parametrize("name", ["flash_attention_2", "kernels-community/vllm-flash-attn3"])
def test_flash_attention_that_does_not_train_sinks_is_refused(name: str) -> None:
    model = ARCHITECTURES["gpt_oss"].build()
    check_model(model)
    model.config._attn_implementation = "flash_attention_4"
    check_model(model)
    model.config._attn_implementation = name
    with pytest.raises(UserError, match=f"'{name}' is not known to train attention sinks.*with 'anchor' after"):
        check_model(model)


def test_a_name_is_no_model() -> None:
    with pytest.raises(UserError, match="model='gpt2' has no configuration to check: pass the transformers model"):
        check_model("gpt2")


def test_ids_are_held_to_the_models_vocabulary() -> None:
    known = collator(model=configured("anchor", vocab_size=200))
    assert known([{"input_ids": [5, 150]}])["input_ids"].tolist() == [[1, 5, 150]]
    with pytest.raises(UserError, match="has 200 in its input_ids, but ids go from 0 to 199"):
        known([{"input_ids": [5, 200]}])
    with pytest.raises(UserError, match="the anchor, token 1, is beyond the model's vocabulary of 1: resize"):
        collator(model=configured("anchor", vocab_size=1))


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"input_ids": [5, 6], "cu_seq_lens_q": [0, 1, 2]}, "is packed already, it has cu_seq_lens_q"),
        ({"input_ids": [5, 6], "attention_mask": [1, 1, 1]}, "has an attention_mask of 3 for 2 input_ids"),
        ({"input_ids": [5, 6], "attention_mask": [[1], [1, 1]]}, "several sequences in its attention_mask"),
        ({"input_ids": None}, "has a NoneType as its input_ids: give a list of token ids"),
        ({"input_ids": [5, 6], "labels": 3}, "has a int as its labels"),
    ],
)
def test_examples_that_are_no_document_are_named(example: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        collator()([example])


def test_a_tokenizers_own_anchor_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    collate = collator(model=configured("anchor"))
    for _ in range(2):
        collate([{"input_ids": [collate._anchor, 5, 6]}])
    assert sum("by itself: tokenize with add_special_tokens=False" in message for message in caplog.messages) == 1


def test_a_row_beyond_the_models_positions_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = configured("anchor")
    collator(model=model, row_length=model.config.max_position_embeddings + 1)
    assert "is more than the model's max_position_embeddings" in caplog.text


def test_scalings_that_look_at_the_whole_batch_are_refused() -> None:
    model = configured("anchor")
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(UserError, match="rope_type=dynamic takes its angles from the longest position of a batch"):
        check_model(model)


def test_attention_that_never_asks_the_interface_is_refused() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 96}
    register()
    config = AutoConfig.for_model("gpt_neox_japanese", **sizes)
    with pytest.raises(UserError, match="model type gpt_neox_japanese computes attention by itself"):
        AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="anchor")
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match="GPTNeoXJapaneseForCausalLM computes attention by itself"):
        check_interface(model)  # of a model that nobody knows, too


def test_tokenizers_and_sizes_of_numpy() -> None:
    assert collator(row_length=np.int64(40))([{"input_ids": [5, 6]}])["input_ids"].shape == (1, 3)
    with pytest.raises(UserError, match="tokenizer='gpt2' is none"):
        AnchorCollator("gpt2", 40)


def test_what_cannot_be_seen_is_said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    collator()
    assert "does not know if the model keeps documents apart: pass model=" in caplog.text
    caplog.clear()
    collator(model=configured("anchor"))
    assert not caplog.messages
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    collator(model=configured("anchor"))
    assert "4 GPUs and one process: Trainer would split batches by DataParallel" in caplog.text
    caplog.clear()
    monkeypatch.setenv("LOCAL_RANK", "0")
    collator(model=configured("anchor"), excess=Excess.cut)
    assert not caplog.messages

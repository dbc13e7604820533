from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from anchorctx.data.sources.stdlib import train_tokenizer
from anchorctx.evals.base import Subject

TEXTS = [f"def f{i}(x):\n    return x + {i}\n" * (i + 1) for i in range(12)]


def ignore(done: int, total: int) -> None:
    """No progress wanted."""


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(vocabulary=300, sample_chars=20_000)


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=tokenizer.bos_token_id,  # type: ignore[arg-type]
        eos_token_id=tokenizer.eos_token_id,  # type: ignore[arg-type]
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return make_model(tokenizer)


@pytest.fixture(scope="session")
def subject(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Subject:
    return Subject(model, tokenizer)


@pytest.fixture(scope="session")
def folder(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The model as a Hugging Face folder, not to be written to."""
    return save(model, tokenizer, tmp_path_factory.mktemp("models") / "tiny")


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, path: Path) -> Path:
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path

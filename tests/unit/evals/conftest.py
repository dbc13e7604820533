from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from anchorctx.data.sources.stdlib import train_tokenizer
from anchorctx.evals.base import Subject
from anchorctx.testing.tiny import save, text_model

TEXTS = [f"def f{i}(x):\n    return x + {i}\n" * (i + 1) for i in range(12)]


def ignore(done: int, total: int) -> None:
    """No progress wanted."""


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(vocabulary=300, sample_chars=20_000)


@pytest.fixture(scope="session")
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return text_model(tokenizer, 256)


@pytest.fixture(scope="session")
def subject(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Subject:
    return Subject(model, tokenizer)


@pytest.fixture(scope="session")
def folder(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The model as a Hugging Face folder, not to be written to."""
    return save(model, tokenizer, tmp_path_factory.mktemp("models") / "tiny")

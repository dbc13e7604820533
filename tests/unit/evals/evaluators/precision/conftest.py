from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from anchorctx.data.sources.source import SourceConfig
from anchorctx.data.sources.stdlib import train_tokenizer
from anchorctx.evals.evaluators.precision.config import PrecisionConfig


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer, and a corpus beside it."""
    folder = tmp_path_factory.mktemp("precision") / "tiny"
    tokenizer = train_tokenizer(vocabulary=300, sample_chars=20_000)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=128,
            initializer_range=0.3,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    texts = (f"def f{i}(x):\n    return x + {i}\n" * (i % 4 + 1) for i in range(60))
    (folder.parent / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


@pytest.fixture
def make_config(folder: Path, tmp_path: Path) -> Any:
    """A small study's configuration; keyword arguments change fields."""

    def make(**fields: Any) -> PrecisionConfig:
        defaults: dict[str, Any] = {
            "model": str(folder),
            "out_dir": str(tmp_path / "out"),
            "corpus": SourceConfig(path=str(folder.parent / "corpus.jsonl")),
            "lengths": [32, 96],
            "shifts": [16, 2000],
            "texts": 3,
            "queries": 8,
            "cost": False,
        }
        return PrecisionConfig(**defaults | fields)

    return make

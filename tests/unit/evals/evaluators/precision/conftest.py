from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from anchorctx.data.sources.source import SourceConfig
from anchorctx.data.sources.stdlib import train_tokenizer
from anchorctx.evals.evaluators.precision.config import PrecisionConfig
from anchorctx.testing.tiny import save, text_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer, and a corpus beside it."""
    folder = tmp_path_factory.mktemp("precision") / "tiny"
    tokenizer = train_tokenizer(vocabulary=300, sample_chars=20_000)
    save(text_model(tokenizer, 128), tokenizer, folder)
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

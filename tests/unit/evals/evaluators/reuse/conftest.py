"""A random model with what it is evaluated on, and the command for that."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from anchorctx.cli.main import main
from anchorctx.data.sources.stdlib import train_tokenizer
from anchorctx.testing.tiny import save, text_model

LINES = "".join(f"def f{i}(x):\n    return x + {i}\n\n\n" for i in range(400))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a tokenizer that knows the facts, a corpus and three GSM8K-like questions."""
    path = tmp_path_factory.mktemp("kvcomm")
    tokenizer = train_tokenizer(vocabulary=300, sample_chars=20_000)
    save(text_model(tokenizer, 1024), tokenizer, path / "tiny")
    (path / "corpus.jsonl").write_text(json.dumps({"text": LINES}) + "\n")
    rows = [{"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(3)]
    (path / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(folder: Path, out: Path, *more: str) -> int:
    named = any(word.startswith(("model=", "models=")) for word in more)
    return main(
        [
            "kvcomm",
            *([] if named else [f"model={folder / 'tiny'}"]),
            f"out_dir={out}",
            f"corpus={{path: {folder / 'corpus.jsonl'}, format: auto}}",
            "retrieval={problems: 3, document_tokens: 60, facts: 2}",
            "copy={problems: 3, question: 40, prefix: 20, output: 6}",
            f"gsm8k={{path: {folder / 'gsm8k.jsonl'}, problems: 2, max_new_tokens: 6}}",
            "settings={warmup: 2, min_exemplars: 2}",
            "compare_tokens=4",
            *more,
        ]
    )

"""Collators and models for the tests of this folder."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from transformers import LlamaConfig

from anchorctx.integrations import AnchorCollator
from anchorctx.layout import Pattern
from anchorctx.testing.tiny import BASE, word_tokenizer


def collator(row_length: int = 8, pattern: Pattern | str = Pattern.anchor, **options: Any) -> AnchorCollator:
    return AnchorCollator(word_tokenizer(96), row_length, pattern, **options)


def configured(attention: str | None, **fields: Any) -> Any:
    """What `check_model` sees of a model."""
    config = LlamaConfig(**BASE | fields)
    config._attn_implementation = attention
    return SimpleNamespace(config=config)

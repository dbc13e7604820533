"""A small tokenizer, shared by the tests of the data package."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from anchorctx.data.sources.stdlib import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 300 tokens with the facts' tokens, BOS and EOS."""
    return train_tokenizer(300, 30_000)


@pytest.fixture(scope="session")
def tokenizer_dir(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same, saved."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return str(folder)

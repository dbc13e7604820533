from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from anchorctx.kvcomm.decoder import Decoder
from anchorctx.testing.tiny import ARCHITECTURES, word_tokenizer


@pytest.fixture(scope="session")
def model() -> PreTrainedModel:
    found = ARCHITECTURES["llama"].build(torch.float32)
    found.set_attn_implementation("sdpa")
    return found.eval()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer(96)


@pytest.fixture(scope="session")
def decoder(model: PreTrainedModel) -> Decoder:
    return Decoder(model)

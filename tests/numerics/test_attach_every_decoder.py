"""Every decoder that is exact, attached: logits and loss of a trainer's batch are those of its documents alone.

Among them are models whose `get_decoder()` is the whole model or the head, and models around a text model that they
call with embeddings. Documents alone run through transformers' eager attention, with no code of ours.

Tolerance: float64. Measured over all: logits differ by at most 2e-14 of their standard deviation, losses by 2.7e-15.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from anchorctx.attention.architecture import known
from anchorctx.errors import UserError
from anchorctx.integrations import attach
from anchorctx.testing import decoders
from anchorctx.testing.tiny import true_float64

TOLERANCE, BOS = 1e-12, 1
DOCUMENTS = ([5, 6, 7, 8, 9, 20, 21], [10, 11, 12, 30, 31, 32, 33], [BOS, 13, 14, 15, 16, 17])
"""The last begins with its copy of the anchor."""
SAMPLE = {"llama", "llama4", "modernbert-decoder", "afmoe", "nemotron", "gemma3", "gemma4", "fuyu"}
"""For CI: a plain one, those whose decoder is hard to find, one that names its mask, a hook, three wrappers."""


def batch() -> dict[str, torch.Tensor]:
    positions = torch.tensor([[i for ids in DOCUMENTS for i in range(len(ids))]])
    ids = torch.tensor([sum(DOCUMENTS, [])])
    return {"input_ids": ids, "position_ids": positions, "labels": torch.where(positions > 0, ids, -100)}


@torch.no_grad()
def alone(model: PreTrainedModel) -> torch.Tensor:
    """(1, T, V) logits of the documents' tokens, each document by itself behind the anchor."""
    own = [ids[ids[0] == BOS :] for ids in DOCUMENTS]
    logits = []
    for ids, part, end in zip(DOCUMENTS, own, itertools.accumulate(map(len, own)), strict=True):
        positions = torch.tensor([[0, *range(1 + end - len(part), 1 + end)]])
        seen = {"input_ids": torch.tensor([[BOS, *part]]), "attention_mask": torch.ones_like(positions)}
        logits.append(model(**seen, position_ids=positions, use_cache=False).logits[:, -len(ids) :])
    return torch.cat(logits, 1)


@pytest.mark.filterwarnings("ignore")  # old models' own
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in SAMPLE else pytest.mark.slow) for n in sorted(known()[0])]
)
def test_attached_it_computes_documents_alone(name: str) -> None:
    given = batch()
    with true_float64():
        model = decoders.build(decoders.tiny(name), "eager").double().eval()  # PhiMoE's routers draw lots in training
        expected = alone(model)
        attach(model, rope_dtype="bfloat16", anchor=BOS)
        output = model(**given)
    assert decoders.difference(output.logits, expected) < TOLERANCE
    assert (output.loss - cross_entropy(expected[0, :-1], given["labels"][0, 1:])).abs() < TOLERANCE


@pytest.mark.parametrize(("name", "images"), [("gemma3", torch.zeros(1, 3, 8, 8)), ("fuyu", [torch.zeros(4, 8)])])
def test_images_are_refused(name: str, images: Any) -> None:
    model = decoders.build(decoders.tiny(name), "eager")
    attach(model, anchor=BOS)
    with pytest.raises(UserError, match="Model got pixel_values, beside input_ids, which attach cannot lay out"):
        model(**batch(), pixel_values=images)

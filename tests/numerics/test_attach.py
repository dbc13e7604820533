"""An attached model against its documents alone, through transformers' eager attention with no code of ours.

Tolerance: float64 throughout. Measured over all cases: logits of up to 3.3 differ by at most 4.5e-15, losses by
1.8e-15, gradients by 9.9e-16 of their tensor's largest entry (or of 1); 1e-12 leaves room for other processors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from anchorctx.integrations import attach
from anchorctx.layout import Pattern
from anchorctx.models.build import checkpoint_activations
from anchorctx.testing.tiny import ARCHITECTURES, true_float64

TOLERANCE = 1e-12
ROW, BOS = 20, 1
LENGTHS = (7, 2, 8, 1, 5, 9)
"""Documents; the second and the last begin with BOS, which is then their copy of the anchor: one token less."""
WITH_BOS = (1, 5)
STARTS = (1, 8, 9, 17, 1, 6)
"""The first four share a row of 20, the other two the next."""
PATTERNS = [pattern for pattern in Pattern if pattern is not Pattern.full]
Document = tuple[list[int], list[int]]


def documents() -> list[Document]:
    """(ids, labels) of each; of the third, two labels more are masked."""
    generator = torch.Generator().manual_seed(5)
    ids = [torch.randint(3, 96, (n,), generator=generator).tolist() for n in LENGTHS]
    for i in WITH_BOS:
        ids[i][0] = BOS
    labels = [[-100, *row[1:]] for row in ids]
    labels[2][3:5] = [-100, -100]
    return list(zip(ids, labels, strict=True))


def flattened() -> dict[str, torch.Tensor]:
    ids, labels = ([sum(parts, [])] for parts in zip(*documents(), strict=True))
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}


def padded(rows: list[list[Document]], masks: list[list[int]]) -> dict[str, torch.Tensor]:
    """Rows of documents, padded on the right to one length; the mask has a number for each document."""
    longest = max(sum(len(ids) for ids, _ in row) for row in rows) + 2
    batch: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "attention_mask": []}
    for row, numbers in zip(rows, masks, strict=True):
        ids, labels = (sum(parts, []) for parts in zip(*row, strict=True))
        mask = [number for (text, _), number in zip(row, numbers, strict=True) for _ in text]
        for name, values, fill in zip(batch, (ids, labels, mask), (0, -100, 0), strict=True):
            batch[name].append([*values, *[fill] * (longest - len(values))])
    return {name: torch.tensor(values) for name, values in batch.items()}


def boundaries() -> torch.Tensor:
    return torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)


def restarting() -> torch.Tensor:
    return torch.cat([torch.arange(n) for n in LENGTHS])[None]


def batches() -> dict[str, dict[str, Any]]:
    """The same documents as other trainers' collators hand them over."""
    texts, ends = documents(), boundaries()
    index = torch.repeat_interleave(torch.arange(len(LENGTHS), dtype=torch.int32), torch.tensor(LENGTHS))[None]
    flash = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 9, "max_length_k": 9}
    return {
        "cu_seq_lens": flattened() | flash,
        "position_ids": flattened() | {"position_ids": restarting()},
        "trl": flattened() | flash | {"position_ids": restarting(), "seq_idx": index},
        "numbered": padded([texts[:4], texts[4:]], [[1, 2, 3, 4], [1, 2]]),
        "restarted_and_padded": padded([texts[:4], texts[4:]], [[1, 1, 1, 1], [1, 1]])
        | {"position_ids": torch.stack([filled(restarting()[0, :18]), filled(restarting()[0, 18:])])},
        "rows": padded([[text] for text in texts], [[1]] * len(texts)),
    }


def filled(positions: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(positions, (0, 20 - len(positions)), value=1)


def model_of(name: str, attention: str = "eager") -> PreTrainedModel:
    model = ARCHITECTURES[name].build(torch.float64)
    model.config._attn_implementation = attention
    return model


def starts_under(pattern: Pattern, form: str) -> tuple[int, ...]:
    """The first position of each document's own tokens."""
    reset = {Pattern.anchor_reset: 1, Pattern.intra_doc_reset: 0}
    if pattern in reset:
        return (reset[pattern],) * len(LENGTHS)
    if form == "rows":
        return (1,) * len(LENGTHS)
    return STARTS if pattern is Pattern.anchor else (1, 8, 10, 18, 1, 6)  # without an anchor BOS is a token of its own


def alone(model: PreTrainedModel, pattern: Pattern, form: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, V) logits of all documents' tokens and the mean loss, each document by itself behind the anchor."""
    logits, losses = [], []
    for (ids, labels), start in zip(documents(), starts_under(pattern, form), strict=True):
        anchored = pattern in (Pattern.anchor, Pattern.anchor_reset)
        own = ids[1:] if anchored and ids[0] == BOS else ids
        seen = [BOS, *own] if anchored else own
        positions = [*([0] if anchored else []), *range(start, start + len(own))]
        tensors = {"input_ids": torch.tensor([seen]), "position_ids": torch.tensor([positions])}
        found = model(**tensors, attention_mask=torch.ones(1, len(seen)), use_cache=False).logits[0, -len(ids) :]
        target = torch.tensor(labels[1:], dtype=torch.long)
        losses.append(torch.nn.functional.cross_entropy(found[:-1], target, reduction="none")[target >= 0])
        logits.append(found)
    return torch.cat(logits), torch.cat(losses).mean()


def compare_gradients(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    for (parameter_name, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None, parameter_name
        assert (one.grad - other.grad).abs().max() < TOLERANCE * max(1.0, other.grad.abs().max().item())


def check(name: str, pattern: Pattern, form: str, batch: dict[str, Any]) -> None:
    model, plain = model_of(name), model_of(name)
    attach(model, pattern, row_length=ROW)
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])) > 0
    with true_float64():
        output = model(**batch)
        output.loss.backward()
        logits, loss = alone(plain, pattern, form)
        loss.backward()
    assert output.logits.shape[:2] == batch["input_ids"].shape
    assert (output.logits[real] - logits).abs().max() < TOLERANCE
    assert (output.loss - loss).abs() < TOLERANCE
    compare_gradients(model, plain)


@pytest.mark.parametrize("form", list(batches()))
def test_whatever_says_where_documents_lie(form: str) -> None:
    check("llama", Pattern.anchor, form, batches()[form])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns(pattern: Pattern) -> None:
    check("llama", pattern, "trl", batches()["trl"])


@pytest.mark.parametrize("name", ["mistral_window", "gemma3", "gpt_neox", "mixtral"])
def test_architectures(name: str) -> None:
    check(name, Pattern.anchor, "numbered", batches()["numbered"])


def test_activations_that_are_recomputed() -> None:
    model, plain = model_of("llama"), model_of("llama")
    attach(model, row_length=ROW)
    checkpoint_activations(model.train())
    with true_float64():
        model(**batches()["trl"]).loss.backward()
        alone(plain, Pattern.anchor, "trl")[1].backward()
    compare_gradients(model, plain)


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("attached_first", [True, False])
def test_under_distributed_data_parallel(attached_first: bool, one_process: None) -> None:
    model, plain = model_of("llama"), model_of("llama")
    if attached_first:
        attach(model, row_length=ROW)
    wrapped = DistributedDataParallel(model)
    if not attached_first:
        attach(wrapped, row_length=ROW)
    with true_float64():
        wrapped(**batches()["trl"]).loss.backward()
        alone(plain, Pattern.anchor, "trl")[1].backward()
    compare_gradients(model, plain)


def test_routers_and_hidden_states_are_those_of_the_trainers_tokens() -> None:
    """The router loss of a mixture of experts then leaves the anchor's copies out."""
    batch = batches()["trl"]
    model, plain = model_of("mixtral"), model_of("mixtral")
    attach(model, row_length=ROW)
    with true_float64():
        output = model(**batch, output_router_logits=True, output_hidden_states=True)
        hidden = []
        for (ids, _), start in zip(documents(), STARTS, strict=True):
            own = ids[1:] if ids[0] == BOS else ids
            tensors = {
                "input_ids": torch.tensor([[BOS, *own]]),
                "position_ids": torch.tensor([[0, *range(start, start + len(own))]]),
            }
            found = plain(**tensors, attention_mask=torch.ones(1, len(own) + 1), output_router_logits=True,
                          output_hidden_states=True, use_cache=False)  # fmt: skip
            hidden.append([x[-len(ids) :] for x in (*found.router_logits, *(h[0] for h in found.hidden_states))])
    expected = [torch.cat(parts) for parts in zip(*hidden, strict=True)]
    mine = (*output.router_logits, *(h[0] for h in output.hidden_states))
    assert len(mine) == len(expected) == 5 and output.aux_loss > 0
    for one, other in zip(mine, expected, strict=True):
        assert one.shape == other.shape and (one - other).abs().max() < TOLERANCE

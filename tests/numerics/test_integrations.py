"""Rows of `AnchorCollator` through transformers' own flash attention: the logits of the documents alone.

There is no GPU here. transformers' code runs as it is; only the kernels that it would import from flash-attn are plain
torch with flash-attn 2's signature and contract (`flash_attn_contract`). Documents alone run through transformers'
eager attention, each behind its anchor at its positions in the row, with no code of ours.

Tolerance: float64 throughout. Measured over all cases: logits of up to 5 differ by at most 8e-15, losses by 1.8e-15,
gradients by 1.3e-15 of their tensor's largest entry (or of 1); 1e-12 leaves room for other processors.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, modeling_flash_attention_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_causal_mask

from anchorctx.attention import register
from anchorctx.errors import UserError
from anchorctx.integrations import AnchorCollator, check_model
from anchorctx.layout import Pattern
from anchorctx.testing.tiny import ARCHITECTURES, true_float64, word_tokenizer

from .flash_attn_contract import Recorder, stand_in

TOLERANCE = 1e-12
ROW = 20
LENGTHS = (7, 2, 8, 1, 5, 9)
"""Documents in rows of 20: the first four share one, the other two the next."""
STARTS = (1, 8, 10, 18, 1, 6)
NAMES = ("llama", "mistral_window", "qwen3", "gemma3")
BY_POSITION = [pattern for pattern in Pattern if pattern is not Pattern.intra_doc]
"""Patterns each of whose documents begins at the smallest position of the batch, where flash attention finds them."""


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """transformers finds flash-attn's functions; calls of the varlen kernel are noted."""
    recorder = Recorder()
    contract = stand_in("FA2", recorder).flash_attn_varlen_func

    def varlen(q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: Any, max_seqlen_k: Any,
               dropout_p: float = 0.0, softmax_scale: Any = None, causal: bool = False, window_size: Any = (-1, -1),
               softcap: float = 0.0, deterministic: bool = False) -> torch.Tensor:  # fmt: skip
        # without cu_seq_lens_* transformers hands the longest length over as a tensor, which torch's operators take
        longest = {"max_seqlen_q": int(max_seqlen_q), "max_seqlen_k": int(max_seqlen_k)}
        return contract(
            q, k, v, cu_seqlens_q, cu_seqlens_k, **longest, dropout_p=dropout_p, softmax_scale=softmax_scale,
            causal=causal, window_size=window_size, softcap=softcap, deterministic=deterministic,
        )  # fmt: skip

    def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        raise AssertionError("a packed batch must not be taken for one sequence")

    functions = (dense, varlen, None, None, None)
    monkeypatch.setattr(modeling_flash_attention_utils, "_lazy_imports", lambda *args, **kwargs: functions)
    for name in ("_loaded_implementation", "_flash_fn", "_flash_varlen_fn", "_process_flash_kwargs_fn"):
        monkeypatch.setattr(modeling_flash_attention_utils, name, None)
    return recorder


def examples() -> list[dict[str, Any]]:
    """Documents of random ids; of the third, two labels more are masked."""
    generator = torch.Generator().manual_seed(5)
    made: list[dict[str, Any]] = [{"input_ids": torch.randint(3, 96, (n,), generator=generator)} for n in LENGTHS]
    made[2]["labels"] = made[2]["input_ids"].clone()
    made[2]["labels"][3:5] = -100
    return made


def model_of(name: str, attention: str) -> PreTrainedModel:
    register()
    model = ARCHITECTURES[name].build(torch.float64)
    model.config._attn_implementation = attention  # set_attn_implementation() would look for a GPU
    return model


def batch_of(pattern: Pattern, **options: Any) -> dict[str, Any]:
    return AnchorCollator(word_tokenizer(96), ROW, pattern, **options)(examples())


def alone(pattern: Pattern) -> list[tuple[list[int], list[int], list[int]]]:
    """(ids, positions, labels) of each document by itself, written out once more: BOS (1) at 0, then the document."""
    documents = []
    for example, start in zip(examples(), STARTS, strict=True):
        ids, labels = example["input_ids"].tolist(), example.get("labels", example["input_ids"]).tolist()
        first = {Pattern.anchor_reset: 1, Pattern.intra_doc_reset: 0}.get(pattern, start)
        documents.append((ids, list(range(first, first + len(ids))), [-100, *labels[1:]]))
    if pattern is Pattern.full:
        documents = [
            tuple(sum(parts, []) for parts in zip(*row, strict=True)) for row in (documents[:4], documents[4:])
        ]
    if pattern in (Pattern.intra_doc, Pattern.intra_doc_reset):
        return documents
    return [([1, *ids], [0, *positions], [-100, *labels]) for ids, positions, labels in documents]


def logits_alone(model: PreTrainedModel, ids: list[int], positions: list[int]) -> torch.Tensor:
    """(T, V) logits through eager attention; a mask of ones keeps transformers from looking for documents."""
    tensors = {"input_ids": torch.tensor([ids]), "position_ids": torch.tensor([positions])}
    return model(**tensors, attention_mask=torch.ones(1, len(ids)), use_cache=False).logits[0]


def check(model: PreTrainedModel, name: str, pattern: Pattern, batch: dict[str, Any]) -> None:
    with true_float64():
        output = model(**batch, use_cache=False)
        output.loss.backward()
        plain = model_of(name, "eager")
        expected, losses = [], []
        for ids, positions, labels in alone(pattern):
            expected.append(logits_alone(plain, ids, positions))
            target = torch.tensor(labels[1:], dtype=torch.long)  # none for a single token
            losses.append(torch.nn.functional.cross_entropy(expected[-1][:-1], target, reduction="none")[target >= 0])
        loss = torch.cat(losses).mean()
        loss.backward()
    assert torch.cat(losses).shape == (sum(LENGTHS) - len(LENGTHS) - 2,)
    assert (output.logits[0] - torch.cat(expected)).abs().max() < TOLERANCE
    assert (output.loss - loss).abs() < TOLERANCE
    for (parameter_name, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None, parameter_name
        assert (one.grad - other.grad).abs().max() < TOLERANCE * max(1.0, other.grad.abs().max().item())


@pytest.mark.parametrize("pattern", list(Pattern))
@pytest.mark.parametrize("name", NAMES)
def test_flash_attention_gives_the_documents_alone(flash: Recorder, name: str, pattern: Pattern) -> None:
    model = model_of(name, "flash_attention_2")
    check(model, name, pattern, batch_of(pattern, model=model))
    assert len(flash.named("flash_attn_varlen_func")) == model.config.num_hidden_layers


@pytest.mark.parametrize("pattern", BY_POSITION)
@pytest.mark.parametrize("name", NAMES)
def test_flash_attention_finds_documents_by_their_positions(flash: Recorder, name: str, pattern: Pattern) -> None:
    """As where a trainer drops the arguments that it does not know."""
    batch = batch_of(pattern)
    kept = {key: batch[key] for key in ("input_ids", "labels", "position_ids")}
    check(model_of(name, "flash_attention_2"), name, pattern, kept)
    boundaries = flash.named("flash_attn_varlen_func")[0]["cu_seqlens_q"]
    assert boundaries.tolist() == batch["cu_seq_lens_q"].tolist()


@pytest.mark.parametrize("pattern", list(Pattern))
@pytest.mark.parametrize("name", NAMES)
def test_our_implementation_reads_the_same_arguments(name: str, pattern: Pattern) -> None:
    model = model_of(name, "anchor_cpu")
    check(model, name, pattern, batch_of(pattern, model=model))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("pattern", [Pattern.anchor, Pattern.intra_doc])
def test_other_implementations_are_wrong_and_refused(attention: str, pattern: Pattern) -> None:
    model = model_of("llama", attention)
    found = model(**batch_of(pattern), use_cache=False).logits[0]
    plain = copy.deepcopy(model)
    plain.config._attn_implementation = "eager"
    expected = torch.cat([logits_alone(plain, ids, positions) for ids, positions, _ in alone(pattern)])
    assert (found - expected).abs().max() > 0.1
    for refused in (lambda: check_model(model), lambda: batch_of(pattern, model=model)):
        with pytest.raises(UserError, match=f"attn_implementation='{attention}' would mix documents"):
            refused()


@pytest.mark.parametrize("pattern", [Pattern.anchor, Pattern.intra_doc])
def test_flex_attention_is_wrong_and_refused(monkeypatch: pytest.MonkeyPatch, pattern: Pattern) -> None:
    """transformers' rule for its mask is asked for every pair; to run it would mean to compile it."""
    model, batch = model_of("llama", "flex_attention"), batch_of(pattern)
    tokens = batch["input_ids"].shape[1]
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS, "flex_attention", lambda mask_function, **kwargs: mask_function)
    sees = create_causal_mask(model.config, torch.zeros(1, tokens, 32), None, None, batch["position_ids"])
    at = torch.arange(tokens)
    found = torch.stack([sees(torch.tensor(0), torch.tensor(0), q, at) for q in at])
    document = torch.bucketize(at, batch["cu_seq_lens_q"], right=True)
    causal = at[None, :] <= at[:, None]
    expected = causal & (document[:, None] == document[None, :])
    assert not torch.equal(found, expected)
    if pattern is Pattern.anchor:  # the second document does not see its anchor, which the row's 9th token is
        assert expected[9, 8] and not found[9, 8]
    with pytest.raises(UserError, match="attn_implementation='flex_attention' would mix documents"):
        check_model(model)


def test_copies_are_alike_to_a_router_and_counted_each() -> None:
    """All copies of the anchor have one hidden state, so that N of them go where the shared anchor goes: N to 1."""
    batch = batch_of(Pattern.anchor)
    copies = batch["position_ids"][0] == 0
    model = model_of("mixtral", "anchor_cpu")
    with true_float64():
        routers = model(**batch, use_cache=False, output_router_logits=True).router_logits
    assert copies.sum() == len(LENGTHS) and len(routers) == 2
    for logits in routers:
        assert (logits[copies] - logits[0]).abs().max() < TOLERANCE
        assert (logits[~copies] - logits[0]).abs().max(1).values.min() > 1e-3


def test_without_boundaries_flash_attention_mixes_intra_doc(flash: Recorder) -> None:
    """Positions that run on begin at their smallest value once a row: this pattern needs cu_seq_lens_*."""
    batch = batch_of(Pattern.intra_doc)
    model_of("llama", "flash_attention_2")(input_ids=batch["input_ids"], position_ids=batch["position_ids"])
    assert flash.named("flash_attn_varlen_func")[0]["cu_seqlens_q"].tolist() == [0, 18, 32]

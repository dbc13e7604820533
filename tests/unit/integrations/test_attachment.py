"""`attach`: what it reads and refuses, and what `detach` leaves of it. Numbers: tests/numerics/test_attach.py."""

from __future__ import annotations

import copy
import inspect
import logging
import threading
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from anchorctx.attention.construction import _check_layouts
from anchorctx.errors import UserError
from anchorctx.integrations import AnchorCollator, attach, check_model, detach
from anchorctx.integrations.documents import Boundaries, lay_out_spans
from anchorctx.layout import Pattern
from anchorctx.testing.tiny import text_model, word_tokenizer

WORDS, ROW = 48, 20
IDS = torch.arange(3, 15)[None]
ONES = torch.ones_like(IDS)


def model() -> LlamaForCausalLM:
    return text_model(word_tokenizer(WORDS), ROW)


def attached(*args: Any, **kwargs: Any) -> LlamaForCausalLM:
    made = model()
    attach(made, *args, **kwargs)
    return made


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"cu_seq_lens": torch.tensor([0, 3, 3, 5])}, [[0, 3], [3, 5]]),
        ({"position_ids": torch.tensor([[0, 1, 2, 0, 1]])}, [[0, 3], [3, 5]]),
        ({"attention_mask": torch.tensor([[1, 1, 2, 3, 0]])}, [[0, 2], [2, 3], [3, 4]]),
        ({"attention_mask": torch.tensor([[True, True, True, False, False]])}, [[0, 3]]),
        (
            {"attention_mask": torch.tensor([[1, 1, 1, 1, 0]]), "position_ids": torch.tensor([[0, 1, 0, 1, 1]])},
            [[0, 2], [2, 4]],
        ),
        ({"attention_mask": torch.tensor([[1, 1, 1, 0, 0], [5, 5, 6, 6, 6]])}, [[0, 3], [5, 7], [7, 10]]),
        ({"position_ids": torch.arange(5)[None], "attention_mask": torch.ones(2, 5)}, [[0, 5], [5, 10]]),
        ({"attention_mask": torch.tensor([[1, 1, 0, 1, 1]])}, [[0, 2], [3, 5]]),
    ],
)
def test_where_documents_lie(given: dict[str, torch.Tensor], expected: list[list[int]]) -> None:
    batch = max(len(given["attention_mask"]) if "attention_mask" in given else 1, 1)
    assert Boundaries(**given).spans("x", batch, 5).tolist() == expected


def test_a_document_that_begins_with_the_anchor_has_its_copy() -> None:
    """The batch: A a a | b b 0 0; behind the anchor as token 0 its tokens are 1 to 7."""
    spans = Boundaries(attention_mask=torch.tensor([[1, 1, 1, 2, 2, 0, 0]])).spans("x", 1, 7)
    laid = lay_out_spans(spans, [True, False], (1, 7), Pattern.anchor, 10)
    assert laid.gather.tolist() == [0, 2, 3, 0, 4, 5]
    assert laid.layout.position_array().tolist() == [0, 1, 2, 0, 3, 4]
    assert laid.place.tolist() == [0, 1, 2, 4, 5, 0, 0]
    laid = lay_out_spans(spans, [True, False], (1, 7), Pattern.intra_doc, 10)
    assert laid.gather.tolist() == [1, 2, 3, 4, 5] and laid.layout.position_array().tolist() == [1, 2, 3, 4, 5]
    assert laid.place.tolist() == [0, 1, 2, 3, 4, 0, 0]


def test_a_document_may_be_the_anchor_alone() -> None:
    laid = lay_out_spans(Boundaries(cu_seq_lens=torch.tensor([0, 1, 3])).spans("x", 1, 3), [True, True], (1, 3),
                         Pattern.anchor, 4)  # fmt: skip
    assert laid.gather.tolist() == [0, 0, 3] and laid.place.tolist() == [0, 1, 2]
    assert laid.layout.position_array().tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({}, "LlamaModel got a batch that does not say where its documents lie: let the collator give"),
        (
            {"attention_mask": torch.tensor([[0] * 3 + [1] * 9])},
            "rows that are padded on the left: pad",
        ),
        ({"attention_mask": torch.zeros_like(IDS)}, "the batch is padding alone"),
        ({"attention_mask": torch.ones(1, 1, 12, 12)}, r"attention_mask of shape \(1, 1, 12, 12\)"),
        ({"position_ids": IDS}, "position_ids that begin anew at 3, but documents restart at 0"),
        ({"position_ids": torch.tensor([[0, 1, 2, 3, 4, 5, 0, 6, 7, 8, 9, 10]])}, r"begin anew at 6.*pattern=None"),
        ({"cu_seq_lens_q": torch.tensor([0, 5])}, "cu_seq_lens_q from 0 to 5 for 1 rows of 12 tokens"),
        ({"attention_mask": ONES, "labels": IDS[:, :5]}, r"labels of shape \(1, 5\) for input_ids of \(1, 12\)"),
        (
            {"attention_mask": 2 * ONES, "output_router_logits": True},
            "router loss by attention_mask, which",
        ),
        ({"attention_mask": {"full_attention": None}}, "attention_mask as a dict: give a tensor"),
        ({"attention_mask": ONES, "token_type_ids": ONES}, "got token_type_ids, one a token, which attach cannot lay"),
    ],
)
def test_batches_that_cannot_be_laid_out_are_named(batch: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(UserError, match=message):
        attached()(input_ids=IDS, **batch)


def test_embeddings_and_documents_beyond_a_row_are_refused() -> None:
    made = attached()
    with pytest.raises(UserError, match="LlamaModel got inputs_embeds without input_ids"):
        made(inputs_embeds=torch.zeros(1, 4, 32), attention_mask=torch.ones(1, 4))
    name = "cache" if "cache" in inspect.signature(made.forward).parameters else "past_key_values"  # until 5.20
    with pytest.raises(UserError, match="LlamaModel got a KV cache with gradients, which prefix tuning does"):
        made(input_ids=IDS, attention_mask=ONES, **{name: DynamicCache(config=made.config)})
    long = torch.arange(ROW)[None] + 3
    with pytest.raises(UserError, match="a document of 20 tokens does not fit row_length=20, which holds 19 behind"):
        made(input_ids=long, attention_mask=torch.ones_like(long))
    long[0, 0] = 1  # an anchor of its own
    made(input_ids=long, attention_mask=torch.ones_like(long))


@pytest.mark.parametrize("ids", [torch.zeros(1, 0, dtype=torch.long), IDS[0]])
def test_ids_that_are_no_batch_are_refused(ids: torch.Tensor) -> None:
    with pytest.raises(UserError, match=r"LlamaModel got input_ids of shape .*, but a batch is \(B, T\)"):
        attached()(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)


def test_models_that_cannot_be_attached() -> None:
    made = attached()
    with pytest.raises(UserError, match="LlamaForCausalLM is attached already: call detach"):
        attach(made)
    with pytest.raises(UserError, match="LlamaForCausalLM is not attached"):
        detach(model())
    with pytest.raises(UserError, match="model='gpt2' is no transformers model"):
        attach("gpt2")
    with pytest.raises(UserError, match="pattern=anker is unknown: choose full, intra_doc"):
        attach(model(), "anker")
    with pytest.raises(UserError, match="pattern=full lets documents see each other"):
        attach(model(), "full")
    with pytest.raises(UserError, match="rope_dtype=float16 is unknown"):
        attach(model(), rope_dtype="float16")
    with pytest.raises(UserError, match="anchor=48 is beyond the model's vocabulary of 48"):
        attach(model(), anchor=48)
    for anchor in ("<s>", [1]):
        with pytest.raises(UserError, match=r"anchor=.* must be a token's id"):
            attach(model(), anchor=anchor)  # type: ignore[arg-type]
    for length in ("x", -3, 0):
        with pytest.raises(UserError, match=f"row_length={length!r} must be an integer of 2 or more"):
            attach(model(), row_length=length)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"LlamaForCausalLM is compiled: attach .* the model itself, then call"):
        attach(torch.compile(model(), backend="eager"))
    dropping = LlamaForCausalLM(LlamaConfig(**model().config.to_diff_dict() | {"attention_dropout": 0.1}))
    with pytest.raises(UserError, match="LlamaAttention has attention_dropout=0.1, which no backend computes: load"):
        attach(dropping)
    none = model()
    none.config.bos_token_id, none.config.eos_token_id = None, []
    with pytest.raises(UserError, match="neither a BOS nor an EOS token to be the anchor: give anchor="):
        attach(none)
    none.config.bos_token_id = none.config.eos_token_id = None
    with pytest.raises(UserError, match="neither a BOS nor an EOS token to be the anchor: give anchor="):
        attach(none)
    scaled = model()
    scaled.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(UserError, match="rope_type=dynamic"):
        attach(scaled)
    assert scaled.config._attn_implementation == "sdpa" and not hasattr(scaled.model, "_anchorctx_attachment")


def test_detached_the_model_is_as_it_was() -> None:
    made = model()
    before, state = made(IDS).logits, dict(made.model.__dict__)
    attach(made)
    assert (made(IDS, attention_mask=ONES).logits - before).abs().max() > 0.1
    detach(made)
    assert torch.equal(made(IDS).logits, before) and made.config._attn_implementation == "sdpa"
    assert made.model.__dict__.keys() == state.keys()
    assert [*made._forward_pre_hooks.values()] == [_check_layouts]  # of every model, once `register` was called
    attach(made)


def test_a_copy_of_the_model_is_attached_by_itself() -> None:
    made = attached()
    other = copy.deepcopy(made)
    with torch.no_grad():
        other.model.embed_tokens.weight.mul_(2)
    batch = {"input_ids": IDS, "attention_mask": ONES}
    assert (other(**batch).logits - made(**batch).logits).abs().max() > 0.1
    detach(other)
    assert made(**batch).logits.shape == (1, 12, WORDS)
    with pytest.raises(UserError, match="is attached already"):
        attach(made)


def test_batches_that_are_laid_out_already_are_taken_as_they_are() -> None:
    made, plain = attached(pattern=None), model()
    collator = AnchorCollator(word_tokenizer(WORDS), ROW, model=made)
    batch = collator([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}])
    logits = made(**batch).logits
    for start, stop in ((0, 4), (4, 7)):
        ids, positions = batch["input_ids"][:, start:stop], batch["position_ids"][:, start:stop]
        expected = plain(ids, position_ids=positions, attention_mask=torch.ones_like(ids)).logits
        assert (logits[:, start:stop] - expected).abs().max() < 1e-5
    check_model(made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_attached_model_generates(dtype: torch.dtype) -> None:
    """Prompts padded on the left, as `generate` wants them, through sdpa as before: the same tokens."""
    plain = model().to(dtype)
    made = copy.deepcopy(plain)
    attach(made, rope_dtype="bfloat16")
    ids = torch.tensor([[1, 5, 6, 7], [0, 1, 8, 9]])
    prompt = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(made.generate(**prompt, **options), plain.generate(**prompt, **options))
    detach(made)
    attach(made)
    assert made.generate(**prompt, **options).shape == (2, 10)  # rotated in float32, beside values in bfloat16


def test_threads_that_generate_do_not_change_how_another_trains() -> None:
    made = attached()
    batch = {"input_ids": IDS, "position_ids": torch.arange(12)[None] % 4}
    prompt = {"input_ids": IDS[:, :4], "attention_mask": ONES[:, :4]}
    before, started, wait = made(**batch).logits, threading.Event(), threading.Event()

    def pause(*args: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            started.set()
            assert wait.wait(20)

    made.model.layers[1].register_forward_pre_hook(pause)
    threads = [threading.Thread(target=made.generate, kwargs=prompt | {"max_new_tokens": 2}) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert started.wait(20)
    during = made(**batch).logits
    wait.set()
    for thread in threads:
        thread.join()
    assert torch.equal(during, before) and torch.equal(made(**batch).logits, before)


def test_an_attention_set_after_attach_is_refused() -> None:
    for pattern in ("anchor", None):
        made = attached(pattern)
        made.set_attn_implementation("sdpa")
        with pytest.raises(UserError, match=r"attached, but its attention was set to 'sdpa' since.*call detach"):
            made(IDS, attention_mask=ONES)


def test_documents_beside_a_cache_are_refused() -> None:
    made = attached()
    name = "cache" if "cache" in inspect.signature(made.forward).parameters else "past_key_values"  # until 5.20
    given = {name: DynamicCache(config=made.config), "cu_seq_lens_q": torch.tensor([0, 5, 12])}
    with torch.no_grad(), pytest.raises(UserError, match="a KV cache beside layouts= or cu_seq_lens_q="):
        made(IDS, **given)


def test_labels_across_documents_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    made = attached()
    batch = {"input_ids": IDS, "labels": IDS, "position_ids": torch.arange(12)[None] % 4}
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            made(**batch)
    assert len(caplog.messages) == 1 and "first tokens of 2 of the 3 documents" in caplog.messages[0]
    caplog.clear()
    labels = torch.where(batch["position_ids"] > 0, IDS, -100)
    attached()(**batch | {"labels": labels})
    assert not caplog.messages


A, E = 1, 2


@pytest.mark.parametrize(
    ("ids", "given", "said"),
    [
        ([A, 5, 6, A, 7, 8], {}, True),
        ([5, 6, E, 7, 8, E], {}, True),
        ([5, 6, E, A, 7, 8], {}, True),
        ([A, 5, 6, 7, 8, E], {}, False),
        ([A, 5, 6, 7, E, E], {}, False),
        ([5, 6, 7, E, 0, 0], {"attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]])}, False),
        ([A, 5, 6, A, 7, 8], {"attention_mask": torch.tensor([[1, 1, 1, 2, 2, 2]])}, False),
        ([A, 5, 6, A, 7, 8], {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}, False),
    ],
)
def test_joined_documents_that_nobody_tells_apart_are_said_once(
    ids: list[int], given: dict[str, torch.Tensor], said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """As TRL's packing_strategy="wrapped" has them."""
    made, row = attached(), torch.tensor([ids])
    batch = {"input_ids": row} | (given or {"attention_mask": torch.ones_like(row)})
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            made(**batch)
    assert len(caplog.messages) == said and all("1 of 1 rows hold BOS or EOS" in text for text in caplog.messages)

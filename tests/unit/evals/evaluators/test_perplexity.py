from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from anchorctx.attention.config import RopeDtype
from anchorctx.data.sources.facts import FactTokens, plant
from anchorctx.errors import UserError
from anchorctx.evals import scoring as forward
from anchorctx.evals.base import Subject
from anchorctx.evals.evaluators.config import ContextConfig, PerplexityConfig
from anchorctx.evals.evaluators.perplexity import ContextPerplexity, Perplexity, encode, perplexity_row, windows
from anchorctx.evals.scoring import score
from anchorctx.evals.subject import attention_name
from anchorctx.testing.tiny import ARCHITECTURES, BASE

from ..conftest import TEXTS, ignore

LONG = ["".join(f"x{i} = {i * j} + {i % 7}\n" for i in range(40)) for j in (3, 5, 11)]


def plain_losses(model: LlamaForCausalLM, ids: list[int]) -> list[float]:
    """-log p of every token after the first, one document, logits in full, float64 softmax: a loop of its own."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    return [-logits[t].log_softmax(-1)[ids[t + 1]].item() for t in range(len(ids) - 1)]


def test_perplexity_equals_a_plain_loop_over_documents(subject: Subject):
    texts = [plant(text, np.random.default_rng(i), 2) for i, text in enumerate([*TEXTS, *LONG])]
    config = PerplexityConfig(documents=0, max_length=200, batch_tokens=700, buckets=[20, 90])
    rows = list(Perplexity(config, texts).run(subject, {}, ignore))
    tokenizer, facts = subject.tokenizer, FactTokens.of(subject.tokenizer)
    losses: list[tuple[int, float]] = []
    for text in texts:
        ids = [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]][:200]
        for t, loss in enumerate(plain_losses(subject.model, ids), 1):  # type: ignore[arg-type]
            if t >= 2 and not facts.is_fact(np.array([ids[t]]))[0]:
                losses.append((t, loss))
    expected = [math.exp(math.fsum(part) / len(part)) for part in (
        [loss for _, loss in losses],
        *([loss for t, loss in losses if a <= t < b] for a, b in ((0, 20), (20, 90), (90, 200))),
    )]  # fmt: skip
    assert [row.value for row in rows] == pytest.approx(expected, rel=1e-6)
    assert [row.metric for row in rows] == ["perplexity"] + ["perplexity_by_position"] * 3
    assert [(row.context["start"], row.context["stop"]) for row in rows[1:]] == [(0, 20), (20, 90), (90, 200)]
    assert rows[0].context["tokens"] == len(losses) == sum(row.context["tokens"] for row in rows[1:])
    assert all(row.low is not None and row.high is not None and row.low < row.value < row.high for row in rows)


@pytest.mark.parametrize(
    ("kind", "fields"), [("dory", {}), ("modernbert-decoder", {}), ("hyperclovax", {"logits_scaling": 0.3})]
)
def test_scores_are_of_the_models_own_logits_whatever_its_head_does(
    kind: str, fields: dict[str, float], tokenizer: PreTrainedTokenizerFast
):
    config = AutoConfig.for_model(kind, **BASE | {"vocab_size": len(tokenizer)} | fields)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    ids = encode(tokenizer, LONG[:1])[0][:50]
    found = score(Subject(model, tokenizer), ids[None], np.arange(50)[None] > 0)
    with torch.no_grad():  # without a cache, with which Dory's own logits are others by 1e-2
        logits = model(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0].double()
    own = torch.nn.functional.cross_entropy(logits[:-1], torch.from_numpy(ids[1:]), reduction="none")
    assert found.loss.tolist() == pytest.approx(own.tolist(), rel=1e-5)


def test_sliding_windows_score_every_token_once_with_enough_before_it(subject: Subject):
    config = PerplexityConfig(documents=0, max_length=64, stride=20)
    ids = encode(subject.tokenizer, LONG[:1])[0]
    pieces = list(windows(0, ids, config))
    scored = []
    for number, piece in enumerate(pieces):
        assert piece.ids[0] == ids[0] and len(piece.ids) == 64
        start = next(s for s in range(1, len(ids)) if (ids[s : s + 63] == piece.ids[1:]).all())
        scored += list(range(start + piece.first - 1, start + 63))
        assert number == 0 or piece.first >= 64 - 20
    assert scored == list(range(2, len(ids)))
    (row, *_) = Perplexity(config, LONG[:1]).run(subject, {}, ignore)
    expected = [x for p in pieces for x in plain_losses(subject.model, p.ids.tolist())[p.first - 1 :]]
    assert row.value == pytest.approx(math.exp(np.mean(expected)), rel=1e-6)
    assert row.context["tokens"] == len(ids) - 2
    (cut, *_) = Perplexity(PerplexityConfig(documents=0, max_length=64), LONG[:1]).run(subject, {}, ignore)
    assert cut.context["tokens"] == 62


def test_more_context_predicts_the_same_tokens(subject: Subject):
    config = ContextConfig(lengths=[16, 60, 120], targets=10, documents=2, batch_tokens=130)
    evaluator = ContextPerplexity(config, [*TEXTS[:3], *LONG])  # the short ones are left out
    documents = [ids[:120] for ids in encode(subject.tokenizer, LONG)][:2:1]
    for unit in evaluator.units():
        (row,) = evaluator.run(subject, unit, ignore)
        length, losses = unit["context_length"], []
        for ids in [documents[0], documents[1]]:
            seen = [int(ids[0]), *ids[1 - length :].tolist()]
            losses += plain_losses(subject.model, seen)[-10:]
        assert row.value == pytest.approx(math.exp(np.mean(losses)), rel=1e-6)
        assert (row.metric, row.n, row.context["tokens"]) == ("perplexity_by_context", 2, 20)


def test_progress_reaches_its_total_and_documents_are_spread_evenly(subject: Subject):
    seen: list[int] = []
    config = PerplexityConfig(documents=6, max_length=40, batch_tokens=100)
    (row, *_) = Perplexity(config, TEXTS).run(subject, {}, lambda done, total: seen.extend([done, -total]))
    documents = [ids[:40] for ids in encode(subject.tokenizer, TEXTS[::2])]
    assert row.n == 6 and row.context["tokens"] == sum(len(ids) - 2 for ids in documents)
    assert sum(done for done in seen if done > 0) == -min(seen) == sum(map(len, documents))


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "cohere2", "gpt_neox"])
def test_scores_are_the_whole_models_whatever_it_does_to_logits(name: str, monkeypatch: pytest.MonkeyPatch):
    architecture = ARCHITECTURES[name]
    model: Any = architecture.build(attention="reference").eval()
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 96, (2, 30))
    chosen = rng.random(ids.shape) < 0.5
    chosen[:, 0] = False
    monkeypatch.setattr(forward, "default_tile", lambda *sizes: 7)
    scores = score(Subject(model, None), ids, chosen)  # type: ignore[arg-type]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        logp = model(input_ids=torch.from_numpy(ids)).logits.double().log_softmax(-1)
    rows, at = np.nonzero(chosen)
    expected = -logp[rows, at - 1, ids[rows, at]].numpy()
    # float32 model: losses of about 5 with an error of 1e-6 were seen
    np.testing.assert_allclose(scores.loss, expected, rtol=2e-6, atol=2e-6)
    assert scores.hit.tolist() == (logp[rows, at - 1].argmax(-1).numpy() == ids[rows, at]).tolist()


def test_no_logits_of_a_whole_row_are_made(subject: Subject, monkeypatch: pytest.MonkeyPatch):
    seen: list[int] = []
    head = subject.model.get_output_embeddings()
    assert isinstance(head, torch.nn.Module)
    hook = head.register_forward_hook(lambda module, args, out: seen.append(out.shape[0]))
    monkeypatch.setattr(forward, "default_tile", lambda *sizes: 8)
    try:
        ids = np.zeros((1, 50), dtype=np.int64)
        chosen = np.zeros(ids.shape, dtype=bool)
        chosen[0, 30:] = True
        score(subject, ids, chosen)
    finally:
        hook.remove()
    assert seen == [8, 8, 4]


@pytest.mark.parametrize("attention", ["anchor", "anchor_cpu", "anchor_reference"])
def test_our_attention_reads_prompts_and_generates_as_sdpa(
    attention: str, folder: Any, tokenizer: PreTrainedTokenizerFast, subject: Subject
):
    model: Any = LlamaForCausalLM.from_pretrained(
        folder, attn_implementation=attention_name(attention, RopeDtype.bfloat16)
    ).eval()
    tokens: Any = copy.deepcopy(tokenizer)
    tokens.pad_token = tokens.eos_token
    texts = ["def f1(x):", "def f11(x):\n    return x +"]
    batch = tokens(texts, padding=True, padding_side="left", return_tensors="pt")
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    ours, plain = (m.generate(**batch, **options) for m in (model, subject.model))  # type: ignore[operator]
    assert ours.tolist() == plain.tolist()
    ids = batch.input_ids[1:]
    with torch.no_grad():
        difference = (model(ids).logits - subject.model(ids).logits).abs().max()
    assert 0 <= difference < 1e-4  # logits of size 10 in float32: 6e-6 was seen


def test_float32_rotation_needs_an_attention_that_casts():
    assert attention_name("auto", RopeDtype.bfloat16) is None
    assert attention_name("sdpa", RopeDtype.bfloat16) == "sdpa"
    assert attention_name("auto", RopeDtype.float32) == "evaluated_sdpa"
    with pytest.raises(UserError, match="attention=eager with rope_dtype=float32.*use attention=sdpa"):
        attention_name("eager", RopeDtype.float32)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Perplexity(PerplexityConfig(stride=4096), TEXTS), "stride=4096 must be 0 to max_length - 1"),
        (lambda: Perplexity(PerplexityConfig(buckets=[9, 3]), TEXTS), r"buckets=\[9, 3\] must be positive and rising"),
        (
            lambda: Perplexity(PerplexityConfig(max_length=0), TEXTS),
            "perplexity.max_length=0 must be at least 3",
        ),
        (lambda: Perplexity(PerplexityConfig(documents=-1), TEXTS), "perplexity.documents=-1 must be at least 0"),
        (lambda: Perplexity(PerplexityConfig(batch_tokens=0), TEXTS), "perplexity.batch_tokens=0 must be at least 1"),
        (lambda: ContextPerplexity(ContextConfig(documents=-1), TEXTS), "context.documents=-1 must be at least 0"),
        (lambda: ContextPerplexity(ContextConfig(lengths=[100]), TEXTS), "must each be at least context.targets=256"),
    ],
)
def test_impossible_settings_are_refused(make: Any, message: str):
    with pytest.raises(UserError, match=message):
        make()


def test_a_corpus_of_short_documents_has_no_context(tokenizer: PreTrainedTokenizerFast):
    evaluator = ContextPerplexity(ContextConfig(lengths=[300]), TEXTS[:3])
    with pytest.raises(UserError, match="none of the 3 held-out documents has the 300 tokens"):
        evaluator.check(tokenizer)


def test_short_documents_are_left_out_where_long_ones_are_asked_for(subject: Subject):
    """The two longest of three, cut at 100; among short ones alone none is found."""
    sizes = [len(ids) for ids in encode(subject.tokenizer, LONG)]
    config = PerplexityConfig(documents=0, min_length=sorted(sizes)[1], max_length=100, buckets=[50, 100])
    (row, _, last) = Perplexity(config, [*TEXTS, *LONG]).run(subject, {}, ignore)
    assert row.n == 2 and last.context["tokens"] == 2 * 50
    few = Perplexity(config, TEXTS)
    with pytest.raises(UserError, match=rf"documents has the {config.min_length} tokens that perplexity.min_length"):
        few.check(subject.tokenizer)


def test_special_tokens_that_a_document_spells_out_are_text(tokenizer: PreTrainedTokenizerFast):
    """As `anchorctx prepare` takes them: a control token in the middle would be another document than was written."""
    written = f"end {tokenizer.eos_token} of {tokenizer.bos_token}"
    (ids,) = encode(tokenizer, [written])
    assert ids[0] == tokenizer.bos_token_id and not {tokenizer.bos_token_id, tokenizer.eos_token_id} & {*ids[1:]}
    assert tokenizer.decode(ids[1:]) == written


def test_a_row_has_what_each_document_says():
    row = perplexity_row("perplexity", np.array([6.0, 0.0, 2.0]), np.array([3.0, 0.0, 4.0]), {})
    assert row.context["values"] == [2.0, 0.5] and row.context["counts"] == [3, 4]  # the second has no tokens here
    assert row.context["loss_nats"] == pytest.approx(8 / 7) and row.n == 2
    assert not row.where  # how the number came about, not which number it is

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, PreTrainedTokenizerFast

from anchorctx.data.sources.facts import FactTokens, loss_weights
from anchorctx.errors import UserError
from anchorctx.evals.base import Subject
from anchorctx.evals.evaluators.config import NeedleConfig, NeedleStyle, RetrievalConfig
from anchorctx.evals.evaluators.needle import NeedleMap, _answers
from anchorctx.evals.evaluators.retrieval import Retrieval, answered, text_stream

from ..conftest import TEXTS, ignore


class Body(torch.nn.Module):
    """Hidden states that are guesses: right where `knows(position of the answer)`, by looking at the ids alone."""

    def __init__(self, tokens: FactTokens, size: int, knows: Any) -> None:
        super().__init__()
        self._tokens, self._size, self._knows = tokens, size, knows

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        hidden = torch.zeros(*input_ids.shape, self._size)
        for row, ids in enumerate(input_ids.numpy()):
            stated, queries = self._tokens.mentions(ids)
            values = {ids[k]: ids[k + 1] for k in stated}
            for key in [*queries, len(ids) - 2]:
                known = ids[key] in values and self._knows(key + 1)
                hidden[row, key, values[ids[key]] if known else self._tokens.keys[0]] = 1.0
        return SimpleNamespace(last_hidden_state=hidden)


class Oracle(torch.nn.Module):
    """A causal language model of such a body, whose head is the identity."""

    device = torch.device("cpu")

    def __init__(self, tokenizer: PreTrainedTokenizerFast, knows: Any) -> None:
        super().__init__()
        size = len(tokenizer)
        self.config = LlamaConfig(vocab_size=size, attn_implementation="eager")
        self.body, self.head = Body(FactTokens.of(tokenizer), size, knows), torch.nn.Linear(size, size, bias=False)
        torch.nn.init.eye_(self.head.weight)

    @property
    def base_model(self) -> torch.nn.Module:
        return self.body

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head

    def forward(self, **inputs: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.body(**inputs).last_hidden_state))


def oracle(tokenizer: PreTrainedTokenizerFast, knows: Any) -> Subject:
    model: Any = Oracle(tokenizer, knows)
    return Subject(model, tokenizer)


def test_retrieval_counts_exactly_what_a_model_knows(tokenizer: PreTrainedTokenizerFast):
    config = RetrievalConfig(lengths=[64, 128], rows=5, facts=6, batch_tokens=300)
    retrieval = Retrieval(config, TEXTS, seed=0)

    def run(knows: Any) -> list[float]:
        subject = oracle(tokenizer, knows)
        rows = [row for unit in retrieval.units() for row in retrieval.run(subject, unit, ignore)]
        assert [(row.context["length"], row.n) for row in rows] == [(64, 30), (128, 30)]
        return [row.value for row in rows]

    assert run(lambda at: True) == [1.0, 1.0]
    assert run(lambda at: False) == [0.0, 0.0]
    half = run(lambda at: at < 64)
    assert half[0] == 1.0 and 0.0 < half[1] < 1.0


def test_without_bos_a_row_is_the_same_from_its_second_token_on(tokenizer: PreTrainedTokenizerFast, subject: Subject):
    def of(bos: bool) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        retrieval = Retrieval(RetrievalConfig(lengths=[100], rows=4, bos=bos), TEXTS, seed=1)
        stream, line_start = text_stream(TEXTS, tokenizer)
        first: Any = tokenizer.bos_token_id
        (rows,) = retrieval._batches(np.random.default_rng(0), FactTokens.of(tokenizer), first, stream, line_start, 100)
        (result,) = retrieval.run(subject, {"length": 100}, ignore)
        return rows.ids, rows.answers, {"n": result.n, **result.context}

    ids, answers, row = of(bos=True)
    bare, bare_answers, bare_row = of(bos=False)
    assert (ids[:, 0] == tokenizer.bos_token_id).all() and not (bare == tokenizer.bos_token_id).any()
    assert (bare == ids[:, 1:]).all() and (bare_answers == answers[:, 1:]).all()
    assert (row["bos"], bare_row["bos"]) == (True, False) and row["n"] == bare_row["n"]


def test_a_length_alone_has_the_numbers_it_has_among_others(subject: Subject):
    def rows(lengths: list[int]) -> list[Any]:
        retrieval = Retrieval(RetrievalConfig(lengths=lengths, rows=3), TEXTS, seed=0)
        return [row for unit in retrieval.units() for row in retrieval.run(subject, unit, ignore)]

    assert rows([64, 128])[1:] == rows([128])


def test_retrieval_rows_hold_the_answers_that_training_weighs(tokenizer: PreTrainedTokenizerFast):
    retrieval = Retrieval(RetrievalConfig(lengths=[100], rows=4), TEXTS, seed=1)
    stream, line_start = text_stream(TEXTS, tokenizer)
    assert tokenizer.decode(stream) == "".join(TEXTS)
    assert line_start.sum() == "".join(TEXTS).count("\n")
    rng, tokens = np.random.default_rng(0), FactTokens.of(tokenizer)
    bos = int(tokenizer.bos_token_id)  # type: ignore[arg-type]
    (rows,) = retrieval._batches(rng, tokens, bos, stream, line_start, 100)
    assert rows.ids.shape == (4, 100)
    assert [(loss_weights(ids, tokenizer) == 1).tolist() for ids in rows.ids] == rows.answers.tolist()


def test_a_models_own_argmax_is_scored(subject: Subject):
    model: Any = subject.model
    tokenizer: Any = subject.tokenizer
    stream, line_start = text_stream(TEXTS, tokenizer)
    retrieval = Retrieval(RetrievalConfig(lengths=[100], rows=2), TEXTS, seed=1)
    bos = int(tokenizer.bos_token_id)  # type: ignore[arg-type]
    rng, tokens = np.random.default_rng(0), FactTokens.of(tokenizer)
    (rows,) = retrieval._batches(rng, tokens, bos, stream, line_start, 100)
    with torch.no_grad():
        guesses = model(input_ids=torch.from_numpy(rows.ids)).logits.argmax(-1).numpy()
    rows.ids[0, 1:][rows.answers[0, 1:]] = guesses[0, :-1][rows.answers[0, 1:]]  # now its guesses are the truth
    first = answered(subject, rows)[: rows.answers[0].sum()]
    assert first[0]  # later guesses may change with the ids before them


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (RetrievalConfig(lengths=[32]), "takes 33 tokens"),
        (RetrievalConfig(lengths=[]), "must each hold"),
        (RetrievalConfig(facts=65), "facts=65 must be between 1 and 64"),
        (RetrievalConfig(rows=0), "retrieval.rows=0 must be at least 1"),
        (RetrievalConfig(mentions=1), "mentions=1 must be at least 2: a fact is stated once"),
    ],
)
def test_impossible_retrieval_is_refused(config: RetrievalConfig, message: str):
    with pytest.raises(UserError, match=message):
        Retrieval(config, TEXTS, seed=0)


# -- needle map -------------------------------------------------------------------------------------------------------


def needle_rows(tokenizer: PreTrainedTokenizerFast, depth: float, **options: Any) -> list[tuple[np.ndarray, int]]:
    needle = NeedleMap(NeedleConfig(lengths=[200], depths=[depth], **options), TEXTS, seed=0)
    needles, rng = needle._needles(tokenizer), np.random.default_rng(0)
    return [needle._row(rng, needles, tokenizer, 200, depth) for _ in range(8)]


@pytest.mark.parametrize("depth", [0.0, 0.3, 0.5, 1.0])
def test_the_needle_lies_at_its_depth_among_others(tokenizer: PreTrainedTokenizerFast, depth: float):
    facts = FactTokens.of(tokenizer)
    for ids, answer in needle_rows(tokenizer, depth, distractors=3):
        assert len(ids) == 200 and answer == 1
        stated, queries = facts.mentions(ids)
        assert len(stated) == 4 and queries.tolist() == [198]  # asked for at the very end
        (at,) = (k for k in stated if ids[k] == ids[198])
        assert ids[at + 1] == ids[199]
        before = at - 1 - 2 * (stated < at).sum()  # tokens of text in front of it
        text = 200 - 1 - 8 - 2
        # within 2 % of the text, exactly at its ends
        assert abs(before - depth * text) <= (0 if depth in (0.0, 1.0) else text / 50)


def test_the_needle_map_counts_exactly_what_a_model_knows(tokenizer: PreTrainedTokenizerFast):
    needle = NeedleMap(NeedleConfig(lengths=[100, 200], depths=[0.0, 1.0], rows=5), TEXTS, seed=0)
    for knows, accuracy in ((lambda at: True, 1.0), (lambda at: False, 0.0)):
        subject = oracle(tokenizer, knows)
        rows = [row for unit in needle.units() for row in needle.run(subject, unit, ignore)]
        assert [row.metric for row in rows] == ["needle_accuracy", "needle_logprob"] * 4
        assert [(r.context["length"], r.context["depth"]) for r in rows[::2]] == [
            *((100, 0.0), (100, 1.0), (200, 0.0), (200, 1.0))
        ]
        assert [row.value for row in rows[::2]] == [accuracy] * 4
        # one logit of 1 and 0 everywhere else: log softmax of the answer's
        log_likelihood = np.log(np.e / (np.e + len(tokenizer) - 1)) - (1 - accuracy)
        assert [row.value for row in rows[1::2]] == pytest.approx([log_likelihood] * 4, rel=1e-6)


def test_a_sentence_is_right_when_greedy_decoding_writes_it(subject: Subject):
    tokenizer: Any = subject.tokenizer
    rows = needle_rows(tokenizer, 0.5, distractors=0, style=NeedleStyle.sentences)
    for ids, size in rows:
        text = tokenizer.decode(ids)
        question, answer = tokenizer.decode(ids[:-size]), tokenizer.decode(ids[-size:])
        place = question.split("What is the code of the ")[1].split("?")[0]
        assert f"The code of the {place} is{answer}.\n" in text and answer.strip().isdigit()
        assert question.endswith(f"Answer: The code of the {place} is")
    model: Any = subject.model
    ids, size = rows[0]
    greedy = model.generate(torch.from_numpy(ids[None, :-size]), max_new_tokens=size, do_sample=False, pad_token_id=0)
    written = greedy[0].numpy()
    assert [found.tolist() for found in _answers(subject, [(ids, size), (written, size)])[:1]] == [[False, True]]
    with torch.no_grad():
        logp = model(torch.from_numpy(ids[None])).logits[0].double().log_softmax(-1)
    expected = sum(logp[t - 1, ids[t]].item() for t in range(200 - size, 200))
    assert _answers(subject, rows[:2])[1][0] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (NeedleConfig(depths=[1.5]), r"needle.depths\[0\]=1.5 must be between 0 and 1"),
        (NeedleConfig(lengths=[]), "must not be empty"),
        (NeedleConfig(rows=0), "needle.rows=0 must be at least 1"),
        (NeedleConfig(distractors=99), "needle.distractors=99 must be 0 to"),
        (NeedleConfig(lengths=[18]), "needle.lengths=18 has no room for text beside 8 needles"),
        (NeedleConfig(lengths=[100_000]), "the haystack has .* tokens, fewer than a row of 100000"),
    ],
)
def test_impossible_needles_are_refused(config: NeedleConfig, message: str, tokenizer: PreTrainedTokenizerFast):
    with pytest.raises(UserError, match=message):
        NeedleMap(config, TEXTS, seed=0).check(tokenizer)

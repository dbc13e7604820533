from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from anchorctx.data.facts import FactTokens, loss_weights, plant
from anchorctx.data.sources import SourceConfig
from anchorctx.data.stdlib import train_tokenizer
from anchorctx.errors import UserError
from anchorctx.evals.perplexity import Perplexity, PerplexityConfig, score_documents
from anchorctx.evals.retrieval import Retrieval, RetrievalConfig, answered, text_stream
from anchorctx.evals.runner import EvalConfig, EvalName, evaluate
from anchorctx.results import read_results
from anchorctx.testing.tiny import text_model

TEXTS = [f"def f{i}(x):\n    return x + {i}\n" * (i + 1) for i in range(12)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(vocabulary=300, sample_chars=20_000)


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return text_model(tokenizer, 256)


def ignore(done: int, total: int) -> None:
    """No progress wanted."""


def test_batched_documents_score_as_each_does_alone(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast):
    planted = [plant(text, np.random.default_rng(i), 2) for i, text in enumerate(TEXTS[:4])]
    documents = [np.array([tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]) for text in planted]
    facts = FactTokens.of(tokenizer)
    for (loss, count), ids in zip(score_documents(model, documents, facts), documents, strict=True):
        with torch.no_grad():
            logp = model(input_ids=torch.from_numpy(ids)[None]).logits[0].double().log_softmax(-1)
        text = [t for t in range(2, len(ids)) if not facts.is_fact(ids[t : t + 1])[0]]
        assert count == len(text) < len(ids) - 2
        # Sums of up to 300 float32 losses, padded against not: 2e-7 of the sum was the largest difference seen.
        assert loss == pytest.approx(-sum(logp[t - 1, ids[t]].item() for t in text), rel=1e-5)


def test_perplexity_is_the_mean_over_tokens_with_an_interval(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
):
    seen: list[int] = []
    config = PerplexityConfig(documents=6, max_length=40, batch_tokens=100)
    (row,) = Perplexity(config, TEXTS).run(model, tokenizer, lambda done, total: seen.extend([done, -total]))
    documents = [np.array([tokenizer.bos_token_id, *tokenizer(text)["input_ids"]])[:40] for text in TEXTS[::2]]
    scores = score_documents(model, documents)
    loss, tokens = sum(loss for loss, _ in scores), sum(count for _, count in scores)
    assert row.value == pytest.approx(math.exp(loss / tokens), rel=1e-5)
    assert row.context["tokens"] == tokens and row.n == 6
    assert row.low is not None and row.high is not None and row.low < row.value < row.high
    assert sum(done for done in seen if done > 0) == -min(seen) == sum(map(len, documents))


class Oracle:
    """Answers a query right where `knows(position of the answer)`, by looking at the ids alone."""

    device = torch.device("cpu")

    def __init__(self, tokenizer: PreTrainedTokenizerFast, knows: Any) -> None:
        self._tokens, self._size, self._knows = FactTokens.of(tokenizer), len(tokenizer), knows

    def __call__(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        logits = torch.zeros(*input_ids.shape, self._size)
        for row, ids in enumerate(input_ids.numpy()):
            stated, queries = self._tokens.mentions(ids)
            values = {ids[k]: ids[k + 1] for k in stated}
            for key in queries:
                guess = values[ids[key]] if self._knows(key + 1) else self._tokens.keys[0]
                logits[row, key, guess] = 1.0
        return SimpleNamespace(logits=logits)


def test_retrieval_counts_exactly_what_a_model_knows(tokenizer: PreTrainedTokenizerFast):
    config = RetrievalConfig(lengths=[64, 128], rows=5, facts=6, batch_tokens=300)
    retrieval = Retrieval(config, TEXTS, seed=0)

    def run(knows: Any) -> list[float]:
        model: Any = Oracle(tokenizer, knows)
        rows = list(retrieval.run(model, tokenizer, ignore))
        assert [(row.context["length"], row.n) for row in rows] == [(64, 30), (128, 30)]
        return [row.value for row in rows]

    assert run(lambda at: True) == [1.0, 1.0]
    assert run(lambda at: False) == [0.0, 0.0]
    half = run(lambda at: at < 64)
    assert half[0] == 1.0 and 0.0 < half[1] < 1.0


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


def test_a_models_own_argmax_is_scored(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast):
    stream, line_start = text_stream(TEXTS, tokenizer)
    retrieval = Retrieval(RetrievalConfig(lengths=[100], rows=2), TEXTS, seed=1)
    bos = int(tokenizer.bos_token_id)  # type: ignore[arg-type]
    rng, tokens = np.random.default_rng(0), FactTokens.of(tokenizer)
    (rows,) = retrieval._batches(rng, tokens, bos, stream, line_start, 100)
    with torch.no_grad():
        guesses = model(input_ids=torch.from_numpy(rows.ids)).logits.argmax(-1).numpy()
    rows.ids[0, 1:][rows.answers[0, 1:]] = guesses[0, :-1][rows.answers[0, 1:]]  # now its guesses are the truth
    first = answered(model, rows)[: rows.answers[0].sum()]
    assert first[0]  # later guesses may change with the ids before them


def test_evaluate_loads_a_folder_and_writes_rows(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
):
    folder = tmp_path / "tiny"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    config = EvalConfig(
        model=str(folder),
        out_dir=str(tmp_path / "out"),
        evals=[EvalName.perplexity, EvalName.retrieval],
        corpus=SourceConfig(path=str(corpus)),
        perplexity=PerplexityConfig(max_length=128),
        retrieval=RetrievalConfig(lengths=[64, 256], rows=2),
    )
    rows = evaluate(config)
    assert [row.metric for row in rows] == ["perplexity", "retrieval_accuracy", "retrieval_accuracy"]
    assert list(read_results(tmp_path / "out" / "results.jsonl")) == rows
    assert all(row.manifest and row.context["model"] == "tiny" for row in rows)
    config.perplexity.max_length = 257
    with pytest.raises(UserError, match="257 tokens.*max_position_embeddings=256.*max_position_embeddings"):
        evaluate(config)
    config.model = str(tmp_path)
    with pytest.raises(UserError, match="has no config.json"):
        evaluate(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (RetrievalConfig(lengths=[32]), "takes 33 tokens"),
        (RetrievalConfig(lengths=[]), "must each hold"),
        (RetrievalConfig(facts=65), "facts=65 must be 1 to 64"),
        (RetrievalConfig(mentions=1), "mentions=1 at least 2"),
    ],
)
def test_impossible_retrieval_is_refused(config: RetrievalConfig, message: str):
    with pytest.raises(UserError, match=message):
        Retrieval(config, TEXTS, seed=0)

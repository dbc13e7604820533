"""Evaluations over two processes, of folders and of a model that trains, give the numbers of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anchorctx.config import resolve
from anchorctx.data.sources.source import SourceConfig
from anchorctx.data.sources.stdlib import train_tokenizer
from anchorctx.evals.evaluators.config import ContextConfig, PerplexityConfig
from anchorctx.evals.runner import EvalConfig, EvalName, evaluate
from anchorctx.records.results import Result, read_results
from anchorctx.testing.tiny import save, text_model
from anchorctx.train.config import ExportConfig
from anchorctx.train.export import export

from .runs import curve, metrics, torchrun

pytestmark = pytest.mark.distributed
LIVE = ("eval/perplexity", "eval/perplexity_by_context_20", "eval/perplexity_by_context_40")


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of 5 to 80 words that the tokenizer of the runs knows."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("corpus") / "words.jsonl"
    texts = [" ".join(f"t{i}" for i in rng.integers(3, 60, n)) for n in (5, 9, 80, 33, 61, 47, 12)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_the_live_model_is_measured_under_zero_3_as_in_one_process(launcher: Any, documents: Path, tmp_path: Path):
    live = (
        *("live.every=2", "live.evals=[perplexity,perplexity_by_context]", f"live.corpus.path={documents}"),
        *("live.corpus.format=jsonl", "live.perplexity.max_length=50", "live.perplexity.batch_tokens=80"),
        *("live.context.lengths=[20,40]", "live.context.targets=8", "live.context.batch_tokens=40"),
    )
    spread = launcher.run("live_spread", 2, "parallel=zero3", "micro_tokens=136", *live)
    too_long = ("live.every=2", "live.perplexity.max_length=65")
    runs = [("live_alone", "micro_tokens=136", *live), ("unwatched", "micro_tokens=136"), ("too_long", *too_long)]
    *made, refused = launcher.several(1, runs)
    assert [result["code"] for result in made] == [0, 0], made
    assert refused["code"] == 2 and not (launcher.root / "too_long").exists()
    assert "live.evals=perplexity asks for 65 tokens, but the model reaches 64" in refused["stderr"]
    alone, unwatched = launcher.root / "live_alone", launcher.root / "unwatched"
    assert [int(row["step"]) for row in metrics(alone) if LIVE[0] in row] == [0, 2, 4, 6]
    np.testing.assert_allclose(curve(spread, *LIVE), curve(alone, *LIVE), rtol=1e-5)
    assert np.unique(curve(alone, *LIVE)[::2], axis=0).shape == (4, 3)  # other numbers as it learns
    np.testing.assert_array_equal(curve(alone, "train/loss"), curve(unwatched, "train/loss"))
    folder = export(ExportConfig(run=str(spread), out_dir=str(tmp_path / "exported")))
    rows = evaluate(
        EvalConfig(
            model=str(folder),
            out_dir=str(tmp_path / "out"),
            evals=[EvalName.perplexity, EvalName.perplexity_by_context],
            corpus=SourceConfig(path=str(documents)),
            perplexity=PerplexityConfig(max_length=50, buckets=[49]),
            context=ContextConfig(lengths=[20, 40], targets=8),
        )
    )
    found = [row.value for row in rows if "start" not in row.context]
    assert found == pytest.approx(curve(spread, *LIVE)[-1].tolist(), rel=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that RULER's documents fit."""
    tokenizer = train_tokenizer(vocabulary=1024, sample_chars=300_000)
    model = text_model(tokenizer, 1024, width=16, layers=1, spread=0.02)
    return save(model, tokenizer, tmp_path_factory.mktemp("models") / "tiny")


SMALL = (
    *("perplexity.documents=5", "perplexity.max_length=500", "retrieval.lengths=[512]", "retrieval.rows=3"),
    *("retrieval.batch_tokens=600", "needle.lengths=[300]", "needle.depths=[0,1]", "needle.rows=2"),
)


def evaluated(out: Path, launcher: list[str], *overrides: str) -> list[Result]:
    command = [*launcher, "-m", "anchorctx", "eval", f"out_dir={out}", *SMALL, *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("written to") == 1
    return list(read_results(out / "results.jsonl"))


def test_two_processes_write_the_rows_of_one(folder: Path, tmp_path: Path):
    evals = "evals=[perplexity,retrieval,needle]"
    two = evaluated(tmp_path / "two", torchrun(2), f"model={folder}", evals)
    one = evaluate(resolve("eval", [f"out_dir={tmp_path / 'one'}", *SMALL, f"model={folder}", evals]))
    assert [(row.metric, row.manifest, row.n) for row in two] == [(row.metric, row.manifest, row.n) for row in one]
    assert {row.metric for row in two} >= {"perplexity", "retrieval_accuracy", "needle_logprob"}
    # here one process has more threads, and so sums in another order
    assert [row.value for row in two] == pytest.approx([row.value for row in one], rel=1e-5)


@pytest.mark.slow
def test_two_processes_with_lm_eval_write_the_very_rows_of_one(folder: Path, tmp_path: Path):
    ruler = ("ruler.tasks=[niah_multikey_3]", "ruler.lengths=[800]", "ruler.limit=3", "ruler.batch_size=2")
    overrides = (f"model={folder}", "evals=[perplexity,retrieval,needle,ruler]", *ruler)
    two = evaluated(tmp_path / "two", torchrun(2), *overrides)
    assert two == evaluated(tmp_path / "one", [sys.executable], *overrides)
    assert "lm_eval" in {row.metric for row in two}


REUSE = (
    *("copy={problems: 2, question: 40, prefix: 20, output: 6}", "tasks=[copy,gsm8k]", "compare_tokens=4"),
    *("arms=[rotate,kvcomm,random,naive]", "variation={documents: 3, tokens: 16, prefix: 8}"),
)


def test_two_processes_share_the_arms_of_kvcomm_and_write_the_rows_of_one(folder: Path, tmp_path: Path):
    problems = [{"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(2)]
    (tmp_path / "gsm8k.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    gsm8k = f"gsm8k={{path: {tmp_path / 'gsm8k.jsonl'}, problems: 2, max_new_tokens: 5}}"

    def rows(launcher: list[str], out: Path) -> list[Any]:
        command = [*launcher, "-m", "anchorctx", "kvcomm", f"model={folder}", f"out_dir={out}", gsm8k, *REUSE]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0 and done.stdout.count("**copy**") == 1, done.stderr[-3000:]
        found = list(read_results(out / "results.jsonl"))
        return [r.metric if timed(r) else (r.metric, r.n, r.manifest, r.value, r.context) for r in found]

    def timed(row: Result) -> bool:  # times differ, and with them what is recommended
        return row.unit == "s" or row.context.get("by") == "seconds" or "recommended" in row.context

    two = rows(torchrun(2), tmp_path / "two")
    assert two == rows([sys.executable], tmp_path / "one")
    assert rows(torchrun(2), tmp_path / "two") == two


def test_two_processes_share_the_texts_of_a_precision_study(folder: Path, tmp_path: Path):
    words = ("lengths=[32,64]", "shifts=[16]", "texts=3", "queries=8", "cost=false", "control=false")

    def rows(launcher: list[str], out: Path) -> list[Result]:
        command = [*launcher, "-m", "anchorctx", "precision", f"model={folder}", f"out_dir={out}", *words]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0 and done.stdout.count("drawn:") == 1, done.stderr[-3000:]
        return list(read_results(out / "results.jsonl"))

    assert rows(torchrun(2), tmp_path / "two") == rows([sys.executable], tmp_path / "one")

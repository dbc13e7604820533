from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anchorctx.cli.main import main
from anchorctx.evals.evaluators.reuse.config import ReuseConfig
from anchorctx.evals.evaluators.reuse.evaluator import arm_makers
from anchorctx.evals.evaluators.reuse.trial import Trial
from anchorctx.kvcomm.arms.names import ARMS, CONTROLS
from anchorctx.kvcomm.arms.offsets import Kvcomm
from anchorctx.records.results import Result, Rows, read_results

from .conftest import command

TESTED = [name for name in (*ARMS, *CONTROLS) if name not in ("rotate_first_k", "blend", "predicted")]


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[Result]:
    assert command(folder, folder / "out", "tasks=[retrieval,copy,gsm8k]", f"arms=[{','.join(TESTED)}]") == 0
    return list(read_results(folder / "out" / "results.jsonl"))


def timed(row: Result) -> bool:
    """Whether it is of how long something took, and so another number each time."""
    return row.unit == "s" or row.context.get("by") == "seconds" or row.metric == "kvcomm_recommendation"


def value(rows: list[Result], metric: str, **context: Any) -> float:
    found = Rows(rows).find(metric, **context)
    assert found is not None, (metric, context)
    return found.value


def test_every_task_has_its_rows(folder: Path, rows: list[Result]) -> None:
    arms = arm_makers(ReuseConfig(arms=TESTED))
    for task in ("retrieval", "copy", "gsm8k"):
        for arm in arms:
            base = {"task": task, "arm": arm, "kind": "all"}
            for tokens in ("first", "all"):
                assert value(rows, "kvcomm_kl", **base, tokens=tokens) >= 0.0
            assert 0 <= value(rows, "kvcomm_agreement", **base, tokens="all") <= 1
            assert value(rows, "kvcomm_ttft", **base, agent="request", quantile="p95") > 0
            assert {r.context["part"] for r in rows if base.items() <= r.context.items() and "layer" in r.context} == {
                "key",
                "value",
            }
    assert {r.context["kind"] for r in rows if r.metric == "kvcomm_accuracy"} == {
        "all", "single", "two_hop", "override", "absent",
    }  # fmt: skip
    assert not [r for r in rows if r.metric == "kvcomm_accuracy" and r.context["task"] == "copy"]
    assert all(r.context["model"] == "tiny" and r.manifest for r in rows)
    assert {r.context["cause"] for r in rows if r.metric == "kvcomm_variation"} == {"content", "shift"}
    for name in ("kvcomm_retrieval.png", "kvcomm_copy.png", "kvcomm_retrieval_cache.png", "kvcomm_gsm8k_frontier.png"):
        assert (folder / "out" / name).stat().st_size > 10_000
    assert (folder / "out" / "kvcomm.md").read_text().count(
        "| kvcomm |"
    ) == 6  # a table of everything and one of what to use
    said = [row.context["sentence"] for row in rows if row.metric == "kvcomm_recommendation"]
    assert len(said) == 3 and all(sentence in (folder / "out" / "kvcomm.md").read_text() for sentence in said)


def test_rows_say_what_is_exact_and_what_is_not(rows: list[Result]) -> None:
    for task in ("retrieval", "copy", "gsm8k"):
        for arm in ("dense", "dense_prefix_cache", "dense_chunked"):
            assert value(rows, "kvcomm_kl", task=task, arm=arm, kind="all", tokens="all") < 1e-8
            assert value(rows, "kvcomm_agreement", task=task, arm=arm, kind="all", tokens="all") == 1.0
        for arm in ("naive", "zeroed", "other_request"):
            assert value(rows, "kvcomm_kl", task=task, arm=arm, kind="all", tokens="all") > 1e-3
    rotate = {"task": "copy", "kind": "all", "part": "key", "measure": "relative"}
    assert value(rows, "kvcomm_kv_error", arm="rotate", layer=0, **rotate) < 1e-5
    assert value(rows, "kvcomm_kv_error", arm="naive", layer=0, **rotate) > 0.1
    assert value(rows, "kvcomm_kv_error", arm="rotate", layer=1, **rotate) > 1e-3
    assert value(rows, "kvcomm_variation", layer=0, part="value", cause="content") == 0.0


def test_the_other_order_is_not_answered_from_the_same_request(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the decision agent reads in another order, no exemplar has this request's offsets for it yet."""
    asked = []

    def place(self: Kvcomm, context: Any) -> Any:
        if not context.keep:
            mine = [e for e in self.pool if e.request == context.request.number]
            asked.append([agent for e in mine for agent, _ in e.offsets if agent == context.prompt.agent])
        return original(self, context)

    original = Kvcomm.place
    monkeypatch.setattr(Kvcomm, "place", place)
    assert command(folder, folder / "order", "tasks=[retrieval]", "arms=[kvcomm]") == 0
    assert len(asked) == 12 and not any(asked)  # three problems of four kinds


def test_settings_with_which_nothing_runs_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mistakes = {
        "tasks=[]": "tasks=[] leaves nothing to run",
        "seed=-1": "seed=-1 must be at least 0",
        "settings.max_bytes=-1": "max_bytes=-1 must be at least 1",
        "copy={prefix: 30000, question: 10, output: 2, problems: 1}": "but the model reaches 1024",
    }
    for mistake, sentence in mistakes.items():
        assert command(folder, folder / "never", mistake) == 2
        assert sentence in capsys.readouterr().err
    assert not (folder / "never").exists()


def test_variation_is_measured_behind_the_prefix_that_is_asked_for(folder: Path, capsys, caplog) -> None:
    def run(prefix: int) -> list[Result]:
        out = folder / f"variation_{prefix}"
        options = ["variation.documents=2", "variation.tokens=16", f"variation.prefix={prefix}"]
        assert command(folder, out, "tasks=[copy]", "copy.problems=1", "arms=[rotate]", *options) == 0
        return [row for row in read_results(out / "results.jsonl") if row.metric == "kvcomm_variation"]

    short, long = run(4), run(32)
    assert {row.context["prefix"] for row in short} == {4} and {row.context["prefix"] for row in long} == {32}
    assert [row.value for row in short] != [row.value for row in long]
    assert (
        command(folder, folder / "far", "tasks=[copy]", "copy.problems=1", "arms=[rotate]", "variation.prefix=600") == 0
    )
    assert "needs 1,457 tokens of the model, which reaches 1,024" in caplog.text
    assert command(folder, folder / "no", "variation.prefix=0") == 2
    assert "variation.prefix=0 must be at least 1" in capsys.readouterr().err


def test_reuse_and_accuracy_are_counted(rows: list[Result]) -> None:
    for by in ("calls", "tokens", "flops"):
        assert value(rows, "kvcomm_reuse", task="copy", arm="dense", kind="all", by=by) == 0.0
    assert value(rows, "kvcomm_reuse", task="copy", arm="rotate", kind="all", by="calls") == 1.0
    assert value(rows, "kvcomm_reuse", task="retrieval", arm="rotate", kind="all", by="contents") > 0.9
    assert value(rows, "kvcomm_reuse", task="retrieval", arm="dense", kind="all", by="contents") == 0.0
    mean = Rows(rows).find("kvcomm_reuse", task="copy", arm="mean_offset", kind="all", by="calls")
    assert mean is not None and mean.value == pytest.approx(1 / 3) and mean.context["by_construction"] is False
    dense = Rows(rows).find("kvcomm_accuracy_difference", task="retrieval", arm="dense", kind="all")
    assert dense is not None and dense.value == 0.0 and dense.low is not None and dense.low < 0 < dense.high  # type: ignore
    assert value(rows, "kvcomm_judge_consistency", task="gsm8k", arm="dense", kind="all", shuffled=False) == 1.0
    assert value(rows, "kvcomm_judge_consistency", task="gsm8k", arm="dense", kind="all", shuffled=True) == 1.0


def test_two_runs_give_identical_numbers(folder: Path, rows: list[Result]) -> None:
    assert command(folder, folder / "again", "tasks=[retrieval]", f"arms=[{','.join(TESTED)}]") == 0
    again = list(read_results(folder / "again" / "results.jsonl"))
    plain = [
        [(r.metric, r.value, r.n, r.context) for r in found if not timed(r)]
        for found in ([r for r in rows if r.context.get("task") in (None, "retrieval")], again)
    ]
    assert plain[0] == plain[1]


def test_typed_twice_or_cut_off_it_leaves_the_rows_of_one_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task that was done is not run again, one that was cut off goes on, and a report takes the folder each time."""
    only = ["tasks=[retrieval,copy]", "arms=[kvcomm,random]", "retrieval.kinds=[single,absent]"]
    file, run, ran = tmp_path / "out" / "results.jsonl", Trial.run, []

    def cut(self: Trial, problems: Any) -> Any:
        ran.append(self.team.kind)
        if ran.count("copy") == 2:
            raise KeyboardInterrupt
        return run(self, problems)

    assert command(folder, tmp_path / "whole", *only) == 0
    monkeypatch.setattr(Trial, "run", cut)
    assert command(folder, file.parent, *only) == 130
    assert {row.context["task"] for row in read_results(file)} == {"retrieval"}
    assert main(["report", str(file.parent), f"out={tmp_path / 'a.html'}"]) == 0
    assert command(folder, file.parent, *only) == 0 and ran.count("copy") == 3  # cut, and again
    whole, found = (list(read_results(path)) for path in (tmp_path / "whole" / "results.jsonl", file))
    plain = [[(r.metric, r.value, r.n, r.manifest, r.context) for r in rows if not timed(r)] for rows in (whole, found)]
    assert plain[0] == plain[1] and len(whole) == len(found)

    once = file.read_bytes()
    assert command(folder, file.parent, *only, "gate={arm: kvcomm, max_kl: 0, min_agreement: 1}") == 1
    assert "| kvcomm |" in (file.parent / "kvcomm.md").read_text()
    # With another bound only what is recommended is new; with the first one again it is the latest again.
    more = file.read_bytes().removeprefix(once).splitlines()
    assert file.read_bytes().startswith(once) and len(more) == 2
    assert all(
        row["metric"] == "kvcomm_recommendation" and row["context"]["bound"] == 0 for row in map(json.loads, more)
    )
    assert command(folder, file.parent, "tasks=[copy]", *only[1:]) == 0
    last = json.loads(file.read_bytes().splitlines()[-1])
    assert (last["context"]["task"], last["context"]["bound"]) == ("copy", 0.05)
    once = file.read_bytes()
    assert command(folder, file.parent, "tasks=[copy]", *only[1:]) == 0 and file.read_bytes() == once
    assert main(["report", str(file.parent), f"out={tmp_path / 'b.html'}"]) == 0
    assert json.loads((file.parent / "manifest.json").read_text())["command"] == "kvcomm"


def test_without_accuracy_the_other_numbers_are_the_same(folder: Path, rows: list[Result], tmp_path: Path) -> None:
    only = ["tasks=[gsm8k]", f"arms=[{','.join(TESTED)}]"]
    assert command(folder, tmp_path, *only, "accuracy=false") == 0
    found = list(read_results(tmp_path / "results.jsonl"))
    accuracy = ("kvcomm_accuracy", "kvcomm_accuracy_difference")
    assert {row.context["arm"] for row in found if row.metric in accuracy} == {"dense"}

    def plain(rows: list[Result]) -> list[Any]:
        mine = [r for r in rows if r.context.get("task") == "gsm8k" and not timed(r) and r.metric not in accuracy]
        return [(r.metric, r.value, r.n, r.context) for r in mine]

    assert plain(found) == plain(rows) and len(plain(found)) > 100
    kept = (tmp_path / "transcripts.jsonl").read_text().splitlines()
    assert [list(json.loads(line)["arms"]) for line in kept] == [["dense"]] * 2
    assert main(["report", str(tmp_path), f"out={tmp_path / 'page.html'}"]) == 0


def test_another_evaluation_of_reuse_is_not_mixed_in(folder: Path, tmp_path: Path, capsys) -> None:
    only = ["tasks=[copy]", "copy.problems=1", "variation.prefix=600"]
    assert command(folder, tmp_path, *only, "arms=[rotate]") == 0
    before = (tmp_path / "results.jsonl").read_bytes()
    assert command(folder, tmp_path, *only, "arms=[naive]") == 2
    assert "holds another kvcomm study of tiny" in capsys.readouterr().err
    assert command(folder, tmp_path, *only, "arms=[naive]", "label=other") == 0
    assert (tmp_path / "results.jsonl").read_bytes().startswith(before)


def test_it_is_an_evaluation_like_the_others(folder: Path, tmp_path: Path) -> None:
    words = ["tasks=[copy]", "arms=[rotate]", "copy.problems=1", "variation.prefix=600"]
    assert command(folder, tmp_path / "short", *words, "copy={question: 40, prefix: 20, output: 6}") == 0
    options = [*words, "copy={question: 40, prefix: 20, output: 6}", "retrieval={problems: 3, document_tokens: 60}"]
    corpus = f"corpus={{path: {folder / 'corpus.jsonl'}}}"
    base = ["eval", f"model={folder / 'tiny'}", f"out_dir={tmp_path / 'long'}", corpus, "evals=[kvcomm]"]
    assert main([*base, *(f"kvcomm.{option}" for option in options), "kvcomm.compare_tokens=4"]) == 0
    short, long = (list(read_results(tmp_path / name / "results.jsonl")) for name in ("short", "long"))
    plain = [[(r.metric, r.value, r.context) for r in rows if not timed(r)] for rows in (short, long)]
    assert plain[0] == plain[1] and plain[0]


def test_the_gate_decides_the_exit_code(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    only = ["tasks=[copy]", "arms=[rotate,dense_prefix_cache]"]
    # times of a model this small say nothing
    assert command(folder, tmp_path / "a", *only, "gate={arm: dense_prefix_cache, max_ttft: 100, min_reuse: 0}") == 0
    assert "gate passed: dense_prefix_cache on copy with tiny: KL" in capsys.readouterr().out
    assert command(folder, tmp_path / "b", *only, "gate={arm: rotate, max_kl: 1e-9}") == 1
    assert "gate FAILED: rotate on copy" in capsys.readouterr().out


def test_an_arm_that_shares_no_content_is_of_no_use(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """It computes all but the agents' fixed texts, as any cache of prefixes does: neither passed nor recommended."""
    only = ["tasks=[gsm8k]", "arms=['rotate_glue:100000']", "gate={arm: 'rotate_glue:100000', max_ttft: 100}"]
    assert command(folder, tmp_path, *only) == 1
    said = capsys.readouterr().out
    assert "reuse 0.000 of the contents' tokens (at least 0.1): NOT MET" in said
    assert (
        "none: stay dense; within a KL of 0.05 there is nothing that computes less than a cache of the agents" in said
    )
    rows = list(read_results(tmp_path / "results.jsonl"))
    at = {"task": "gsm8k", "kind": "all", "arm": "rotate_glue:100000"}
    assert value(rows, "kvcomm_reuse", by="contents", **at) == 0.0 < value(rows, "kvcomm_reuse", by="tokens", **at)


def test_several_models_are_paired_on_the_same_problems(folder: Path, tmp_path: Path) -> None:
    """Two models in one call, one of them twice: each has its rows, pictures and values by problem."""
    tiny = folder / "tiny"
    models = f"models=[{{path: {tiny}, label: a/full}}, {{path: {tiny}, label: anchor, rope: {{theta: 1e5}}}}]"
    only = ["tasks=[retrieval]", "arms=[rotate]", "retrieval={problems: 3, document_tokens: 60, prefix: 50}"]
    only.append("retrieval.kinds=[two_hop,override]")
    assert (
        command(folder, tmp_path, models, *only, "gate={arm: rotate, max_kl: 1e9, min_agreement: 0, max_ttft: 100}")
        == 0
    )
    found = list(read_results(tmp_path / "results.jsonl"))
    rows = [row for row in found if row.metric != "kvcomm_recommendation"]  # one each, which may differ
    assert len(found) == len(rows) + 2
    assert len({r.manifest for r in rows}) == 2 and len({r.context.get("problems") for r in rows}) == 2
    cells = {
        model: [(r.metric, r.context | {"model": "", "values": len(r.context.get("values", []))}) for r in rows
                if r.context["model"] == model]
        for model in ("a/full", "anchor")
    }  # fmt: skip
    assert cells["a/full"] == cells["anchor"] and len(cells["anchor"]) * 2 == len(rows)
    assert {r.context["kind"] for r in rows if "kind" in r.context} == {"all", "two_hop", "override"}
    for model in cells:
        for metric in ("kvcomm_kl", "kvcomm_agreement", "kvcomm_accuracy", "kvcomm_judge_consistency"):
            row = Rows(rows).find(metric, model=model, arm="rotate", kind="all")
            assert row is not None and row.n == len(row.context["values"]) == 6
            assert np.mean(row.context["values"]) == pytest.approx(row.value)
    assert value(rows, "kvcomm_kl", model="anchor", arm="rotate") != value(
        rows, "kvcomm_kl", model="a/full", arm="rotate"
    )
    assert {p.name for p in tmp_path.glob("*.png")} == {
        f"kvcomm_{model}_retrieval{what}.png" for model in ("a_full", "anchor") for what in ("", "_cache", "_frontier")
    }
    assert (tmp_path / "kvcomm.md").read_text().count("| rotate |") == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("arms=[fast]", "unknown arm 'fast': choose dense"),
        ("arms=[rotate_glue:-1]", "arm 'rotate_glue:-1' must have a whole number of at least 0 behind its colon"),
        ("gate.arm=kvcomm arms=[rotate]", "gate.arm=kvcomm is not among the arms"),
        ("settings.warmup=0", "settings.warmup=0 must be at least 1"),
        ("settings.min_exemplars=30", "min_exemplars=30 must not exceed"),
        ("compare_tokens=0", "compare_tokens=0"),
        ("agents.count=2", "agents.count=2 has too few readers"),
        ("agents=5", r"agents=5 is not {key: value}: write agents={count: 5}"),
        ("tasks=[gsm8k] chat=true", "chat=true asks for roles, but .*no chat template.*set chat=false"),
        ("tasks=[gsm8k] agents.file=TINY/none.yaml", "agents.file=.* asks for roles, but .*no chat template"),
        ("tasks=[gsm8k] chat=false agents.file=TINY/none.yaml", "agents.file=TINY/none.yaml cannot be read"),
        ("retrieval.document_tokens=900", "prompt of .* the model reaches 1024"),
        ("tasks=[humaneval]", "allow_code_execution=true"),
        ("retrieval.kinds=[three_hop]", "retrieval.kinds has 'three_hop', which is unknown: choose single"),
        ("retrieval.prefix=-1", "retrieval.prefix=-1 must be at least 0"),
        ("retrieval.prefix=900", "prompt of .* the model reaches 1024"),
        ("retrieval.document_tokens=4", "no room for 3 facts"),
        ("models=[{path: TINY, average: x}]", "average=x is not known to kvcomm"),
        ("model=[TINY,TINY/none]", "TINY/none does not exist"),
        ("model=[TINY,TINY] label=x", "label=x cannot name 2 models"),
        ("tasks=[copy] copy.output=1000000000000", "the model reaches 1,?024"),
        ("tasks=[copy] copy.question=1000000000000", "the model reaches 1,?024"),
        ("budget_minutes=0", "budget_minutes=0.0 must be above 0: null is no limit"),
        ("until_interval=-1", "until_interval=-1.0 must be above 0: null runs all problems"),
        ("arms=[predicted] settings.predicted.warmup=3", "from 3 requests: raise warmup to 9 or more"),
        ("gate.min_agreement=2 gate.arm=rotate", "gate.min_agreement=2.0 must be between 0 and 1"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    tiny = str(folder / "tiny")
    words = re.split(r" (?=[\w.]+=)", override.replace("TINY", tiny))
    assert command(folder, tmp_path / "none", *words) == 2
    message = message.replace("TINY", tiny)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("anchorctx kvcomm: ")
    assert re.search(message, error), error
    assert not (tmp_path / "none").exists()

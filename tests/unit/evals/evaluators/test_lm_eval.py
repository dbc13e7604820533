"""lm-eval through our runner: its numbers, its data, and what it cannot do, said before anything starts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from anchorctx.data.sources.stdlib import train_tokenizer
from anchorctx.errors import UserError
from anchorctx.evals.base import Subject
from anchorctx.evals.evaluators import lm_eval as harness
from anchorctx.evals.evaluators.config import OFFLINE, LmEvalConfig, RulerConfig
from anchorctx.evals.evaluators.lm_eval import lm_eval_version, run_tasks, task_manager
from anchorctx.evals.evaluators.ruler import Ruler, as_in_a_fresh_process, shortest
from anchorctx.evals.runner import EvalConfig, EvalName, evaluate
from anchorctx.testing.tiny import save, text_model

from ..conftest import ignore

LENGTH = 1536
TASK = """\
task: z_pick_the_sum
dataset_path: json
dataset_kwargs: {data_files: DATA}
test_split: train
output_type: multiple_choice
doc_to_text: "{{question}} ="
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose model and tokenizer suit RULER: 2,048 positions, and words of more than a byte."""
    tokenizer = train_tokenizer(vocabulary=2048, sample_chars=300_000)
    model = text_model(tokenizer, 2048, width=16, layers=1, spread=0.5)
    return save(model, tokenizer, tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="module")
def own_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a task of one's own, over data of one's own."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"question": f"{a} + {b}", "choices": [f" {a + b}", f" {a - b}", f" {a * b}"], "answer": 0}
        for a in range(3, 13)
        for b in (2, 5)
    ]
    (folder / "data.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "task.yaml").write_text(TASK.replace("DATA", str(folder / "data.json")))
    return folder


def load(folder: Path) -> Subject:
    from transformers import AutoTokenizer

    return Subject(LlamaForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder))


def by_command_line(folder: Path, out: Path, tasks: str, *options: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Results and responses of lm-eval's own command line, in a process of its own."""
    command = [
        *(sys.executable, "-W", "ignore", "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu"),
        *("--model_args", f"pretrained={folder},dtype=float32", "--tasks", tasks, "--log_samples"),
        *("--metadata", json.dumps({"max_seq_lengths": [LENGTH]}), "--output_path", str(out), *options),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)  # with as many threads as we have
    assert done.returncode == 0, done.stderr[-2000:]
    (results,) = out.rglob("results_*.json")
    samples = {
        task: [json.loads(line) for line in next(out.rglob(f"samples_{task}_*.jsonl")).read_text().splitlines()]
        for task in tasks.split(",")
    }
    return json.loads(results.read_text())["results"], samples


@pytest.mark.slow  # two minutes
def test_numbers_and_answers_are_those_of_lm_evals_own_command_line(small: Path, own_tasks: Path, tmp_path: Path):
    options = ("--limit", "3", "--batch_size", "3", "--include_path", str(own_tasks))
    results, samples = by_command_line(small, tmp_path / "theirs", "ruler_cwe,z_pick_the_sum", *options)
    config = EvalConfig(
        model=str(small),
        out_dir=str(tmp_path / "ours"),
        evals=[EvalName.lm_eval],
        lm_eval=LmEvalConfig(tasks=["z_pick_the_sum"], include_path=str(own_tasks), limit=3, batch_size=3),
    )
    rows = {row.context["measure"]: row for row in evaluate(config)}
    theirs = results["z_pick_the_sum"]
    assert set(rows) == {"acc", "acc_norm"}
    for measure, row in rows.items():
        assert row.value == theirs[f"{measure},none"] and row.n == 3
        assert row.low is not None and row.high is not None
        assert (row.high - row.low) / 2 == pytest.approx(1.959964 * theirs[f"{measure}_stderr,none"], rel=1e-6)
    assert 0 < rows["acc"].value + rows["acc_norm"].value < 2  # this model is sometimes right
    subject = load(small)
    # drawn twice: the second has the same data, although lm-eval's module draws from a generator that goes on
    assert [answers(subject, "ruler_cwe") for _ in range(2)] == [responses(samples["ruler_cwe"])] * 2


def answers(subject: Subject, task: str) -> list[Any]:
    metadata = {"pretrained": subject.tokenizer.name_or_path, "max_seq_lengths": [LENGTH]}
    tasks = as_in_a_fresh_process(task_manager(None, "ruler", metadata=metadata))
    options = RulerConfig(limit=3, batch_size=3)
    return responses(run_tasks(subject, [task], tasks, options, ignore, offline=True)["samples"][task])


def responses(samples: list[dict[str, Any]]) -> list[Any]:
    """What was asked (hashed) and what the model wrote, of every document."""
    ordered = sorted(samples, key=lambda sample: sample["doc_id"])
    return [[sample["prompt_hash"], sample["resps"], str(sample["target"])] for sample in ordered]


@pytest.mark.slow
@pytest.mark.parametrize("task", OFFLINE)
def test_every_offline_ruler_task_gives_its_command_lines_answers(task: str, small: Path, tmp_path: Path):
    _, samples = by_command_line(small, tmp_path / "theirs", task, "--limit", "3", "--batch_size", "3")
    assert answers(load(small), task) == responses(samples[task])


def test_six_ruler_tasks_run_without_a_network_and_are_remembered(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    config = EvalConfig(
        model=str(small),
        out_dir=str(tmp_path),
        evals=[EvalName.ruler],
        ruler=RulerConfig(lengths=[LENGTH], limit=2, batch_size=2),
    )
    rows = evaluate(config)
    assert [row.context["task"] for row in rows] == list(OFFLINE)
    assert {(row.metric, row.n, row.context["length"], row.context["measure"]) for row in rows} == {
        ("lm_eval", 2, LENGTH, "score")
    }
    assert all(0 <= row.value <= 1 and row.low is not None for row in rows)
    monkeypatch.setattr(harness, "_language_model", refuse)
    assert evaluate(config) == rows


def refuse(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("this must not be called")


def test_a_length_that_lm_eval_could_never_fill_is_refused(small: Path):
    """Its generators of documents would run for ever: they draw again until one fits."""
    tokenizer = load(small).tokenizer
    least = shortest("ruler_vt", 400, tokenizer)
    assert 500 < least < LENGTH and shortest("niah_single_1", 400, tokenizer) == 0
    with pytest.raises(
        UserError, match=rf"400 is too short for ruler_vt, whose smallest document takes {least} tokens"
    ):
        Ruler(RulerConfig(tasks=["ruler_vt"], lengths=[LENGTH, 400])).check(tokenizer)
    # from 4,096 tokens on lm-eval repeats words five times as often
    assert shortest("ruler_cwe", 4095, tokenizer) < LENGTH < 4096 < shortest("ruler_cwe", 4096, tokenizer)
    with pytest.raises(UserError, match="4096 is too short for ruler_cwe"):
        Ruler(RulerConfig(tasks=["ruler_cwe"], lengths=[LENGTH, 4096])).check(tokenizer)


def test_unknown_names_give_the_nearest(tmp_path: Path, small: Path, own_tasks: Path):
    with pytest.raises(UserError, match="ruler.tasks names ruler_vtt, which lm-eval .* did you mean ruler_vt or"):
        Ruler(RulerConfig(tasks=["ruler_vtt"])).units()
    tasks = LmEvalConfig(tasks=["hellaswagg"], include_path=str(own_tasks))
    config = EvalConfig(model=str(small), out_dir=str(tmp_path / "out"), evals=[EvalName.lm_eval], lm_eval=tasks)
    with pytest.raises(UserError, match="lm_eval.tasks names hellaswagg, .* did you mean hellaswag"):
        evaluate(config)
    assert not (tmp_path / "out").exists()


def test_what_needs_the_hub_says_so_before_it_starts(
    tmp_path: Path, small: Path, own_tasks: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    caplog.set_level("INFO")
    tasks = LmEvalConfig(tasks=["hellaswag"], include_path=str(own_tasks))
    config = EvalConfig(model=str(small), out_dir=str(tmp_path / "out"), evals=[EvalName.lm_eval], lm_eval=tasks)
    with pytest.raises(UserError, match="hellaswag needs Rowan/hellaswag from the hub, which is neither in the cache"):
        evaluate(config)
    assert "hellaswag reads Rowan/hellaswag from the hub" in caplog.text
    config = EvalConfig(
        model=str(small),
        out_dir=str(tmp_path / "out"),
        evals=[EvalName.ruler],
        ruler=RulerConfig(tasks=["ruler"], lengths=[LENGTH]),
    )
    with pytest.raises(UserError, match="niah_single_2 needs baber/paul_graham_essays from the hub"):
        evaluate(config)
    assert not (tmp_path / "out").exists()


def test_without_lm_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    harness._read_tasks.cache_clear()
    with pytest.raises(UserError, match=r"pip install 'anchorctx\[eval\]'"):
        Ruler(RulerConfig()).units()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ruler(RulerConfig(lengths=[])), "must name at least one each"),
        (
            lambda: Ruler(RulerConfig(lengths=[512, 2048], max_length=1024)),
            "max_length=1024 would cut .* raise it to 2048",
        ),
        (lambda: Ruler(RulerConfig(limit=0)), "ruler.limit=0 must be at least 1"),
        (lambda: Ruler(RulerConfig(batch_size=0)), "ruler.batch_size=0 must be at least 1"),
        (lambda: harness.LmEval(LmEvalConfig(num_fewshot=-1)), "lm_eval.num_fewshot=-1 must be at least 0"),
        (lambda: harness.LmEval(LmEvalConfig()), r"lm_eval.tasks=\[\] names no task"),
        (
            lambda: harness.LmEval(LmEvalConfig(tasks=["x"], include_path="no/such")),
            "include_path=no/such is not a folder",
        ),
    ],
)
def test_impossible_settings_are_refused(make: Any, message: str):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize("name", ["ruler", "lm_eval"])
def test_a_chat_template_that_is_not_there_is_refused(name: str, small: Path):
    make = {"ruler": lambda: Ruler(RulerConfig(apply_chat_template=True))}
    make["lm_eval"] = lambda: harness.LmEval(LmEvalConfig(tasks=["hellaswag"], apply_chat_template=True))
    with pytest.raises(
        UserError, match=rf"{name}.apply_chat_template=true needs a chat template, .*{small.name} has not"
    ):
        make[name]().check(load(small).tokenizer)


@pytest.mark.parametrize("bos", [True, False, None])
def test_the_anchor_stands_in_front_where_it_is_asked_for(bos: bool | None, small: Path):
    """The ids are those of lm-eval's own loading of the folder, whose tokenizer adds no BOS by itself."""
    from lm_eval.models.huggingface import HFLM

    ours = harness._language_model(load(small), RulerConfig(add_bos_token=bos), lambda done, of: None)
    theirs = HFLM(str(small), device="cpu", add_bos_token=bos)
    text = "the needle is 4"
    for encode in (lambda lm: lm.tok_encode(text), lambda lm: lm.tok_batch_encode([text])[0][0].tolist()):
        assert encode(ours) == encode(theirs)
    assert (ours.tok_encode(text)[0] == ours.tokenizer.bos_token_id) is (bos is True)


def test_the_version_is_part_of_what_is_measured():
    assert lm_eval_version() == "0.4.13"

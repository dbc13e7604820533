from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from anchorctx.attention.config import RopeDtype
from anchorctx.cli.eval import table
from anchorctx.data.sources.source import SourceConfig
from anchorctx.errors import UserError
from anchorctx.evals import runner
from anchorctx.evals.evaluators.config import PerplexityConfig, RetrievalConfig
from anchorctx.evals.evaluators.retrieval import Retrieval
from anchorctx.evals.journal import Journal
from anchorctx.evals.runner import EvalConfig, EvalDtype, EvalName, EvaluatedModel, evaluate
from anchorctx.evals.subject import identity, load, models_of, read_config, read_tokenizer
from anchorctx.models import RopeConfig
from anchorctx.records.results import read_results
from anchorctx.testing.numerics import observed_rope_dtype
from anchorctx.testing.tiny import save, text_model

from .conftest import TEXTS


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> SourceConfig:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return SourceConfig(path=str(path))


@pytest.fixture(scope="module")
def other(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(text_model(tokenizer, 256, seed=1), tokenizer, tmp_path_factory.mktemp("models") / "other")


def config(model: Any, out: Path, corpus: SourceConfig, **options: Any) -> EvalConfig:
    settings: dict[str, Any] = {
        "evals": [EvalName.perplexity, EvalName.retrieval],
        "corpus": corpus,
        "perplexity": PerplexityConfig(max_length=128),
        "retrieval": RetrievalConfig(lengths=[64, 256], rows=2),
    }
    model = model if isinstance(model, list | None) else str(model)
    return EvalConfig(model=model, out_dir=str(out), **(settings | options))


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Labels of the models that are loaded."""
    seen: list[str] = []

    def counted(model: EvaluatedModel, *args: Any) -> Any:
        seen.append(str(model.label))
        return load(model, *args)

    monkeypatch.setattr(runner, "load", counted)
    return seen


def test_a_folder_is_evaluated_and_done_rows_are_not_run_again(
    folder: Path, corpus: SourceConfig, tmp_path: Path, loads: list[str]
):
    first = evaluate(config(folder, tmp_path, corpus))
    names = ["perplexity", "perplexity_by_position", *["retrieval_accuracy"] * 2]
    assert [row.metric for row in first] == names
    assert list(read_results(tmp_path / "results.jsonl")) == first
    assert {row.context["model"] for row in first} == {"tiny"} and loads == ["tiny"]
    for key in {row.manifest for row in first}:
        kept = json.loads((tmp_path / "manifests" / f"{key}.json").read_text())
        assert kept["hash"] == key and kept["first_measured"]["command"] == "eval"
    assert len({row.manifest for row in first}) == 2  # one for each evaluation
    assert evaluate(config(folder, tmp_path, corpus)) == first and loads == ["tiny"]
    longer = RetrievalConfig(lengths=[64, 128, 256], rows=2)
    again = evaluate(config(folder, tmp_path, corpus, retrieval=longer))
    assert loads == ["tiny"] * 2
    written = list(read_results(tmp_path / "results.jsonl"))
    assert written == [*first, again[3]] and again[3].context["length"] == 128
    assert again[3].manifest == first[3].manifest  # rows of one series
    # how it is computed, not what, and what other evaluations are asked for, change nothing
    quicker = RetrievalConfig(lengths=[64], rows=2, batch_tokens=99)
    assert evaluate(config(folder, tmp_path, corpus, evals=[EvalName.retrieval], retrieval=quicker)) == [first[2]]
    assert loads == ["tiny"] * 2


def test_an_interrupted_evaluation_goes_on_where_it_was(
    folder: Path, corpus: SourceConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole, run, seen = evaluate(config(folder, tmp_path / "whole", corpus)), Retrieval.run, []

    def failing(self: Retrieval, subject: Any, unit: dict[str, Any], progress: Any) -> Any:
        seen.append(unit["length"])
        if len(seen) == 2:
            raise KeyboardInterrupt
        return run(self, subject, unit, progress)

    monkeypatch.setattr(Retrieval, "run", failing)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config(folder, tmp_path / "out", corpus))
    assert list(read_results(tmp_path / "out" / "results.jsonl")) == whole[:-1]
    assert evaluate(config(folder, tmp_path / "out", corpus)) == whole
    assert seen == [64, 256, 256]


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"rope_dtype": RopeDtype.float32},
        {"label": "another"},
        {"dtype": EvalDtype.bfloat16},
        {"config": {"rms_norm_eps": 0.1}},
        {"retrieval": RetrievalConfig(lengths=[64], rows=3)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_changes_the_numbers_is_measured_anew(
    change: dict[str, Any], folder: Path, corpus: SourceConfig, tmp_path: Path, loads: list[str]
):
    base = {"evals": [EvalName.retrieval], "retrieval": RetrievalConfig(lengths=[64], rows=2)}
    (before,) = evaluate(config(folder, tmp_path, corpus, **base))
    (after,) = evaluate(config(folder, tmp_path, corpus, **(base | change)))
    assert before.manifest != after.manifest and len(loads) == 2
    assert list(read_results(tmp_path / "results.jsonl")) == [before, after]


def test_other_weights_documents_and_code_are_measured_anew(
    folder: Path, other: Path, corpus: SourceConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def manifest(model: Path, source: SourceConfig = corpus) -> str:
        options: dict[str, Any] = {"evals": [EvalName.perplexity], "label": "the same"}
        return evaluate(config(model, tmp_path / "out", source, **options))[0].manifest

    copied = shutil.copytree(folder, tmp_path / "copied")
    changed = tmp_path / "changed.jsonl"
    changed.write_text(Path(corpus.path).read_text().replace("return", "yield"))
    first = manifest(folder)
    assert manifest(copied) == first
    assert len({first, manifest(other), manifest(folder, SourceConfig(path=str(changed)))}) == 3
    monkeypatch.setattr(runner, "code_fingerprint", lambda: "edited")
    assert manifest(folder) != first


def test_a_later_step_of_training_has_another_identity(folder: Path, tmp_path: Path):
    model: Any = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 1e-5)
    shutil.copytree(folder, tmp_path / "stepped")
    model.save_pretrained(tmp_path / "stepped")
    found = [identity(m, read_config(m)) for m in (EvaluatedModel(path=str(p)) for p in (folder, tmp_path / "stepped"))]
    assert found[0]["files"] != found[1]["files"] and found[0]["config"] == found[1]["config"]


def test_a_torn_results_file_is_mended_and_a_damaged_one_is_named(folder: Path, corpus: SourceConfig, tmp_path: Path):
    first = evaluate(config(folder, tmp_path, corpus))
    path = tmp_path / "results.jsonl"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)  # perplexity's two, written together, and two of retrieval
    for kept, half in ((3, 40), (2, 1), (1, 0)):
        path.write_bytes(b"".join(lines[:kept]) + lines[kept][:half])
        assert evaluate(config(folder, tmp_path, corpus)) == first
        assert path.read_bytes() == whole
    path.write_bytes(b"".join([*lines[:2], b"what is this\n", lines[3]]))
    with pytest.raises(UserError, match="results.jsonl:3 is no result row"):
        evaluate(config(folder, tmp_path, corpus))


def test_two_evaluations_cannot_write_one_folder(folder: Path, corpus: SourceConfig, tmp_path: Path):
    held = Journal(tmp_path)
    with pytest.raises(UserError, match=f"out_dir={tmp_path} is being written by process {os.getpid()} on "):
        evaluate(config(folder, tmp_path, corpus))
    held.close()
    evaluate(config(folder, tmp_path, corpus))


def test_checkpoints_are_averaged_beside_another_model(
    folder: Path, other: Path, corpus: SourceConfig, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
):
    base = save(text_model(tokenizer, 256, seed=2), tokenizer, tmp_path / "base")
    models = [
        EvaluatedModel(path=str(base), label="before"),
        *(EvaluatedModel(path=str(path), average="run") for path in (folder, other)),
    ]
    rows = evaluate(config(None, tmp_path / "out", corpus, models=models))
    by_model = {name: [r for r in rows if r.context["model"] == name] for name in ("before", "tiny", "other", "run")}
    assert [len(found) for found in by_model.values()] == [4] * 4
    for a, b, mean in zip(by_model["tiny"], by_model["other"], by_model["run"], strict=True):
        assert mean.value == (a.value + b.value) / 2 and mean.metric == a.metric and mean.n == 2
        assert mean.low is not None and mean.high is not None
        # Student's t of two values: 12.7062 times half their distance
        assert mean.high - mean.value == pytest.approx(12.7062 * abs(a.value - b.value) / 2, rel=1e-5)
        assert mean.context["checkpoints"] == ["tiny", "other"]
        assert mean.context.get("length") == a.context.get("length")
        assert mean.manifest not in (a.manifest, b.manifest)
    assert list(read_results(tmp_path / "out" / "results.jsonl")) == rows
    assert evaluate(config(None, tmp_path / "out", corpus, models=models)) == rows
    lines = list(table(rows))
    assert lines[0].split() == ["before", "tiny", "other", "run"] and len(lines) == 5
    assert lines[1].startswith("perplexity ") and lines[1].count("±") == 4


def test_labels_are_the_shortest_ends_that_differ(tmp_path: Path):
    def labels(*paths: str, **options: Any) -> list[str | None]:
        return [model.label for model in models_of(EvalConfig(out_dir="x", model=list(paths), **options))]

    assert labels("runs/a/exported", "runs/b/exported") == ["a/exported", "b/exported"]
    assert labels("runs/a", "runs/b") == ["a", "b"]
    assert labels("x", label="mine") == ["mine"]


@pytest.mark.parametrize("device_map", ["auto", {"model.embed_tokens": "cpu", "model.layers": "disk"}])
def test_a_spread_model_has_the_same_numbers(
    device_map: Any, folder: Path, corpus: SourceConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plain = evaluate(config(folder, tmp_path / "plain", corpus))
    if isinstance(device_map, dict):  # layers that stay on disk until they are called, through accelerate's hooks
        device_map = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "disk", "lm_head": "disk"}
        device_map |= {"model.layers.0": "disk", "model.layers.1": "cpu"}
        whole = AutoModelForCausalLM.from_pretrained

        def spread(path: str, **options: Any) -> Any:
            return whole(path, **options | {"device_map": device_map, "offload_folder": str(tmp_path / "offload")})

        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", spread)
    found = evaluate(config(folder, tmp_path / "spread", corpus, device_map="auto"))
    assert [row.value for row in found] == pytest.approx([row.value for row in plain], rel=1e-6)


def test_rope_and_its_dtype_reach_the_model(folder: Path, tmp_path: Path):
    options: dict[str, Any] = {"rope": RopeConfig(theta=5e5), "max_length": 1024}
    wanted = EvalConfig(
        model=str(folder), out_dir="x", rope_dtype=RopeDtype.float32, dtype=EvalDtype.bfloat16, **options
    )
    (model,) = models_of(wanted)
    subject = load(model, read_config(model), read_tokenizer(model), wanted)
    assert subject.model.config.rope_parameters["rope_theta"] == 5e5
    assert subject.model.config.max_position_embeddings == 1024
    assert observed_rope_dtype(subject.model) is RopeDtype.float32
    ids = torch.arange(40)[None] + 300
    with torch.no_grad():
        ours = subject.model(ids).logits  # fills a cache
        made: Any = subject.model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)  # type: ignore[operator]
        assert made[0, 40] == ours[0, -1].argmax() and made.shape == (1, 43)
        wanted.rope_dtype = RopeDtype.bfloat16
        plain = load(model, read_config(model), read_tokenizer(model), wanted).model(ids).logits
    assert ours.dtype is torch.bfloat16 and 0 < (ours - plain).abs().max() < 1.0


def test_bad_input_is_refused_before_anything_is_written(
    folder: Path, other: Path, corpus: SourceConfig, tmp_path: Path
):
    out = tmp_path / "out"

    def refused(message: str, model: Any = folder, **options: Any) -> None:
        with pytest.raises(UserError, match=message):
            evaluate(config(model, out, corpus, **options))
        assert not out.exists()

    refused("257 tokens, but tiny has max_position_embeddings=256: .*extend the model with max_length", **{
        "perplexity": PerplexityConfig(max_length=257)
    })  # fmt: skip
    refused("has no config.json, so it is not a Hugging Face model", tmp_path)
    refused("does not exist", "no/such/model")
    refused("name what to evaluate, once", None)
    refused("name what to evaluate, once", folder, models=[EvaluatedModel(path="x")])
    refused("must be a folder or a list of folders", [{"path": "x"}])
    refused("cannot name 2 models", ["a", "b"], label="mine")
    refused("two models are labelled same", None, models=[EvaluatedModel(path=p, label="same") for p in "ab"])
    refused("two models are labelled tiny", [str(folder), str(folder)])
    refused(r"evals=\[\] asks for nothing: choose from perplexity", evals=[])
    refused("max_length=512 exceeds the 256 positions", max_length=512)
    refused("device=gpu is unknown", device="gpu")
    refused("tokenizer .* has no token <key_00>", strip_facts(folder, tmp_path / "plain"))


def test_rows_that_a_shorter_model_does_not_reach_are_left_out_and_said(
    folder: Path, other: Path, corpus: SourceConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """As of a base beside the model that was trained from it on longer rows."""
    longer = EvaluatedModel(path=str(other), max_length=512, rope=RopeConfig(theta=1e6))
    models = {"models": [EvaluatedModel(path=str(folder)), longer], "evals": [EvalName.retrieval]}
    options: dict[str, Any] = models | {"retrieval": RetrievalConfig(lengths=[64, 256, 512], rows=2)}
    rows = evaluate(config(None, tmp_path / "out", corpus, **options))
    of = {
        label: {row.context["length"] for row in rows if row.context["model"] == label} for label in ("tiny", "other")
    }
    assert of == {"tiny": {64, 256}, "other": {64, 256, 512}}
    assert "retrieval of tiny: rows of 512 tokens are left out, since the model reaches 256" in caplog.text
    assert "other: rows" not in caplog.text
    with pytest.raises(
        UserError, match="asks for 1024 tokens, but tiny has max_position_embeddings=256"
    ):  # nobody does
        evaluate(config(None, tmp_path / "no", corpus, **models, retrieval=RetrievalConfig(lengths=[64, 1024], rows=2)))
    both = [EvalName.retrieval, EvalName.perplexity]  # nothing of tiny is left
    options |= {"retrieval": RetrievalConfig(lengths=[512], rows=2), "perplexity": PerplexityConfig(max_length=400)}
    rows = evaluate(config(None, tmp_path / "longer", corpus, **options | {"evals": both}))
    assert {row.context["model"] for row in rows} == {"other"} and "perplexity of tiny: rows of 400" in caplog.text
    assert {row.metric for row in rows} >= {"perplexity", "retrieval_accuracy"}


def strip_facts(folder: Path, out: Path) -> Path:
    """A copy whose tokenizer does not know the planted facts."""
    shutil.copytree(folder, out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (out / name).write_text((out / name).read_text().replace("<key_", "<other_"))
    return out


def test_configurations_resolve(folder: Path):
    from anchorctx.config import resolve

    models = "models=[{path: a, label: before, rope: {theta: 1e6}, max_length: 512}, {path: b, average: run}]"
    found = resolve("eval", ["out_dir=x", models, "evals=[ruler,lm_eval]", "lm_eval.tasks=[mmlu]"])
    assert [dataclasses.asdict(m)["label"] for m in found.models] == ["before", None]
    assert found.models[0].rope.theta == 1e6 and found.evals == [EvalName.ruler, EvalName.lm_eval]
    assert resolve("eval", ["out_dir=x", "model=[a,b]"]).model == ["a", "b"]
    with pytest.raises(UserError, match="labl"):
        resolve("eval", ["out_dir=x", "models=[{path: a, labl: b}]"])

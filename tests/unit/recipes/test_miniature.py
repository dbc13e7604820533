"""The miniature's statistics, stages, keys and claims, and the comparison of a run with a recipe's figures."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import yaml

from anchorctx.data.sources.facts import FactTokens
from anchorctx.errors import UserError
from anchorctx.layout import PackedLayout
from anchorctx.records.results import Result, append_results

ROOT = Path(__file__).parents[3]
MINIATURE = ROOT / "recipes" / "miniature"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch):
    """Imports a script of the recipe, or of scripts/, as it is imported when it is run."""
    monkeypatch.syspath_prepend(str(MINIATURE.parent))
    monkeypatch.syspath_prepend(str(MINIATURE))
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


@pytest.mark.parametrize(
    ("values", "margin", "answer"),
    [
        ((0.10, 0.11, 0.12), 0.03, "supported"),
        ((0.011, 0.010, 0.012), 0.03, "not supported"),  # there, but smaller than claimed
        ((-0.10, -0.11, -0.12), 0.03, "not supported"),
        ((0.0, 0.1, 0.2), 0.03, "undecided"),
        ((0.1, 0.1, 0.1), 0.1, "supported"),
        ((0.10, 0.11), 0.03, "undecided"),  # whatever the mean
        ((), 0.03, "undecided"),
    ],
)
def test_answers(module, values: tuple[float, ...], margin: float, answer: str) -> None:
    assert module("verdicts").Estimate(values).answer(margin) == answer


@pytest.mark.parametrize(
    ("low", "high", "answer"),
    [(0.21, 0.5, "supported"), (0.1, 0.19, "not supported"), (0.1, 0.5, "undecided"), (None, None, "undecided")],
)
def test_time_saved_is_judged_by_its_interval(module, tmp_path: Path, low: float, high: float, answer: str) -> None:
    recipe = yaml.safe_load((MINIATURE / "recipe_ci.yaml").read_text())
    summary = module("summary").Summary(recipe, tmp_path)
    summary.judge_saving(
        Result(metric="time_saved", value=0.3, unit="1", n=5, low=low, high=high, context={"length": 8192})
    )
    assert summary.results[0].context["answer"] == answer and summary.results[0].context["claim"] == "S1 at 8,192"


def test_the_interval_is_students(module) -> None:
    found = module("verdicts").Estimate((1.0, 2.0, 4.0))
    low, high = found.interval  # mean 7/3, standard error sqrt(7/3 / 3), t = 4.3027
    assert found.mean == pytest.approx(7 / 3)
    assert (low, high) == pytest.approx((7 / 3 - 4.3027 * (7 / 9) ** 0.5, 7 / 3 + 4.3027 * (7 / 9) ** 0.5), abs=1e-4)


def rows_of(module, values: dict[int, dict[str, float]]):
    """`Rows` with a retrieval accuracy at 4,096 for each seed and model."""
    return module("verdicts").Rows(
        {
            seed: [
                Result(metric="retrieval_accuracy", value=v, unit="1", n=1, context={"model": m, "length": 4096})
                for m, v in models.items()
            ]
            for seed, models in values.items()
        }
    )


def test_claims_are_paired_within_seeds(module) -> None:
    """Seeds differ by far more than the patterns do; the pairs tell the effect all the same."""
    by_seed = {s: {"anchor": 0.2 * s + 0.1, "full": 0.2 * s} for s in range(3)}
    claim = next(c for c in module("claims").CLAIMS if c.name == "T1")
    found = claim.estimate(rows_of(module, by_seed))
    assert found.values == pytest.approx((0.1, 0.1, 0.1)) and found.answer(claim.margin) == "supported"


def test_seeds_without_a_measurement_are_left_out(module) -> None:
    claim = next(c for c in module("claims").CLAIMS if c.name == "T1")
    found = claim.estimate(rows_of(module, {0: {"anchor": 0.5, "full": 0.4}, 1: {"anchor": 0.5}, 2: {}}))
    assert found.values == pytest.approx((0.1,)) and found.answer(claim.margin) == "undecided"


def test_a_row_measured_twice_is_not_chosen_from(module) -> None:
    """Nor is its seed left out in silence."""
    verdicts = module("verdicts")
    rows = verdicts.Rows({0: [Result(metric="m", value=v, unit="1", n=1) for v in (1.0, 2.0)]})
    with pytest.raises(UserError, match="seed 0 has 2 rows of m"):
        verdicts.estimate([0], lambda seed: rows.value(seed, "m"))


def test_a_key_that_must_not_be_there_tells_rows_apart(module) -> None:
    contexts: list[dict] = [{"length": 1}, {"length": 1, "first": "dropped"}]
    rows = module("verdicts").Rows(
        {0: [Result(metric="m", value=float(len(c)), unit="1", n=1, context=c) for c in contexts]}
    )
    assert rows.value(0, "m", length=1, first=None) == 1.0


@pytest.mark.parametrize(
    ("page", "kinds", "number"),
    [("HYPOTHESES.md", "TK", 18), ("HYPOTHESES_2.md", "C", 11), ("HYPOTHESES_3.md", "BWR", 11)],
)
def test_every_claim_written_down_beforehand_has_its_margin(module, page: str, kinds: str, number: int) -> None:
    """The pages' tables and the code agree on names and numeric margins."""
    claims = {claim.name: claim for claim in module("claims").CLAIMS}
    text = (MINIATURE / page).read_text().splitlines()
    lines = [line.split("|") for line in text if line.startswith("| ") and line[2] in kinds and line[3].isdigit()]
    assert len(lines) == number
    for cells in lines:
        wanted = cells[-2].strip().removeprefix("log ")
        value = np.log(float(wanted)) if "log" in cells[-2] else float(wanted)
        assert claims[cells[1].strip()].margin == pytest.approx(value)


def test_claims_that_repeat_others_have_their_margins(module) -> None:
    """L1 to L4, D1 and D2 are T1 to T4 in other settings; P1 to P4 are there."""
    claims = {claim.name: claim for claim in module("claims").CLAIMS}
    for name, like in {"L1": "T1", "L2": "T2", "L3": "T3", "L4": "T4", "D1": "T1", "D2": "T2"}.items():
        assert claims[name].margin == claims[like].margin
    assert {f"P{i}" for i in range(1, 5)} <= set(claims) and len(claims) == 50


def test_keys_become_unique_in_a_row_and_facts_stay_true(module) -> None:
    tokens = FactTokens(np.arange(100, 164), np.arange(200, 264))
    ids = np.array([1, 100, 200, 7, 101, 201, 100, 200, 8, 100, 202, 9, 101, 203, 100, 202])
    layout = PackedLayout((0, 1, 8, 16), 1)
    out = module("unique_keys").relabelled(ids, layout, tokens, np.random.default_rng(0))
    keys = np.isin(ids, tokens.keys)
    assert (out[~keys] == ids[~keys]).all() and np.isin(out[keys], tokens.keys).all()
    assert out[1] == out[6] and out[9] == out[14]  # the same fact within a document
    assert len({out[1], out[4], out[9], out[12]}) == 4  # and no key in two


def test_too_many_facts_for_a_row_are_refused(module) -> None:
    tokens = FactTokens(np.arange(100, 164), np.arange(200, 264))
    ids = np.concatenate([[1], np.arange(100, 164), [100]])
    with pytest.raises(UserError, match="more than 64"):
        module("unique_keys").relabelled(ids, PackedLayout((0, 1, 65, 66), 1), tokens, np.random.default_rng(0))


@pytest.mark.parametrize("name", ["recipe.yaml", "recipe_ci.yaml"])
def test_stages_are_whole_and_in_order(module, name: str) -> None:
    recipe = yaml.safe_load((MINIATURE / name).read_text())
    found = module("plan").stages(recipe, Path("out"))
    names = [stage.name for stage in found]
    assert len(set(names)) == len(names)
    for index, stage in enumerate(found):
        assert set(stage.needs) <= set(names[:index]) and stage.budget > 0
    trained = [n for n in names if n.startswith("train/")]
    assert len(trained) == sum(len(arm.get("seeds", recipe["seeds"])) for arm in recipe["arms"].values())


def test_continuations_of_a_seed_differ_in_what_the_recipe_says_alone(module) -> None:
    recipe = yaml.safe_load((MINIATURE / "recipe.yaml").read_text())
    by_name = {s.name: s.commands[0] for s in module("plan").stages(recipe, Path("out")) if s.name[:5] == "train"}
    one, other = by_name["train/1/full"], by_name["train/1/anchor"]
    differ = {a.split("=")[0] for a, b in zip(one, other, strict=True) if a != b}
    assert differ == {"out_dir", "pattern"}


def test_what_a_stage_rests_on_is_in_its_fingerprint_and_where_it_runs_is_not(module) -> None:
    recipe = yaml.safe_load((MINIATURE / "recipe_ci.yaml").read_text())
    plan = module("plan")

    def of(recipe: dict, out: str) -> dict[str, str]:
        return module("chain.stage").fingerprints(plan.stages(recipe, Path(out)), Path(out))

    before = of(recipe, "out")
    assert of(recipe, "/elsewhere/out") == before
    after = of(recipe | {"arms": recipe["arms"] | {"anchor": {"pattern": "anchor", "lr": 5e-4}}}, "out")
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"train/0/anchor", "eval/0/anchor", "kvcomm/0/anchor", "precision/0/anchor"}
    after = of(recipe | {"bases": {"base": {"cooldown": 90}}}, "out")
    assert all(before[name] != after[name] for name in before)


def test_a_training_of_other_settings_is_not_gone_on_with(module) -> None:
    recipe = yaml.safe_load((MINIATURE / "recipe_ci.yaml").read_text())
    (stage,) = (s for s in module("plan").stages(recipe, Path("out")) if s.name == "train/0/anchor")
    assert stage.clears == ["out/seed_0/runs/anchor", "out/seed_0/anchor"]
    assert "out_dir=out/seed_0/runs/anchor" in stage.commands[0] and stage.script().startswith("rm -rf out/seed_0/runs")


def test_an_arm_says_what_it_has_of_its_own(module) -> None:
    recipe = yaml.safe_load((MINIATURE / "recipe.yaml").read_text())
    by_name = {s.name: s for s in module("plan").stages(recipe, Path("out"))}
    long, large = by_name["train/0/anchor_16k"], by_name["train/0/large_anchor"]
    assert {"model.max_length=16384", "tokens_per_step=16384", "steps=30"} <= set(long.commands[0])
    assert "corpus/ordinary_16384" in long.needs and "base/0/large_base" in large.needs
    assert by_name["base/0/large_base"].commands[0][-4:] == ["--layers", "4", "--width", "128"]
    evaluated = by_name["eval/0/intra_doc_16k_bf16"].commands[0]
    assert {"rope_dtype=bfloat16_emulated", "retrieval.lengths=[512,16384]", "retrieval.rows=16"} <= set(evaluated)
    assert "label='full behind 1,024'" in by_name["kvcomm_prefix/1/full"].commands[0]


def test_done_stages_are_not_repeated_and_failures_say_why(module, tmp_path: Path, capsys) -> None:
    stage, run = module("chain.stage"), module("chain.runner")
    write = [sys.executable, "-c", f"open(r'{tmp_path / 'made'}', 'a').write('x')"]
    stages = [stage.Stage("a/one", [write], 1), stage.Stage("b", [write], 1, ["a/one"])]
    run.Runner(stages, tmp_path, 2).run()
    run.Runner(stages, tmp_path, 2).run()
    assert (tmp_path / "made").read_text() == "xx" and "2 of 2 stages are done already" in capsys.readouterr().out
    changed = [stage.Stage("a/one", [[*write, "more"]], 1), stages[1]]
    run.Runner(changed, tmp_path, 1).run()
    assert (tmp_path / "made").read_text() == "xxxx"  # and what rests on it, whose own command is the same
    broken = [stage.Stage("c", [[sys.executable, "-c", "raise SystemExit('no such luck')"]], 1)]
    with pytest.raises(SystemExit, match="c failed.*\n.*\nno such luck"):
        run.Runner(broken, tmp_path, 1).run()


def test_a_stage_that_was_cut_off_goes_on_and_another_begins_anew(module, tmp_path: Path) -> None:
    stage, run, filled = module("chain.stage"), module("chain.runner"), tmp_path / "filled"

    def runs(code: str, *more: str) -> None:
        """Appends x to filled/made, and then does what `code` says."""
        write = (
            f"import os; os.makedirs(r'{filled}', exist_ok=True); open(r'{filled / 'made'}', 'a').write('x'); {code}"
        )
        one = stage.Stage("a/one", [[sys.executable, "-c", write, *more]], 1, clears=[str(filled)])
        run.Runner([one], tmp_path, 1).run()

    fails_once = "raise SystemExit(os.path.getsize('{}') < 2)".format(filled / "made")
    with pytest.raises(SystemExit):
        runs(fails_once)
    runs(fails_once)
    assert (filled / "made").read_text() == "xx" and not list((tmp_path / "begun").iterdir())
    with pytest.raises(SystemExit):
        runs("raise SystemExit(1)")
    assert (filled / "made").read_text() == "x"
    runs("", "with", "other", "words")
    assert (filled / "made").read_text() == "x"
    (tmp_path / "done" / "a.one.json").unlink()
    runs("", "with", "other", "words")
    assert (filled / "made").read_text() == "x"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["none.yaml", "out"], "none.yaml is no file"),
        ([str(MINIATURE / "recipe_ci.yaml"), "out", "--only", "trian"], "--only trian begins no stage's name"),
        ([str(MINIATURE / "recipe_ci.yaml"), "out", "--jobs", "0"], "--jobs 0 must be at least 1"),
    ],
)
def test_mistakes_at_the_runner_are_said(module, capsys, arguments: list[str], sentence: str) -> None:
    with pytest.raises(SystemExit) as ended:
        module("run").main(arguments)
    assert ended.value.code == 2 and sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"seeds": []}, r"seeds=\[\] must be a list"),
        ({"seeds": 2}, "seeds=2 must be a list"),
        ({"arms": {"full": {"pattern": "ful"}}}, "arm full has pattern=ful: choose full"),
        ({"arms": {"full": {"pattern": "full", "step": 5}}}, "arm full has step, which no arm has"),
        ({"arms": {"full": {"pattern": "full", "base": "huge"}}}, "arm full has base=huge: choose base"),
        ({"arms": {"full": {"pattern": "full", "corpus": "tag"}}}, "arm full has corpus=tag: choose ordinary"),
        ({"studies": {"s": {"command": "plan"}}}, "study s has command=plan: choose kvcomm"),
        (
            {"studies": {"s": {"command": "eval", "models": {"ful": [0]}}}},
            "study s has ful of seed 0, which nothing makes",
        ),
        ({"ruler": {"models": {"full": [7]}}}, "study ruler has full of seed 7"),
        ({"needles": None}, None),
    ],
)
def test_mistakes_in_a_recipe_are_said_before_anything_runs(module, tmp_path: Path, change: dict, sentence: str | None):
    recipe = yaml.safe_load((MINIATURE / "recipe_ci.yaml").read_text()) | change
    (path := tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    if sentence is None:
        assert module("recipe").read_recipe(path) == recipe
        return
    with pytest.raises(UserError, match=sentence):
        module("recipe").read_recipe(path)


@pytest.mark.parametrize(
    ("text", "sentence"), [("", "has no seeds"), ("a: [", "is no YAML"), ("seeds: [0]", "no bases")]
)
def test_what_is_no_recipe_is_refused(module, tmp_path: Path, text: str, sentence: str) -> None:
    (path := tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(UserError, match=sentence):
        module("recipe").read_recipe(path)


def check(tmp_path: Path, *figures: dict) -> subprocess.CompletedProcess[str]:
    """Run check_recipe.py over two rows."""
    expected, results = tmp_path / "expected.json", tmp_path / "results.jsonl"
    expected.write_text(json.dumps({"figures": list(figures)}))
    results.unlink(missing_ok=True)
    context = {"model": "after"}
    rows = [
        Result(metric="perplexity", value=71.0, unit="1", n=1, context=context),
        Result(metric="retrieval_accuracy", value=0.9, unit="1", n=1, context=context | {"length": 512}),
    ]
    append_results(results, rows)
    command = [sys.executable, str(ROOT / "scripts" / "check_recipe.py"), str(expected), str(tmp_path)]
    return subprocess.run(command, capture_output=True, text=True)


def test_figures_of_a_run_are_compared(tmp_path: Path) -> None:
    perplexity = {"metric": "perplexity", "model": "after", "length": None}
    retrieval = {"metric": "retrieval_accuracy", "model": "after", "length": 512}
    done = check(tmp_path, perplexity | {"value": 70, "tolerance": 2}, retrieval | {"at_least": 0.8})
    assert done.returncode == 0 and "2 of 2 figures are as expected" in done.stdout
    done = check(tmp_path, perplexity | {"value": 70, "tolerance": 0.5}, retrieval | {"at_most": 0.8})
    assert done.returncode == 1 and done.stdout.count("OUTSIDE") == 2
    done = check(tmp_path, retrieval | {"length": 1024, "at_least": 0.0})
    assert done.returncode == 1 and "0 rows" in done.stdout
    for mistake in ({}, {"value": 1}, {"tolerance": 1}):
        done = check(tmp_path, perplexity | mistake)
        assert done.returncode == 2 and "has no bounds" in done.stderr
    for mistake in ({"value": None, "tolerance": 1}, {"value": 71, "tolerance": float("inf")}, {"at_most": "71"}):
        done = check(tmp_path, perplexity | mistake)
        assert done.returncode == 2 and "which is no number" in done.stderr
    done = check(tmp_path, {"model": "after", "at_least": 0})
    assert done.returncode == 2 and "names no metric" in done.stderr
    done = check(tmp_path)
    assert done.returncode == 2 and "no figures" in done.stderr

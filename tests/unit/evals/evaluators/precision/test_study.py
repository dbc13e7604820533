from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from anchorctx.attention.config import RopeDtype
from anchorctx.attention.rope import rotary_modules
from anchorctx.errors import UserError
from anchorctx.evals.evaluators.precision import models
from anchorctx.evals.evaluators.precision import study as study_module
from anchorctx.evals.evaluators.precision.budget import Size, Speed, choose, measure, sizes
from anchorctx.evals.evaluators.precision.config import Arithmetic, PrecisionConfig
from anchorctx.evals.evaluators.precision.measure import Texts
from anchorctx.evals.evaluators.precision.models import random_score_changes
from anchorctx.evals.evaluators.precision.probe import Change
from anchorctx.evals.evaluators.precision.rows import interval_half, key_bins, layer_rows, mean_result
from anchorctx.evals.evaluators.precision.units import Timings
from anchorctx.evals.evaluators.precision.verdict import Question, find, table, verdict
from anchorctx.evals.shortcuts import evaluate_precision as study
from anchorctx.flops import ModelFlops
from anchorctx.records.results import Result, read_results
from anchorctx.testing.numerics import observed_rope_dtype

Make = Callable[..., PrecisionConfig]


# -- random queries and keys: what was tried before any of this was built ---------------------------------------------


def test_random_scores_reproduce_the_trial():
    """Float32 2e-6 to 7e-4, bfloat16 3.8e-3 to 4.7e-3, float32 rotation between (D = 128, theta 5e5).

    What is known of the trial is D, theta and the shifts, 16 to 130,000. Averaged over 4,096 queries, bfloat16 gives
    3.6e-3 at a shift of 16 and 3.9e-3 to 4.2e-3 beyond: the trial's range is within the spread of single queries.
    """
    shifts = (16, 4096, 130_000)
    change = {a: torch.stack(random_score_changes(a, shifts)) for a in Arithmetic}  # (shifts, queries)
    mean = {a: x.mean(1).tolist() for a, x in change.items()}
    single = change[Arithmetic.bfloat16].quantile(0.9, dim=1)
    float32, ours, bfloat16 = (mean[a] for a in (Arithmetic.float32, Arithmetic.float32_rotation, Arithmetic.bfloat16))
    assert 2e-6 < float32[0] < 3e-6 and 5e-4 < float32[-1] < 7e-4
    assert float32[0] < float32[1] < float32[2]
    assert all(3.5e-3 < x < 4.7e-3 for x in bfloat16) and all(3.8e-3 < x < 4.7e-3 for x in bfloat16[1:])
    assert 3.8e-3 < single[0] and single[-1] < 4.8e-3
    assert all(a < b < c for a, b, c in zip(float32, ours, bfloat16, strict=True))
    assert all(0.55 < b / c < 0.70 for b, c in zip(ours, bfloat16, strict=True))


# -- the study itself ------------------------------------------------------------------------------------------------


def numbers(rows: list[Result]) -> list[tuple[Any, ...]]:
    return [(row.metric, row.value, row.low, row.high, json.dumps(row.context, sort_keys=True)) for row in rows]


def test_a_study_is_whole_deterministic_and_resumable(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = make_config()
    rows = study(config)
    out = Path(config.out_dir)
    assert list(read_results(out / "results.jsonl")) == rows
    assert len({row.manifest for row in rows}) == 1 and rows[0].manifest
    at = {"rows": "shift", "layer": "all", "first": "kept", "shift": 16, "length": 96}
    change = {
        (w, a): find(rows, "precision_attention_change", weights=w, arithmetic=a, **at).value  # type: ignore[union-attr]
        for w in ("trained", "control")
        for a in ("float32", "float32_rotation", "bfloat16")
    }
    for weights in ("trained", "control"):
        parts = [change[weights, a] for a in ("float32", "float32_rotation", "bfloat16")]
        assert 0 < parts[0] < parts[1] / 100 and parts[1] < parts[2]
    for layer in (0, 1, "all"):
        for first in ("kept", "hidden"):
            row = find(rows, "precision_attention_change", weights="trained", arithmetic="bfloat16", shift=2000,
                       length=96, layer=layer, first=first)  # fmt: skip
            assert row is not None and row.n == 3 and row.low is not None and row.low < row.value < row.high
    assert find(rows, "precision_attention_change", first="dropped", weights="control", arithmetic="float32")
    assert find(rows, "precision_attention_change", rows="intra_doc", layer=1, arithmetic="float32_rotation")
    names = {
        "first_share",
        "other_share",
        "first_rank",
        "first_score_change",
        "key_change",
        "logprob_change",
        "loss_change",
        "offset_change",
        "verdict",
    }
    assert {f"precision_{name}" for name in names} <= {row.metric for row in rows}
    assert "moves" in table(rows) and "Use rope_dtype=float32" in table(rows)

    # Typed again nothing is measured; cut off in the middle of a unit, what is missing is.
    file, loads = out / "results.jsonl", []
    whole, load = file.read_bytes(), models.load
    monkeypatch.setattr(models, "load", lambda *args: loads.append(args[1:3]) or load(*args))
    assert study(config) == rows and file.read_bytes() == whole and not loads
    lines = whole.splitlines(keepends=True)
    keep = next(i for i, row in enumerate(rows) if row.context.get("weights") == "control")
    file.write_bytes(b"".join(lines[:keep]))
    assert study(config) == rows and file.read_bytes() == whole
    assert loads == [(models.Weights.control, arithmetic) for arithmetic in Arithmetic]
    # Elsewhere, from the beginning: the same numbers.
    again = study(make_config(out_dir=str(tmp_path / "again")))
    assert numbers(again) == numbers(rows)
    # Another study must not be mixed in.
    with pytest.raises(UserError, match="holds another precision study of tiny"):
        study(make_config(queries=9))
    shutil.rmtree(out)


def test_parts_can_be_left_out(make_config: Make):
    rows = study(
        make_config(
            control=False, packed=False, end_to_end=False, arithmetics=[Arithmetic.bfloat16], lengths=[32], texts=1
        )
    )
    assert {row.context.get("weights") for row in rows if "weights" in row.context} == {"trained", "random"}
    metrics = {row.metric for row in rows}
    assert not metrics & {"precision_logprob_change", "precision_offset_change", "precision_cost"}
    (closing,) = (row for row in rows if row.metric == "precision_verdict")
    assert closing.context["recommendation"] == "" and "float32 rotation" not in closing.context["sentence"]


def test_emulation_changes_nothing_that_shows(make_config: Make, tmp_path: Path):
    """At this size few sums are near a tie: means over queries agree far within their intervals."""
    options = {"lengths": [64], "control": False, "packed": False, "end_to_end": False}
    real, emulated = (
        study(make_config(emulate=study_module_emulate, out_dir=str(tmp_path / study_module_emulate), **options))
        for study_module_emulate in ("never", "always")
    )
    for a, b in zip(real, emulated, strict=True):
        assert a.metric == b.metric and b.value == pytest.approx(a.value, rel=0.02, abs=1e-9)


def test_the_control_has_the_same_weights_in_every_arithmetic(folder: Path):
    subject = models.open_checkpoint(str(folder), {}, "cpu")
    control = {a: models.load(subject, models.Weights.control, a, seed=3) for a in Arithmetic}
    trained = models.load(subject, models.Weights.trained, Arithmetic.float32, seed=3)
    exact = control[Arithmetic.float32].state_dict()
    for name, weight in control[Arithmetic.bfloat16].state_dict().items():
        assert weight.dtype is torch.bfloat16 and torch.equal(weight, exact[name].bfloat16())
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(exact[name], trained.state_dict()[name])
    assert exact[name].std() == pytest.approx(0.3, rel=0.1)  # the configuration's own initializer_range
    assert [observed_rope_dtype(control[a]) for a in Arithmetic] == [
        RopeDtype.bfloat16,
        RopeDtype.float32,
        RopeDtype.float32,
    ]
    assert all(m.inv_freq.dtype is torch.float32 for a in Arithmetic for m in rotary_modules(control[a]))


def test_default_lengths_and_layers_follow_the_model(make_config: Make, folder: Path):
    subject = models.open_checkpoint(str(folder), {}, "cpu")
    config = make_config(lengths=[], shift=5)
    setting = study_module.check(config, subject, next(sizes(config, subject.reach)))
    assert setting.lengths == (16, 32, 64, 128) and setting.layers == {0, 1} and setting.shifts == (5, 16, 2000)
    subject.config.num_hidden_layers = 32
    setting = study_module.check(make_config(), subject, Size((32, 96), 3))
    assert sorted(setting.layers) == [0, 4, 8, 12, 16, 20, 24, 28]


# -- how much is measured ----------------------------------------------------------------------------------------------


def test_sizes_halve_the_longest_row_and_spare_a_text(make_config: Make):
    config = make_config(lengths=[], texts=None)
    assert [(size.lengths[-1], size.texts) for size in sizes(config, 2500)] == [
        (2500, 4), (2500, 3), (1250, 4), (1250, 3), (625, 4), (625, 3),
    ]  # fmt: skip
    assert [size.lengths for size in sizes(config, 10**6)][0] == (4096, 8192, 16384, 32768)
    assert [size.texts for size in sizes(make_config(lengths=[], texts=2), 2500)] == [2, 2, 2]
    assert list(sizes(make_config(lengths=[64, 32], texts=2), 700)) == [Size((32, 64), 2)]
    assert list(sizes(make_config(lengths=[64], texts=None), 700)) == [Size((64,), 4), Size((64,), 3)]


def test_the_time_of_a_study_is_that_of_its_texts(make_config: Make):
    """1 ms a token in bfloat16 and 2 in float32, attention left out: counted by hand."""
    speed = Speed(ModelFlops(per_token=10.0, per_pair=0.0, windows=(None,)), bfloat16=1e-4, float32=2e-4)
    config = make_config(arithmetics=[Arithmetic.bfloat16, Arithmetic.float32], control=False)
    # 300 tokens, a third of 200 again without the first token, 200 again packed; 3 ms a token in both arithmetics.
    once = (300 + 200 / 3 + 200) * 3e-3
    assert speed.study(config, Size((100, 200), 3)) == pytest.approx(3 * once)
    # The control doubles the models, and its third arithmetic adds 1 ms a token; a fifth of the time goes to the cost.
    config = make_config(control=True, cost=True)
    assert speed.study(config, Size((100, 200), 3)) == pytest.approx(3 * once * 2 * 4 / 3 / 0.8)
    config = make_config(lengths=[], texts=None, budget_minutes=1)
    fits, possible = choose(config, 8192, speed), list(sizes(config, 8192))
    assert speed.study(config, fits) <= 60 and fits != possible[0]
    assert all(speed.study(config, size) > 60 for size in possible[: possible.index(fits)])
    assert choose(make_config(lengths=[], texts=None, budget_minutes=1e-6), 8192, speed) == possible[-1]


def test_a_study_fits_its_budget_and_keeps_to_its_choice(
    make_config: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Reach 128: four lengths to 128 and 4 texts, or 3 where time is short."""
    options = {"lengths": [], "texts": None, "control": False, "packed": False, "end_to_end": False}
    config = make_config(**options, arithmetics=[Arithmetic.bfloat16], budget_minutes=1e-3)
    monkeypatch.setattr(study_module, "measure", lambda *_: Speed(ModelFlops(10.0, 0.0, (None,)), 1e-5, 1e-5))
    with caplog.at_level(logging.INFO):
        rows = study(config)
    texts = {row.n for row in rows if row.metric == "precision_attention_change"}
    lengths = {row.context["length"] for row in rows if row.context.get("weights") == "trained"}
    assert texts == {3} and lengths == {16, 32, 64, 128}
    said = "precision of tiny: rows of 16, 32, 64, 128 tokens, 3 texts take about 1 s of precision.budget_minutes=0.001"
    assert said in caplog.text
    # The machine may be quicker now, but half a study must not become another one.
    file = Path(config.out_dir) / "results.jsonl"
    keep = next(i for i, row in enumerate(rows) if row.context.get("length") == 64)
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:keep]))
    monkeypatch.setattr(study_module, "measure", lambda *_: pytest.fail("measured again"))
    assert numbers(study(config)) == numbers(rows)


def test_the_models_own_time_is_measured(make_config: Make, folder: Path):
    subject, config = models.open_checkpoint(str(folder), {}, "cpu"), make_config(lengths=[], texts=None)
    texts = Texts(["def f(x):\n    return x\n" * 200], subject.tokenizer)
    setting = study_module.check(config, subject, next(sizes(config, subject.reach)))
    start = time.perf_counter()
    speed = measure(subject, config, setting, texts, seed=0)
    taken = time.perf_counter() - start
    for arithmetic in Arithmetic:
        assert 0 < speed.text(arithmetic, 32) < speed.text(arithmetic, 128) < taken


# -- rows ------------------------------------------------------------------------------------------------------------


def test_intervals_are_students():
    row = mean_result("m", [1.0, 2.0, 3.0], "1", {"a": 1})
    assert row.value == 2.0 and row.high == pytest.approx(2 + 4.303 / math.sqrt(3), rel=1e-4) and row.context["a"] == 1
    assert mean_result("m", [1.0], "1", {}).low is None and interval_half([1.0]) is None
    assert interval_half([1.0, 2.0, 3.0]) == pytest.approx(4.303 / math.sqrt(3), rel=1e-4)


@pytest.mark.parametrize("length", [1, 8, 9, 100, 4096])
def test_key_bins_cover_every_key_once(length: int):
    bins = list(key_bins(length))
    assert [k for start, stop in bins for k in range(start, stop)] == list(range(length))


def test_rows_of_text_are_the_corpus(folder: Path):
    tokenizer = models.open_checkpoint(str(folder), {}, "cpu").tokenizer
    documents = ["abc" * 5, "x = 1\n" * 20, "", "last"]
    texts = Texts(documents, tokenizer)
    one, two = texts.rows(40, 2)
    ids = [i for document in documents for i in tokenizer(document)["input_ids"]]
    assert one.ids.tolist() == [tokenizer.bos_token_id, *ids[:39]]
    assert two.ids.tolist() == [tokenizer.bos_token_id, *ids[-39:]]
    end = len(tokenizer(documents[0])["input_ids"]) + 1
    assert one.layout.doc_offsets == (0, 1, end, 40)
    last = len(tokenizer("last")["input_ids"])
    assert two.layout.doc_offsets == (0, 1, 40 - last, 40)
    assert one.without_first().ids.tolist() == ids[:39]
    with pytest.raises(UserError, match=r"2 different rows of 400 need 798"):
        texts.rows(400, 2)


def test_packed_rows_hold_several_documents(folder: Path):
    tokenizer = models.open_checkpoint(str(folder), {}, "cpu").tokenizer
    documents = [f"value = {i}\n" * (1 + 9 * (i % 2)) for i in range(60)]
    rows = Texts(documents, tokenizer).packed_rows(96, 3)
    assert len(rows) == 3
    ids = [tokenizer(document)["input_ids"][:11] for document in documents]
    taken = 0
    for row in rows:
        assert row.layout.length == len(row.ids) == 96 and row.layout.num_documents >= 8
        for start, stop in zip(row.layout.doc_offsets[1:], row.layout.doc_offsets[2:], strict=False):
            assert row.ids[start:stop].tolist() == ids[taken][: stop - start]
            taken += 1
    assert len(Texts(documents, tokenizer).packed_rows(96, 500)) < 60  # as many as there are
    with pytest.raises(UserError, match="too few documents to pack a row of 96"):
        Texts(["short"], tokenizer).packed_rows(96, 1)


def test_cost_is_the_ratio_of_paired_steps():
    timings = Timings([1.0, 2.0, 4.0], [1.1, 2.2, 4.4])
    assert timings.ratio() == pytest.approx((1.1, 1.1, 1.1))
    seconds, other, ratio = timings.rows({"length": 4, "device": "the CPU"})
    assert (seconds.value, other.value) == (2.0, 2.2) and ratio.metric == "precision_cost"


def test_the_cost_is_measured_on_whole_steps(make_config: Make):
    rows = study(make_config(cost=True, control=False, packed=False, end_to_end=False, lengths=[64], texts=2))
    ratio = find(rows, "precision_cost")
    assert ratio is not None and ratio.n == 8 and 0 < ratio.low < ratio.value < ratio.high < 10  # type: ignore[operator]
    assert all(find(rows, "precision_step_seconds", rope_dtype=name) for name in ("bfloat16", "float32"))


# -- the verdict -----------------------------------------------------------------------------------------------------


def synthetic(
    bfloat16: list[float], ours: list[float], hidden: float, cost: tuple[float, float, float]
) -> list[Result]:
    at = {"weights": "trained", "rows": "shift", "layer": "all", "shift": 16}

    def row(values: list[float], arithmetic: str, length: int = 4096, metric: str = "attention_change", **more: Any):
        context = at | {"arithmetic": arithmetic, "length": length} | more
        return mean_result(f"precision_{metric}", values, "1", context)

    mean = sum(bfloat16) / len(bfloat16)
    value, low, high = cost
    return [
        row(bfloat16, "bfloat16", first="kept"),
        row([x / 2 for x in bfloat16], "bfloat16", 512, first="kept"),
        row(ours, "float32_rotation", first="kept"),
        row([1e-6, 2e-6], "float32", first="kept"),
        row([hidden * mean, hidden * mean], "bfloat16", first="hidden"),
        row([0.129, 0.131], "bfloat16", metric="first_share"),
        row([0.258, 0.262], "bfloat16", metric="first_attention"),
        row([0.0109, 0.0111], "bfloat16", metric="other_share"),
        row([1.0, 1.0], "bfloat16", metric="first_rank"),
        row([0.9, 0.9], "bfloat16", metric="first_share", first="dropped"),
        Result(metric="precision_cost", value=value, unit="1", n=8, low=low, high=high,
               context={"length": 4096, "device": "the CPU"}),
    ]  # fmt: skip


def close(rows: list[Result]) -> Result:
    found = verdict(rows, Question("mine", 16, (512, 4096)))
    assert found is not None
    return found


def test_the_verdict_says_what_was_measured():
    closing = close(synthetic([0.010, 0.0101], [0.005, 0.0051], hidden=0.3, cost=(1.08, 1.05, 1.11)))
    assert closing.value == pytest.approx(0.4975, abs=1e-3)
    assert closing.context["sentence"] == (
        "mine: at 4,096 tokens, shifting all positions by 16 tokens moves 1.0 % of each query's attention in bfloat16, "
        "0.51 % with float32 rotation and 0.00015 % in float32; from 512 to 4,096 tokens the bfloat16 change grows "
        "(×2.00); the first token has 13 % (95 %: 12 % to 14 %) of the change, where no token can have more than 50 %, "
        "place 1 of 4,096 by size in 2 texts (the largest other token has 1.1 % (95 %: 0.97 % to 1.2 %)): 532 times an "
        "even share, and 0.50 times (95 %: 0.50 to 0.50) its part of the attention, 26 % (95 %: 23 % to 29 %); with it "
        "hidden 0.30 % moves, 0.30 times (95 %: 0.28 to 0.32) as much."
    )
    assert closing.context["recommendation"].startswith("Use rope_dtype=float32: it removes 50 %")
    assert closing.context["recommendation"].endswith(
        "With it a bfloat16 training step of 4,096 tokens on the CPU takes longer (+8.0 %, 95 %: +5.0 to +11.0 %)."
    )


def test_the_verdict_ranks_the_first_token_and_judges_nothing():
    """Nobody's sentence turns over at a threshold: the same words with other numbers."""
    for hidden in (0.1, 0.49, 0.51, 0.95, 1.5):
        sentence = close(synthetic([0.01, 0.01], [0.005, 0.0051], hidden, (1.0, 0.9, 1.1))).context["sentence"]
        assert f"moves, {hidden:.2f} times (95 %: {hidden:.2f} to {hidden:.2f}) as much" in sentence
        assert "carr" not in sentence
    rows = synthetic([0.01, 0.0101], [0.005, 0.0051], 1.0, (1.0, 0.9, 1.1))
    rank = next(row for row in rows if row.metric == "precision_first_rank")
    rank.context["values"] = [3.0, 17.0]
    assert "place 3 to 17 of 4,096 by size in 2 texts" in close(rows).context["sentence"]
    assert "takes no longer, measurably" in close(rows).context["recommendation"]
    old = [row for row in rows if row.metric not in ("precision_first_rank", "precision_other_share")]
    assert "50 %: 532 times an even share" in close(old).context["sentence"]
    assert "the first token's part is not known" in close(rows[:4]).context["sentence"]


def test_tokens_are_ranked_by_their_part_of_the_change():
    """Two layers' changes of four keys: 4 1 6 1 and 2 1 2 1 of 18; the largest other has 8, and the first 6."""

    def change(keys: list[float]) -> Change:
        one, parts = torch.ones(1, dtype=torch.float64), torch.tensor(keys, dtype=torch.float64)
        return Change(one * sum(keys) / 2, one, parts[:1], one, one, one, parts)

    context = {"rows": "shift", "length": 4}
    rows = list(layer_rows([{0: change([4, 1, 6, 1]), 1: change([2, 1, 2, 1])}], context, layers=True))
    found = {
        (row.metric.removeprefix("precision_"), row.context["layer"]): row.value
        for row in rows
        if row.metric.removeprefix("precision_") in ("first_share", "other_share", "first_rank")
    }
    assert found == pytest.approx({
        ("first_share", "all"): 6 / 18, ("other_share", "all"): 8 / 18, ("first_rank", "all"): 2,
        ("first_share", 0): 4 / 12, ("other_share", 0): 6 / 12, ("first_rank", 0): 2,
        ("first_share", 1): 2 / 6, ("other_share", 1): 2 / 6, ("first_rank", 1): 1,
    })  # fmt: skip


@pytest.mark.parametrize(("ours", "word"), [(0.0131, "does not show it"), (0.005, "differs as well")])
def test_the_recommendation_says_whether_the_models_output_shows_it(ours: float, word: str):
    rows = synthetic([0.01, 0.0101], [0.005, 0.0051], 1.0, (1.0, 0.9, 1.1))
    at = {"weights": "trained", "rows": "shift", "shift": 16, "length": 4096}
    for arithmetic, value in (("bfloat16", 0.013), ("float32_rotation", ours)):
        values = [value, value * 1.01]
        rows.append(mean_result("precision_logprob_change", values, "nats", at | {"arithmetic": arithmetic}))
    text = close(rows).context["recommendation"]
    assert f"log-probability {word}: it changes by 0.013 nats in bfloat16 and {ours:.2g} with" in text


def test_no_recommendation_without_an_effect():
    rows = synthetic([0.010, 0.012], [0.0102, 0.0112], 1.0, (1.1, 1.0, 1.2))
    assert "does not reduce the change measurably" in close(rows).context["recommendation"]
    rows = synthetic([0.010, 0.03], [0.005, 0.01], 1.0, (0.8, 0.7, 0.9))
    assert "does not grow measurably (×2.00)" in close(rows).context["sentence"]
    assert verdict([], Question("mine", 16, (4096,))) is None


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lengths": [32, 256]}, r"exceed the 128 positions .*max_position_embeddings"),
        ({"lengths": [4]}, "at least 16 tokens"),
        ({"layers": [0, 2]}, "has 2, but the model's layers are 0 to 1"),
        ({"shifts": [0, 16]}, r"shifts\[0\]=0 must be at least 1: leave 0 out"),
        ({"shift": -1}, "shift=-1 must be at least 1: leave 0 out"),
        ({"texts": 0}, "texts=0 must be at least 1"),
        ({"budget_minutes": 0}, "budget_minutes=0 must be above 0"),
        ({"arithmetics": []}, "leaves nothing to study"),
        ({"texts": 500}, "500 different rows of 32"),
        (
            {"config": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}},
            "rope_type=dynamic",
        ),
        ({"model": "/nowhere/at/all"}, "does not exist"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(make_config: Make, fields: dict[str, Any], message: str):
    config = make_config(**fields)
    with pytest.raises(UserError, match=message):
        study(config)
    assert not Path(config.out_dir).exists()


def test_a_folder_that_is_no_model(make_config: Make, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no config.json"):
        study(make_config(model=str(tmp_path / "empty")))

"""How large a study is, from its settings, the model and the time that there is."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anchorctx.evals.evaluators.precision import models
from anchorctx.evals.evaluators.precision import study as study_module
from anchorctx.evals.evaluators.precision.budget import Size, Speed, choose, line, measure, sizes
from anchorctx.evals.evaluators.precision.config import Arithmetic, PrecisionConfig
from anchorctx.evals.evaluators.precision.measure import Texts
from anchorctx.evals.shortcuts import evaluate_precision as study
from anchorctx.flops import ModelFlops
from anchorctx.records.results import Result

Make = Callable[..., PrecisionConfig]


def numbers(rows: list[Result]) -> list[tuple[Any, ...]]:
    return [(row.metric, row.value, row.low, row.high, json.dumps(row.context, sort_keys=True)) for row in rows]


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
    speed = Speed(ModelFlops(per_token=10.0, per_pair=0.0, windows=(None,)), bfloat16=(0.0, 1e-4), float32=(0.0, 2e-4))
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
    monkeypatch.setattr(
        study_module, "measure", lambda *_: Speed(ModelFlops(10.0, 0.0, (None,)), (0.0, 1e-5), (0.0, 1e-5))
    )
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


@pytest.mark.parametrize(
    ("timed", "expected"),
    [
        ([(10.0, 3.0), (20.0, 4.0)], (2.0, 0.1)),  # mostly what is the same for all, as in a small model
        ([(10.0, 1.0), (15.0, 9.0), (30.0, 3.0)], (0.0, 0.1)),  # a pause in between
        ([(10.0, 3.0), (20.0, 2.0)], (2.0, 0.0)),  # noise
        ([(10.0, 1.0), (20.0, 8.0)], (0.0, 0.4)),
        ([(10.0, 3.0)], (0.0, 0.3)),
    ],
)
def test_what_is_the_same_for_all_texts_is_told_apart(
    timed: list[tuple[float, float]], expected: tuple[float, float]
) -> None:
    assert line(timed) == pytest.approx(expected)

"""Differences and their tests against published values, and by simulation."""

from __future__ import annotations

import numpy as np
import pytest

from anchorctx.records.results import Result, mean_interval, median_interval, wilson_interval
from anchorctx.records.statistics import difference, holm, over_cells, student_p, student_quantile
from anchorctx.report.collect import Material, Place, Row
from anchorctx.report.sections import comparison


def result(value: float, half: float | None = None, metric: str = "m", n: int = 9, **context) -> Result:
    low, high = (None, None) if half is None else (value - half, value + half)
    return Result(metric=metric, value=value, unit="1", n=n, low=low, high=high, context=context)


def share(hits: int, n: int) -> Result:
    low, high = wilson_interval(hits, n)
    return Result(metric="retrieval_accuracy", value=hits / n, unit="1", n=n, low=low, high=high)


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (10, 2.2281), (29, 2.0452), (120, 1.9799)]
)
def test_students_distribution_is_the_tables(freedom: int, quantile: float):
    assert student_p(quantile, freedom) == pytest.approx(0.05, abs=5e-6)  # the tables have four decimals
    assert student_quantile(freedom) == pytest.approx(quantile, abs=1e-4)
    assert student_p(0, freedom) == 1 and student_p(-quantile, freedom) == student_p(quantile, freedom)


def test_means_have_students_interval():
    low, high = mean_interval([*range(12)]) or (0, 0)
    half = 2.200985 * (143 / 11) ** 0.5 / 12**0.5  # 11 degrees of freedom; 0 to 11 have squares of deviations of 143
    assert (low, high) == pytest.approx((5.5 - half, 5.5 + half), abs=1e-6)
    assert mean_interval([1.0]) is None
    wide = 3.496614 / 2.200985  # the quantile of 0.995, less what rounding leaves of it
    assert (mean_interval([*range(12)], 0.005) or (0, 0))[1] == pytest.approx(5.5 + half * wide, abs=1e-5)


def test_medians_have_an_interval_between_two_of_the_values():
    # Binomial tables: of 10 values the 2nd and the 9th (97.9 %), of 20 the 6th and the 15th (95.9 %).
    assert median_interval([*range(10)]) == (1, 8) and median_interval([*range(20)]) == (5, 14)
    assert median_interval([3.0, 1.0, 2.0, 9.0, 5.0, 4.0]) == (1.0, 9.0)  # six: 96.9 %
    assert median_interval([1.0] * 5) is None  # five: 93.8 %


def test_paired_values_give_students_test():
    a, b = [1.0, 2.0, 3.0, 4.0, 5.0], [1.2, 2.1, 3.4, 4.1, 5.7]
    found = difference(result(3.0, 9.0, values=a), result(3.3, 9.0, values=b))
    assert found is not None and found.test == "paired t"
    assert found.value == pytest.approx(0.3)
    # t = 0.3 / (0.254951 / sqrt 5) = 2.6312, four degrees of freedom: p = 0.0582.
    assert found.p == pytest.approx(0.0582, abs=1e-4)
    assert found.low == pytest.approx(0.3 - 2.77645 * 0.254951 / 5**0.5, abs=1e-5)


def test_intervals_of_two_shares_give_newcombes_interval():
    """Newcombe (1998), method 10, example (a): 56/70 - 48/80 = 0.2, interval 0.0524 to 0.3339."""
    found = difference(share(48, 80), share(56, 70))
    assert found is not None and found.test == "two intervals"
    assert (found.value, found.low, found.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)
    assert 0.005 < found.p < 0.01
    back = difference(share(56, 70), share(48, 80))
    assert back is not None and (back.low, back.high, back.p) == pytest.approx((-found.high, -found.low, found.p))


def test_equal_ends_and_probability_agree():
    """Where the interval just touches zero, the probability is 0.05."""
    found = difference(result(0.0, 3.0), result(5.0, 4.0))
    assert found is not None and found.low == pytest.approx(0) and found.p == pytest.approx(0.05, abs=1e-6)


def test_perplexities_are_compared_as_ratios():
    a = Result(metric="perplexity", value=10.0, unit="1", n=9, low=8.0, high=12.5)
    b = Result(metric="perplexity", value=20.0, unit="1", n=9, low=16.0, high=25.0)
    found = difference(a, b)
    assert found is not None and found.is_ratio and found.value == pytest.approx(2.0)
    assert found.low == pytest.approx(2 / 1.25**2**0.5) and found.high == pytest.approx(2 * 1.25**2**0.5)


def test_perplexities_of_the_same_documents_are_compared_in_pairs():
    """Documents differ by far more than the models: in pairs the difference shows, from the intervals it does not.

    By simulation: 95 % intervals hold the true ratio in 93 to 97 % of 2,000 draws of 40 documents.
    """
    rng, held = np.random.default_rng(0), 0
    for _ in range(2000):
        counts, level = rng.integers(100, 4000, 40), rng.normal(2.5, 0.5, 40)
        a, b = ((level + shift + rng.normal(0, 0.05, 40)) for shift in (0.0, -0.02))
        rows = [
            result(
                float(np.exp((x * counts).sum() / counts.sum())),
                3.0,
                metric="perplexity",
                values=x.tolist(),
                counts=counts.tolist(),
            )
            for x in (a, b)
        ]
        found = difference(*rows)
        assert found is not None and found.is_ratio and found.test == "paired documents"
        assert found.value == pytest.approx(rows[1].value / rows[0].value)
        assert (found.p < 0.05) == (not found.low <= 1 <= found.high)
        held += found.low <= np.exp(-0.02) <= found.high
    assert 0.93 < held / 2000 < 0.97
    other = result(12.0, 3.0, metric="perplexity", values=[2.5, 2.6], counts=[5, 6])
    apart = difference(result(12.5, 3.0, metric="perplexity", values=[2.5, 2.6], counts=[5, 7]), other)
    assert apart is not None and apart.test == "two intervals"  # not the same text: another tokenizer


def test_without_a_spread_nothing_is_said():
    assert difference(result(1.0), result(2.0, 0.1)) is None
    same = difference(share(5, 5), share(5, 5))
    assert same is not None and same.value == 0 and same.p == 1


def test_sign_flips_are_exact_for_few_cells_and_sampled_for_many():
    found = over_cells([(0.0, 1.0)] * 6)
    assert found is not None and found.p == 2 / 64  # all signs equal: two of 64
    assert over_cells([(0.0, 1.0)] * 5) is None
    mixed = over_cells([(0.0, x) for x in (1, -1, 2, -2, 3, -3)])
    assert mixed is not None and mixed.p == 1 and mixed.value == 0
    rng = np.random.default_rng(1)
    noise = [over_cells([(0.0, x) for x in rng.standard_normal(40)]) for _ in range(200)]
    alarms = sum(found.p < 0.05 for found in noise if found is not None)
    assert 2 <= alarms <= 20  # 5 % of 200, within four standard deviations


def test_holm_is_the_textbooks():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def material(*rows: tuple[str, Result]) -> Material:
    from pathlib import Path

    place = Place("a", "a", Path("a"), {})
    return Material(rows=[Row(result, place, model) for model, result in rows])


def test_only_cells_that_both_have_are_compared():
    section = comparison.build(
        material(
            ("one", result(0.5, 0.1, "retrieval_accuracy", length=512)),
            ("one", result(0.4, 0.1, "retrieval_accuracy", length=1024)),
            ("two", result(0.9, 0.1, "retrieval_accuracy", length=512)),
            ("two", result(0.9, 0.1, "retrieval_accuracy", length=4096)),
        )
    )
    assert section is not None
    (line,) = section.blocks[0].rows  # type: ignore[union-attr]
    assert [cell.text for cell in line[:2]] == ["retrieval accuracy, length 512", "two"]
    assert line[4].text == "+0.400 (+0.259 to +0.541)" and line[6].strong
    assert section.lead.startswith("1 of 1 differences to one")


def test_many_cells_are_compared_as_a_whole():
    rows = [("one", result(0.1 * i, 0.1, "needle_accuracy", length=i)) for i in range(1, 10)]
    rows += [("two", result(0.1 * i + 0.05, 0.1, "needle_accuracy", length=i)) for i in range(1, 10)]
    section = comparison.build(material(*rows))
    assert section is not None
    (line,) = section.blocks[0].rows  # type: ignore[union-attr]
    assert line[0].text == "needle accuracy, mean of 9 cells" and "sign flips" in section.blocks[0].caption  # type: ignore[union-attr]


def test_one_model_is_compared_with_nothing():
    assert comparison.build(material(("one", result(0.5, 0.1, "retrieval_accuracy", length=512)))) is None

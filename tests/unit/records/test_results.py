from __future__ import annotations

from pathlib import Path

import pytest

from anchorctx.errors import UserError
from anchorctx.records.results import Result, Rows, append_results, read_results, wilson_interval


def test_rows_come_back_as_written_and_are_appended(tmp_path: Path):
    path = tmp_path / "new" / "results.jsonl"
    rows = [
        Result(metric="a", value=0.5, unit="1", n=10, low=0.2, high=0.8, manifest="abc", context={"length": 512}),
        Result(metric="b", value=3.0, unit="nats", n=1),
    ]
    append_results(path, rows[:1])
    append_results(path, rows[1:])
    assert list(read_results(path)) == rows


def test_a_line_that_is_no_row_is_named(tmp_path: Path):
    path = tmp_path / "results.jsonl"
    append_results(path, [Result(metric="a", value=0.5, unit="1", n=10)])
    path.write_text(path.read_text() + '{"metric": "a"}\n')
    with pytest.raises(UserError, match="results.jsonl:2 is no result row"):
        list(read_results(path))
    with pytest.raises(UserError, match="is no file of results"):
        list(read_results(tmp_path / "none.jsonl"))


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    # The ends solve (p - hits/n)^2 = z^2 p (1-p) / n, checked below; these are rounded for the reader.
    [(5, 10, 0.237, 0.763), (0, 10, 0.0, 0.278), (10, 10, 0.722, 1.0), (95, 100, 0.888, 0.978)],
)
def test_wilson_interval_solves_its_equation(hits: int, n: int, low: float, high: float):
    ends = wilson_interval(hits, n)
    assert ends == pytest.approx((low, high), abs=5e-4)
    for p in ends:
        assert (p - hits / n) ** 2 == pytest.approx(1.959964**2 * p * (1 - p) / n, abs=1e-9)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_a_row_says_which_number_it_is_and_how_it_came_about():
    context = {"model": "a", "length": 512, "facts": 3, "rows": 8, "values": [1.0]}
    row = Result(metric="m", value=1.0, unit="1", n=8, context=context)
    assert row.model == "a" and row.where == {"length": 512}
    assert row.about == {"facts": 3, "rows": 8, "values": [1.0]}
    words = Result(metric="m", value=2.0, unit="1", n=8, context={"rows": "shift", "tokens": "all", "layer": 0})
    assert words.model == "" and words.where == words.context and not words.about
    later = Result(metric="m", value=3.0, unit="1", n=8, context=context)
    assert Rows([row, words, later]).find("m", model="a", length=512) is row
    assert Rows([row, words]).find("m", layer=0) is words
    assert Rows([row]).find("m", layer=0) is None and Rows([row]).find("n") is None

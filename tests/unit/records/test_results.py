from __future__ import annotations

import os
from pathlib import Path

import pytest

from anchorctx.errors import UserError
from anchorctx.records.results import Result, Rows, append_results, mend_results, read_results, wilson_interval


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
    with pytest.raises(UserError, match="is not a file of results"):
        list(read_results(tmp_path / "none.jsonl"))


@pytest.mark.parametrize(
    "line",
    ['{"metric": "a"', "[" * 100_000, "\x00\x00", '"a"', "7", '{"metric": 1, "value": 0.5, "unit": "1", "n": 10}']
    + ['{"metric": "a", "value": "0.5", "unit": "1", "n": 10}', '{"metric": "a", "value": 1, "unit": "1", "n": true}']
    + ['{"metric": "a", "value": 0.5, "unit": "1", "n": 10, "part": [3, 2]}', "\udcff"]
    + [
        f'{{"metric": "a", "value": 0.5, "unit": "1", "n": 10, "part": {part}}}'
        for part in ("[1, Infinity]", "[NaN, 1]", "[1, 1e400]", '["1", 2]', "[1]", "[true, 1]", "[[], 1]")
    ]
    + [
        f'{{"metric": "a", "unit": "1", "n": 10, "value": 0, "{name}": {value}}}'
        for name in ("value", "low", "high", "n")
        for value in ("NaN", "-Infinity", "1e400", "1" + "0" * 400, "1" + "0" * 4000)
    ],
    ids=lambda line: line[-40:].encode("unicode_escape").decode(),
)
def test_whatever_is_no_row_is_refused_by_all_readers(tmp_path: Path, line: str):
    path = tmp_path / "results.jsonl"
    append_results(path, [Result(metric="a", value=0.5, unit="1", n=10)])
    path.write_bytes(path.read_bytes() + line.encode(errors="surrogateescape") + b"\n")
    for read in (mend_results, lambda path: list(read_results(path))):
        with pytest.raises(UserError, match="results.jsonl:2 is no result row"):
            read(path)


def test_an_interval_that_is_not_known_is_read(tmp_path: Path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"metric": "a", "value": -1, "unit": "1", "n": 10, "low": null, "high": 1e308}\n')
    assert list(read_results(path)) == [Result(metric="a", value=-1, unit="1", n=10, high=1e308)]


def batches() -> list[list[Result]]:
    """Two evaluations, `a` of two measurements and `b` of one, of one to three rows each."""
    return [
        [Result(metric="m", value=i + j, unit="1", n=1, manifest=name, context={"i": i, "j": j}) for j in range(rows)]
        for i, (name, rows) in enumerate((("a", 2), ("a", 1), ("b", 3)))
    ]


def test_a_file_torn_at_any_byte_keeps_every_whole_measurement_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, "fsync", lambda _: None)  # some thousand of them are not what this is about
    path = tmp_path / "results.jsonl"
    ends = []
    for rows in batches():
        append_results(path, rows)
        ends.append(path.stat().st_size - 1)  # a last line may lack its end
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        kept = [rows for rows, end in zip(batches(), ends, strict=True) if end <= cut]
        assert len(list(read_results(path))) >= sum(map(len, kept))  # readers leave out no more than half a row
        assert mend_results(path) == sum(kept, []) == list(read_results(path))
        for rows in batches()[len(kept) :]:
            append_results(path, rows)
        assert path.read_bytes() == whole


def test_rows_that_were_removed_by_hand_take_their_measurement_with_them(tmp_path: Path):
    path = tmp_path / "results.jsonl"
    for rows in batches():
        append_results(path, rows)
    lines, rows = path.read_text().splitlines(keepends=True), batches()
    for gone, left in {0: rows[1:], 1: rows[1:], 2: rows[::2], 3: rows[:2], 4: rows[:2], 5: rows[:2]}.items():
        path.write_text("".join(line for i, line in enumerate(lines) if i != gone))
        assert mend_results(path) == sum(left, [])
    path.write_text("".join(lines[1::-1] + lines[2:]))
    assert mend_results(path) == sum(rows[1:], [])  # nor do they count in another order
    untold = ['{"metric": "m", "value": 1, "unit": "1", "n": 1, "context": {}}\n'] * 2  # by an earlier version
    path.write_text("".join(untold + lines[:1]))
    assert len(mend_results(path)) == 2 and path.read_text() == "".join(untold)


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


def test_rows_can_be_chosen_and_the_latest_counts():
    def row(value: float, metric: str = "m", **context: object) -> Result:
        return Result(metric=metric, value=value, unit="1", n=1, context=context)

    first, other = row(1.0, model="a", length=512, facts=3), row(2.0, model="a", length=1024)
    again, theirs = row(3.0, model="a", length=512, facts=4), row(4.0, "n", model="b", first="kept")
    rows = Rows([first, other, again, theirs])
    assert rows.of("m", length=512) == [first, again] and rows.of(model="b") == [theirs]
    assert rows.of(first=None) == [first, other, again]  # None: rows without the entry
    assert rows.find("n", first=None) is None
    assert rows.distinct("length") == [512, 1024] and rows.distinct("nothing") == []
    assert rows.latest() == [again, other, theirs]  # facts do not tell two numbers apart
    assert row(1.0, x=1, y=2).key == row(2.0, y=2, x=1, values=[1.0]).key != row(1.0, x=1).key


@pytest.mark.parametrize(
    ("one", "two", "same"),
    [({"tokens": 5}, {"tokens": 5}, True), ({"tokens": 5}, {"tokens": 6}, False), ({}, {"tokens": 6}, True),
     ({"documents": 2, "tokens": 5}, {"documents": 3, "tokens": 5}, False),
     ({"tokens": "all"}, {"tokens": "first"}, True)],
)  # fmt: skip
def test_rows_about_as_much_text_can_be_compared(one: dict, two: dict, same: bool):
    rows = [Result(metric="m", value=1.0, unit="1", n=1, context=context) for context in (one, two)]
    assert rows[0].same_text(rows[1]) is same

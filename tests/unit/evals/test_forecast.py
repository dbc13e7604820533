"""How long an evaluation will take is said from a first piece of it; a dry run stops there and writes nothing."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from anchorctx.cli.main import main
from anchorctx.evals import forecast as forecast_module
from anchorctx.evals.forecast import Bar, MeasuredError, duration

from .conftest import TEXTS

Words = Callable[[str], list[str]]


@pytest.fixture
def words(folder: Path, tmp_path: Path) -> Words:
    """A small command on the tiny model."""
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text * 8}) + "\n" for text in TEXTS))

    def make(command: str) -> list[str]:
        more = {
            "eval": ["evals=[perplexity,retrieval]", "perplexity.max_length=128", "perplexity.batch_tokens=256",
                     "retrieval={lengths: [64, 256], rows: 2}"],
            "precision": ["lengths=[32,64]", "shifts=[16]", "texts=2", "cost=false"],
            "kvcomm": ["tasks=[copy]", "copy={problems: 2, question: 20, prefix: 10, output: 4}", "arms=[rotate]",
                       "settings={warmup: 2}", "variation={tokens: 8, prefix: 8}"],
        }  # fmt: skip
        text = f"corpus={{path: {corpus}, format: auto}}"
        return [command, f"model={folder}", f"out_dir={tmp_path / 'out'}", text, *more[command]]

    return make


@pytest.mark.parametrize(("command", "parts"), [
    ("eval", ["perplexity of tiny", "retrieval of tiny"]),
    ("precision", ["precision of tiny"]),
    ("kvcomm", ["kvcomm of tiny"]),
])  # fmt: skip
def test_a_dry_run_says_how_long_and_writes_nothing(
    command: str, parts: list[str], words: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words(command), "--dry-run"]) == 0
    *lines, total = capsys.readouterr().out.splitlines()
    assert [line.partition(": about ")[0] for line in lines] == parts
    assert all(", by the first " in line for line in lines) and total.startswith("in all: ")
    assert not (tmp_path / "out").exists()


def test_what_is_there_already_takes_no_time(
    words: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(forecast_module, "WORTH_SAYING", 0.0)
    with caplog.at_level(logging.INFO):
        assert main(words("eval")) == 0
    said = [message for message in caplog.messages if ": about " in message]
    assert [message.partition(":")[0] for message in said] == ["perplexity of tiny", "retrieval of tiny"]
    results = (tmp_path / "out/results.jsonl").read_bytes()
    capsys.readouterr()
    assert main([*words("eval"), "--dry-run"]) == 0
    assert capsys.readouterr().out == "in all: nothing to do: all of it is there already\n"
    assert (tmp_path / "out/results.jsonl").read_bytes() == results


def test_the_whole_is_in_proportion_to_the_second_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit of 512 tokens that has 10,000 to do, and another that is four times as long: 50,000.

    Of these 1,000 take 30 s, in which the model is loaded, and the next 1,000 take 2 s: 30 + 49 * 2.
    """
    clock = iter([0.0, 100.0, 130.0, 132.0])
    monkeypatch.setattr(forecast_module.time, "monotonic", lambda: next(clock))
    bar = Bar("reading of it", "tok", [{"length": 512}, {"length": 2048}], dry_run=True)
    bar.start({"length": 512})
    bar.advance(1000, 10_000)
    assert bar.forecast is None
    with pytest.raises(MeasuredError):
        bar.advance(1000, 10_000)
    assert bar.forecast is not None and bar.forecast.seconds == pytest.approx(128.0)
    assert str(bar.forecast) == "reading of it: about 2 min, by the first 2,000 of 50,000 tok"


def test_units_of_known_sizes_are_counted() -> None:
    """Three problems of one task, 60 of another: 63, whatever the first one says."""
    bar = Bar("it", "problem", [{"task": "a"}, {"task": "b"}], sizes=[3, 60], dry_run=True)
    bar.start({"task": "a"})
    bar.advance(1, 3)
    with pytest.raises(MeasuredError):
        bar.advance(1, 3)
    assert bar.forecast is not None and bar.forecast.first == "2 of 63 problem"


@pytest.mark.parametrize("pieces", [[8], [4, 4]])
def test_pieces_may_be_all_there_is(pieces: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.0, 3.0, 5.0])
    monkeypatch.setattr(forecast_module.time, "monotonic", lambda: next(clock))
    bar = Bar("it", "req", [{}])
    bar.start({})
    for done in pieces:
        bar.advance(done, 8)
    found = bar.settle()
    assert found is not None and found.seconds == (3.0 if len(pieces) == 1 else 5.0) and found.first == "8 of 8 req"


def test_durations_are_short() -> None:
    assert [duration(x) for x in (0.2, 40.4, 89, 91, 700, 5500, 86_400)] == [
        "1 s", "40 s", "89 s", "2 min", "12 min", "1.5 h", "24.0 h",
    ]  # fmt: skip

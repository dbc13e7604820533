"""The frontier of KV reuse on the page, in Markdown and as a picture."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from anchorctx.cli.main import main
from anchorctx.records.manifest import write_manifest
from anchorctx.records.results import Result, Rows, append_results
from anchorctx.report.figures.frontier import curves_of, draw_frontier, frontier_charts
from anchorctx.report.figures.prediction import draw_predictions, prediction_charts
from anchorctx.report.figures.reuse import tasks_of
from anchorctx.report.sections.frontier import frontier_text
from anchorctx.report.sections.reuse import reuse_table

from .fixtures import manifest

ARMS = {
    "dense": (0.0, 1.0),
    "dense_prefix_cache": (1e-14, 0.8),
    "blend:0.4": (0.02, 0.5),
    "blend:0.05": (0.09, 0.2),
    "kvcomm": (0.1, 0.6),
    "predicted:0.05": (0.01, 0.7),
}
"""Divergence in nats, and cost over dense's."""
SENTENCE = "t: use blend:0.4, the cheapest within a KL of 0.05: so & so"


def rows(model: str = "m", mark: str = "") -> list[Result]:
    def row(metric: str, value: float, half: float = 0.0, **where: Any) -> Result:
        context = {"model": model, "task": "t", "kind": "all"} | where
        return Result(metric=f"kvcomm_{metric}", value=value, unit="1", n=20, low=value - half, high=value + half,
                      manifest=mark, context=context)  # fmt: skip

    found = []
    for arm, (kl, cost) in ARMS.items():
        found += [row("kl", kl, 0.4 * kl, arm=arm, tokens="all"), row("agreement", 1 - kl, arm=arm, tokens="all")]
        found += [row("cost", cost, arm=arm, by="tokens"), row("cost", 1.5 * cost, 0.1, arm=arm, by="seconds")]
    found.append(row("kl", 2.0, arm="zeroed", tokens="all"))  # a control has no cost
    at = {"arm": "predicted:0.05", "bound": 0.05}
    shared, seen = [[0.01, 0.04, 0.02], [0.02, 0.045, 0.06]], [[0.01, 0.02], [0.02, 0.03], [0.0, 0.0]]
    found += [row("prediction", 0.5, 0.2, measure="shared", **at)]
    found += [row("prediction", 0.25, 0.2, measure="missed", values=shared, **at)]
    found += [row("prediction", 0.7, measure="rank", values=seen, **at)]
    return [*found, row("recommendation", 0.02, bound=0.05, recommended="blend:0.4", sentence=SENTENCE)]


def test_an_arm_is_a_curve_over_its_setting() -> None:
    (task,) = tasks_of(Rows(rows()))
    curves = curves_of(task, "KL", "cost: seconds")
    assert list(curves) == ["dense", "dense_prefix_cache", "blend", "kvcomm", "predicted"]
    assert [mark.arm for mark in curves["blend"]] == ["blend:0.05", "blend:0.4"]  # what computes less first
    charts = {title: chart for title, chart, _ in frontier_charts(task)}
    assert list(charts) == [
        f"{loss} against {cost}" for loss in ("KL", "agreement") for cost in ("computed tokens", "time")
    ]
    titles = re.findall(r"<title>(.*?)</title>", charts["KL against computed tokens"].svg)
    assert "blend" in titles and "blend:0.05: 0.090 (0.054 to 0.126) at 20.0 % (20.0 % to 20.0 %)" in titles
    assert "dense: 0.000 (0.000 to 0.000) at 100.0 % (100.0 % to 100.0 %)" in titles
    assert [name for name, *_ in charts["KL against time"].legend] == list(curves)


def test_the_text_ends_with_what_to_use() -> None:
    (task,) = tasks_of(Rows(rows()))
    head, _, *lines = frontier_text(task).split("\n\n")[0].splitlines()
    assert head == "| arm | tokens computed | TTFT | KL (nats) | agreement | within 0.05 | on the frontier |"
    cells = {line.split(" | ")[0][2:]: line[:-2].split(" | ")[1:] for line in lines}
    assert list(cells) == ["blend:0.05", "blend:0.4", "kvcomm", "predicted:0.05", "dense_prefix_cache", "dense"]
    # blend:0.05 is above the bound with its interval, and kvcomm computes and loses more than blend:0.4.
    assert {arm: tuple(cell[-2:]) for arm, cell in cells.items()} == {
        "blend:0.05": ("no", "yes"), "blend:0.4": ("yes", "yes"), "kvcomm": ("no", "no"),
        "predicted:0.05": ("yes", "yes"), "dense_prefix_cache": ("yes", "yes"), "dense": ("yes", "no"),
    }  # fmt: skip
    text = reuse_table(rows())
    assert text.endswith(f"\n\n{SENTENCE}.") and "zeroed" not in frontier_text(task) and "| zeroed |" in text
    assert (
        "predicted:0.05 shared 50.0 % (30.0 % to 70.0 %) of 20 turns" in text and "more than its bound of 0.05;" in text
    )
    assert "**a: t: what to use**" in reuse_table([*rows("a"), *rows("b")])


def test_pictures_are_drawn_for_each_task(tmp_path: Path) -> None:
    for draw, name in ((draw_frontier, "frontier"), (draw_predictions, "prediction")):
        assert [path.name for path in draw(rows(), tmp_path)] == [f"kvcomm_t_{name}.png"]
        assert (tmp_path / f"kvcomm_t_{name}.png").stat().st_size > 10_000
    older = [row for row in rows() if row.metric in ("kvcomm_kl", "kvcomm_agreement")]
    assert draw_frontier(older, tmp_path) == draw_predictions(older, tmp_path) == []
    assert frontier_text(tasks_of(Rows(older))[0]) == ""
    (task,) = tasks_of(Rows(rows()))
    ((_, chart),) = prediction_charts(task)
    assert chart.svg.count("<circle") == 5


def test_the_page_says_what_to_use(tmp_path: Path) -> None:
    mark = write_manifest(tmp_path / "reuse", manifest("kvcomm"))
    append_results(tmp_path / "reuse" / "results.jsonl", rows(mark=mark))
    assert main(["report", str(tmp_path / "reuse"), f"out={tmp_path / 'a.html'}"]) == 0
    page = (tmp_path / "a.html").read_text()
    assert SENTENCE.replace("&", "&amp;") in page and "t: KL against computed tokens" in page
    assert "t: predicted:0.05, predicted and true" in page


def test_predictions_without_a_rank_correlation_are_shown() -> None:
    """There is none where all divergences are equal."""
    without = [row for row in rows() if row.context.get("measure") != "rank"]
    (task,) = tasks_of(Rows(without))
    text = frontier_text(task)
    assert "diverged by more than its bound of 0.05.\n" in text and "its warm-up takes" not in text
    ((_, chart),) = prediction_charts(task)
    assert chart.svg.count("<circle") == 2


@pytest.mark.parametrize("missing", ["kvcomm_recommendation", "kvcomm_prediction"])
def test_what_was_not_measured_is_not_said(missing: str) -> None:
    text = reuse_table([row for row in rows() if row.metric != missing])
    assert (SENTENCE in text) == (missing != "kvcomm_recommendation") == ("within 0.05" in text)
    assert ("its warm-up" in text) == (missing != "kvcomm_prediction")

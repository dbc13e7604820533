"""The table of the frontier: what each arm computes and takes, what it loses, and which one to use."""

from __future__ import annotations

import dataclasses

from anchorctx.records.results import Result
from anchorctx.report.blocks import MISSING, Cell, Figure, Note, Table, measured, text_cell
from anchorctx.report.figures.frontier import EXACT, frontier_charts
from anchorctx.report.figures.prediction import prediction_charts
from anchorctx.report.figures.reuse import TaskRows
from anchorctx.report.numbers import number, with_interval

COLUMNS = {
    "cost: tokens": "tokens computed",
    "cost: seconds": "TTFT",
    "KL": "KL (nats)",
    "agreement": "agreement",
    "difference": "accuracy, less dense's",
}
"""The measure, and its heading."""


def blocks(name: str, task: TaskRows) -> list[Figure | Table | Note]:
    """For the page: the recommendation, the table and the charts; nothing of an evaluation without costs."""
    if not _arms(task):
        return []
    head, body = _table(task)
    caption = (
        "Cheapest first, with 95 % intervals over problems; tokens and time to first token over dense's, hidden work "
        "included. Within: the interval's upper end is below the bound. On the frontier: no arm computes less and "
        "loses less."
    )
    said = [] if task.recommendation is None else [Note(task.recommendation.context["sentence"])]
    figures = [Figure(f"{name}: {title}", chart, words) for title, chart, words in frontier_charts(task)]
    words = (
        "What was expected of each turn's divergence, and what it was: of the dense turns that the prediction was "
        "fitted to, each left out with its request, and of those that were shared then. Dotted: the arm's bound."
    )
    predicted = [Figure(f"{name}: {arm}, predicted and true", chart, words) for arm, chart in prediction_charts(task)]
    notes = [Note(text) for text in _predictions(task)]
    return [*said, *figures, Table(f"{name}: what to use", head, body, caption), *predicted, *notes]


def frontier_text(task: TaskRows) -> str:
    """The same table and sentence in Markdown; empty without costs."""
    if not _arms(task):
        return ""
    head, body = _table(task)
    lines = [head, ["---"] * len(head), *([cell.text for cell in row] for row in body)]
    said = [] if task.recommendation is None else [f"{task.recommendation.context['sentence']}."]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    # The recommendation comes last.
    return "\n\n".join([table, *_predictions(task), *said])


def _predictions(task: TaskRows) -> list[str]:
    """A sentence for each arm that predicts its divergence."""
    found = []
    for arm in task.rows.of("kvcomm_prediction").distinct("arm"):
        rows = {m: task.rows.find("kvcomm_prediction", arm=arm, measure=m) for m in ("shared", "missed", "rank")}
        shared, missed, rank = rows["shared"], rows["missed"], rows["rank"]
        if shared is None or missed is None or not shared.n:
            found.append(f"{arm} was dense throughout: its warm-up takes more problems than were run.")
            continue
        of_them = f"; of these {with_interval(missed, as_percent=True)} diverged by more than its bound of "
        found.append(
            f"{arm} shared {with_interval(shared, as_percent=True)} of {shared.n} turns after its warm-up"
            + (f"{of_them}{missed.context['bound']:g}" if missed.n else "")
            + (f"; what it expected and what was true have a rank correlation of {rank.value:.2f}" if rank else "")
            + "."
        )
    return found


def _arms(task: TaskRows) -> list[str]:
    """Those with a cost, cheapest first."""
    cost = {arm: row.value for arm in task.arms if (row := task.find("cost: tokens", arm)) is not None}
    return sorted(cost, key=lambda arm: cost[arm])


def _table(task: TaskRows) -> tuple[list[str], list[list[Cell]]]:
    arms, bound = _arms(task), task.recommendation.context["bound"] if task.recommendation else None
    used = {measure: head for measure, head in COLUMNS.items() if any(task.find(measure, arm) for arm in arms)}
    head = ["arm", *used.values(), *([f"within {bound:g}"] if bound is not None else []), "on the frontier"]
    body = []
    for arm in arms:
        within = [] if bound is None else [_within(task.find("KL", arm), bound)]
        on = text_cell("yes" if _on_frontier(task, arm, arms) else "no")
        body.append([text_cell(arm), *(_cell(m, task.find(m, arm)) for m in used), *within, on])
    return head, body


def _cell(measure: str, row: Result | None) -> Cell:
    if row is None:
        return MISSING
    if measure == "KL":  # from 1e-14 to 10: digits, not decimals
        ends = "" if row.low is None or row.high is None else f" ({number(max(row.low, 0.0))} to {number(row.high)})"
        return Cell(number(row.value) + ends, row.value)
    if measure == "agreement" and row.high is not None and row.high > 1:  # Student's interval knows no limits
        row = dataclasses.replace(row, high=1.0)
    return measured(row, as_percent=measure.startswith("cost"))


def _within(row: Result | None, bound: float) -> Cell:
    """Whether the interval is below the bound, above it, or holds it."""
    if row is None or row.low is None or row.high is None:
        return MISSING
    return text_cell("yes" if row.high <= bound else "no" if row.low > bound else "open")


def _on_frontier(task: TaskRows, arm: str, arms: list[str]) -> bool:
    """Whether nothing that computes less, or as much, loses less; what is exact loses nothing."""

    def place(of: str) -> tuple[float, float]:
        cost, loss = task.find("cost: tokens", of), task.find("KL", of)
        assert cost is not None and loss is not None
        return cost.value, 0.0 if of in EXACT else loss.value

    mine = place(arm)
    return not any(a <= mine[0] and b <= mine[1] and (a, b) != mine for a, b in map(place, arms))

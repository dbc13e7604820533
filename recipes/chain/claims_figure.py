"""The picture of a recipe's claims: what was claimed before the runs, and what came out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from anchorctx.records.results import Result
from anchorctx.report.figures.style import BLUE, ORANGE, new_figure, save, styled


def bar(row: Result) -> tuple[list[float], list[float]]:
    """Lengths of the interval's arms, below and above."""
    low, high = (row.value if end is None else end for end in (row.low, row.high))
    return [row.value - low], [high - row.value]


@styled
def claims_figure(rows: Sequence[Result], folder: Path) -> Path:
    """Effects with their intervals and the margins that they were to reach."""
    found = [row for row in rows if row.metric == "claim"]
    figure, axes = new_figure(7, 0.34 * len(found) + 1.4)
    colors = {"supported": BLUE, "not supported": ORANGE, "undecided": "#7F7F7F"}
    for y, row in enumerate(reversed(found)):
        color = colors[row.context["answer"]]
        axes.errorbar(row.value, y, xerr=bar(row), fmt="s", color=color, capsize=3, markersize=4)
        axes.plot(row.context["margin"], y, "|", color="black", markersize=11)
    for answer, color in colors.items():
        axes.plot([], [], "s", color=color, label=answer)
    axes.plot([], [], "|", color="black", markersize=11, label="margin")
    axes.axvline(0, color="#555555", linewidth=0.8)
    axes.set_xscale("symlog", linthresh=0.05, linscale=0.6)  # effects of 0.005 beside intervals of more than 1
    ticks = (-1, -0.3, -0.1, -0.03, 0, 0.03, 0.1, 0.3, 1)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(found)), [row.context["claim"] for row in reversed(found)])
    axes.set(xlabel="effect in the direction claimed, 95 % interval (units: HYPOTHESES*.md)")
    axes.set_title("What was claimed beforehand, and what came out")
    axes.legend(loc="upper right")
    return save(figure, folder / "claims.png")

"""`precision.png`: the paper's three figures (arXiv 2411.13476, section 3) for one checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anchorctx.report.plots import BLUE, GREEN, ORANGE, new_figure, save, styled
from anchorctx.report.precision_series import Arm, Study

COLORS = {"bfloat16": ORANGE, "float32_rotation": BLUE, "float32": GREEN}


@styled
def precision_figure(study: Study, path: Path) -> Path:
    """Draw the change against the shift, by token, and the first token's against the length; returns `path`."""
    figure, (left, middle, right) = new_figure(13.5, 4.6, columns=3)
    _draw(left, study.by_shift())
    left.set(xscale="log", xlabel="shift of all positions (tokens)", ylabel="share of attention that moves")
    left.set_title(f"Against the shift, {study.length:,} tokens")
    _draw(middle, study.by_key())
    middle.set(xscale="log", xlabel="key (1 is the first token)", ylabel="change of attention to a key")
    middle.set_title(f"By token, shift of {study.shift:,}")
    arms = study.by_length()
    _draw(right, arms)
    lengths = sorted({x for arm in arms for x in arm.x})
    right.set_xscale("log", base=2)
    right.set_xticks(lengths, [f"{length:,.0f}" for length in lengths])
    right.minorticks_off()
    right.set(xlabel="row length (tokens)", ylabel="change of its score (nats)")
    right.set_title(f"The first token, shift of {study.shift:,}")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=6)
    figure.suptitle(study.model, x=0.065, y=0.985, ha="left", color="#555555")
    figure.subplots_adjust(bottom=0.22, top=0.85, left=0.065, right=0.99, wspace=0.28)
    return save(figure, path, tight=False)


def _draw(axes: Any, arms: Sequence[Arm]) -> None:
    for arm in arms:
        color = COLORS[arm.arithmetic]
        points = [(x, row) for x, row in zip(arm.x, arm.rows, strict=True) if row.value > 0]
        x, values = [x for x, _ in points], [row.value for _, row in points]
        low = [max(row.low or row.value, row.value / 5) for _, row in points]  # a logarithm has no 0
        high = [row.high or row.value for _, row in points]
        axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
        axes.plot(x, values, color=color, marker="o", markersize=3.5, linewidth=1.8,
                  linestyle="--" if arm.dashed else "-", label=arm.name)  # fmt: skip
    axes.set_yscale("log")

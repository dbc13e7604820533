"""Figures about size: a plan scaled to many GPUs, and peak memory against row length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from anchorctx.report.plots import MARKERS, SERIES, new_figure, save, styled


@styled
def scaling_figure(points: Sequence[Mapping[str, float]], title: str, path: Path) -> Path:
    """Draw `plan.simulate`'s points: bytes sent by a GPU in a step, and efficiency, against GPUs; returns `path`."""
    figure, (sent, share) = new_figure(11.5, 4.4, columns=2)
    for number, sequence in enumerate(sorted({point["sequence"] for point in points})):
        mine = [point for point in points if point["sequence"] == sequence]
        look: dict[str, Any] = {"color": SERIES[number % len(SERIES)], "marker": MARKERS[number % len(MARKERS)]}
        gpus = [point["gpus"] for point in mine]
        name = f"SP {sequence:g}"
        sent.plot(gpus, [(p["sequence_bytes"] + p["zero_bytes"]) / 1e9 for p in mine], label=name, markersize=4, **look)
        share.plot(gpus, [point["efficiency"] for point in mine], label=name, markersize=4, **look)
    ticks = sorted({point["gpus"] for point in points})
    for axes in (sent, share):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{gpus:,.0f}" for gpus in ticks], fontsize=8)
        axes.minorticks_off()
        axes.set_xlabel("GPUs (DP x SP)")
    sent.set(ylabel="GB sent by a GPU in a step", ylim=(0, None))
    sent.set_title("Communication")
    share.set(ylabel="time spent computing", ylim=(0, 1.05))
    share.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    share.set_title("Expected efficiency (weak scaling)")
    handles, labels = sent.get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels))
    figure.suptitle(title, x=0.065, y=0.985, ha="left", color="#555555", fontsize=9)
    figure.subplots_adjust(bottom=0.25, top=0.85, left=0.065, right=0.985, wspace=0.22)
    return save(figure, path, tight=False)


@styled
def memory_figure(rows: Sequence[Mapping[str, Any]], title: str, path: Path) -> Path:
    """Draw measured peaks (markers) and predicted ones (lines) against the row length, a colour an arm.

    Rows have `arm`, `tokens`, `measured` and `predicted` bytes. Returns `path`.
    """
    figure, axes = new_figure(7.5, 4.6)
    for number, arm in enumerate(dict.fromkeys(row["arm"] for row in rows)):
        mine = sorted((row for row in rows if row["arm"] == arm), key=lambda row: row["tokens"])
        color, x = SERIES[number % len(SERIES)], [row["tokens"] for row in mine]
        axes.plot(x, [row["predicted"] / 2**30 for row in mine], color=color, linewidth=1.6)
        axes.plot(
            x,
            [row["measured"] / 2**30 for row in mine],
            color=color,
            linestyle="none",
            marker=MARKERS[number % len(MARKERS)],
            label=arm,
        )
    ticks = sorted({row["tokens"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(ticks, [f"{tokens:,}" for tokens in ticks], fontsize=8)
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set(xlabel="row length (tokens)", ylabel="peak memory of a process (GiB)")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8, loc="upper left", title="measured (lines: planned)", title_fontsize=8)
    return save(figure, path)

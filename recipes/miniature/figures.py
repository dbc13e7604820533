"""The miniature's pictures, drawn from the means over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from chain.claims_figure import bar

from anchorctx.records.results import Result
from anchorctx.report.figures.style import BLUE, MARKERS, ORANGE, SERIES, new_figure, save, styled


@styled
def trained_figure(rows: Sequence[Result], folder: Path) -> Path:
    """Retrieval at each model's longest length: every seed as a point, the mean with its interval."""
    longest = {row.context["model"]: row for row in sorted(rows, key=lambda row: row.context.get("length", 0))
               if row.metric == "mean_retrieval_accuracy"}  # fmt: skip
    named = dict.fromkeys(row.context["model"] for row in rows if row.metric == "mean_retrieval_accuracy")
    found = [longest[model] for model in named]
    figure, axes = new_figure(7, 0.36 * len(found) + 1.3)
    for y, row in enumerate(reversed(found)):
        color = ORANGE if "bf16" in row.context["model"] else BLUE
        axes.errorbar(row.value, y, xerr=bar(row), fmt="s", color=color, capsize=3)
        axes.plot(row.context["values"], np.full(row.n, y + 0.22), "|", color="#555555", markersize=7)
    axes.set_yticks(range(len(found)), [row.context["model"] for row in reversed(found)])
    axes.set(xlabel="retrieval accuracy at the row's length: seeds, mean, 95 % interval", xlim=(0, 1.02))
    axes.set_title("After continued training")
    return save(figure, folder / "trained.png")


@styled
def reuse_figure(rows: Sequence[Result], folder: Path) -> Path:
    """Divergence from dense by arm and model, on a logarithmic axis."""
    found = [row for row in rows if row.metric == "mean_kvcomm_kl"]
    arms, models = ([*dict.fromkeys(row.context[k] for row in found)] for k in ("arm", "model"))
    figure, axes = new_figure(7, 0.16 * len(arms) * len(models) + 1.6)
    named: set[str] = set()
    for number, model in enumerate(models):
        for y, arm in enumerate(reversed(arms)):
            for row in (r for r in found if (r.context["arm"], r.context["model"]) == (arm, model)):
                height = y + 0.8 / len(models) * (len(models) // 2 - number)
                style = {
                    "color": SERIES[number % len(SERIES)],
                    "marker": MARKERS[(number + number // len(SERIES)) % len(MARKERS)],
                    "linestyle": "",
                }
                axes.plot(max(row.value, 1e-7), height, label=None if model in named else model, **style)
                named.add(model)
                seeds = np.maximum(row.context["values"], 1e-7)
                axes.plot(seeds, np.full(len(seeds), height), color=SERIES[number % len(SERIES)], linewidth=1)
    axes.set_yticks(range(len(arms)), arms[::-1])
    axes.set_xscale("log")
    axes.set(xlabel="KL from dense at the first token, nats (mean; the line spans the seeds)")
    axes.set_title("Reuse of KV caches")
    axes.legend(loc="best")
    return save(figure, folder / "reuse.png")

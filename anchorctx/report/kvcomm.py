"""The KVCOMM evaluation as a table and as pictures: closeness to dense, accuracy, reuse, time, memory, cache errors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from anchorctx.report.plots import BLUE, MARKERS, ORANGE, SERIES, SKY, load_matplotlib, new_figure, save, styled
from anchorctx.results import Result

KL_FLOOR = 1e-8
"""Where bars of a logarithmic KL axis begin, in nats: float32's rounding."""
ERROR_ARMS = ("naive", "rotate", "rotate_glue", "kvcomm_ungated", "mean_offset", "anchored")


def find(rows: Sequence[Result], metric: str, **context: Any) -> Result | None:
    """The latest row of a metric whose context has these entries."""
    found = [r for r in rows if r.metric == metric and context.items() <= r.context.items()]
    return found[-1] if found else None


def reuse_table(rows: Sequence[Result]) -> str:
    """A Markdown table for each task: one line an arm."""
    parts = []
    for task in _distinct(rows, "task"):
        head = ["arm", "KL, nat", "agreement", "accuracy (difference to dense, 95 %)", "judge", "judge, shuffled"]
        head += ["reuse: calls", "tokens", "FLOPs", "TTFT p50, ms", "p95", "kept, MiB"]
        lines = [f"**{task}**", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for arm in _distinct([r for r in rows if r.context.get("task") == task], "arm"):
            lines.append("| " + " | ".join(_cells(rows, task, arm)) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, "* reuses everything by construction"])


def draw_reuse(rows: Sequence[Result], folder: Path) -> list[Path]:
    """All pictures that the rows allow."""
    drawn = [reuse_figure(rows, task, folder / f"kvcomm_{task}.png") for task in _distinct(rows, "task")]
    tasks = [task for task in _distinct(rows, "task") if find(rows, "kvcomm_kv_error", task=task)]
    return drawn + [error_figure(rows, task, folder / f"kvcomm_{task}_cache.png") for task in tasks[:1]]


@styled
def reuse_figure(rows: Sequence[Result], task: str, path: Path) -> Path:
    """Divergence, accuracy by kind, time to first token and kept bytes of every arm."""
    own = [r for r in rows if r.context.get("task") == task]
    arms = _distinct(own, "arm")
    scored = find(own, "kvcomm_accuracy") is not None
    figure, axes = new_figure(15 if scored else 11.5, 0.9 + 0.34 * len(arms), columns=4 if scored else 3)
    panels = list(axes)
    _bars(panels[0], arms, [_value(own, "kvcomm_kl", arm, tokens="all") for arm in arms], BLUE)
    panels[0].set_xscale("log")
    panels[0].set_xlim(left=KL_FLOOR)
    panels[0].set(xlabel="KL(dense | arm), nats a token", title="Divergence from dense")
    panels[0].set_yticks(range(len(arms)), arms)
    if scored:
        _draw_accuracy(panels[1], own, arms)
    time, memory = panels[-2:]
    p50, p95 = (
        [1e3 * _value(own, "kvcomm_ttft", arm, agent="request", quantile=q) for arm in arms] for q in ("p50", "p95")
    )
    _bars(time, arms, p50, SKY)
    time.plot(p95, range(len(arms)), "|", color=ORANGE, markersize=9, markeredgewidth=2)
    time.set(xlabel="TTFT of a request, ms (bar p50, line p95)", title="Time, all hidden work in")
    _bars(memory, arms, [_value(own, "kvcomm_kept_bytes", arm) / 2**20 for arm in arms], "#009E73")
    memory.set(xlabel="MiB kept between requests", title="Memory")
    for panel in panels[1:]:
        panel.set_yticks(range(len(arms)), [])
    figure.suptitle(_title(own, task), x=0.01, ha="left", fontsize=10)
    figure.set_layout_engine("constrained")
    return save(figure, path)


@styled
def error_figure(rows: Sequence[Result], task: str, path: Path) -> Path:
    """By layer: the relative error of each arm's keys and values, and what context and place change of a document's."""
    variation = find(rows, "kvcomm_variation") is not None
    figure, axes = new_figure(13 if variation else 9, 3.8, columns=3 if variation else 2)
    arms = [arm for arm in ERROR_ARMS if find(rows, "kvcomm_kv_error", task=task, arm=arm)]
    for panel, part in zip(axes, ("key", "value"), strict=False):
        for number, arm in enumerate(arms):
            own = [r for r in rows if r.metric == "kvcomm_kv_error" and r.context["measure"] == "relative"]
            own = [r for r in own if (r.context["task"], r.context["arm"], r.context["part"]) == (task, arm, part)]
            _line(panel, own, arm, number)
        panel.set(xlabel="layer", ylabel="relative error against dense", title=f"{part.capitalize()}s, {task}")
        panel.set_ylim(bottom=0)
    axes[0].legend(fontsize=8)
    if variation:
        series = [(cause, part) for cause in ("content", "shift") for part in ("key", "value")]
        for number, (cause, part) in enumerate(series):
            own = [r for r in rows if r.metric == "kvcomm_variation"]
            own = [r for r in own if (r.context["cause"], r.context["part"]) == (cause, part)]
            _line(axes[2], own, f"{part}s: other {'text before' if cause == 'content' else 'place'}", number)
        axes[2].set(xlabel="layer", ylabel="relative change", title="One document in another context")
        axes[2].set_ylim(bottom=0)
        axes[2].legend(fontsize=8)
    figure.set_layout_engine("constrained")
    return save(figure, path)


def _line(axes: Any, rows: Sequence[Result], label: str, number: int) -> None:
    layers = [r.context["layer"] for r in rows]
    color, marker = SERIES[number % len(SERIES)], MARKERS[number % len(MARKERS)]
    axes.plot(layers, [r.value for r in rows], color=color, marker=marker, label=label)
    axes.set_xticks(sorted(layers))
    axes.xaxis.set_major_locator(load_matplotlib().ticker.MaxNLocator(integer=True))


def _bars(axes: Any, arms: Sequence[str], values: Sequence[float], color: str) -> None:
    axes.barh(range(len(arms)), values, color=color, height=0.65)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    for place, value in enumerate(values):
        axes.annotate(f" {value:.2g}", (max(value, KL_FLOOR), place), va="center", fontsize=8)
    axes.margins(x=0.18)


def _draw_accuracy(axes: Any, rows: Sequence[Result], arms: Sequence[str]) -> None:
    kinds = [kind for kind in _distinct(rows, "kind") if kind != "all"] or ["all"]
    height = 0.8 / len(kinds)
    for number, kind in enumerate(kinds):
        values = [_value(rows, "kvcomm_accuracy", arm, kind=kind) for arm in arms]
        places = np.arange(len(arms)) - 0.4 + height * (number + 0.5)
        axes.barh(places, values, height, color=SERIES[number % len(SERIES)], label=kind)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(xlabel="share of answers right", xlim=(0, 1.02), title="Accuracy")
    if len(kinds) > 1:
        axes.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14))


def _cells(rows: Sequence[Result], task: str, arm: str) -> list[str]:
    def value(metric: str, form: str, scale: float = 1.0, **context: Any) -> str:
        row = find(rows, metric, task=task, arm=arm, **({"kind": "all"} | context))
        return "" if row is None else form.format(row.value * scale)

    difference = find(rows, "kvcomm_accuracy_difference", task=task, arm=arm, kind="all")
    accuracy = value("kvcomm_accuracy", "{:.3f}")
    if difference is not None and arm != "dense":
        accuracy += f" ({difference.value:+.3f}, {difference.low:+.3f} to {difference.high:+.3f})"
    reuse = find(rows, "kvcomm_reuse", task=task, arm=arm, kind="all", by="calls")
    star = "*" if reuse is not None and reuse.context["by_construction"] else ""
    return [
        arm,
        value("kvcomm_kl", "{:.2g}", tokens="all"),
        value("kvcomm_agreement", "{:.4f}", tokens="all"),
        accuracy,
        value("kvcomm_judge_consistency", "{:.3f}", shuffled=False),
        value("kvcomm_judge_consistency", "{:.3f}", shuffled=True),
        value("kvcomm_reuse", "{:.0%}", by="calls") + star,
        value("kvcomm_reuse", "{:.0%}", by="tokens"),
        value("kvcomm_reuse", "{:.0%}", by="flops"),
        value("kvcomm_ttft", "{:.1f}", 1e3, agent="request", quantile="p50"),
        value("kvcomm_ttft", "{:.1f}", 1e3, agent="request", quantile="p95"),
        value("kvcomm_kept_bytes", "{:.1f}", 2**-20),
    ]


def _value(rows: Sequence[Result], metric: str, arm: str, **context: Any) -> float:
    row = find(rows, metric, arm=arm, **({"kind": "all"} | context))
    return float("nan") if row is None else row.value


def _title(rows: Sequence[Result], task: str) -> str:
    turns = find(rows, "kvcomm_kl", arm="dense", kind="all", tokens="all")
    return f"{rows[0].context['model']}: {task}, {turns.n if turns else 0} agent turns"


def _distinct(rows: Sequence[Result], name: str) -> list[str]:
    return list(dict.fromkeys(r.context[name] for r in rows if name in r.context))

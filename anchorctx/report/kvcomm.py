"""The KVCOMM evaluation as a table and as pictures: closeness to dense, accuracy, reuse, time, memory, cache errors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from anchorctx.records.results import Result
from anchorctx.report.plots import BLUE, GREEN, MARKERS, ORANGE, SERIES, SKY, load_matplotlib, new_figure, save, styled

KL_FLOOR = 1e-8
"""Where bars of a logarithmic KL axis begin, in nats: float32's rounding."""
ERROR_ARMS = ("naive", "rotate", "rotate_glue", "kvcomm_ungated", "mean_offset", "anchored")


def find(rows: Sequence[Result], metric: str, **context: Any) -> Result | None:
    """The latest row of a metric whose context has these entries."""
    found = [r for r in rows if r.metric == metric and context.items() <= r.context.items()]
    return found[-1] if found else None


def reuse_table(rows: Sequence[Result]) -> str:
    """A Markdown table for each model and task: one line an arm."""
    models = _by_model(rows)
    parts = []
    for model, own in models.items():
        parts += [*([f"### {model}"] if len(models) > 1 else []), *_task_tables(own)]
    return "\n\n".join([*parts, "* reuses everything by construction"])


def _by_model(rows: Sequence[Result]) -> dict[str, list[Result]]:
    models = _distinct(rows, "model")
    return {model: [row for row in rows if row.context["model"] == model] for model in models}


def _task_tables(rows: Sequence[Result]) -> list[str]:
    parts = []
    for task in _distinct(rows, "task"):
        head = ["arm", "KL, nat", "agreement", "accuracy (difference to dense, 95 %)", "judge", "judge, shuffled"]
        head += ["reuse: calls", "tokens", "FLOPs", "TTFT p50, ms", "p95", "kept, MiB"]
        lines = [f"**{task}**", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for arm in _distinct([r for r in rows if r.context.get("task") == task], "arm"):
            lines.append("| " + " | ".join(_cells(rows, task, arm)) + " |")
        parts.append("\n".join(lines))
    return parts


def draw_reuse(rows: Sequence[Result], folder: Path) -> list[Path]:
    """All pictures that the rows allow; with several models each one's name is in the files' names."""
    models, drawn = _by_model(rows), []
    for model, own in models.items():
        stem = "kvcomm_" + (re.sub(r"[^\w.-]+", "_", model) + "_" if len(models) > 1 else "")
        tasks = _distinct(own, "task")
        drawn += [reuse_figure(own, task, folder / f"{stem}{task}.png") for task in tasks]
        split = [t for t in tasks if any(find(own, "kvcomm_kv_error", task=t, arm=arm) for arm in ERROR_ARMS)]
        drawn += [error_figure(own, task, folder / f"{stem}{task}_cache.png") for task in split[:1]]
    return drawn


@styled
def reuse_figure(rows: Sequence[Result], task: str, path: Path) -> Path:
    """Divergence, accuracy by kind, consistency of the decision, reuse, time and kept bytes of every arm."""
    own = [r for r in rows if r.context.get("task") == task]
    arms = _distinct(own, "arm")
    scored = find(own, "kvcomm_accuracy") is not None
    figure, axes = new_figure(14 if scored else 10, 2 * (0.9 + 0.27 * len(arms)), columns=3 if scored else 2, rows=2)
    panels = list(axes.flat)
    _draw_divergence(panels[0], own, arms)
    if scored:
        _draw_accuracy(panels[1], own, arms)
        judged = {f"{name} order": {"shuffled": name == "another"} for name in ("the same", "another")}
        _grouped(panels[2], [_series(own, "kvcomm_judge_consistency", arms, label, c) for label, c in judged.items()])
        panels[2].set(xlabel="decisions like dense's", xlim=(0, 1.02), title="Decision agent through the arm")
    reuse, time, memory = panels[-3:]
    _grouped(reuse, [_series(own, "kvcomm_reuse", arms, by, {"by": by}) for by in ("calls", "tokens", "flops")])
    reuse.set(xlabel="share saved (negative: extra work)", title="Reuse")
    _draw_times(time, own, arms)
    _bars(memory, [_value(own, "kvcomm_kept_bytes", arm) / 2**20 for arm in arms], GREEN)
    memory.set(xlabel="MiB kept between requests", title="Memory")
    for number, panel in enumerate(panels):
        panel.set_yticks(range(len(arms)), [] if number % (len(panels) // 2) else arms)
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


def _bars(axes: Any, values: Sequence[float], color: str, least: float = 0.0) -> None:
    axes.barh(range(len(values)), values, color=color, height=0.65)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    for place, value in enumerate(values):
        axes.annotate(f" {value:.2g}", (max(value, least), place), va="center", fontsize=8)
    axes.margins(x=0.18)


def _grouped(axes: Any, series: Sequence[tuple[str, list[float]]]) -> None:
    """Bars side by side for each arm, and a legend below."""
    height = 0.8 / len(series)
    for number, (label, values) in enumerate(series):
        places = np.arange(len(values)) - 0.4 + height * (number + 0.5)
        axes.barh(places, values, height, color=SERIES[number % len(SERIES)], label=label)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    if len(series) > 1:
        axes.legend(
            fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, 0), borderaxespad=5
        )  # under the label


def _series(
    rows: Sequence[Result], metric: str, arms: Sequence[str], label: str, context: dict[str, Any]
) -> tuple[str, list[float]]:
    return label, [_value(rows, metric, arm, **context) for arm in arms]


def _draw_divergence(axes: Any, rows: Sequence[Result], arms: Sequence[str]) -> None:
    _bars(axes, [_value(rows, "kvcomm_kl", arm, tokens="all") for arm in arms], BLUE, KL_FLOOR)
    axes.set_xscale("log")
    axes.set_xlim(left=KL_FLOOR)
    axes.set(xlabel="KL(dense | arm), nats a token", title="Divergence from dense")


def _draw_accuracy(axes: Any, rows: Sequence[Result], arms: Sequence[str]) -> None:
    kinds = [kind for kind in _distinct(rows, "kind") if kind != "all"] or ["all"]
    _grouped(axes, [_series(rows, "kvcomm_accuracy", arms, kind, {"kind": kind}) for kind in kinds])
    axes.set(xlabel="share of answers right", xlim=(0, 1.02), title="Accuracy")


def _draw_times(axes: Any, rows: Sequence[Result], arms: Sequence[str]) -> None:
    p50, p95 = (
        [1e3 * _value(rows, "kvcomm_ttft", arm, agent="request", quantile=q) for arm in arms] for q in ("p50", "p95")
    )
    _bars(axes, p50, SKY)
    axes.plot(p95, range(len(arms)), "|", color=ORANGE, markersize=9, markeredgewidth=2)
    axes.set(xlabel="TTFT of a request, ms (bar p50, line p95)", title="Time, all hidden work in")


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
    problems = find(rows, "kvcomm_kl", arm="dense", kind="all", tokens="all")
    return f"{rows[0].context['model']}: {task}, {problems.n if problems else 0} problems"


def _distinct(rows: Sequence[Result], name: str) -> list[str]:
    return list(dict.fromkeys(r.context[name] for r in rows if name in r.context))

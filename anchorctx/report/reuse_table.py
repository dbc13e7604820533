"""The evaluation of KV reuse as a Markdown table: closeness to dense, accuracy, reuse, time and memory of every arm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from anchorctx.records.results import Result


def find(rows: Sequence[Result], metric: str, **context: Any) -> Result | None:
    """The latest row of a metric whose context has these entries."""
    found = [r for r in rows if r.metric == metric and context.items() <= r.context.items()]
    return found[-1] if found else None


def reuse_table(rows: Sequence[Result]) -> str:
    """A Markdown table for each model and task: one line an arm."""
    models = rows_by_model(rows)
    parts = []
    for model, own in models.items():
        parts += [*([f"### {model}"] if len(models) > 1 else []), *_task_tables(own)]
    return "\n\n".join([*parts, "* reuses everything by construction"])


def rows_by_model(rows: Sequence[Result]) -> dict[str, list[Result]]:
    """Rows of each model, in order of appearance."""
    models = distinct(rows, "model")
    return {model: [row for row in rows if row.context["model"] == model] for model in models}


def _task_tables(rows: Sequence[Result]) -> list[str]:
    parts = []
    for task in distinct(rows, "task"):
        head = ["arm", "KL, nat", "agreement", "accuracy (difference to dense, 95 %)", "judge", "judge, shuffled"]
        head += ["reuse: calls", "tokens", "FLOPs", "TTFT p50, ms", "p95", "kept, MiB"]
        lines = [f"**{task}**", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for arm in distinct([r for r in rows if r.context.get("task") == task], "arm"):
            lines.append("| " + " | ".join(_cells(rows, task, arm)) + " |")
        parts.append("\n".join(lines))
    return parts


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


def distinct(rows: Sequence[Result], name: str) -> list[str]:
    """Values of a name in the rows' context, in order of appearance."""
    return list(dict.fromkeys(r.context[name] for r in rows if name in r.context))

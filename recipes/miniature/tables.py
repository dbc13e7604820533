"""The miniature's tables of means over seeds, each made from a folder's summary; empty where nothing was measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from recipe import arm_of, labels_of
from stage import SHORT
from verdicts import Estimate

if TYPE_CHECKING:
    from summary import Summary

REUSE = ("dense_prefix_cache", "naive", "rotate", "rotate_glue", "kvcomm", "kvcomm_ungated", "mean_offset", "anchored",
         "dense_chunked", "zeroed", "random", "other_request")  # fmt: skip
KINDS = ("single", "two_hop", "override", "absent")
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


def shown(found: Estimate, digits: int = 3) -> str:
    """`mean (low to high)`, as a table's cell; empty without values."""
    if not found.values:
        return ""
    interval = found.interval
    ends = f" ({interval[0]:.{digits}f} to {interval[1]:.{digits}f})" if interval else ""
    return f"{found.mean:.{digits}f}{ends}"


def number(found: Sequence[Estimate]) -> str:
    """How many seeds the estimates of a line have."""
    return str(max(len(estimate.values) for estimate in found))


def table(title: str, head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table under a heading; nothing without lines."""
    if not lines:
        return ""
    rows = [head, ["---"] * len(head), *lines]
    return f"\n### {title}\n\n" + "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def lengths(summary: Summary) -> dict[str, int]:
    """Tokens of each model's rows; a base is asked at the default."""
    recipe = summary.recipe
    rows = {name: recipe["defaults"]["row_length"] for name in recipe["bases"]}
    return rows | {name: arm_of(recipe, name)["row_length"] for name in recipe["arms"]}


def training(summary: Summary) -> str:
    """Retrieval, and short contexts."""
    lines = []
    for model, length in lengths(summary).items():
        found = [summary.mean("retrieval_accuracy", model=model, length=n) for n in (SHORT, length)]
        perplexity = shown(summary.mean("perplexity", model=model), 1)
        if found[1].values:
            lines.append([model, f"{length:,}", *map(shown, found), perplexity, str(len(found[1].values))])
    head = ["model", "row", f"retrieval at {SHORT}", "at the row's length"]
    return table("Retrieval and short contexts", [*head, f"perplexity, documents cut at {SHORT}", "seeds"], lines)


def by_length(summary: Summary) -> str:
    """Retrieval at the lengths between, and perplexity by a token's position in its document."""
    lines, rows = [], summary.rows
    for label in labels_of(summary.recipe, "eval"):
        contexts = [row.context for row in rows.all("perplexity_by_position") if row.context["model"] == label]
        spans = sorted({(c["start"], c["stop"]) for c in contexts})
        lengths = sorted({r.context["length"] for r in rows.all("retrieval_accuracy")
                          if r.context["model"] == label})  # fmt: skip
        answers = [rows.estimate("retrieval_accuracy", model=label, length=n) for n in lengths]
        cells = [f"{n:,}: {shown(estimate)}" for n, estimate in zip(lengths, answers, strict=True)]
        found = [rows.estimate("perplexity_by_position", model=label, start=a, stop=b) for a, b in spans]
        places = [f"{a:,} to {b:,}: {estimate.mean:.1f}" for (a, b), estimate in zip(spans, found, strict=True)]
        if cells:
            lines.append([label, "; ".join(cells), "; ".join(places), number(answers)])
    head = ["model", "retrieval", "perplexity by position, mean", "seeds"]
    return table("Retrieval at other lengths and without BOS, perplexity by position", head, lines)


def depth(summary: Summary) -> str:
    """Needles at the row's length."""
    lines = []
    for model, length in lengths(summary).items():
        found = [summary.mean("needle_accuracy", model=model, length=length, depth=d) for d in DEPTHS]
        if any(estimate.values for estimate in found):
            lines.append([model, *(shown(estimate, 2) for estimate in found), number(found)])
    return table("Needle at the row's length, by depth", ["model", *(f"{d:g}" for d in DEPTHS), "seeds"], lines)


def precision(summary: Summary) -> str:
    """Change of attention under a shift."""
    where = {"weights": "trained", "rows": "shift", "layer": "all", "shift": 16}
    kinds = (("bfloat16", "kept"), ("bfloat16", "hidden"), ("float32_rotation", "kept"))
    lines = []
    for model, longest in lengths(summary).items():
        for length in (SHORT, longest):
            at = where | {"model": model, "length": length}
            cells = [
                summary.mean("precision_attention_change", arithmetic=arithmetic, first=first, **at)
                for arithmetic, first in kinds
            ]
            attention = summary.mean("precision_first_attention", arithmetic="float32", first=None, **at)
            if attention.values:
                lines.append([model, f"{length:,}", *(shown(c, 5) for c in cells), shown(attention, 4), number(cells)])
    head = [
        "model",
        "tokens",
        "change, bfloat16",
        "first token hidden",
        "rotated in float32",
        "attention on it",
        "seeds",
    ]
    return table("Precision: share of attention that a shift by 16 moves", head, lines)


def reuse(summary: Summary) -> str:
    """Arms of KVCOMM against dense."""
    lines = []
    for arm in REUSE:
        for model in labels_of(summary.recipe, "kvcomm"):
            where = {"model": model, "arm": arm, "task": "retrieval"}
            kl = summary.mean("kvcomm_kl", kind="all", tokens="first", **where)
            if not kl.values:
                continue
            kinds = [shown(summary.mean("kvcomm_accuracy_difference", kind=kind, **where)) for kind in KINDS]
            judges = [
                shown(summary.mean("kvcomm_judge_consistency", kind="all", shuffled=s, **where), 2)
                for s in (False, True)
            ]
            lines.append([arm, model, shown(kl, 4), *kinds, *judges, number([kl])])
    head = ["arm", "model", "KL from dense, nats", *(f"{k}: accuracy - dense" for k in KINDS)]
    return table("Reuse of KV caches", [*head, "judge consistent", "shuffled", "seeds"], lines)


def variation(summary: Summary) -> str:
    """How a document's KV depends on what stands before it and where it stands."""
    parts = [(cause, part) for cause in ("content", "shift") for part in ("key", "value")]
    lines = []
    for model in labels_of(summary.recipe, "kvcomm"):
        found = [
            summary.mean("kvcomm_variation", model=model, cause=cause, part=part, layer=1) for cause, part in parts
        ]
        if any(estimate.values for estimate in found):
            lines.append([model, *map(shown, found), number(found)])
    head = ["model", "other prefix: keys", "values", "moved: keys", "values", "seeds"]
    return table("A document's KV in the second layer, relative error", head, lines)


def ruler(summary: Summary) -> str:
    """Without means: it is for one seed."""
    rows = summary.rows.all("lm_eval")
    models, tasks = ([*dict.fromkeys(row.context[key] for row in rows)] for key in ("model", "task"))
    at = {(row.context["model"], row.context["task"]): f"{row.value:.2f} (n={row.n})" for row in rows}
    return table("RULER", ["task", *models], [[task, *(at.get((m, task), "") for m in models)] for task in tasks])


def speed(summary: Summary) -> str:
    """Seconds of a step in turns within one run, and what is saved against `full`; S1 is judged for each length."""
    seconds = {(r.context["length"], r.context["pattern"]): r.value for r in summary.timed("step_seconds")}
    lines = []
    for row in summary.timed("time_saved"):
        length, pattern = row.context["length"], row.context["pattern"]
        if pattern == "anchor":
            summary.judge_saving(row)
        ends = "" if row.low is None else f" ({row.low:.3f} to {row.high:.3f})"
        saved, took = "" if pattern == "full" else f"{row.value:.3f}{ends}", seconds[length, pattern]
        lines.append([f"{length:,}", pattern, f"{took:.3f}", f"{length / took:,.0f}", saved, str(row.n)])
    head = ["row", "pattern", "seconds, median", "tokens/s", "time saved (95 %)", "turns"]
    return table("Time of a step", head, lines)

"""The bfloat16 RoPE study of a checkpoint: verdict, the paper's three figures, layers, training rows, a table."""

from __future__ import annotations

from collections.abc import Sequence

from anchorctx.records.results import Result
from anchorctx.report.blocks import Cell, Figure, Note, Section, Table
from anchorctx.report.charts import Line, line_chart
from anchorctx.report.collect import Material
from anchorctx.report.precision_series import ARITHMETICS, WEIGHTS, Arm, Study
from anchorctx.report.series import check_one_manifest
from anchorctx.report.svg import Axis, number

PREFIX = "precision_"
MOVED = "attention that moves"


def build(material: Material) -> Section | None:
    """None without a precision study."""
    found = studies(material)
    if not found:
        return None
    blocks: list[Figure | Note | Table] = []
    for study in found:
        blocks += _notes(study)
        blocks += _figures(study, f"{study.model}: " if len(found) > 1 else "")
        blocks.append(_table(study))
    lead = (
        "RoPE promises that attention depends on distances alone, so that adding a constant to all positions changes "
        "nothing. Here it is added, and what changes is measured, layer by layer, each fed with the unshifted states. "
        "The first three figures are the paper's (arXiv 2411.13476, section 3), for this model."
    )
    return Section("precision", "RoPE in bfloat16", lead, blocks)


def studies(material: Material) -> list[Study]:
    """One study a model; UserError when one would mix manifests."""
    rows = [row for row in material.rows if row.result.metric.startswith(PREFIX)]
    found = []
    for model in dict.fromkeys(row.model for row in rows if "model" in row.result.context):
        mine = [row for row in rows if row.model == model]
        check_one_manifest(mine, f"the precision study of {model}")
        study = Study(model, [row.result for row in mine])
        if study.by_shift():
            found.append(study)
    return found


def _notes(study: Study) -> list[Note]:
    if study.verdict is None:
        return []
    context = study.verdict.context
    return [Note(text) for text in (context.get("sentence"), context.get("recommendation")) if text]


def _figures(study: Study, prefix: str) -> list[Figure]:
    length, shift = study.length, study.shift
    lengths = sorted({row.context["length"] for arm in study.by_length() for row in arm.rows})
    figures = [
        _figure(f"{prefix}Against the shift", study.by_shift(), Axis("shift of all positions (tokens)", log=10),
                Axis(MOVED, log=10, percent=True),
                f"Share of each query's attention that moves to other keys, at {length:,} tokens. Dashed: "
                "the same architecture with weights drawn anew."),
        _figure(f"{prefix}By token", study.by_key(), Axis("key (1 is the first token)", log=10),
                Axis("change of attention to a key", log=10),
                f"Mean absolute change of the attention to single keys and ranges of keys, at a shift of {shift:,}."),
        _figure(f"{prefix}The first token against length", study.by_length(),
                Axis("row length (tokens)", log=2, ticks=lengths), Axis("change of its score (nats)", log=10),
                f"Mean absolute change of the first token's scaled score, at a shift of {shift:,}."),
        _figure(f"{prefix}All tokens against length", study.by_length("precision_attention_change"),
                Axis("row length (tokens)", log=2, ticks=lengths), Axis(MOVED, log=10, percent=True),
                f"Share of attention that moves, by length, at a shift of {shift:,}."),
        _figure(f"{prefix}By layer", [arm for arm in study.by_layer() if not arm.dashed],
                Axis("layer", ticks=sorted({at for arm in study.by_layer() for at in arm.x})),
                Axis(MOVED, log=10, percent=True), f"The checkpoint's layers, at {length:,} tokens."),
        _figure(f"{prefix}Packed training rows", [arm for arm in study.by_offset() if not arm.dashed],
                Axis("where the document begins (tokens)"), Axis(MOVED, log=10, percent=True),
                "intra_doc against intra_doc_reset: the same rows, where each document is shifted by where it begins."),
    ]  # fmt: skip
    return [figure for figure in figures if figure is not None]


def _figure(title: str, arms: Sequence[Arm], x: Axis, y: Axis, caption: str) -> Figure | None:
    lines = []
    for arm in arms:
        points = [(at, row) for at, row in zip(arm.x, arm.rows, strict=True) if row.value > 0]
        low = [row.low if row.low is not None and row.low > 0 else None for _, row in points]
        high = [row.high for _, row in points]
        values = [row.value for _, row in points]
        lines.append(Line(arm.name, [at for at, _ in points], values, low, high, arm.color, arm.dashed))
    if not any(line.x for line in lines):
        return None
    if len({at for line in lines for at in line.x}) == 1 and x.ticks is None:
        x = Axis(x.label, x.log, ticks=sorted({at for line in lines for at in line.x}))
    return Figure(title, line_chart(lines, x, y, title), caption)


def _table(study: Study) -> Table:
    at = {"rows": "shift", "layer": "all", "shift": study.shift, "length": study.length}
    body = []
    for weights, suffix in WEIGHTS.items():
        for arithmetic, name in ARITHMETICS.items():
            where = at | {"weights": weights, "arithmetic": arithmetic}
            kept = study.value("precision_attention_change", first="kept", **where)
            if kept is None:
                continue
            values = (
                study.value("precision_attention_change", first="hidden", **where),
                study.value("precision_attention_change", first="dropped", **where),
                study.value("precision_first_share", **(where | {"first": None})),
                study.value("precision_first_attention", **(where | {"first": None})),
            )
            spoken = study.value("precision_logprob_change", **{k: v for k, v in where.items() if k != "layer"})
            packed = study.value("precision_attention_change", rows="intra_doc", layer="all", first="kept",
                                 weights=weights, arithmetic=arithmetic)  # fmt: skip
            body.append(
                [Cell(name + suffix, name + suffix), *map(_share, (kept, *values)), _nats(spoken), _share(packed)]
            )
    head = ("arithmetic", "attention that moves", "first token hidden", "first token dropped",
            "first token's share of the change", "its attention", "change of next token's log p (nats)",
            "training rows (intra_doc)")  # fmt: skip
    caption = (
        f"Shift of {study.shift:,} at {study.length:,} tokens. Hidden: its score is left out of the softmax. Dropped: "
        "it is not in the text, another token is first. Of the change no token can have more than 50 %, since what one "
        "loses others gain. The log-probability is after all layers, without feeding them unshifted states."
    )
    return Table(f"{study.model} by arithmetic", head, body, caption)


def _share(row: Result | None) -> Cell:
    return Cell("–") if row is None else Cell(f"{number(100 * row.value, digits=2)} %", row.value)


def _nats(row: Result | None) -> Cell:
    return Cell("–") if row is None else Cell(number(row.value, digits=2), row.value)

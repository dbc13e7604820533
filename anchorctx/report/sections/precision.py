"""The bfloat16 RoPE study of a checkpoint: verdict, the paper's three figures, layers, training rows, a table."""

from __future__ import annotations

from anchorctx.records.results import Result
from anchorctx.report.blocks import Cell, Figure, Note, Section, Table
from anchorctx.report.collect import Material
from anchorctx.report.figures.precision import precision_charts
from anchorctx.report.numbers import number
from anchorctx.report.precision_series import ARITHMETICS, WEIGHTS, Study
from anchorctx.report.series import check_one_manifest

PREFIX = "precision_"


def build(material: Material) -> Section | None:
    """None without a precision study."""
    found = studies(material)
    if not found:
        return None
    blocks: list[Figure | Note | Table] = []
    for study in found:
        blocks += _notes(study)
        prefix = f"{study.model}: " if len(found) > 1 else ""
        blocks += [
            Figure(f"{prefix}{title}", chart, caption) for title, chart, caption in precision_charts(study) if chart
        ]
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

"""The bfloat16 RoPE study of a checkpoint: verdict, the paper's three figures, layers, training rows, a table."""

from __future__ import annotations

from anchorctx.records.results import Result
from anchorctx.report.blocks import MISSING, Block, Cell, Figure, Note, Section, Table, text_cell
from anchorctx.report.collect import Material
from anchorctx.report.figures.precision import CHANGE, Study, precision_charts
from anchorctx.report.numbers import number
from anchorctx.report.series import whole_evaluation

PREFIX = "precision_"


def build(material: Material) -> Section | None:
    """None without a precision study."""
    series = whole_evaluation(material.rows, PREFIX, "the precision study")
    studies = [study for model, rows in series.items() if (study := Study(model, rows)).length]
    if not studies:
        return None
    blocks: list[Block] = []
    for study in studies:
        prefix = f"{study.model}: " if len(studies) > 1 else ""
        blocks += _notes(study)
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


def _notes(study: Study) -> list[Note]:
    if study.verdict is None:
        return []
    context = study.verdict.context
    return [Note(text) for text in (context.get("sentence"), context.get("recommendation")) if text]


def _table(study: Study) -> Table:
    rows, at = study.rows, {"shift": study.shift, "length": study.length}
    body = []
    for name, arm in study.arms():
        whole = arm | at | {"rows": "shift", "layer": "all"}
        kept = rows.find(CHANGE, first="kept", **whole)
        if kept is None:
            continue
        shares = (
            kept,
            rows.find(CHANGE, first="hidden", **whole),
            rows.find(CHANGE, first="dropped", **whole),
            # None: not the rows of texts whose first token was dropped, where another token is first.
            rows.find("precision_first_share", first=None, **whole),
            rows.find("precision_other_share", first=None, **whole),  # missing in older studies
            rows.find("precision_first_attention", first=None, **whole),
        )
        # Of the whole model rather than of layers; and, last, of a training row, where the main shift has no meaning.
        spoken = rows.find("precision_logprob_change", rows="shift", **arm, **at)
        packed = rows.find(CHANGE, rows="intra_doc", layer="all", first="kept", **arm)
        body.append([text_cell(name), *map(_share, shares), _nats(spoken), _share(packed)])
    head = ("arithmetic", "attention that moves", "first token hidden", "first token dropped",
            "first token's share of the change", "largest share of another", "first token's attention",
            "change of next token's log p (nats)", "training rows (intra_doc)")  # fmt: skip
    caption = (
        f"Shift of {study.shift:,} at {study.length:,} tokens. Hidden: its score is left out of the softmax. Dropped: "
        "it is not in the text, another token is first. Of the change no token can have more than 50 %, since what one "
        f"loses others gain; an even share is {number(1 / study.length, percent=True, digits=2)}. The log-probability "
        "is after all layers, without feeding them unshifted states."
    )
    return Table(f"{study.model} by arithmetic", head, body, caption)


def _share(row: Result | None) -> Cell:
    # Two digits, however small: a fixed number of decimals would show float32's errors as 0.
    return MISSING if row is None else Cell(number(row.value, percent=True, digits=2), row.value)


def _nats(row: Result | None) -> Cell:
    return MISSING if row is None else Cell(number(row.value, digits=2), row.value)

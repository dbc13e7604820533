"""The precision study's charts; the first three are the paper's (arXiv 2411.13476, section 3) and `precision.png`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from anchorctx.report.figures.axes import Axis
from anchorctx.report.figures.chart import Chart, save_charts
from anchorctx.report.figures.charts import Line, line_chart
from anchorctx.report.precision_series import Arm, Study

MOVED = Axis("attention that moves", log=10, percent=True)


def precision_figure(study: Study, path: Path) -> Path:
    """Draw the change against the shift, by token, and the first token's against the length; returns `path`."""
    titles = (f"Against the shift, {study.length:,} tokens", f"By token, shift of {study.shift:,}",
              f"The first token, shift of {study.shift:,}")  # fmt: skip
    charts = [chart for _, chart, _ in precision_charts(study)[:3]]
    return save_charts([(t, c) for t, c in zip(titles, charts, strict=True) if c is not None], path, study.model)


def precision_charts(study: Study) -> list[tuple[str, Chart | None, str]]:
    """Title, chart (None where nothing was measured) and caption of each figure."""
    length, shift = study.length, study.shift
    trained = [[arm for arm in arms if not arm.dashed] for arms in (study.by_layer(), study.by_offset())]
    rows = Axis("row length (tokens)", log=2, ticks=_places(study.by_length()))
    score, key = Axis("change of its score (nats)", log=10), Axis("change of attention to a key", log=10)
    figures = (
        ("Against the shift", study.by_shift(), Axis("shift of all positions (tokens)", log=10), MOVED,
         f"Share of each query's attention that moves to other keys, at {length:,} tokens. Dashed: the same "
         "architecture with weights drawn anew."),
        ("By token", study.by_key(), Axis("key (1 is the first token)", log=10), key,
         f"Mean absolute change of the attention to single keys and ranges of keys, at a shift of {shift:,}."),
        ("The first token against length", study.by_length(), rows, score,
         f"Mean absolute change of the first token's scaled score, at a shift of {shift:,}."),
        ("All tokens against length", study.by_length("precision_attention_change"), rows, MOVED,
         f"Share of attention that moves, by length, at a shift of {shift:,}."),
        ("By layer", trained[0], Axis("layer", ticks=_places(study.by_layer())), MOVED,
         f"The checkpoint's layers, at {length:,} tokens."),
        ("Packed training rows", trained[1], Axis("where the document begins (tokens)"), MOVED,
         "intra_doc against intra_doc_reset: the same rows, where each document is shifted by where it begins."),
    )  # fmt: skip
    return [(title, _chart(title, arms, x, y), caption) for title, arms, x, y, caption in figures]


def _chart(title: str, arms: Sequence[Arm], x: Axis, y: Axis) -> Chart | None:
    lines = []
    for arm in arms:
        rows = [(at, row) for at, row in zip(arm.x, arm.rows, strict=True) if row.value > 0]  # a logarithm has no 0
        low = [row.low if row.low is not None and row.low > 0 else None for _, row in rows]
        ends = low, [row.high for _, row in rows]
        values = [row.value for _, row in rows]
        lines.append(Line(arm.name, [at for at, _ in rows], values, *ends, color=arm.color, dashed=arm.dashed))
    places = sorted({at for line in lines for at in line.x})
    if len(places) == 1 and x.ticks is None:
        x = Axis(x.label, x.log, ticks=places)
    return line_chart(lines, x, y, title) if places else None


def _places(arms: Sequence[Arm]) -> list[float]:
    return sorted({at for arm in arms for at in arm.x})

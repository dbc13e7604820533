"""The precision study's lines and charts, for the page and for `precision.png`.

The first three figures are the paper's (arXiv 2411.13476, section 3): the change of attention against the shift, the
change by token, and the first token's change against the length.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anchorctx.records.results import Result, Rows
from anchorctx.report.figures.chart import Axis, Chart, save_charts
from anchorctx.report.figures.charts import Line, line_chart
from anchorctx.report.figures.curves import result_line, ticks

CHANGE = "precision_attention_change"
ARITHMETICS = {"bfloat16": "bfloat16", "float32_rotation": "float32 rotation", "float32": "float32"}
COLORS = {"bfloat16": 2, "float32_rotation": 1, "float32": 3}
CONTROL = "control"
WEIGHTS = {"trained": "", CONTROL: ", weights drawn anew"}
"""What is added to an arithmetic's name."""
MOVED = Axis("attention that moves", log=10, percent=True)


@dataclass(frozen=True, slots=True)
class Study:
    """One model's rows of a precision study."""

    model: str
    rows: Rows

    @property
    def length(self) -> int:
        """The longest row, in tokens; 0 where no change of attention was measured."""
        return max((row.context["length"] for row in self.rows.of(CHANGE)), default=0)

    @property
    def shift(self) -> int:
        """The main shift, in tokens: the one that single keys were measured at."""
        return next((row.context["shift"] for row in self.rows.of("precision_key_change")), 0)

    @property
    def verdict(self) -> Result | None:
        """The closing row; None where the study has none yet."""
        return self.rows.find("precision_verdict")

    def arms(self) -> Iterator[tuple[str, dict[str, str]]]:
        """Name, and entries of the context, of each arithmetic of the checkpoint, then of the control."""
        for weights, suffix in WEIGHTS.items():
            for arithmetic, name in ARITHMETICS.items():
                yield name + suffix, {"weights": weights, "arithmetic": arithmetic}

    def lines(self, metric: str, x: str, control: bool = True, **where: Any) -> list[Line]:
        """A line for each arm that was measured: the metric against the number `x` of the context.

        `where` chooses rows by their context. The control's lines are dashed, or left out.
        """
        lines = []
        for name, arm in self.arms():
            # `layer` is a word for the mean over layers; values of 0 have no place on a logarithmic axis.
            rows = [r for r in self.rows.of(metric, **arm, **where) if _is_number(r.context[x]) and r.value > 0]
            if rows and (control or arm["weights"] != CONTROL):
                line = result_line(name, rows, x, COLORS[arm["arithmetic"]])
                low = [end if end is not None and end > 0 else None for end in line.low]
                lines.append(dataclasses.replace(line, low=low, dashed=arm["weights"] == CONTROL))
        return lines


def precision_figure(study: Study, path: Path) -> Path:
    """Draw the change against the shift, by token, and the first token's against the length; returns `path`."""
    titles = (f"Against the shift, {study.length:,} tokens", f"By token, shift of {study.shift:,}",
              f"The first token, shift of {study.shift:,}")  # fmt: skip
    charts = [chart for _, chart, _ in precision_charts(study)[:3]]
    return save_charts([(t, c) for t, c in zip(titles, charts, strict=True) if c is not None], path, study.model)


def precision_charts(study: Study) -> list[tuple[str, Chart | None, str]]:
    """Title, chart (None where nothing was measured) and caption of each figure."""
    length, shift = study.length, study.shift
    whole: dict[str, Any] = {"rows": "shift", "layer": "all"}
    by_shift = study.lines(CHANGE, "shift", **whole, first="kept", length=length)
    by_key = study.lines("precision_key_change", "key_start", **whole, length=length, control=False)
    # The axis is logarithmic: key 0 is drawn at 1.
    by_key = [dataclasses.replace(line, x=[x + 1 for x in line.x]) for line in by_key]
    # first=None leaves out the texts whose first token was dropped: there another token is first.
    first = study.lines("precision_first_score_change", "length", **whole, shift=shift, first=None)
    everywhere = study.lines(CHANGE, "length", **whole, shift=shift, first="kept")
    by_layer = study.lines(CHANGE, "layer", rows="shift", first="kept", shift=shift, length=length, control=False)
    by_offset = study.lines("precision_offset_change", "start", rows="intra_doc", control=False)
    lengths = Axis("row length (tokens)", log=2, ticks=ticks(first))
    figures = (
        ("Against the shift", by_shift, Axis("shift of all positions (tokens)", log=10), MOVED,
         f"Share of each query's attention that moves to other keys, at {length:,} tokens. Dashed: the same "
         "architecture with weights drawn anew."),
        ("By token", by_key, Axis("key (1 is the first token)", log=10), Axis("change of attention to a key", log=10),
         f"Mean absolute change of the attention to single keys and ranges of keys, at a shift of {shift:,}."),
        ("The first token against length", first, lengths, Axis("change of its score (nats)", log=10),
         f"Mean absolute change of the first token's scaled score, at a shift of {shift:,}."),
        ("All tokens against length", everywhere, lengths, MOVED,
         f"Share of attention that moves, by length, at a shift of {shift:,}."),
        ("By layer", by_layer, Axis("layer", ticks=ticks(by_layer)), MOVED,
         f"The checkpoint's layers, at {length:,} tokens."),
        ("Packed training rows", by_offset, Axis("where the document begins (tokens)"), MOVED,
         "intra_doc against intra_doc_reset: the same rows, where each document is shifted by where it begins."),
    )  # fmt: skip
    return [(title, _chart(title, lines, x, y), caption) for title, lines, x, y, caption in figures]


def _chart(title: str, lines: Sequence[Line], x: Axis, y: Axis) -> Chart | None:
    places = ticks(lines)
    if len(places) == 1 and x.ticks is None:
        x = dataclasses.replace(x, ticks=places)  # round values may all lie beside the only point
    return line_chart(lines, x, y, title) if places else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)

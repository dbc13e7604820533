"""A report in Weights & Biases: each of its figures as an image, each of its tables as a table.

It is a W&B run of its own, of the job type `report`, and names the training runs that it is about. Were it added to one
of those, an upload of the training's offline folder would take it away again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anchorctx.records.wandb_run import start_wandb
from anchorctx.report.blocks import Cell, Figure, Section, Table
from anchorctx.report.collect import Material
from anchorctx.report.config import ReportConfig
from anchorctx.report.figures.chart import save_charts

RUN_ID = "wandb_run_id"
"""The file in a training run's folder that holds its id at W&B."""


def send_report(config: ReportConfig, title: str, sections: Sequence[Section], material: Material) -> None:
    """Send everything at once; UserError when W&B does not start."""
    import wandb

    out = Path(config.out)
    ids = {run.label: path.read_text().strip() for run in material.runs if (path := run.place.path / RUN_ID).is_file()}
    run = start_wandb(
        config.wandb,
        "wandb",
        entity=config.entity,
        project=config.project,
        group=config.group,
        name=title,
        job_type="report",
        dir=str(out.parent),
        config={"folders": [str(place.path) for place in material.places], "runs": ids},
    )
    sent: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:  # W&B takes a copy
        for section in sections:
            for number, block in enumerate(section.blocks):
                name = f"{section.title}/{number + 1} {getattr(block, 'title', '')}"
                if isinstance(block, Figure):
                    path = save_charts([(block.title, block.chart)], Path(folder) / f"{section.id}_{number}.png")
                    sent[name] = wandb.Image(str(path), caption=block.caption)
                elif isinstance(block, Table):
                    sent[name] = wandb.Table(columns=list(block.head), data=_data(block))
        run.log(sent)
        run.finish()


def _data(table: Table) -> list[Any]:
    """What a row's cells sort by: a number where there is one; the text of a number's interval is left behind."""
    return [[_value(cell, table.numeric(column)) for column, cell in enumerate(row)] for row in table.rows]


def _value(cell: Cell, numeric: bool) -> float | str | None:
    # A column of W&B's has one type.
    if numeric:
        return float(cell.sort) if isinstance(cell.sort, int | float) else None
    return cell.text

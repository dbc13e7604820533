"""`anchorctx plot`: metrics, results and a packed row in, PNG files out."""

from __future__ import annotations

from pathlib import Path

from anchorctx.errors import UserError
from anchorctx.layout import PackedLayout
from anchorctx.records.results import read_results
from anchorctx.report.collect import METRICS, read_metrics
from anchorctx.report.config import PlotConfig
from anchorctx.report.figures.curves import loss_figure, retrieval_figure
from anchorctx.report.figures.pattern import pattern_figure


def plot(config: PlotConfig, layout: PackedLayout | None) -> list[Path]:
    """Draw every picture that the configuration asks for; `layout` is the packed row's. Returns the files.

    Raises UserError when there is nothing to draw or an input is missing or unreadable.
    """
    out = Path(config.out_dir)
    if layout is None and config.run is None and not config.results:
        raise UserError("nothing to draw: give run=..., results=[...] or packed=...")
    out.mkdir(parents=True, exist_ok=True)
    # A refusal further down leaves the pictures that were drawn before it.
    drawn = []
    if config.run is not None:
        path = Path(config.run) / METRICS
        if not path.is_file():
            raise UserError(f"run={config.run} has no {METRICS}: name the out_dir of a training run")
        drawn.append(loss_figure(read_metrics(path), out / "loss.png"))
    if config.results:
        rows = [row for name in config.results for row in read_results(Path(name))]
        drawn.append(retrieval_figure(rows, out / "retrieval.png", config.pretraining_length))
    if layout is not None:
        drawn.append(pattern_figure(config.pattern.apply(layout), out / "pattern.png"))
    return drawn

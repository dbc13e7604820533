"""`anchorctx precision`: does bfloat16 break RoPE on a checkpoint, and does float32 rotation mend it?"""

from __future__ import annotations

from pathlib import Path

from anchorctx.cli.configured import configuration
from anchorctx.cli.main import Arguments

EXAMPLE = "anchorctx precision model=exported out_dir=precision 'lengths=[1024, 4096, 16384]'"


def run(arguments: Arguments) -> None:
    """Study a model; prints a table and the verdict, and writes results.jsonl and precision.png."""
    config = configuration("precision", arguments, EXAMPLE)
    if config is None:
        return
    from anchorctx.evals.commands import evaluate_precision
    from anchorctx.evals.distribute import is_first
    from anchorctx.evals.evaluators.precision.verdict import table
    from anchorctx.records.results import Rows
    from anchorctx.report.figures.precision import Study, precision_figure

    rows = evaluate_precision(config)
    if not is_first():
        return
    print(table(rows))
    figure = precision_figure(Study(rows[-1].context["model"], Rows(rows)), Path(config.out_dir) / "precision.png")
    print(f"\ndrawn: {figure}; for a page with all figures: anchorctx report {config.out_dir}")

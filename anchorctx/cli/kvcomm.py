"""`anchorctx kvcomm`: how well agents that run a checkpoint reuse each other's KV caches; exits 1 if the gate fails."""

from __future__ import annotations

from pathlib import Path

from anchorctx.cli.configured import configuration
from anchorctx.cli.main import Arguments

EXAMPLE = """\
anchorctx kvcomm model=exported out_dir=reuse
anchorctx kvcomm model=exported out_dir=gate 'tasks=[retrieval]' 'arms=[rotate_glue]' gate.arm=rotate_glue"""


def run(arguments: Arguments) -> int:
    """Evaluate, print the table, draw; 0, or 1 when the gate's arm is beyond its bounds."""
    config = configuration("kvcomm", arguments, EXAMPLE)
    if config is None:
        return 0
    from anchorctx.evals.commands import evaluate_reuse
    from anchorctx.evals.distribute import is_first
    from anchorctx.report.figures.reuse import draw_reuse
    from anchorctx.report.sections.reuse import reuse_table

    outcome = evaluate_reuse(config)
    verdict = outcome.verdict
    if is_first():
        table, out = reuse_table(outcome.rows), Path(config.out_dir)
        (out / "kvcomm.md").write_text(table + "\n")
        print(f"\n{table}\n")
        for path in draw_reuse(outcome.rows, out):
            print(f"drawn: {path}")
        if verdict is not None:
            print(verdict.text)
    return 0 if verdict is None or verdict.passed else 1

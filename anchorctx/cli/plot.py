"""`anchorctx plot`: pictures of runs, evaluations and packed rows."""

from __future__ import annotations

import statistics

from anchorctx.cli.configured import configuration
from anchorctx.cli.main import Arguments
from anchorctx.errors import UserError

EXAMPLE = (
    "anchorctx plot out_dir=plots run=runs/mine packed=packed 'results=[before/results.jsonl, after/results.jsonl]'"
)


def run(arguments: Arguments) -> None:
    """Draw, and print what was drawn."""
    config = configuration("plot", arguments, EXAMPLE)
    if config is None:
        return
    from anchorctx.data.packed_set import PackedSet
    from anchorctx.report.plot import plot

    layout = None
    if config.packed is not None:
        packed = PackedSet.open(config.packed, verify=False)
        row = typical_row(packed.row_documents.tolist()) if config.row is None else config.row
        if not 0 <= row < len(packed):
            raise UserError(f"row={row} is not in the packed set, which has {len(packed)} rows: give 0 or more")
        layout = packed.row(row).layout
    for path in plot(config, layout):
        print(f"drawn: {path}")


def typical_row(documents: list[int]) -> int:
    """The first row whose number of documents is nearest to the mean."""
    mean = statistics.fmean(documents)
    return min(range(len(documents)), key=lambda row: abs(documents[row] - mean))

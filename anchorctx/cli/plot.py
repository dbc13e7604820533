"""`anchorctx plot`: pictures of runs, evaluations and packed rows."""

from __future__ import annotations

import sys

from anchorctx.cli.configured import configuration
from anchorctx.cli.main import Arguments, main
from anchorctx.errors import UserError

EXAMPLE = (
    "anchorctx plot out_dir=plots run=runs/mine packed=packed 'results=[before/results.jsonl, after/results.jsonl]'"
)


def run(arguments: Arguments) -> None:
    """Draw, and print what was drawn."""
    config = configuration("plot", arguments, EXAMPLE)
    if config is None:
        return
    from anchorctx.data.shards import PackedSet
    from anchorctx.report.render import render

    layout = None
    if config.packed is not None:
        packed = PackedSet.open(config.packed, verify=False)
        if not 0 <= config.row < len(packed):
            raise UserError(f"row={config.row} is not in the packed set, which has {len(packed)} rows: give 0 or more")
        layout = packed.row(config.row).layout
    for path in render(config, layout):
        print(f"drawn: {path}")


if __name__ == "__main__":
    sys.exit(main(["plot", *sys.argv[1:]]))

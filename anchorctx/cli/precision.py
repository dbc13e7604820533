"""`anchorctx precision`: does bfloat16 break RoPE on a checkpoint, and does float32 rotation mend it?"""

from __future__ import annotations

import sys

from anchorctx.cli.configured import configuration
from anchorctx.cli.main import Arguments, main

EXAMPLE = "anchorctx precision model=exported out_dir=precision 'lengths=[1024, 4096, 16384]'"


def run(arguments: Arguments) -> None:
    """Study a model; prints a table and the verdict, and writes results.jsonl and precision.png."""
    config = configuration("precision", arguments, EXAMPLE)
    if config is None:
        return
    from anchorctx.evals.precision.study import study
    from anchorctx.evals.precision.table import table

    rows = study(config)
    print(table(rows))


if __name__ == "__main__":
    sys.exit(main(["precision", *sys.argv[1:]]))

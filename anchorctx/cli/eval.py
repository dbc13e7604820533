"""`anchorctx eval`: what a Hugging Face folder is worth."""

from __future__ import annotations

import sys

from anchorctx.cli.configured import configuration
from anchorctx.cli.main import Arguments, main

EXAMPLE = "anchorctx eval model=exported out_dir=results 'evals=[perplexity]'"


def run(arguments: Arguments) -> None:
    """Evaluate a model and write `results.jsonl`."""
    config = configuration("eval", arguments, EXAMPLE)
    if config is None:
        return
    from anchorctx.evals.runner import evaluate

    evaluate(config)


if __name__ == "__main__":
    sys.exit(main(["eval", *sys.argv[1:]]))

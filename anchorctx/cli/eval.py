"""`anchorctx eval`, also `torchrun --nproc_per_node N -m anchorctx eval`: what Hugging Face folders are worth."""

from __future__ import annotations

from collections.abc import Sequence

from anchorctx.cli.configured import configuration
from anchorctx.cli.main import Arguments, former_entry
from anchorctx.records.results import Result
from anchorctx.records.table import text_table

EXAMPLE = """\
anchorctx eval model=exported out_dir=results 'evals=[perplexity,needle]'
anchorctx eval 'model=[base,exported]' out_dir=results 'evals=[ruler]' 'ruler.lengths=[8192,32768]' ruler.limit=50
torchrun --nproc_per_node 8 -m anchorctx eval model=exported out_dir=results \\
    'evals=[lm_eval]' 'lm_eval.tasks=[mmlu,hellaswag]' lm_eval.batch_size=8"""


def run(arguments: Arguments) -> None:
    """Evaluate models, write `results.jsonl` and print what it says of them."""
    config = configuration("eval", arguments, EXAMPLE)
    if config is None:
        return
    from anchorctx.evals.distribute import is_first
    from anchorctx.evals.runner import evaluate

    rows = evaluate(config)
    if is_first():
        print("\n".join(table(rows)))
        print(f"\nwritten to {config.out_dir}/results.jsonl")


def table(rows: Sequence[Result]) -> list[str]:
    """A line for every number, a column for every model; each with half its 95 % interval."""
    models = list(dict.fromkeys(row.model for row in rows))
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        cells.setdefault(_what(row), {})[row.model] = _cell(row)
    lines = ([what, *(line.get(model, "") for model in models)] for what, line in cells.items())
    return text_table([["", *models], *lines], "<>")


def _what(row: Result) -> str:
    return " ".join([row.metric, *map(str, row.where.values())]) + ("" if row.unit == "1" else f" ({row.unit})")


def _cell(row: Result) -> str:
    if row.low is None or row.high is None:
        return f"{row.value:.4g}"
    return f"{row.value:.4g} ± {(row.high - row.low) / 2:.2g}"


if __name__ == "__main__":
    former_entry("eval")

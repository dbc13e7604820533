"""What the quickstart made, where it lies, and what to try next.

python recipes/quickstart/summary.py OUT SECONDS
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

from anchorctx.records.results import Result, read_results


def main(out: Path, seconds: int) -> None:
    """Print the summary of a finished quickstart."""
    rows: dict[str, list[Result]] = {}
    for row in read_results(out / "eval" / "results.jsonl"):
        rows.setdefault(row.context["model"], []).append(row)
    metrics = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    speed = [row["perf/tokens_per_second"] for row in metrics if "perf/tokens_per_second" in row]
    saved = [row["perf/attention_flops_saved"] for row in metrics if "perf/attention_flops_saved" in row]
    lengths = [row.context["length"] for row in rows["after"] if row.metric == "retrieval_accuracy"]
    print(f"\ndone in {seconds // 60} min {seconds % 60} s")
    print(f"\n{'held out':<24}{'perplexity':>11}   retrieval at" + "".join(f"{length:>9,}" for length in lengths))
    for model, found in rows.items():
        accuracy = "".join(f"{row.value:>9.3f}" for row in found if row.metric == "retrieval_accuracy")
        print(f"{model:<24}{perplexity(found):>11.1f}" + " " * 15 + accuracy)
    print(
        f"\ntraining: {statistics.median(speed):,.0f} tokens/s (median of {len(speed)} steps), "
        f"{statistics.mean(saved):.0%} of full attention's operations not needed"
    )
    print("\nmade:")
    for path, what in (
        ("report.html", "one page with all of this: open it in a browser"),
        ("exported", "the model: AutoModelForCausalLM.from_pretrained loads it"),
        ("plots/retrieval.png", "retrieval accuracy against context length"),
        ("plots/loss.png", "training and validation loss"),
        ("plots/pattern.png", "what the tokens of one packed row may see"),
        ("run/metrics.jsonl", "every step's metrics"),
        ("run/checkpoints", "checkpoints; the same command resumes from them"),
    ):
        print(f"  {out / path!s:<36} {what}")
    print("\nnext: the same rows with full attention, to compare")
    print(f"  OUT={out}_full bash recipes/quickstart/run.sh pattern=full")


def perplexity(rows: list[Result]) -> float:
    """The perplexity among a model's results."""
    return next(row.value for row in rows if row.metric == "perplexity")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

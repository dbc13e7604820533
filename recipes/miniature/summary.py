"""Tables, verdicts and pictures of a miniature's folder, from the rows that its stages wrote.

    python recipes/miniature/summary.py RECIPE.yaml OUT

Writes OUT/summary/tables.md, results.jsonl (means over seeds, one row a claim), *.png, and prints the tables. Whatever
was not measured yet is left out, so it can be run at any time.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from claims import CLAIMS
from figures import claims_figure, reuse_figure, trained_figure
from verdicts import Estimate, Rows

from anchorctx.manifest import build_manifest, read_json, write_manifest
from anchorctx.results import FILE, Result, append_results

REUSE = ("dense_prefix_cache", "naive", "rotate", "rotate_glue", "kvcomm", "kvcomm_ungated", "mean_offset", "anchored",
         "dense_chunked", "zeroed", "random", "other_request")  # fmt: skip
FIGURES = {"mean_retrieval_accuracy": trained_figure, "mean_kvcomm_kl": reuse_figure, "claim": claims_figure}
"""What is drawn where rows of a metric are there."""
KINDS = ("single", "two_hop", "override", "absent")


def shown(found: Estimate, digits: int = 3) -> str:
    """`mean (low to high)`, as a table's cell; empty without values."""
    if not found.values:
        return ""
    interval = found.interval
    ends = f" ({interval[0]:.{digits}f} to {interval[1]:.{digits}f})" if interval else ""
    return f"{found.mean:.{digits}f}{ends}"


def table(title: str, head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table under a heading; nothing without lines."""
    if not lines:
        return ""
    rows = [head, ["---"] * len(head), *lines]
    return f"\n### {title}\n\n" + "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


class Summary:
    """What one folder holds."""

    def __init__(self, recipe: dict[str, Any], out: Path) -> None:
        self.recipe, self.rows, self.out = recipe, Rows.of(out, recipe["seeds"]), out
        self.models = ["base", *recipe["arms"]]
        self.results: list[Result] = []

    def mean(self, metric: str, **context: Any) -> Estimate:
        """Over seeds, and remembered as a result row."""
        found = self.rows.estimate(metric, **context)
        if found.values:
            low, high = found.interval or (None, None)
            options: dict[str, Any] = {"low": low, "high": high, "context": context | {"values": list(found.values)}}
            self.results.append(
                Result(metric=f"mean_{metric}", value=found.mean, unit="1", n=len(found.values), **options)
            )
        return found

    def tables(self) -> Iterator[str]:
        """One after the other."""
        yield self._claims()
        yield self._training()
        yield self._depth()
        yield self._precision()
        yield self._reuse()
        yield self._variation()
        yield self._time()

    def _claims(self) -> str:
        lines = []
        for claim in CLAIMS:
            found = claim.estimate(self.rows)
            low, high = found.interval or (None, None)
            answer = found.answer(claim.margin)
            if found.values:
                context = {"claim": claim.name, "answer": answer, "margin": claim.margin, "values": list(found.values)}
                options: dict[str, Any] = {"low": low, "high": high, "context": context}
                self.results.append(Result(metric="claim", value=found.mean, unit="1", n=len(found.values), **options))
            cell = shown(found) or "not measured"
            lines.append([claim.name, claim.says, cell, f"{claim.margin:.3f}", str(len(found.values)), answer])
        return table("Claims", ["", "claim", "effect (95 %)", "margin", "seeds", "answer"], lines)

    def _training(self) -> str:
        lengths = self.recipe["evaluation"]["lengths"]
        lines = []
        for model in self.models:
            cells = [shown(self.mean("retrieval_accuracy", model=model, length=n)) for n in lengths]
            perplexity = shown(self.mean("perplexity", model=model), 1)
            seeds = len(self.rows.estimate("retrieval_accuracy", model=model, length=lengths[-1]).values)
            if any(cells):
                lines.append([model, *cells, perplexity, str(seeds)])
        head = ["model", *(f"retrieval at {n:,}" for n in lengths), "perplexity, documents cut at 512", "seeds"]
        return table("Retrieval and short contexts", head, lines)

    def _depth(self) -> str:
        depths, length = (0.0, 0.25, 0.5, 0.75, 1.0), self.recipe["row_length"]
        lines = []
        for model in self.models:
            cells = [shown(self.mean("needle_accuracy", model=model, length=length, depth=d), 2) for d in depths]
            if any(cells):
                lines.append([model, *cells])
        return table(f"Needle at {length:,} tokens, by depth", ["model", *(f"{d:g}" for d in depths)], lines)

    def _precision(self) -> str:
        where = {"weights": "trained", "rows": "shift", "layer": "all", "shift": 16}
        lines = []
        for model in self.models:
            for length in (512, self.recipe["row_length"]):
                at = where | {"model": model, "length": length}
                cells = [
                    self.mean("precision_attention_change", arithmetic=arithmetic, first=first, **at)
                    for arithmetic, first in (
                        ("bfloat16", "kept"),
                        ("bfloat16", "hidden"),
                        ("float32_rotation", "kept"),
                    )
                ]
                attention = self.mean("precision_first_attention", arithmetic="float32", **at)
                if attention.values:
                    lines.append([model, f"{length:,}", *(shown(c, 5) for c in cells), shown(attention, 4)])
        head = ["model", "tokens", "change, bfloat16", "first token hidden", "rotated in float32", "attention on it"]
        return table("Precision: share of attention that a shift by 16 moves", head, lines)

    def _reuse(self) -> str:
        lines = []
        for arm in REUSE:
            for model in self.recipe["kvcomm"]["models"]:
                where = {"model": model, "arm": arm, "task": "retrieval"}
                kl = self.mean("kvcomm_kl", kind="all", tokens="first", **where)
                if not kl.values:
                    continue
                kinds = [shown(self.mean("kvcomm_accuracy_difference", kind=kind, **where)) for kind in KINDS]
                judges = [
                    shown(self.mean("kvcomm_judge_consistency", kind="all", shuffled=s, **where), 2)
                    for s in (False, True)
                ]
                lines.append([arm, model, shown(kl, 4), *kinds, *judges])
        head = ["arm", "model", "KL from dense, nats", *(f"{k}: accuracy - dense" for k in KINDS)]
        return table("Reuse of KV caches", [*head, "judge consistent", "shuffled"], lines)

    def _variation(self) -> str:
        lines = []
        for model in self.recipe["kvcomm"]["models"]:
            cells = [
                shown(self.mean("kvcomm_variation", model=model, cause=cause, part=part, layer=1))
                for cause in ("content", "shift")
                for part in ("key", "value")
            ]
            if any(cells):
                lines.append([model, *cells])
        head = ["model", "other prefix: keys", "values", "moved: keys", "values"]
        return table("A document's KV in the second layer, relative error", head, lines)

    def _time(self) -> str:
        kinds: dict[str, list[float]] = {}
        for path in sorted((self.out / "done").glob("*.json")):
            kinds.setdefault(path.name.split(".")[0], []).append(read_json(path)["seconds"])
        lines = [
            [kind, str(len(s)), f"{min(s):.0f} to {max(s):.0f}", f"{sum(s) / 60:.1f}"] for kind, s in kinds.items()
        ]
        return table("Time", ["stage", "number", "seconds each, on one core", "minutes in all"], lines)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("recipe", type=Path, help="YAML file of the recipe")
    parser.add_argument("out", type=Path, help="folder of the run")
    options = parser.parse_args(arguments)
    recipe = yaml.safe_load(options.recipe.read_text())
    summary, folder = Summary(recipe, options.out), options.out / "summary"
    text = "".join(summary.tables()).lstrip()
    stamp = write_manifest(folder, build_manifest("miniature", recipe))
    (folder / FILE).unlink(missing_ok=True)
    append_results(folder / FILE, [dataclasses.replace(row, manifest=stamp) for row in summary.results])
    (folder / "tables.md").write_text(text)
    measured = {row.metric for row in summary.results}
    for metric, draw in FIGURES.items():
        if metric in measured:
            draw(summary.results, folder)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Tables, claims and pictures of a run: `PYTHONPATH=recipes python -m smollm2.summary RECIPE.yaml OUT`.

Writes OUT/summary/tables.md, results.jsonl (a row a claim), claims.png, gains.png, and OUT/report.html. Whatever
was not measured yet is left out, so it can be run at any time.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chain.claims_figure import claims_figure
from smollm2.claims import CLAIMS, losses, results
from smollm2.stages import BASES, read_recipe

from anchorctx.cli.main import main as anchorctx
from anchorctx.errors import UserError
from anchorctx.records.manifest import build_manifest, read_json, write_manifest
from anchorctx.records.results import FILE, Result, Rows, append_results, read_results
from anchorctx.report.figures.chart import Axis, save_charts
from anchorctx.report.figures.charts import Line, line_chart
from anchorctx.report.figures.curves import ticks


def rows_of(out: Path, recipe: Mapping[str, Any]) -> list[Rows]:
    """What was measured, by seed; the checkpoint's own rows are in each."""
    positions = {tuple(ends): name for name, ends in recipe["positions"].items()}
    base = _rows(out / "base", positions)
    return [Rows([*base, *_rows(out / f"seed_{seed}", positions)]) for seed in recipe["seeds"]]


def tables(by_seed: Sequence[Rows], claims: Sequence[Result], out: Path) -> str:
    """All of them in Markdown; what recipes of several seeds do not measure, of the first one."""
    rows, parts = by_seed[0], [_claims(claims)]
    for seed, own in enumerate(by_seed):
        suffix = f", seed {seed}" if len(by_seed) > 1 else ""
        parts += [
            _by_model(f"Perplexity by position{suffix}", own.of(measure="long"), "perplexity_by_position", "stop"),
            _by_model(
                f"Perplexity of documents cut at 512 tokens{suffix}", own.of(measure="short"), "perplexity", None
            ),
        ]
    parts += [_by_model("Needles, all depths", rows, "needle_accuracy", "length"), _ruler(rows), _precision(rows)]
    return "\n".join([part for part in [*parts, _reuse(rows), _time(out)] if part]).lstrip()


def table(title: str, head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table under a heading; nothing without lines."""
    rows = [head, ["---"] * len(head), *lines]
    return f"\n### {title}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n" if lines else ""


def shown(row: Result | None, form: str = "{:.3g}") -> str:
    """A value with its interval."""
    if row is None:
        return ""
    ends = "" if row.low is None or row.high is None else f" ({form} to {form})".format(row.low, row.high)
    return form.format(row.value) + ends


def _rows(folder: Path, positions: Mapping[tuple[int, int], str]) -> list[Result]:
    """Rows with the measure that they are of (OUT/base/short/raised/results.jsonl: `short`), and what the recipe calls
    their positions."""
    found = []
    for path in sorted(folder.glob(f"*/*/{FILE}")):
        for row in read_results(path):
            ends = (row.context.get("start"), row.context.get("stop"))
            more = {"measure": path.parts[-3], "positions": positions.get(ends)}  # type: ignore[arg-type]
            found.append(dataclasses.replace(row, context=row.context | more))
    return found


def _claims(claims: Sequence[Result]) -> str:
    says = {claim.name: claim.says for claim in CLAIMS}
    lines = [
        [
            row.context["claim"],
            says[row.context["claim"]],
            shown(row, "{:.3f}"),
            f"{row.context['margin']:.3f}",
            str(row.n),
            row.context["answer"],
            ", ".join(f"{value:.3f}" for value in row.context["by_seed"]),
        ]
        for row in claims
    ]
    return table("Claims", ["", "claim", "effect (95 %)", "margin", "n", "answer", "by seed"], lines)


def _by_model(title: str, rows: Rows, metric: str, key: str | None) -> str:
    """A line for each model, a column for each value of `key`; the mean of several rows in a cell."""
    found = rows.of(metric)
    columns = sorted(found.distinct(key)) if key else [None]
    lines = []
    for model in found.distinct("model"):
        cells = []
        for column in columns:
            mine = [row for row in found.of(model=model) if key is None or row.context[key] == column]
            values = [row.value for row in mine]
            cells.append(shown(mine[0]) if len(mine) == 1 else f"{sum(values) / len(values):.3g}" if mine else "")
        lines.append([model, *cells])
    heads = [f"to {column:,}" if key == "stop" else f"{column:,}" if column else metric for column in columns]
    return table(title, ["model", *heads], lines)


def _ruler(rows: Rows) -> str:
    found = rows.of("lm_eval")
    models = found.distinct("model")
    cells = dict.fromkeys((row.context["task"], row.context.get("length")) for row in found)
    lines = [
        [
            str(task),
            f"{length or 0:,}",
            *(shown(found.find("lm_eval", model=m, task=task, length=length)) for m in models),
        ]
        for task, length in cells
    ]
    return table("RULER", ["task", "tokens", *models], lines)


def _precision(rows: Rows) -> str:
    found = rows.of("precision_attention_change", rows="shift", layer="all", weights="trained")
    lines = []
    for model in found.distinct("model"):
        for length in sorted(found.of(model=model).distinct("length")):
            at: dict[str, Any] = {"model": model, "length": length}
            kinds = [("bfloat16", "kept"), ("bfloat16", "hidden"), ("float32_rotation", "kept"), ("float32", "kept")]
            cells = [shown(found.find("precision_attention_change", arithmetic=a, first=f, **at)) for a, f in kinds]
            more = {"weights": "trained", "layer": "all", "arithmetic": "bfloat16", "first": None}
            parts = [shown(rows.find(f"precision_{name}", **at, **more)) for name in ("first_share", "first_attention")]
            lines.append([model, f"{length:,}", *cells, *parts])
    head = [
        "model",
        "tokens",
        "bfloat16",
        "first hidden",
        "float32 rotation",
        "float32",
        "first's part",
        "its attention",
    ]
    return table("Attention that a shift by 16 moves", head, lines)


def _reuse(rows: Rows) -> str:
    lines = []
    for row in rows.of("kvcomm_kl", kind="all", tokens="all"):
        at = {key: row.context[key] for key in ("model", "task", "arm")}
        agreement = rows.find("kvcomm_agreement", kind="all", tokens="all", **at)
        accuracy = rows.find("kvcomm_accuracy", kind="all", **at)
        lines.append([*at.values(), shown(row), shown(agreement), shown(accuracy)])
    return table("Reuse of KV caches", ["model", "task", "arm", "KL, nats", "agreement", "accuracy"], lines)


def _time(out: Path) -> str:
    kinds: dict[str, list[float]] = {}
    for path in sorted((out / "done").glob("*.json")):
        kinds.setdefault(path.name.split(".")[0], []).append(read_json(path)["seconds"])
    lines = [[kind, str(len(s)), f"{min(s):.0f} to {max(s):.0f}", f"{sum(s) / 60:.1f}"] for kind, s in kinds.items()]
    return table("Time", ["stage", "number", "seconds each", "minutes in all"], lines)


def gains_figure(by_seed: Sequence[Rows], path: Path) -> Path | None:
    """By how many nats a token each continuation reads the same documents better than `full`, by position; a chart a
    seed. None where `full` or all others were not measured."""
    charts = []
    for seed, rows in enumerate(by_seed):
        found = rows.of("perplexity_by_position", measure="long")
        models = [name for name in found.distinct("model") if name not in ("full", *BASES)]
        lines = [line for i, model in enumerate(models) if (line := _gain(rows, model, found.distinct("stop"), i)).x]
        if lines:
            axis = Axis("position in the document (tokens, up to)", log=2, ticks=ticks(lines))
            title = "Better than full" + (f", seed {seed}" if len(by_seed) > 1 else "")
            charts.append((title, line_chart(lines, axis, Axis("nats a token"), "")))
    return save_charts(charts, path) if charts else None


def _gain(rows: Rows, model: str, stops: Sequence[int], color: int) -> Line:
    at = {stop: losses("perplexity_by_position", "full", model, measure="long", stop=stop)(rows) for stop in stops}
    kept = {stop: effect for stop, effect in sorted(at.items()) if effect is not None}
    x, effects = list(kept), list(kept.values())
    return Line(model, x, [e.value for e in effects], [e.low for e in effects], [e.high for e in effects], color)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("recipe", type=Path, help="YAML file of the recipe")
    parser.add_argument("out", type=Path, help="folder of the run")
    options = parser.parse_args(arguments)
    out = options.out
    try:
        if not out.is_dir():
            raise UserError(f"{out} is no folder: give one that run.py has filled")
        recipe = read_recipe(options.recipe)
        by_seed = rows_of(out, recipe)
        claims = results(CLAIMS, by_seed)
        text = tables(by_seed, claims, out)
    except UserError as error:
        parser.error(str(error))
    folder = out / "summary"
    stamp = write_manifest(folder, build_manifest("smollm2", recipe))
    (folder / FILE).unlink(missing_ok=True)
    append_results(folder / FILE, [dataclasses.replace(row, manifest=stamp) for row in claims])
    (folder / "tables.md").write_text(text)
    if claims:
        claims_figure(claims, folder)
    gains_figure(by_seed, folder / "gains.png")
    print(text)
    folders = [
        path for name in ("base", *(f"seed_{seed}" for seed in recipe["seeds"])) if (path := out / name).is_dir()
    ]
    return anchorctx(["report", *map(str, folders), f"out={out / 'report.html'}"]) if folders else 0


if __name__ == "__main__":
    sys.exit(main())

"""Where every token of a packed set went, how long its documents are, and its mixture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from anchorctx.report.blocks import Cell, Figure, Section, Table
from anchorctx.report.collect import Material, Place
from anchorctx.report.figures.charts import histogram, stacked_bars
from anchorctx.report.numbers import number, percent

CELLS = {
    "trained": "trained",
    "zero_weight": "loss weight 0",
    "first_tokens": "first of a piece",
    "anchor": "anchors",
    "tags": "tags",
    "padding": "padding",
}
"""What rows are made of: names in the manifest's accounting, and in the report."""


def build(material: Material) -> Section | None:
    """None when no packed set is known, neither itself nor from a training run's manifest."""
    sets = packed_sets(material)
    if not sets:
        return None
    used = [name for name in CELLS if any(manifest["accounting"].get(name) for _, manifest in sets)]
    bars = [(name, _shares(manifest, used)) for name, manifest in sets]
    caption = (
        "Every cell of the packed rows, by what it holds. The account is exact: preparing fails if a token is lost."
    )
    chart = stacked_bars(bars, [CELLS[name] for name in used], "What the rows hold, as shares")
    blocks: list[Figure | Table] = [Figure("What the rows hold", chart, caption), _lengths(*sets[0])]
    blocks.append(_account(sets))
    blocks += [table for name, manifest in sets if (table := _mixture(name, manifest))]
    return Section("data", "Data", " ".join(_lead(*each) for each in sets), blocks)


def packed_sets(material: Material) -> list[tuple[str, dict[str, Any]]]:
    """Name and manifest of each packed set: those at hand, then those that training runs name and that are not."""
    known = {place.manifest.get("fingerprint"): (_name(place), place.manifest) for place in material.packed}
    for run in material.runs:
        manifest = run.place.manifest.get("data")
        if isinstance(manifest, dict) and "accounting" in manifest:
            known.setdefault(manifest.get("fingerprint"), (f"{run.label}'s rows", manifest))
    return list(known.values())


def _name(place: Place) -> str:
    """A packed set lies in a folder named by its fingerprint; the folder above has the user's name for it."""
    parent, _, last = place.name.rpartition("/")
    return parent if parent and last == place.manifest.get("fingerprint") else place.name


def _shares(manifest: dict[str, Any], used: Sequence[str]) -> list[tuple[str, float]]:
    account = manifest["accounting"]
    cells = account["rows"] * manifest["row_length"]
    return [(CELLS[name], account.get(name, 0) / max(cells, 1)) for name in used]


def _lengths(name: str, manifest: dict[str, Any]) -> Figure:
    lengths = manifest.get("document_lengths", {})
    bins = [(number(float(start)), float(count)) for start, count in lengths.items()]
    chart = histogram(bins, "Documents by length", "tokens a document, from", "documents")
    return Figure(f"Document lengths, {name}", chart, "Documents by length; each bar ends at twice where it begins.")


def _account(sets: Sequence[tuple[str, dict[str, Any]]]) -> Table:
    head = ["packed set", "documents", "tokens in", "dropped", "rows", "row length", "trained", "padding"]
    rows = []
    for name, manifest in sets:
        account = manifest["accounting"]
        came = sum(account.get(key, 0) for key in ("document_tokens", "eos_tokens", "repeated"))
        dropped = sum(account.get("dropped", {}).values())
        counts = (manifest.get("documents", 0), came, dropped, account["rows"], manifest["row_length"])
        counts += (account["trained"], account["padding"])
        rows.append([Cell(name, name), *(Cell(f"{count:,}", count) for count in counts)])
    reasons = {reason: n for _, m in sets for reason, n in m["accounting"].get("dropped", {}).items()}
    said = "; ".join(f"{reason}: {n:,} tokens" for reason, n in sorted(reasons.items()))
    return Table("Account", head, rows, f"Dropped, by reason: {said}." if said else "Nothing was dropped.")


def _mixture(name: str, manifest: dict[str, Any]) -> Table | None:
    """What was wanted and what came of it, where the set is a mixture."""
    mixture = manifest.get("mixture") or {}
    realised, wanted = mixture.get("realised") or {}, mixture.get("wanted") or {}
    if len(realised) < 2:
        return None
    rows = []
    for part, found in realised.items():
        want = wanted.get(part)
        rows.append(
            [
                Cell(part, part),
                Cell(f"{found['tokens']:,}", found["tokens"]),
                Cell("–" if want is None else percent(want, 1), want),
                Cell(percent(found["share"], 1), found["share"]),
                Cell(f"{found['passes']:.2f}" if "passes" in found else "–", found.get("passes")),
            ]
        )
    by = mixture.get("by", "source")
    caption = "Shares of the rows' tokens of documents; passes are how often the part's own tokens were used."
    return Table(f"Mixture of {name}", (by, "tokens", "wanted", "realised", "passes"), rows, caption)


def _lead(name: str, manifest: dict[str, Any]) -> str:
    account = manifest["accounting"]
    cells = account["rows"] * manifest["row_length"]
    return (
        f"{name}: {account['rows']:,} rows of {manifest['row_length']:,} tokens, "
        f"{percent(account['trained'] / cells, 1)} of their cells trained, "
        f"{percent(account['padding'] / cells, 2)} padding."
    )

"""What went in: where every token of a packed set went, what its tokens may see, and each number's manifest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from anchorctx.layout import PackedLayout
from anchorctx.report.blocks import MISSING, Block, Cell, Figure, Section, Table, formatted, text_cell
from anchorctx.report.collect import Material, Place
from anchorctx.report.figures.charts import histogram, stacked_bars
from anchorctx.report.figures.pattern import band_width, close_chart, first_boundary, pattern_words, whole_chart
from anchorctx.report.numbers import number, percent

PackedFacts = tuple[str, dict[str, Any]]
"""Name and manifest of a packed set."""
CELLS = {
    "trained": "trained",
    "zero_weight": "loss weight 0",
    "first_tokens": "first of a piece",
    "anchor": "anchors",
    "tags": "tags",
    "padding": "padding",
}
"""What rows are made of: names in the manifest's accounting, and in the report."""


# -- data -------------------------------------------------------------------------------------------------------------


def build_data(material: Material) -> Section | None:
    """Where every token went, documents' lengths and the mixture, of packed sets and those that training runs name."""
    sets = _packed_sets(material)
    if not sets:
        return None
    used = [name for name in CELLS if any(manifest["accounting"].get(name) for _, manifest in sets)]
    bars = [(name, _shares(manifest, used)) for name, manifest in sets]
    caption = (
        "Every cell of the packed rows, by what it holds. The account is exact: preparing fails if a token is lost."
    )
    chart = stacked_bars(bars, [CELLS[name] for name in used], "What the rows hold, as shares")
    blocks: list[Block] = [Figure("What the rows hold", chart, caption), _lengths(*sets[0]), _account(sets)]
    blocks += [table for name, manifest in sets if (table := _mixture(name, manifest))]
    return Section("data", "Data", " ".join(_lead(*each) for each in sets), blocks)


def _packed_sets(material: Material) -> list[PackedFacts]:
    """The packed sets in the folders, then those that are only in a training run's manifest."""
    # By fingerprint: a set in the folders and the same set in a run's manifest are one.
    known = {place.manifest.get("fingerprint"): (_set_name(place), place.manifest) for place in material.packed}
    for run in material.runs:
        manifest = run.place.manifest.get("data")
        if isinstance(manifest, dict) and "accounting" in manifest:
            known.setdefault(manifest.get("fingerprint"), (f"{run.label}'s rows", manifest))
    return list(known.values())


def _set_name(place: Place) -> str:
    """A packed set lies in a folder named by its fingerprint; the folder above has the user's name for it."""
    parent, _, last = place.name.rpartition("/")
    return parent if parent and last == place.manifest.get("fingerprint") else place.name


def _shares(manifest: dict[str, Any], used: Sequence[str]) -> list[tuple[str, float]]:
    return [(CELLS[name], manifest["accounting"].get(name, 0) / _cells(manifest)) for name in used]


def _cells(manifest: dict[str, Any]) -> int:
    """Positions of all rows; at least 1, as a divisor for sets that have no rows."""
    return max(manifest["accounting"]["rows"] * manifest["row_length"], 1)


def _lengths(name: str, manifest: dict[str, Any]) -> Figure:
    lengths = manifest.get("document_lengths", {})
    bins = [(number(float(start)), float(count)) for start, count in lengths.items()]
    chart = histogram(bins, "Documents by length", "tokens a document, from", "documents")
    return Figure(f"Document lengths, {name}", chart, "Documents by length; each bar ends at twice where it begins.")


def _account(sets: Sequence[PackedFacts]) -> Table:
    head = ["packed set", "documents", "tokens in", "dropped", "rows", "row length", "trained", "padding"]
    rows = []
    for name, manifest in sets:
        account = manifest["accounting"]
        # What came in is either in the rows or dropped: the account of `anchorctx prepare` has no other end.
        came = sum(account.get(key, 0) for key in ("document_tokens", "eos_tokens", "repeated"))
        dropped = sum(account.get("dropped", {}).values())
        counts = (manifest.get("documents", 0), came, dropped, account["rows"], manifest["row_length"])
        counts += (account["trained"], account["padding"])
        rows.append([text_cell(name), *(formatted(count, "{:,}") for count in counts)])
    reasons: Counter[str] = Counter()  # over all sets: one caption stands below all of their lines
    for _, manifest in sets:
        reasons.update(manifest["accounting"].get("dropped", {}))
    words = "; ".join(f"{reason}: {n:,} tokens" for reason, n in sorted(reasons.items()))
    return Table("Account", head, rows, f"Dropped, by reason: {words}." if words else "Nothing was dropped.")


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
                text_cell(part),
                formatted(found["tokens"], "{:,}"),
                MISSING if want is None else Cell(percent(want, 1), want),
                Cell(percent(found["share"], 1), found["share"]),
                formatted(found.get("passes"), "{:.2f}"),
            ]
        )
    by = mixture.get("by", "source")
    caption = "Shares of the rows' tokens of documents; passes are how often the part's own tokens were used."
    return Table(f"Mixture of {name}", (by, "tokens", "wanted", "realised", "passes"), rows, caption)


def _lead(name: str, manifest: dict[str, Any]) -> str:
    account, cells = manifest["accounting"], _cells(manifest)
    return (
        f"{name}: {account['rows']:,} rows of {manifest['row_length']:,} tokens, "
        f"{percent(account['trained'] / cells, 1)} of their cells trained, "
        f"{percent(account['padding'] / cells, 2)} padding."
    )


# -- attention pattern ------------------------------------------------------------------------------------------------


def build_pattern(material: Material) -> Section | None:
    """What the tokens of one packed row may see; None without a packed set."""
    if not material.layouts:
        return None
    path, layout = next(iter(material.layouts.items()))
    name = next((place.name.split("/")[0] for place in material.packed if place.path == path), path.name)
    close = f"Token by token where the first document ends, at {first_boundary(layout):,}, beside the row's first keys."
    blocks = [
        Figure("One packed row", whole_chart(layout), _pattern_caption(layout)),
        Figure("Close-up", close_chart(layout), close),
    ]
    return Section("pattern", "Attention pattern", f"One row of {name}: {pattern_words(layout)}.", blocks)


def _pattern_caption(layout: PackedLayout) -> str:
    anchor = ""
    if layout.anchor_len:
        wider = ", drawn wider than it is" if band_width(layout) > layout.anchor_len else ""
        anchor = f" All see the anchor ({layout.anchor_len} token{'s' if layout.anchor_len > 1 else ''}{wider})."
    return f"A query (downwards) attends to the keys (across) that are coloured; what is grey is left out.{anchor}"


# -- provenance -------------------------------------------------------------------------------------------------------


def build_provenance(material: Material) -> Section | None:
    """Which manifests stand behind the report's numbers; None when no folder has any."""
    places = {row.place.path: row.place for row in material.rows} | {place.path: place for place in material.places}
    used = list(dict.fromkeys((row.result.manifest, row.place.path) for row in material.rows))
    known = {place.hash for place in places.values()}
    rows = [_manifest_row(place, place.hash, place.manifest) for place in places.values() if place.manifest]
    rows += [_manifest_row(places[p], mark, places[p].more[mark]) for mark, p in used if mark in places[p].more]
    # A folder that was evaluated again, or whose manifest was removed, still has rows that name the old one.
    strays = [(mark, places[p]) for mark, p in used if mark not in known and mark not in places[p].more]
    rows += [[text_cell(place.name), Cell("?"), Cell(mark or "none"), *[MISSING] * 4] for mark, place in strays]
    if not rows:
        return None
    head = ("folder", "command", "manifest", "created", "code", "torch, transformers", "device")
    caption = "A manifest holds the whole configuration, code revision, versions and machine; its hash is on every row."
    if strays:
        caption += " A question mark: rows whose manifest is no longer in their folder."
    return Section("provenance", "Provenance", "What was run, and where.", [Table("Manifests", head, rows, caption)])


def _manifest_row(place: Place, mark: str, manifest: dict[str, Any]) -> list[Cell]:
    versions, machine, code = (manifest.get(name) or {} for name in ("versions", "machine", "code"))
    # A package that was installed without its repository has no revision.
    revision = str(code.get("revision") or f"anchorctx {versions.get('anchorctx', '–')}")[:8]
    texts = [
        place.full_name,
        manifest.get("command", "–"),
        mark,
        str(manifest.get("created", "–"))[:16].replace("T", " "),
        f"{revision}{' + changes' if code.get('dirty') else ''}",
        f"{versions.get('torch', '–')}, {versions.get('transformers', '–')}",
        ", ".join(sorted(set(machine.get("devices", [])))) or "–",
    ]
    return [text_cell(text) for text in texts]

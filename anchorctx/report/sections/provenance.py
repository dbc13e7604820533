"""Which manifests stand behind the report: every number above has one."""

from __future__ import annotations

from typing import Any

from anchorctx.report.blocks import Cell, Section, Table
from anchorctx.report.collect import Material, Place


def build(material: Material) -> Section | None:
    """None when no folder has a manifest."""
    used = list(dict.fromkeys((row.result.manifest, row.place.path) for row in material.rows))
    places = {row.place.path: row.place for row in material.rows} | {place.path: place for place in material.places}
    known = {place.hash for place in places.values()}
    rows = [_row(place, place.hash, place.manifest) for place in places.values() if place.manifest]
    rows += [_row(places[p], mark, places[p].more[mark]) for mark, p in used if mark in places[p].more]
    strays = [mark for mark, path in used if mark not in known and mark not in places[path].more]
    for stray in strays:
        lost = next(row.place for row in material.rows if row.result.manifest == stray)
        rows.append([Cell(lost.name, lost.name), Cell("?"), Cell(stray or "none"), *[Cell("–")] * 4])
    if not rows:
        return None
    head = ("folder", "command", "manifest", "created", "code", "torch, transformers", "device")
    caption = "A manifest holds the whole configuration, code revision, versions and machine; its hash is on every row."
    if strays:
        caption += " A question mark: rows whose manifest is no longer in their folder."
    return Section("provenance", "Provenance", "What was run, and where.", [Table("Manifests", head, rows, caption)])


def _row(place: Place, mark: str, manifest: dict[str, Any]) -> list[Cell]:
    versions, machine = manifest.get("versions", {}), manifest.get("machine", {})
    texts = [
        manifest.get("command", "–"),
        mark,
        str(manifest.get("created", "–"))[:16].replace("T", " "),
        _code(manifest.get("code") or {}, versions),
        f"{versions.get('torch', '–')}, {versions.get('transformers', '–')}",
        ", ".join(sorted(set(machine.get("devices", [])))) or "–",
    ]
    name = place.name if place.name == place.argument else f"{place.argument}/{place.name}"
    return [Cell(name, name), *(Cell(text, text) for text in texts)]


def _code(code: dict[str, Any], versions: dict[str, Any]) -> str:
    revision = str(code.get("revision") or f"anchorctx {versions.get('anchorctx', '–')}")[:8]
    return f"{revision}{' + changes' if code.get('dirty') else ''}"

"""Which manifests stand behind the report: every number above has one."""

from __future__ import annotations

from typing import Any

from anchorctx.report.blocks import Cell, Section, Table
from anchorctx.report.collect import Material, Place


def build(material: Material) -> Section | None:
    """None when no folder has a manifest."""
    known = {place.hash for place in material.places}
    strays = sorted({row.result.manifest for row in material.rows} - known)
    rows = [_row(place) for place in material.places]
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


def _row(place: Place) -> list[Cell]:
    manifest = place.manifest
    versions, machine = manifest.get("versions", {}), manifest.get("machine", {})
    texts = [
        manifest.get("command", "–"),
        place.hash,
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

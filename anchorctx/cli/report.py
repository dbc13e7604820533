"""`anchorctx report RUN...`: what training runs and evaluations found, as one HTML file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from anchorctx.cli.configured import configuration
from anchorctx.cli.main import Arguments
from anchorctx.errors import UserError
from anchorctx.layout import PackedLayout, Pattern

if TYPE_CHECKING:
    from anchorctx.report.collect import Material
    from anchorctx.report.config import ReportConfig

EXAMPLE = "anchorctx report runs/mine results/after out=report.html"


def run(arguments: Arguments) -> None:
    """Write the page and say where it is."""
    config = configuration("report", _with_folders(arguments), EXAMPLE)
    if config is None:
        return
    from anchorctx.report.collect import collect
    from anchorctx.report.page import write_report

    material = collect(config.runs)
    material.layouts = _layouts(config, material)
    out = write_report(config, material)
    print(f"report: {out} ({out.stat().st_size / 1000:,.0f} kB); open it in a browser, no network needed")


def _with_folders(arguments: Arguments) -> Arguments:
    """Words without `=`, and folders whatever their names hold, are the runs."""
    folders = [word for word in arguments.overrides if "=" not in word or Path(word).is_dir()]
    if not folders:
        return arguments
    rest = [word for word in arguments.overrides if word not in folders]
    if any(word.startswith("runs=") for word in rest):
        raise UserError(f"folders are given twice, as {folders[0]} and as runs=[...]: use one of the two")
    return dataclasses.replace(arguments, overrides=[f"runs={json.dumps(folders, ensure_ascii=False)}", *rest])


def _layouts(config: ReportConfig, material: Material) -> dict[Path, PackedLayout]:
    """A row of the first packed set, under the pattern asked for, or that of the first run, or AnchorAttention's."""
    from anchorctx.data.packed_set import PackedSet

    used = [run.place.manifest.get("config", {}).get("pattern") for run in material.runs]
    name = config.pattern or next((pattern for pattern in used if pattern), Pattern.anchor.value)
    if name not in list(Pattern):
        raise UserError(f"pattern={name} is unknown: choose {', '.join(Pattern)}")
    for place in material.packed[:1]:
        packed = PackedSet.open(place.path, verify=False)
        if not 0 <= config.row < len(packed):
            raise UserError(f"row={config.row} is not in the packed set, which has {len(packed)} rows: give 0 or more")
        return {place.path: Pattern(name).apply(packed.row(config.row).layout)}
    return {}

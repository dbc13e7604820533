"""`report`: folders in, one self-contained HTML file out. The same folders give the same file, byte for byte.

A new section is a module with `build(material)` under `sections/`, and a line in SECTIONS.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from markupsafe import Markup

from anchorctx.errors import UserError
from anchorctx.report.blocks import Build, Section
from anchorctx.report.collect import Material
from anchorctx.report.config import ReportConfig
from anchorctx.report.sections import (
    comparison,
    data,
    kvcomm,
    needle,
    pattern,
    perplexity,
    precision,
    provenance,
    retrieval,
    ruler,
    speed,
    training,
)
from anchorctx.report.tiles import tiles

SECTIONS: Sequence[Build] = (
    retrieval.build,
    perplexity.build,
    ruler.build,
    ruler.build_other,
    needle.build,
    comparison.build,
    precision.build,
    kvcomm.build,
    training.build,
    speed.build,
    data.build,
    pattern.build,
    provenance.build,
)
"""What a report may have, in the order of a reader's questions: how good, why, how it was made, from what."""


def write_report(config: ReportConfig, material: Material) -> Path:
    """Write the page whole or not at all; returns its path."""
    out = Path(config.out)
    if out.is_dir():
        raise UserError(f"out={out} is a folder: name a file, such as {out / 'report.html'}")
    material.pretraining_length = config.pretraining_length
    title = config.title or ", ".join(dict.fromkeys(place.argument for place in material.places)) or "anchorctx"
    page = render_page(title, material)
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f".{out.name}.{os.getpid()}")
    beside.write_text(page, encoding="utf-8")
    os.replace(beside, out)
    return out


def render_page(title: str, material: Material) -> str:
    """The HTML of a report."""
    sections = [section for build in SECTIONS if (section := build(material)) is not None]
    return _template().render(
        title=title,
        tiles=tiles(material),
        sections=sections,
        style=Markup(_asset("page.css")),
        script=Markup(_asset("page.js")),
    )


def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["numeric"] = lambda table, column: table.numeric(column)
    return environment.from_string(_asset("page.html.j2"))


def _asset(name: str) -> str:
    return (resources.files("anchorctx.report") / "assets" / name).read_text(encoding="utf-8")


__all__ = ["SECTIONS", "ReportConfig", "Section", "render_page", "write_report"]

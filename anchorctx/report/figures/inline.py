"""A matplotlib figure as SVG inside a page: without ids and fonts, colours as CSS variables, a title on each mark."""

from __future__ import annotations

import io
import json
import re
import warnings
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

from markupsafe import Markup

from anchorctx.report.figures.style import MUTED, VARIABLES

SVG, LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"
KEPT = {"fill", "fill-opacity", "stroke", "stroke-opacity", "stroke-width", "stroke-dasharray", "opacity"}
KEPT |= {"font-weight", "text-anchor"}
DEFAULTS = {("text-anchor", "start"), ("fill", VARIABLES[MUTED]), ("opacity", "1"), ("stroke-width", "1")}
"""What the page's style sheet, or SVG itself, says anyway."""


def tag(css: str, *titles: str) -> str:
    """A gid for an artist: the class of its group in the page, and a title for each path and marker in it."""
    return json.dumps([css, *titles])


def inline_svg(figure: Any, description: str) -> Markup:
    """The figure as an SVG element; `description` is for readers who cannot see it."""
    file = io.StringIO()
    # The page's cards are the background, in either theme.
    figure.patch.set_visible(False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the reader's browser has other fonts
        figure.savefig(file, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(file.getvalue())
    # matplotlib defines a marker's path once and refers to it by its id. Ids would have to differ between the page's
    # figures, so each use becomes a circle.
    markers = {f"#{path.get('id')}": path.get("d", "") for path in root.iter(f"{SVG}path") if path.get("id")}
    body = Markup("").join(_inside(root, markers, iter(())))
    return Markup('<svg viewBox="{}" role="img" aria-label="{}">{}</svg>').format(
        root.get("viewBox"), description, body
    )


def _inside(parent: ElementTree.Element, markers: dict[str, str], titles: Iterator[str]) -> Iterator[Markup]:
    """The shapes and texts below an element; each shape takes the next of `titles`, in the order of drawing."""
    for element in parent:
        kind, name = element.tag.removeprefix(SVG), element.get("id", "")
        # A gid that `tag` made begins with a bracket; matplotlib's own, such as `patch_1`, are dropped.
        if kind == "g" and name.startswith("["):
            css, *inner_titles = json.loads(name)
            inner = Markup("").join(_inside(element, markers, iter(inner_titles)))
            yield Markup('<g class="{}">{}</g>').format(css, inner) if css else inner
        elif kind == "g":
            yield from _inside(element, markers, titles)
        elif kind == "text":
            place = _rounded(element.get("x", "")), _rounded(element.get("y", ""))
            yield Markup('<text x="{}" y="{}"{}>{}</text>').format(*place, _style(element), element.text or "")
        elif kind in ("path", "use"):
            yield _shape(element, markers, next(titles, ""))


def _shape(element: ElementTree.Element, markers: dict[str, str], title: str) -> Markup:
    words = Markup("<title>{}</title>").format(title) if title else ""
    if (marker := element.get(LINK)) is None:
        path = re.sub(r"\s*([MLCQz])\s*", r"\1", _rounded(element.get("d", "").strip()))
        return Markup('<path d="{}"{}>{}</path>').format(path, _style(element), words)
    # Every marker is a circle whose path begins at its lowest point, M 0 3.5 C ...: the third word is the radius.
    radius = _rounded(markers[marker].split()[2])
    place = _rounded(element.get("x", "")), _rounded(element.get("y", ""))
    return Markup('<circle cx="{}" cy="{}" r="{}"{}>{}</circle>').format(*place, radius, _style(element), words)


def _style(element: ElementTree.Element) -> Markup:
    pairs = (pair.split(": ", 1) for pair in element.get("style", "").split("; ") if pair)
    kept = [(name, VARIABLES.get(value, value)) for name, value in pairs if name in KEPT]
    css = ";".join(f"{name}:{value}" for name, value in kept if (name, value) not in DEFAULTS)
    return Markup(' style="{}"').format(css) if css else Markup("")


def _rounded(text: str) -> str:
    """Its numbers to a tenth of a unit: 68.456 to 68.5, 70.0 to 70."""
    return re.sub(r"-?\d+\.\d+", lambda found: f"{float(found[0]):.1f}".removesuffix(".0"), text)

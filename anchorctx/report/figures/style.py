"""What all figures share: colours, matplotlib's settings, and writing a PNG file.

Colours are Okabe and Ito's, which colour-blind readers tell apart. In the page each becomes a variable of the style
sheet, so that a figure follows the reader's light or dark theme. matplotlib is imported when a figure is drawn.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from anchorctx.records.disk import Writing
from anchorctx.records.files import write_bytes

GREY, BLUE, ORANGE, GREEN, PINK, SKY = "#7f7f7f", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9"
SERIES = (GREY, BLUE, ORANGE, GREEN, PINK, SKY)
MARKERS = "os^Dvp"
# Five shades that no two meanings share: in the page each is replaced by a variable, found by its value.
INK, MUTED, RULE, CARD, LEFT_OUT = "#14181f", "#596273", "#e6e9ef", "#ffffff", "#e4e7ec"
ON_PART, IN_LOW, IN_HIGH = "#fffffe", "#010101", "#fffffd"
"""Text on a bar and on light and dark cells of a heat map; each its own colour, to be told apart in an SVG."""
HEAT_STEPS = 10
HEAT_ENDS = ((238, 244, 250), (6, 58, 99))
# Steps rather than a smooth scale: each is a colour that can be found in an SVG and replaced by a mixture.
HEAT = [
    "#" + "".join(f"{round(low + (high - low) * step / HEAT_STEPS):02x}" for low, high in zip(*HEAT_ENDS, strict=True))
    for step in range(HEAT_STEPS + 1)
]
"""Colours of a heat map, from low to high."""
VARIABLES = (
    {color: f"var(--s{number})" for number, color in enumerate(SERIES)}
    | {INK: "var(--text)", MUTED: "var(--muted)", RULE: "var(--grid)", CARD: "var(--card)"}
    | {LEFT_OUT: "var(--left-out)", ON_PART: "var(--on-part)", IN_LOW: "var(--in-low)", IN_HIGH: "var(--in-high)"}
    | {
        color: f"color-mix(in oklab,var(--heat-high) {100 * step // HEAT_STEPS}%,var(--heat-low))"
        for step, color in enumerate(HEAT)
    }
)
"""What stands for each colour in the page."""
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.grid": True,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text, in the page's font
    "svg.hashsalt": "anchorctx",  # else ids are random, and the order of definitions with them
}
Drawing = TypeVar("Drawing", bound=Callable[..., Any])


def styled(draw: Drawing, math: bool = True) -> Drawing:
    """Draw with STYLE, and leave matplotlib's own settings as they were; without `math` a $ is a dollar sign."""

    @functools.wraps(draw)
    def drawing(*args: Any, **kwargs: Any) -> Any:
        with load_matplotlib().rc_context(STYLE | {"text.parse_math": math}):
            return draw(*args, **kwargs)

    return cast(Drawing, drawing)


def new_figure(width: float, height: float, columns: int = 1, rows: int = 1) -> tuple[Any, Any]:
    """A figure in inches that needs no display, and its axes."""
    figure = blank_figure(width, height)
    return figure, figure.subplots(rows, columns)


def blank_figure(width: float, height: float) -> Any:
    """A figure in inches without axes."""
    mpl = load_matplotlib()
    # Without pyplot, which would look for a display and keep every figure alive.
    figure = mpl.figure.Figure(figsize=(width, height), dpi=150)
    mpl.backends.backend_agg.FigureCanvasAgg(figure)
    return figure


def save(figure: Any, path: Path) -> Path:
    """Write the figure, with its folder if needed, whole or not at all; returns `path`."""
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix.removeprefix("."), bbox_inches="tight")
    with Writing("a picture", path.parent, content.tell()):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content.getvalue())
    return path


def load_matplotlib() -> Any:
    """The matplotlib package with the parts that are used."""
    # Sub-modules are not there by themselves; importing them here is what makes `mpl.patches` work.
    import matplotlib
    import matplotlib.backends.backend_agg
    import matplotlib.colors
    import matplotlib.figure
    import matplotlib.lines
    import matplotlib.patches
    import matplotlib.ticker

    return matplotlib

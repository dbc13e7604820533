"""The method for docs/method.md: a row with one shared anchor, with copies, and in pieces on two GPUs.

Drawn from the layouts that `PackedLayout` itself makes of one small row.

.venv/bin/python docs/draw_method.py [FILE]        default: docs/images/method.png
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anchorctx.layout import PackedLayout

LENGTHS = (5, 3, 10, 4)
"""Tokens of the documents, behind an anchor of one."""
MAX_TOKENS = 10
"""Tokens of a piece."""
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")
"""Of documents; Okabe and Ito's."""
ANCHOR_COLOUR, TEXT_COLOUR = "#222222", "#333333"


@dataclass(frozen=True)
class Strip:
    """A run of tokens as the kernel gets them."""

    owners: tuple[int, ...]
    """The document of each token; -1 is the anchor or a copy of it."""
    positions: tuple[int, ...]
    sees: np.ndarray
    """(T, T) bool: `PackedLayout.allowed_array`."""


def row() -> PackedLayout:
    """The row with its shared anchor."""
    return PackedLayout((0, *np.cumsum([1, *LENGTHS]).tolist()), 1)


def strip(layout: PackedLayout, index: np.ndarray) -> Strip:
    """The tokens that `index` gathers from the row."""
    owners = row().token_docs()[index] - 1
    return Strip(tuple(owners.tolist()), tuple(layout.position_array().tolist()), layout.allowed_array())


def strips() -> tuple[Strip, Strip, list[Strip]]:
    """Shared anchor, copies, and pieces in the order in which the row has them."""
    shared = row()
    pieces = [strip(*piece) for piece in shared.pieces(MAX_TOKENS)]
    return (
        strip(shared, np.arange(shared.length)),
        strip(*shared.with_copies()),
        sorted(pieces, key=lambda piece: max(piece.owners) == LENGTHS.index(max(LENGTHS))),
    )


def draw(path: Path) -> None:
    """The picture: three ways to lay the row out on the left, who sees whom on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shared, copies, (first, second, long) = strips()
    figure = pyplot.figure(figsize=(8, 7.5))
    axes = figure.add_axes((0.01, 0.4, 0.98, 0.6))
    axes.set(xlim=(-0.4, len(copies.owners) + 0.4), ylim=(12.3, -0.9))
    axes.axis("off")
    note: dict[str, Any] = {"fontsize": 9.5, "color": TEXT_COLOUR, "va": "bottom"}
    bold: dict[str, Any] = note | {"weight": "bold"}
    axes.text(0, 0, "One row, one shared anchor (A); the numbers are positions", **bold)
    _tokens(axes, shared, 0, 0.15)
    axes.text(0, 3.1, "The same with a copy of the anchor, at position 0, before each document", **bold)
    _tokens(axes, copies, 0, 3.25)
    axes.text(0, 6.2, f"The same in pieces of at most {MAX_TOKENS} tokens, on two GPUs", **bold)
    axes.text(0, 7.1, "whole documents: nothing is sent inside attention", **note)
    at = len(first.owners) + 5.2
    for name, piece, left in (("GPU 0", first, 2.2), ("GPU 1", second, at)):
        axes.text(left - 0.2, 7.8, name, ha="right", fontsize=9.5, color=TEXT_COLOUR, va="center")
        _tokens(axes, piece, left, 7.25)
    half = -(-len(long.owners) // 2)
    axes.text(0, 10.0, "a document longer than a piece: both GPUs share it (Ulysses)", **note)
    for name, tokens, left in (("GPU 0", slice(0, half), 2.2), ("GPU 1", slice(half, None), at)):
        axes.text(left - 0.2, 10.7, name, ha="right", fontsize=9.5, color=TEXT_COLOUR, va="center")
        _tokens(axes, Strip(long.owners[tokens], long.positions[tokens], long.sees), left, 10.15)
    for left, what, title in ((0.03, shared, "shared anchor"), (0.53, copies, "copies")):
        _matrix(figure.add_axes((left, 0.035, 0.44, 0.34)), what, f"What each token sees: {title}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def _colour(owner: int) -> str:
    return ANCHOR_COLOUR if owner < 0 else COLOURS[owner]


def _tokens(axes: Any, what: Strip, left: float, top: float) -> None:
    from matplotlib.patches import Rectangle

    for i, (owner, position) in enumerate(zip(what.owners, what.positions, strict=True)):
        axes.add_patch(Rectangle((left + i + 0.03, top), 0.94, 1.1, facecolor=_colour(owner), edgecolor="none"))
        label = "A" if owner < 0 else ""
        axes.text(left + i + 0.5, top + 0.55, label, ha="center", va="center", color="white", fontsize=9.5)
        axes.text(left + i + 0.5, top + 1.5, str(position), ha="center", va="center", color=TEXT_COLOUR, fontsize=9)


def _matrix(axes: Any, what: Strip, title: str) -> None:
    from matplotlib.patches import Rectangle

    tokens = len(what.owners)
    for q, k in np.argwhere(what.sees).tolist():
        axes.add_patch(Rectangle((k + 0.04, q + 0.04), 0.92, 0.92, facecolor=_colour(what.owners[k]), edgecolor="none"))
    axes.set(xlim=(0, tokens), ylim=(tokens, 0), xticks=[], yticks=[], aspect="equal")
    axes.set_title(title, fontsize=9.5, color=TEXT_COLOUR, weight="bold", pad=4)
    axes.set_ylabel("token", fontsize=9, color=TEXT_COLOUR)
    axes.set_xlabel("sees", fontsize=9, color=TEXT_COLOUR)
    for side in axes.spines.values():
        side.set_color("#BBBBBB")


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "images" / "method.png")

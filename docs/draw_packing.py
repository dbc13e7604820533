"""Pictures of every packing policy for docs/data.md, made of rows that the packer itself makes.

.venv/bin/python docs/draw_packing.py [FOLDER]        default: docs/images
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from anchorctx.data.packing.accounting import Accounting
from anchorctx.data.packing.assemble import RowShape, assemble
from anchorctx.data.packing.config import LongDocuments, PackConfig, Policy
from anchorctx.data.packing.packer import Packer
from anchorctx.data.packing.pieces import ArrayText, Rows, Tags, make_pieces
from anchorctx.data.packing.shard import Row
from anchorctx.layout import Pattern

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C6BB1", "#A6761D")
"""Of documents; Okabe and Ito's, and two more."""
ANCHOR_COLOUR, TAG_COLOUR, PAD_COLOUR = "#222222", "#9A9A9A", "#F2F2F2"
ANCHOR, PAD, EOS, TAG = 60_000, 60_001, 60_002, 60_003
STRIDE = 1000
"""Token ids are STRIDE times the document's number plus the place in it."""
LENGTHS = (9, 14, 6, 31, 5, 12, 3, 8)
CAPACITY = 23


@dataclass(frozen=True)
class Panel:
    """A corpus, packed one way."""

    title: str
    config: PackConfig
    lengths: tuple[int, ...] = LENGTHS
    pattern: Pattern = Pattern.anchor
    eos: bool = False
    tag: tuple[int, ...] = ()
    positions: bool = False
    shape: RowShape = field(default_factory=lambda: RowShape(CAPACITY + 1, 1, ANCHOR, PAD))


def panels() -> dict[str, list[Panel]]:
    """The panels of each picture, by file name."""
    fits, plain = tuple(n for n in LENGTHS if n <= CAPACITY), PackConfig(policy=Policy.concat_split)
    best = PackConfig(policy=Policy.best_fit)
    short, three, reset = (9, 2, 28, 6, 3), replace(best, interleave=3), Pattern.anchor_reset
    scattered = RowShape(CAPACITY + 1, 1, ANCHOR, PAD, chunks=3, seed=3)
    return {
        "best_fit": [Panel("best_fit: only the document that is longer than a row is cut", best)],
        "concat_split": [Panel("concat_split: cut at the row's end, continued in the next row", plain)],
        "one_per_row": [Panel("one_per_row", PackConfig(policy=Policy.one_per_row))],
        "long_documents": [
            Panel(f"long_documents={long.value}", replace(best, long_documents=long), (9, 52, 6))
            for long in LongDocuments
        ],
        "min_length": [
            Panel("min_length=1", best, short),
            Panel("min_length=6: two documents and a remainder are dropped", replace(best, min_length=6), short),
        ],
        "separators": [
            Panel("append_eos=false", best, (9, 6, 5)),
            Panel("append_eos=true: a token of its own, trained", best, (9, 6, 5), eos=True),
            Panel("pack.prepend_bos=true: in front of each piece, not trained", best, (9, 6, 5), tag=(ANCHOR,)),
        ],
        "domain_tags": [Panel("domain_tags=true: the domain's name, not trained", best, fits, tag=(TAG, TAG))],
        "interleave": [
            Panel("interleave=1", best, (9, 8, 6)),
            Panel("interleave=3: chunks, still one document each", three, (9, 8, 6), shape=scattered),
        ],
        "positions": [
            Panel("pattern=anchor: continuous positions", best, (9, 8, 6), positions=True),
            Panel("pattern=anchor_reset: each document restarts", best, (9, 8, 6), reset, positions=True),
        ],
    }


def rows_of(panel: Panel) -> list[Row]:
    """The panel's rows, made by the packer."""
    lengths = np.array(panel.lengths) + panel.eos
    text = [STRIDE * number + np.arange(length) for number, length in enumerate(lengths.tolist())]
    for ids in text:
        ids[-1] = EOS if panel.eos else ids[-1]
    tags, accounting = Tags(), Accounting(["corpus"])
    tag = tags.add(np.array(panel.tag, np.uint32))
    accounting.add("document_tokens", np.zeros(len(lengths), np.int64), lengths)
    documents = make_pieces(
        lengths,
        size=lengths + len(panel.tag),
        document=np.arange(len(lengths)),
        start=np.cumsum(lengths) - lengths,
        tag=tag,
    )
    packer = Packer(panel.config, panel.shape.capacity, len(panel.tag), accounting)
    rows = Rows.joined([*packer.add(documents), *packer.finish()])
    shard = assemble(rows, panel.shape, tags, {0: ArrayText(np.concatenate(text).astype(np.uint16))}, accounting)
    accounting.check(panel.shape.row_length)
    return [shard.row(index, panel.shape.anchor_len) for index in range(len(shard))]


def draw(several: list[Panel], path: Path) -> None:
    """One picture: the panels below each other."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    made = [rows_of(panel) for panel in several]
    heights = [len(rows) + 0.95 for rows in made]
    figure, axes = plt.subplots(
        len(several), 1, figsize=(8.2, 0.34 * sum(heights) + 0.35), height_ratios=heights, squeeze=False
    )
    for axis, panel, rows in zip(axes[:, 0], several, made, strict=True):
        for number, row in enumerate(rows):
            _draw_row(axis, row, number, panel)
        axis.set(xlim=(-0.2, panel.shape.row_length + 0.2), ylim=(len(rows), -0.95))
        axis.text(0, -0.3, panel.title, fontsize=9)
        axis.axis("off")
    figure.legend(handles=_legend(), loc="lower center", ncols=5, frameon=False, fontsize=7.5, handlelength=1.1)
    figure.subplots_adjust(left=0.01, right=0.99, top=1, bottom=0.3 / figure.get_figheight(), hspace=0)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_row(axis: Any, row: Row, number: int, panel: Panel) -> None:
    from matplotlib.patches import Rectangle

    docs, positions = row.layout.token_docs(), panel.pattern.apply(row.layout).position_array()
    owner = -1
    for t, token in enumerate(row.input_ids.tolist()):
        owner = token // STRIDE if token < ANCHOR else owner
        trained = row.loss_weights[t] > 0
        is_anchor = t < row.layout.anchor_len
        is_dark = trained or token >= ANCHOR
        colour = {PAD: PAD_COLOUR, TAG: TAG_COLOUR, ANCHOR: ANCHOR_COLOUR}.get(token, COLOURS[owner % len(COLOURS)])
        axis.add_patch(
            Rectangle(
                (t + 0.03, number + 0.06),
                0.94,
                0.8,
                facecolor=colour,
                alpha=1.0 if is_dark else 0.35,
                edgecolor="white",
                linewidth=0.4,
            )
        )
        label = "A" if is_anchor else {EOS: "E", TAG: "t", ANCHOR: "B"}.get(token, "")
        label = str(positions[t]) if panel.positions and token != PAD else label
        axis.text(
            t + 0.5, number + 0.47, label, ha="center", va="center", color="white" if is_dark else "black", fontsize=6.5
        )
        if t and docs[t] != docs[t - 1] and token != PAD:
            axis.plot([t, t], [number, number + 0.92], color="black", linewidth=1.2)


def _legend() -> list[Any]:
    from matplotlib.patches import Patch

    return [
        Patch(color=ANCHOR_COLOUR, label="anchor (A), BOS (B)"),
        Patch(color=COLOURS[0], label="trained token"),
        Patch(color=COLOURS[0], alpha=0.35, label="first of a piece, not trained"),
        Patch(color=TAG_COLOUR, label="tag (t), not trained"),
        Patch(facecolor=PAD_COLOUR, edgecolor="#CCCCCC", label="padding"),
    ]


def main() -> None:
    """Draw all pictures."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "images"
    folder.mkdir(parents=True, exist_ok=True)
    for name, several in panels().items():
        draw(several, folder / f"packing_{name}.png")
        print(f"drawn: packing_{name}.png")


if __name__ == "__main__":
    main()

"""Figures as PNG: retrieval against context length, loss curves, and the attention pattern of a packed row.

Colours are Okabe and Ito's, which colour-blind readers tell apart. matplotlib is imported when a figure is drawn.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from anchorctx.errors import UserError
from anchorctx.layout import PackedLayout
from anchorctx.records.results import Result

BLUE, SKY, ORANGE, GREEN, GREY = "#0072B2", "#56B4E9", "#D55E00", "#009E73", "#ECECEC"
SERIES = ("#7F7F7F", BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00")
MARKERS = "os^Dvp"
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
}


Drawing = TypeVar("Drawing", bound=Callable[..., Path])


def styled(draw: Drawing) -> Drawing:
    """Draw with STYLE, and leave matplotlib's own settings as they were."""

    @functools.wraps(draw)
    def drawing(*args: Any, **kwargs: Any) -> Path:
        with load_matplotlib().rc_context(STYLE):
            return draw(*args, **kwargs)

    return cast(Drawing, drawing)


@styled
def retrieval_figure(results: Iterable[Result], path: Path, pretraining_length: int | None = None) -> Path:
    """Draw `retrieval_accuracy` rows against their `length`, one line a `model`, with 95 % intervals.

    `pretraining_length` (tokens) is marked where given. Returns `path`; UserError when no row is of that metric.
    """
    rows = [result for result in results if result.metric == "retrieval_accuracy"]
    if not rows:
        raise UserError(f"no retrieval_accuracy rows to draw {path} from: run anchorctx eval with evals=[retrieval]")
    figure, axes = new_figure(7, 4.2)
    for number, model in enumerate(dict.fromkeys(str(row.context.get("model", "model")) for row in rows)):
        last = {row.context["length"]: row for row in rows if str(row.context.get("model", "model")) == model}
        _accuracy_line(axes, model, [last[length] for length in sorted(last)], number)
    _label_ends(axes)
    if pretraining_length is not None:
        axes.axvline(pretraining_length, color="#555555", linestyle=":", linewidth=1.2)
        axes.text(pretraining_length, 0.4, " pretraining\n length", color="#555555", va="center", ha="left", fontsize=9)
    lengths = sorted({row.context["length"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    axes.set(xlabel="context length (tokens)", ylabel="retrieval accuracy (share of answers right)", ylim=(0, 1.06))
    axes.margins(x=0.06)
    axes.set_title("Retrieval of planted facts")
    axes.legend(loc="lower center")
    return save(figure, path)


@styled
def loss_figure(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """Draw `train/loss` and `val/loss` (nats a token) against `tokens` from rows of metrics.jsonl; returns `path`.

    A validation set with another loss weighting has another scale than training; both are what the run logged.
    """
    figure, axes = new_figure(7, 4.2)
    drawn = False
    for key, label, color in (("train/loss", "training", SKY), ("val/loss", "validation (held out)", ORANGE)):
        points = [(row["tokens"], row[key]) for row in rows if key in row and math.isfinite(row[key])]
        if not points:
            continue
        drawn = True
        x, y = np.array(points, dtype=float).T
        is_training = key == "train/loss"
        if is_training and len(x) >= 20:
            axes.plot(x, y, color=color, linewidth=0.8, alpha=0.6)
            axes.plot(*_smoothed(x, y), color=BLUE, linewidth=2, label=f"{label}, running mean")
        else:
            axes.plot(x, y, color=BLUE if is_training else color, linewidth=2, marker="o", markersize=4, label=label)
    if not drawn:
        raise UserError(f"no train/loss or val/loss to draw {path} from: give the rows of a run's metrics.jsonl")
    axes.xaxis.set_major_formatter(load_matplotlib().ticker.EngFormatter(sep=""))
    axes.set(xlabel="trained tokens", ylabel="loss (nats a token)")
    axes.set_title("Training and validation loss")
    axes.legend()
    return save(figure, path)


@styled
def pattern_figure(layout: PackedLayout, path: Path) -> Path:
    """Draw which keys each token of one packed row attends to, with a close-up of a document boundary."""
    figure, (whole, close) = new_figure(11, 5.4, columns=2)
    tokens = layout.length
    share = layout.attention_pairs() / (tokens * (tokens + 1) / 2)
    _draw_whole(whole, layout)
    documents = f"{layout.num_documents} document{'s' if layout.num_documents != 1 else ''}"
    whole.set_title(f"One row: {tokens:,} tokens, {documents}\n{share:.1%} of full causal attention")
    _draw_close(close, layout)
    figure.legend(handles=_pattern_legend(layout), loc="lower center", ncols=4)
    figure.subplots_adjust(bottom=0.19, top=0.88, left=0.07, right=0.98, wspace=0.18)
    return save(figure, path, tight=False)


def _accuracy_line(axes: Any, model: str, rows: Sequence[Result], number: int) -> None:
    x, y = [row.context["length"] for row in rows], [row.value for row in rows]
    low = [row.value if row.low is None else row.low for row in rows]
    high = [row.value if row.high is None else row.high for row in rows]
    color = SERIES[number % len(SERIES)]
    axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
    axes.plot(x, y, color=color, marker=MARKERS[number % len(MARKERS)], linewidth=2, label=model)


def _label_ends(axes: Any, apart: float = 0.055) -> None:
    """Each line's last value to its right, moved apart where lines end together."""
    floor = -math.inf
    for line in sorted(axes.get_lines(), key=lambda line: line.get_ydata()[-1]):
        x, y = line.get_xdata()[-1], line.get_ydata()[-1]
        floor = max(y, floor + apart)
        axes.annotate(
            f"{y:.2f}", (x, floor), (9, 0), textcoords="offset points", va="center", color=line.get_color(), fontsize=10
        )


def _smoothed(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Running mean over a twentieth of the run."""
    width = max(len(y) // 20, 5)
    kernel = np.ones(width) / width
    return np.convolve(x, kernel, "valid"), np.convolve(y, kernel, "valid")


def band_width(layout: PackedLayout) -> float:
    """Width of the anchor's band, in tokens: its own, or else what can just be seen."""
    return max(layout.anchor_len, layout.length / 80)


def _draw_whole(axes: Any, layout: PackedLayout) -> None:
    """Documents as triangles (and blocks, where one comes in pieces), the anchor as a band wide enough to see."""
    tokens, anchor = layout.length, layout.anchor_len
    axes.fill([0, 0, tokens], [0, tokens, tokens], color=GREY, linewidth=0)
    offsets = layout.doc_offsets
    ids = layout.doc_ids or tuple(range(len(offsets) - 1))
    order = ranks(layout, ids)
    spans = list(zip(ids, offsets, offsets[1:], strict=False))
    for i, (doc, start, stop) in enumerate(spans):
        color = (BLUE, SKY)[order[doc] % 2]
        axes.fill([start, start, stop], [start, stop, stop], color=color, linewidth=0)
        for other, a, b in spans[:i]:
            if other == doc:
                axes.fill([a, b, b, a], [start, start, stop, stop], color=color, linewidth=0)
    if anchor:
        width = band_width(layout)
        axes.fill([0, width, width, 0], [0, width, tokens, tokens], color=ORANGE, linewidth=0)
    axes.set(xlim=(-tokens / 200, tokens), ylim=(tokens, 0), aspect="equal")
    axes.set(xlabel="key position (tokens)", ylabel="query position (tokens)")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(load_matplotlib().ticker.StrMethodFormatter("{x:,.0f}"))
    axes.grid(False)


def _draw_close(axes: Any, layout: PackedLayout, reach: int = 10) -> None:
    """Single tokens around the boundary between the first two documents, beside the row's first keys."""
    boundary = first_boundary(layout)
    near = np.arange(max(boundary - reach, 0), min(boundary + reach, layout.length))
    first = np.arange(min(layout.anchor_len + 3, int(near[0])))
    keys = np.concatenate([first, near])
    colors = _cells(layout, near, keys)
    gap = 1.5 if len(first) and first[-1] + 1 < near[0] else 0.0
    left = np.arange(len(keys)) + np.where(np.arange(len(keys)) >= len(first), gap, 0.0)
    patches = load_matplotlib().patches
    for row in range(len(near)):
        for column in range(len(keys)):
            axes.add_patch(patches.Rectangle((left[column], row), 0.94, 0.94, color=colors[row][column], linewidth=0))
    if gap:
        axes.text(len(first) + gap / 2, len(near) / 2, "…", ha="center", va="center", fontsize=16)
    shown = [0, *(range(len(first), len(keys), 5) if len(first) else range(5, len(keys), 5))]
    axes.set_xticks(left[shown] + 0.47, [f"{keys[i]:,}" for i in shown])
    axes.set_yticks(np.arange(0, len(near), 5) + 0.47, [f"{q:,}" for q in near[::5]])
    axes.set(xlim=(-0.3, left[-1] + 1), ylim=(len(near), -0.1), aspect="equal")
    axes.set(xlabel="key position (tokens)", ylabel="query position (tokens)")
    axes.set_title(
        f"Close-up, token by token,\nwhere a document ends at {boundary:,}"
        if layout.num_documents > 1
        else "Close-up, token by token"
    )
    axes.grid(False)


def ranks(layout: PackedLayout, ids: Sequence[int]) -> dict[int, int]:
    """Number of each document in order of appearance, from 0; the anchor, which is none, comes before."""
    first = -1 if layout.anchor_len else 0
    return {doc: rank for rank, doc in enumerate(dict.fromkeys(ids), first)}


def first_boundary(layout: PackedLayout) -> int:
    """Where the first document ends and another follows; the middle of the row when there is but one."""
    inner = [offset for offset in layout.doc_offsets[1:-1] if offset > layout.anchor_len]
    return inner[0] if inner else layout.length // 2


def _cells(layout: PackedLayout, queries: np.ndarray, keys: np.ndarray) -> list[list[str]]:
    """Colour of every (query, key) pair."""
    docs = layout.token_docs()
    rank = ranks(layout, docs.tolist())
    causal = keys[None, :] <= queries[:, None]
    anchor = causal & (keys < layout.anchor_len)[None, :]
    same = causal & (docs[queries][:, None] == docs[keys][None, :])
    return [
        [
            ORANGE if anchor[i, j] else (BLUE, SKY)[rank[int(docs[q])] % 2] if same[i, j] else
            GREY if causal[i, j] else "white"
            for j in range(len(keys))
        ]
        for i, q in enumerate(queries)
    ]  # fmt: skip


def _pattern_legend(layout: PackedLayout) -> list[Any]:
    patches = load_matplotlib().patches
    handles = [patches.Patch(color=BLUE, label="document")]
    if layout.num_documents > 1:
        handles.append(patches.Patch(color=SKY, label="next document (colours alternate)"))
        handles.append(patches.Patch(color=GREY, label="left out: other documents"))
    if layout.anchor_len:
        size = f"{layout.anchor_len} token{'s' if layout.anchor_len > 1 else ''}"
        wider = ", drawn wider on the left" if band_width(layout) > layout.anchor_len else ""
        handles.insert(0, patches.Patch(color=ORANGE, label=f"anchor ({size}{wider})"))
    return handles


def new_figure(width: float, height: float, columns: int = 1, rows: int = 1) -> tuple[Any, Any]:
    """A figure that no display ever sees (Agg), in inches, and its axes."""
    mpl = load_matplotlib()
    figure = mpl.figure.Figure(figsize=(width, height), dpi=150)
    mpl.backends.backend_agg.FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns)


def save(figure: Any, path: Path, tight: bool = True) -> Path:
    """Write the figure, with its folder if needed; returns `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight" if tight else None)
    return path


def load_matplotlib() -> Any:
    """The matplotlib package with the parts that are used; UserError when it is not installed."""
    try:
        import matplotlib
        import matplotlib.backends.backend_agg
        import matplotlib.colors
        import matplotlib.figure
        import matplotlib.patches
        import matplotlib.ticker
    except ImportError:
        raise UserError("pictures need matplotlib, which is not installed: pip install 'anchorctx[plots]'") from None
    return matplotlib

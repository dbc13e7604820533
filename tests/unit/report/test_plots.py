from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anchorctx.errors import UserError
from anchorctx.layout import PackedLayout
from anchorctx.records.results import Result
from anchorctx.report import plots

LAYOUTS = [
    PackedLayout((0, 1, 30, 31, 64), 1),
    PackedLayout((0, 64)),
    PackedLayout((0, 2, 20, 40, 64), 2, doc_ids=(9, 1, 2, 1)),
]


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Figures as they were saved."""
    figures: list[Any] = []
    save = plots.save
    monkeypatch.setattr(plots, "save", lambda figure, *a, **k: (figures.append(figure), save(figure, *a, **k))[1])
    return figures


@pytest.mark.parametrize("layout", LAYOUTS)
def test_close_up_cells_are_the_specification(layout: PackedLayout):
    index = np.arange(layout.length)
    allowed = layout.allowed_array()
    colors = np.array(plots._cells(layout, index, index))
    np.testing.assert_array_equal(np.isin(colors, [plots.BLUE, plots.SKY, plots.ORANGE]), allowed)
    np.testing.assert_array_equal(colors == plots.ORANGE, allowed & (index < layout.anchor_len)[None, :])
    np.testing.assert_array_equal(colors == plots.GREY, ~allowed & (index[None, :] <= index[:, None]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_drawn_area_is_the_attention(layout: PackedLayout, saved: list[Any], tmp_path: Path):
    assert plots.pattern_figure(layout, tmp_path / "deep" / "p.png").stat().st_size > 10_000
    whole = saved[0].axes[0]
    area = 0.0
    for patch in whole.patches:
        x, y = np.array(patch.get_xy()).T
        color = plots.load_matplotlib().colors.to_hex(patch.get_facecolor()).upper()
        if color in (plots.BLUE, plots.SKY):
            area += abs(np.dot(x[:-1], y[1:]) - np.dot(y[:-1], x[1:])) / 2
    # A continuous triangle of side n has n^2/2 of the n(n+1)/2 cells: half a cell a token is missing.
    anchor = layout.anchor_len
    pairs = layout.attention_pairs() - anchor * (layout.length - anchor) - layout.length / 2
    own = anchor**2 / 2  # the anchor's own triangle is drawn as a document's, under the band
    assert area == pytest.approx(pairs - (anchor * (anchor + 1) / 2 - anchor / 2) + own)
    assert f"{layout.num_documents} document" in whole.get_title(loc="left")


def result(model: str, length: int, value: float) -> Result:
    context = {"model": model, "length": length}
    return Result(metric="retrieval_accuracy", value=value, unit="1", n=9, low=value - 0.1, high=value, context=context)


def test_retrieval_lines_are_the_rows(saved: list[Any], tmp_path: Path):
    rows = [result("before", 1024, 0.5), result("before", 512, 0.9), result("after", 512, 0.8)]
    other = Result(metric="perplexity", value=3.0, unit="1", n=1)
    plots.retrieval_figure([*rows, other, result("after", 512, 0.7)], tmp_path / "r.png", pretraining_length=512)
    (axes,) = saved[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines["before"] == [[512, 0.9], [1024, 0.5]]
    assert lines["after"] == [[512, 0.7]]  # the latest row of a length counts
    assert (tmp_path / "r.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(UserError, match="no retrieval_accuracy rows"):
        plots.retrieval_figure([other], tmp_path / "none.png")


@pytest.mark.parametrize("steps", [3, 60])
def test_loss_curves_are_the_rows(saved: list[Any], tmp_path: Path, steps: int):
    rows: list[dict[str, Any]] = [{"tokens": 10 * i, "train/loss": 5.0 - i / steps} for i in range(steps)]
    rows += [{"tokens": 10, "val/loss": 4.0}, {"tokens": 20, "train/loss": float("nan")}, {"step": 1}]
    plots.loss_figure(rows, tmp_path / "l.png")
    lines = saved[0].axes[0].lines
    assert lines[0].get_xydata().tolist() == [[row["tokens"], row["train/loss"]] for row in rows[:steps]]
    assert lines[-1].get_xydata().tolist() == [[10, 4.0]]
    with pytest.raises(UserError, match="no train/loss or val/loss"):
        plots.loss_figure([{"tokens": 1}], tmp_path / "none.png")


def test_missing_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"anchorctx\[plots\]"):
        plots.pattern_figure(LAYOUTS[0], tmp_path / "p.png")


def test_importing_pictures_imports_neither_torch_nor_matplotlib():
    code = "import sys, anchorctx.report.plots; print({'torch', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"

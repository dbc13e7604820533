"""Figures hold what they are given: as PNG files, and as SVG in the page."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anchorctx.errors import UserError
from anchorctx.layout import PackedLayout
from anchorctx.records.results import Result
from anchorctx.report.figures import chart, curves, pattern, style
from anchorctx.report.figures.chart import Axis
from anchorctx.report.figures.charts import Bars, Grid, Line, bar_chart, heat_map, histogram, line_chart, stacked_bars
from anchorctx.report.figures.reuse import draw_reuse

from .fixtures import ARMS, reuse_rows

LAYOUTS = [
    PackedLayout((0, 1, 30, 31, 64), 1),
    PackedLayout((0, 64)),
    PackedLayout((0, 2, 20, 40, 64), 2, doc_ids=(9, 1, 2, 1)),
]


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Figures as they were saved."""
    figures: list[Any] = []
    save = chart.save
    monkeypatch.setattr(chart, "save", lambda figure, path: (figures.append(figure), save(figure, path))[1])
    return figures


# -- the pattern of a packed row --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_close_up_cells_are_the_specification(layout: PackedLayout):
    index = np.arange(layout.length)
    allowed = layout.allowed_array()
    colors = np.array(pattern.cell_colors(layout, index, index))
    np.testing.assert_array_equal(np.isin(colors, [style.BLUE, style.SKY, style.ORANGE]), allowed)
    np.testing.assert_array_equal(colors == style.ORANGE, allowed & (index < layout.anchor_len)[None, :])
    np.testing.assert_array_equal(colors == style.LEFT_OUT, ~allowed & (index[None, :] <= index[:, None]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_drawn_area_is_the_attention(layout: PackedLayout, saved: list[Any], tmp_path: Path):
    assert pattern.pattern_figure(layout, tmp_path / "deep" / "p.png").stat().st_size > 10_000
    whole = saved[0].axes[0]
    area = 0.0
    for patch in whole.patches:
        x, y = np.array(patch.get_xy()).T
        if style.load_matplotlib().colors.to_hex(patch.get_facecolor()) in (style.BLUE, style.SKY):
            area += abs(np.dot(x[:-1], y[1:]) - np.dot(y[:-1], x[1:])) / 2
    # A continuous triangle of side n has n^2/2 of the n(n+1)/2 cells: half a cell a token is missing.
    anchor = layout.anchor_len
    pairs = layout.attention_pairs() - anchor * (layout.length - anchor) - layout.length / 2
    own = anchor**2 / 2  # the anchor's own triangle is drawn as a document's, under the band
    assert area == pytest.approx(pairs - (anchor * (anchor + 1) / 2 - anchor / 2) + own)
    assert any(f"{layout.num_documents} document" in text.get_text() for text in saved[0].texts)


# -- lines ------------------------------------------------------------------------------------------------------------


def result(model: str, length: int, value: float) -> Result:
    context = {"model": model, "length": length}
    return Result(metric="retrieval_accuracy", value=value, unit="1", n=9, low=value - 0.1, high=value, context=context)


def test_retrieval_lines_are_the_rows(saved: list[Any], tmp_path: Path):
    rows = [result("before", 1024, 0.5), result("before", 512, 0.9), result("after", 512, 0.8)]
    other = Result(metric="perplexity", value=3.0, unit="1", n=1)
    curves.retrieval_figure([*rows, other, result("after", 512, 0.7)], tmp_path / "r.png", pretraining_length=512)
    (axes,) = saved[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines["before"] == [[512, 0.9], [1024, 0.5]]
    assert lines["after"] == [[512, 0.7]]  # the latest row of a length counts
    assert [text.get_text() for text in saved[0].legends[0].get_texts()] == ["before", "after"]
    assert (tmp_path / "r.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(UserError, match="no retrieval_accuracy rows"):
        curves.retrieval_figure([other], tmp_path / "none.png")


@pytest.mark.parametrize("steps", [3, 60])
def test_loss_curves_are_the_rows(saved: list[Any], tmp_path: Path, steps: int):
    rows: list[dict[str, Any]] = [{"tokens": 10 * i, "train/loss": 5.0 - i / steps} for i in range(steps)]
    rows += [{"tokens": 10, "val/loss": 4.0}, {"tokens": 20, "train/loss": float("nan")}, {"step": 1}]
    curves.loss_figure(rows, tmp_path / "l.png")
    lines = saved[0].axes[0].lines
    assert lines[0].get_xydata().tolist() == [[row["tokens"], row["train/loss"]] for row in rows[:steps]]
    assert lines[-1].get_xydata().tolist() == [[10, 4.0]]
    with pytest.raises(UserError, match="no train/loss or val/loss"):
        curves.loss_figure([{"tokens": 1}], tmp_path / "none.png")


@pytest.mark.parametrize(
    ("axis", "values"),
    [(Axis("x"), [3.0, 3.0]), (Axis("x"), [-1.0, 250.0]), (Axis("x", log=10), [1e-9, 3e-2]),
     (Axis("x", log=2, ticks=[512, 4096]), [512, 4096]), (Axis("x", log=2, ticks=[512]), [512]),
     (Axis("x", log=2, ticks=list(range(1, 40))), [1, 39]), (Axis("x", log=10), [5.0]),
     (Axis("x", log=10), [0.0, 0.0])],
)  # fmt: skip
def test_axes_hold_all_values_and_have_ticks(axis: Axis, values: list[float]):
    axes = style.new_figure(4, 3)[1]
    axis.apply(axes, "x", values)
    low, high = axes.get_xlim()
    assert low < high and all(low <= v <= high for v in values if v > 0 or not axis.log)
    ticks = axes.get_xticks()
    assert 1 <= len(ticks) <= 8 and all(low <= tick <= high for tick in ticks)
    assert all(text.get_text() for text in axes.get_xticklabels())


def test_two_names_of_one_look_have_a_legend_each(saved: list[Any], tmp_path: Path):
    one, same, other = (
        line_chart([Line(name, [1, 2], [3, 4], color=1)], Axis("x"), Axis("y"), "d") for name in ("a", "a", "b")
    )
    chart.save_charts([("t", one), ("t", same)], tmp_path / "one.png")
    chart.save_charts([("t", one), ("t", other)], tmp_path / "two.png")
    assert [len(figure.legends) for figure in saved] == [1, 2]


# -- SVG --------------------------------------------------------------------------------------------------------------


def test_svg_has_values_under_the_pointer_and_the_pages_colours():
    line = Line("<a> & $b$", [1, 2], [0.5, 0.25], [0.4, None], [0.6, None], color=2)
    svg = line_chart([line], Axis("x"), Axis("y", percent=True), 'the "d"', mark=(1.5, "here")).svg
    assert "<title>&lt;a&gt; &amp; $b$: 0.5 at 1 (95 %: 0.4 to 0.6)</title>" in svg
    assert "<title>&lt;a&gt; &amp; $b$: 0.25 at 2</title>" in svg
    assert svg.count("<circle") == 2 and "stroke:var(--s2)" in svg and ">here</text>" in svg
    assert 'aria-label="the &#34;d&#34;"' in svg and "font-family" not in svg and "font-size" not in svg
    assert not re.search(r"#[0-9a-f]{6}|url\(| id=|xlink| (d|c?x|c?y)=\"[^\"]*\d\.\d\d", svg)


@pytest.mark.parametrize("name", ["long", "short"])
def test_lines_of_many_points_have_their_name_alone(name: str):
    count = 1000 if name == "long" else 10
    svg = line_chart([Line(name, range(count), range(count))], Axis("x"), Axis("y"), "d").svg
    assert svg.count("<title>") == (1 if name == "long" else 1 + count)


def test_no_colour_stands_for_two():
    assert len(style.VARIABLES) == len(set(style.VARIABLES.values())) == 6 + 8 + len(style.HEAT)


def test_heat_maps_leave_missing_cells_empty():
    grid = Grid({("a", "1"): 0.2, ("b", "2"): 1.0}, ["a", "b"], ["1", "2"], row_label="r", column_label="c")
    chart = heat_map(grid, "d")
    assert re.findall(r"fill:color-mix\(in oklab,var\(--heat-high\) (\d+)%", chart.svg) == ["20", "100"]
    assert re.findall(r"<title>(.*?)</title>", chart.svg) == ["a, 1: 0.20", "b, 2: 1.00"]


def test_bars_have_the_sizes_of_their_values():
    bars = stacked_bars([("set", [("a", 0.75), ("b", 0.25)])], ["a", "b"], "d").svg
    widths = [float(right) - float(left) for left, right in re.findall(r'd="M([\d.]+) [\d.]+L([\d.]+)', bars)]
    assert widths[0] == pytest.approx(3 * widths[1], rel=1e-2) and sum(widths) == pytest.approx(408, abs=0.2)
    assert ">75.0 %</text>" in bars and "<title>set, b: 25.00 %</title>" in bars
    counts = histogram([("16", 10.0), ("32", 5.0)], "d", "x", "y").svg
    assert re.findall(r"<title>(.*?)</title>", counts) == ["16: 10", "32: 5"]


def ends_of_bars(svg: str, color: int) -> list[tuple[float, float]]:
    """Left and right ends of the bars of a colour, from above."""
    found = re.findall(rf'<path d="M([\d.]+) [\d.]+L([\d.]+) [^"]*" style="fill:var\(--s{color}\)', svg)
    return [(float(left), float(right)) for left, right in found]


def test_rows_of_bars_begin_at_nothing_and_tell_their_values():
    both = [Bars("x", [0.5, None, -0.25], 1), Bars("y", [0.25, 0.0, 0.125], 2)]
    chart = bar_chart(["a", "b", "c"], both, Axis("share", percent=True), "d")
    (zero, half), (_, down) = ends_of_bars(chart.svg, 1)
    quarter, nothing, eighth = ends_of_bars(chart.svg, 2)
    assert (quarter[0], nothing, eighth[0]) == (zero, (zero, zero), zero)
    lengths = half - zero, 2 * (quarter[1] - zero), 2 * (zero - down), 4 * (eighth[1] - zero)
    assert lengths == pytest.approx([lengths[0]] * 4, abs=0.5)  # the file has tenths of a point
    titles = re.findall(r"<title>(.*?)</title>", chart.svg)
    assert titles == ["a: x 50 %, y 25 %", "b: y 0 %", "c: x -25 %, y 12.5 %"]
    assert chart.legend == [("x", 1, "fill"), ("y", 2, "fill")]


def test_bars_of_a_logarithm_begin_at_its_low_end_and_have_their_values_behind_them():
    axis = Axis("KL", log=10, low=1e-8)
    chart = bar_chart(["a", "b", "c", "d"], [Bars("", [0.0, 1e-9, 1e-4, 1.0], 1)], axis, "d")
    none, less, four, eight = ends_of_bars(chart.svg, 1)
    assert none == less == (none[0], none[0]) and chart.legend == []
    assert eight[1] - eight[0] == pytest.approx(2 * (four[1] - four[0]), abs=0.2)
    assert all(f">{words}</text>" in chart.svg for words in ("0", "1e-9", "0.0001", "1"))


def test_pictures_of_reuse_have_a_panel_for_what_was_measured(saved: list[Any], tmp_path: Path):
    files = draw_reuse(list(reuse_rows("m")), tmp_path)
    assert [path.name for path in files] == ["kvcomm_retrieval.png", "kvcomm_copy.png", "kvcomm_retrieval_cache.png"]
    assert [len(figure.axes) for figure in saved] == [6, 4, 3]
    assert "m: retrieval, 12 problems" in [text.get_text() for text in saved[0].texts]
    for axes in saved[0].axes:
        assert [text.get_text() for text in axes.get_yticklabels()] == list(ARMS)
    two = draw_reuse([*reuse_rows("a/b"), *reuse_rows("c")], tmp_path)
    assert [path.name for path in two][:2] == ["kvcomm_a_b_retrieval.png", "kvcomm_a_b_copy.png"] and len(two) == 6


def test_charts_are_the_same_each_time():
    first, second = (line_chart([Line("a", [1, 2, 3], [3, 1, 2])], Axis("x"), Axis("y"), "d").svg for _ in range(2))
    assert first == second


def test_importing_figures_imports_neither_torch_nor_matplotlib():
    code = (
        "import sys, anchorctx.report.plot, anchorctx.report.figures.reuse, anchorctx.report.figures.precision; "
        "print({'torch', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"

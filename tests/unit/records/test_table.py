"""Aligned columns."""

from __future__ import annotations

import numpy as np

from anchorctx.records.table import text_table


def test_columns_are_aligned_and_counts_have_separators() -> None:
    rows = [("source", "tokens", "share"), ("web", 1_234_567, "97.00 %"), ("books, all", np.int64(890), "3.00 %")]
    assert text_table(rows, "<>", indent=2) == [
        "  source         tokens    share",
        "  web         1,234,567  97.00 %",
        "  books, all        890   3.00 %",
    ]


def test_headings_and_short_rows_widen_nothing() -> None:
    rows = ["a heading wider than all columns", ("x", "1", "note"), "", ("longer", "22"), ("y", "", "")]
    assert text_table(rows, "<><", indent=1) == [
        "a heading wider than all columns",
        " x        1  note",
        "",
        " longer  22",
        " y",
    ]


def test_no_rows_are_no_lines() -> None:
    assert text_table([]) == [] and text_table(["only a heading"]) == ["only a heading"]

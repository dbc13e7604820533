"""The page of attacks is what their record says."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def test_the_page_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    writer = importlib.import_module("write_reliability")
    monkeypatch.setitem(sys.modules, "write_reliability", writer)
    assert writer.PAGE.read_text() == writer.page(), "run python docs/write_reliability.py"

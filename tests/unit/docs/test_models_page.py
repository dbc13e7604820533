"""The page of decoders is what the list of them says."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import transformers

from anchorctx.attention.architecture import known

ROOT = Path(__file__).parents[3]


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    module = importlib.import_module("write_models")
    monkeypatch.setitem(sys.modules, "write_models", module)
    return module


def test_the_page_is_up_to_date(writer: ModuleType) -> None:
    if transformers.__version__ != known()[2]:
        pytest.skip(f"the page names the decoders of transformers {known()[2]}")
    assert writer.PAGE.read_text() == writer.page(), "run python docs/write_models.py"


def test_notes_are_of_exact_decoders(writer: ModuleType) -> None:
    assert set(writer.NOTES) <= known()[0]

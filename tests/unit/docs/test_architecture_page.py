"""The page about the code: its picture is what the imports are, and what it names exists."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "architecture.md"


@pytest.fixture
def drawing(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    module = importlib.import_module("draw_architecture")
    monkeypatch.setitem(sys.modules, "draw_architecture", module)
    return module


def test_every_path_of_the_page_exists() -> None:
    roots = "anchorctx|conf|docs|examples|recipes|benchmarks|scripts|tests"
    named = re.findall(rf"`((?:{roots})/[\w./]*)`", PAGE.read_text())
    assert len(named) > 30
    assert not [name for name in named if not (ROOT / name).exists()]
    packages = {path.parent.name for path in (ROOT / "anchorctx").glob("*/__init__.py")} - {"testing"}
    assert packages <= {name.split("/")[1] for name in named if name.startswith("anchorctx/")}


def test_the_picture_is_drawn_from_the_imports(drawing: ModuleType, tmp_path: Path) -> None:
    graph = drawing.arrows()
    assert {"models", "data", "parallel"} <= graph["train"] and "evals" not in graph["train"]
    assert set(graph) | set(drawing.FOUNDATION) == set(drawing.WHAT)  # each has its line in the picture
    drawing.draw(tmp_path / "first.png")
    drawing.draw(tmp_path / "second.png")
    picture = (tmp_path / "first.png").read_bytes()
    assert picture == (tmp_path / "second.png").read_bytes() and len(picture) > 20_000


def test_arrows_that_follow_from_others_are_left_out(drawing: ModuleType) -> None:
    graph = {"a": {"b", "c"}, "b": {"c"}, "c": set(), "d": {"c"}}
    assert drawing.reduced(graph) == {"a": {"b"}, "b": {"c"}, "c": set(), "d": {"c"}}
    assert drawing.heights(graph) == {"a": 2, "b": 1, "c": 0, "d": 1}
    where = drawing.places(drawing.reduced(graph))
    assert where["a"][1] > where["b"][1] > where["c"][1] and len(set(where.values())) == 4


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("from anchorctx.data.loader import x", ["data"]),
        ("import anchorctx.evals.runner", ["evals"]),
        ("from anchorctx import plan", ["plan"]),
        ("from ..layout import Pattern\nfrom . import merge\nimport torch", ["layout", "attention"]),
    ],
)
def test_imports_are_read(drawing: ModuleType, source: str, names: list[str]) -> None:
    assert list(drawing.imported(ast.parse(source), ["anchorctx", "attention"])) == names

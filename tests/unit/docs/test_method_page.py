"""The page about the method: its picture shows what layouts are, and its code and names exist."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import anchorctx.integrations
from anchorctx.layout import PackedLayout, Pattern

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "method.md").read_text()


@pytest.fixture
def drawing(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    module = importlib.import_module("draw_method")
    monkeypatch.setitem(sys.modules, "draw_method", module)
    return module


def test_the_picture_shows_the_same_tokens_three_times(drawing: ModuleType) -> None:
    shared, copies, pieces = drawing.strips()
    assert shared.positions == tuple(range(1 + sum(drawing.LENGTHS)))
    assert copies.owners.count(-1) == len(drawing.LENGTHS) == sum(piece.owners.count(-1) for piece in pieces)
    own = [
        sorted((o, p) for strip in strips for o, p in zip(strip.owners, strip.positions, strict=True) if o >= 0)
        for strips in ([shared], [copies], pieces)
    ]
    assert own[0] == own[1] == own[2] and len(own[0]) == sum(drawing.LENGTHS)
    *small, long = pieces
    assert len(small) == 2 and all(len(piece.owners) <= drawing.MAX_TOKENS < len(long.owners) for piece in small)
    # whoever sees whom: a document's tokens see as many in both, the anchor among them
    owner, seen = np.array(shared.owners), shared.sees.sum(1)
    assert sorted(seen[owner >= 0]) == sorted(copies.sees.sum(1)[np.array(copies.owners) >= 0])


def test_the_picture_is_the_same_each_time(drawing: ModuleType, tmp_path: Path) -> None:
    drawing.draw(tmp_path / "first.png")
    drawing.draw(tmp_path / "second.png")
    picture = (tmp_path / "first.png").read_bytes()
    assert picture == (tmp_path / "second.png").read_bytes() and len(picture) > 20_000


@pytest.mark.parametrize(("tokens", "share"), [(1024, "0.1 %"), (50, "2 %")])
def test_what_copies_cost(tokens: int, share: str) -> None:
    row = PackedLayout((0, *range(1, 10 * tokens + 2, tokens)), 1)
    added = (row.with_copies()[0].length - row.length + 1) / (row.length - 1)
    assert f"{100 * added:.2g} %".replace("0.098", "0.1") == share and f"{share} at" in PAGE


def test_links_code_and_names_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", PAGE) if not link.startswith("http")]
    assert len(links) >= 3 and all((ROOT / "docs" / link).exists() for link in links)
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        ast.parse("if True:\n" + block if block.startswith("  ") else block)
    assert all(f"`{pattern}`" in PAGE for pattern in Pattern)
    options = {field.name for field in fields(anchorctx.integrations.AnchorCollator)} | {"model"}
    asked = set(re.findall(r"AnchorCollator\(tokenizer, (.*)\)", PAGE)[0].replace(" ", "").split(","))
    assert {option.partition("=")[0] for option in asked} <= options
    public = set(anchorctx.integrations.__all__) - {"Excess"}
    assert not [name for name in public if not re.search(rf"\b{name}\b", PAGE)]
    attached = set(inspect.signature(anchorctx.integrations.attach).parameters)
    for call in re.findall(r"attach\(model, (.*?)\)", PAGE):
        assert {option.partition("=")[0] for option in call.split(", ")} <= attached

"""Files that were changed by hand, or to do harm: every text is text, and what is no number is one sentence."""

from __future__ import annotations

import html.parser
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anchorctx.errors import UserError
from anchorctx.report.collect import collect
from anchorctx.report.page import render_page

from .fixtures import make_evaluation, make_packed, make_precision, make_reuse, make_run

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</title></svg><iframe src=javascript:alert(1)>",
    "{{ 7 * 7 }}{% raw %}",
    "\u202e<!--",
)


class Elements(html.parser.HTMLParser):
    """Names of all elements and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.attributes: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += [name for name, _ in attrs]


def everything(folder: Path, name: str) -> str:
    """A page of one project whose every name is `name`."""
    make_run(folder / "run", steps=12)
    make_packed(folder / "packed" / "abc123")
    make_evaluation(folder / "eval", f"{name} a", 0.2)
    make_precision(folder / "precision", f"{name} b")
    make_reuse(folder / "reuse", f"{name} b")
    for path in folder.rglob("manifest.json"):
        path.write_text(json.dumps(_named(json.loads(path.read_text()), name)))
    return render_page(name, collect([str(folder)]))


def _named(manifest: dict[str, Any], name: str) -> dict[str, Any]:
    manifest |= {"code": {"revision": name, "dirty": True}, "versions": dict.fromkeys(("torch", "anchorctx"), name)}
    manifest |= {"machine": {"devices": [name]}, "created": name}
    if mixture := manifest.get("mixture"):
        mixture["wanted"] = {f"{name} {key}": value for key, value in mixture["wanted"].items()}
        mixture["realised"] = {f"{name} {key}": value for key, value in mixture["realised"].items()}
        manifest["accounting"]["dropped"] = {name: 36}
    return manifest


def test_names_add_no_element_and_no_attribute(tmp_path: Path) -> None:
    plain, hostile = Elements(), Elements()
    plain.feed(everything(tmp_path / "plain", "x"))
    page = everything(tmp_path / "mine", " ".join(HOSTILE))
    hostile.feed(page)
    assert set(hostile.elements) == set(plain.elements) and set(hostile.attributes) == set(plain.attributes)
    assert hostile.elements.count("script") == plain.elements.count("script")
    assert "{{ 7 * 7 }}" in page and "alert(1)" in page  # as text


def rows(change: dict[str, Any]) -> Callable[[Path], None]:
    """An evaluation whose rows all have `change`."""

    def make(folder: Path) -> None:
        path = make_evaluation(folder, "m", 0.5) / "results.jsonl"
        lines = [json.dumps(json.loads(line) | change) for line in path.read_text().splitlines()]
        path.write_text("\n".join(lines) + "\n")

    return make


def metrics(**change: Any) -> Callable[[Path], None]:
    """A run whose metrics all have `change`, for every key where it is `all`."""

    def make(folder: Path) -> None:
        path = make_run(folder, steps=5) / "metrics.jsonl"
        found = [json.loads(line) for line in path.read_text().splitlines()]
        lines = [row | (dict.fromkeys(row, change["all"]) if "all" in change else change) for row in found]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    return make


def packed(**change: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        path = make_packed(folder / "abc")
        manifest = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps(manifest | change))

    return make


@pytest.mark.parametrize("value", [[1], "x", 3, None, {"pattern": ["full"]}, {"pattern": {"a": 1}}, {"pattern": 3}])
def test_a_manifest_that_names_no_pattern_is_one_without(tmp_path: Path, value: Any) -> None:
    make_run(tmp_path / "run", steps=5)
    make_packed(tmp_path / "packed" / "abc123")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest | {"config": value}))
    material = collect([str(tmp_path)])
    assert [run.place.pattern for run in material.runs] == [None]
    assert "pattern" not in render_page("t", material).partition("trained tokens")[2].partition(".")[0]


@pytest.mark.parametrize("value", ["x", 0, 1e300, [1], {"a": 1}, None, True])
def test_metrics_of_anything_make_a_page(tmp_path: Path, value: Any) -> None:
    """What is no number is left out."""
    for name, make in {"all": metrics(all=value), "tokens": metrics(tokens=value)}.items():
        make(tmp_path / name)
        assert "<html" in render_page("t", collect([str(tmp_path / name)]))


@pytest.mark.parametrize(
    "make",
    [
        *(rows({"value": value}) for value in ("x", None, float("nan"), float("inf"), 1e308, [1])),
        *(rows({name: "x"}) for name in ("n", "low", "high", "context")),
        rows({"metric": 3}),
        rows({"manifest": [3]}),
        rows({"context": {"model": "m", "length": "x"}}),
        rows(dict.fromkeys(("metric", "value", "unit", "n", "low", "high", "manifest", "context"), "x")),
        packed(accounting={"rows": "x", "trained": "x", "padding": "x"}),
        packed(document_lengths={"a": "b"}),
        packed(row_length="x"),
    ],
)
def test_what_is_no_number_is_one_sentence(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "mine")
    with pytest.raises(
        UserError, match=r"(in a row of .*: delete the row, or evaluate again|is no result row|cannot be drawn)"
    ) as error:
        render_page("t", collect([str(tmp_path / "mine")]))
    assert "\n" not in str(error.value)

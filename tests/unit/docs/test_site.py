"""The docs as a site: it builds, no link leads nowhere, and its reference has every public name."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PACKAGES = ("anchorctx", "anchorctx.attention", "anchorctx.integrations", "anchorctx.kvcomm")


def test_the_site_builds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the docs' site needs pip install '.[docs]'")
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    importlib.import_module("build_site").build(tmp_path / "site")
    reference = (tmp_path / "site" / "docs" / "reference.html").read_text()
    assert "Attention under packed layouts" in reference and ":::" not in reference
    assert (tmp_path / "site" / "docs" / "images" / "pattern.png").is_file()
    assert "fonts.googleapis" not in (tmp_path / "site" / "index.html").read_text()


def test_the_reference_has_every_public_name() -> None:
    listed = set(re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "reference.md").read_text(), re.MULTILINE))
    for path in listed:
        module, _, name = path.rpartition(".")
        assert hasattr(importlib.import_module(module), name), path
    names = {path.rpartition(".")[2] for path in listed}
    for package in PACKAGES:
        public = set(importlib.import_module(package).__all__) - {"__version__"}
        assert public <= names, package

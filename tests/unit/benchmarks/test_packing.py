"""The packing benchmark compares like with like, and the pictures of the policies are drawn from real rows."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from anchorctx.data.packing.config import Policy

ROOT = Path(__file__).parents[3]


def script(path: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    folder, name = path.split("/")
    monkeypatch.syspath_prepend(str(ROOT / folder))
    module = importlib.import_module(name)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def test_all_ways_pack_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = script("benchmarks/packing", monkeypatch)
    lengths = bench.lognormal(50_000, np.random.default_rng(3))
    tokens = np.arange(lengths.sum(), dtype=np.int32)
    texts = [part.tolist() for part in np.split(tokens, np.cumsum(lengths)[:-1])]
    rows = bench.ours(Policy.concat_split, lengths, tokens, 512)
    assert rows == bench.token_loop(texts, 512) == bench.piece_loop(texts, 512) == -(-int(lengths.sum()) // 511)
    assert bench.list_loop(texts, 512) == -(-int(lengths.sum()) // 512)


def test_memory_of_a_small_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bench = script("benchmarks/packing", monkeypatch)
    found = bench.memory(tmp_path, 0.005, 4096)
    assert found["rows"] > 300 and 0.01 < found["imports_gib"] < found["peak_gib"] < 1


def test_the_pictures_show_every_policy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pictures = script("docs/draw_packing", monkeypatch)
    panels = pictures.panels()
    assert set(panels) >= {"best_fit", "concat_split", "one_per_row", "long_documents", "min_length", "separators"}
    assert len(pictures.rows_of(panels["long_documents"][0])) == 3
    pictures.draw(panels["interleave"], tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000
    for name in panels:
        assert (ROOT / "docs" / "images" / f"packing_{name}.png").is_file()
        assert f"images/packing_{name}.png" in (ROOT / "docs" / "data.md").read_text()

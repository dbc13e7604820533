"""The attention benchmark: its rows and ratios, and a whole quick run from the command line."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from anchorctx.layout import PackedLayout

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "attention.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("attention", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["attention"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_equal_documents(bench: ModuleType) -> None:
    assert bench.equal_documents(12, 4) == PackedLayout((0, 1, 4, 8, 12), 1)
    assert bench.equal_documents(4, 4) == PackedLayout((0, 1, 4), 1)


def test_lognormal_documents_are_seeded_and_have_a_long_tail(bench: ModuleType) -> None:
    row = bench.lognormal_documents(2**21, seed=3)
    assert row == bench.lognormal_documents(2**21, seed=3) != bench.lognormal_documents(2**21, seed=4)
    lengths = np.diff(row.doc_offsets)[1:]
    assert row.length == 2**21 and row.anchor_len == 1
    # About 1,270 documents: the median's standard error is 1.25 * 1.2 / sqrt(1270) = 4 %.
    assert np.median(lengths) == pytest.approx(800, rel=0.2)
    assert lengths.max() > 10_000


def test_ratios_leave_out_the_warm_up(bench: ModuleType) -> None:
    assert bench.ratios([100.0, 4.0, 9.0, 2.0], [1.0, 2.0, 3.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}


def test_variants_compute_what_they_are_named_for(bench: ModuleType) -> None:
    row = bench.equal_documents(24, 6)
    tensors = [torch.randn(1, 2, 24, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    index = {variant: bench.tokens_of(variant, row) for variant in bench.VARIANTS}
    out = {
        variant: bench.attention(variant, row)(*(x[:, :, index[variant]] for x in tensors))
        for variant in bench.VARIANTS
    }
    torch.testing.assert_close(out["merge"], out["dense"], rtol=0, atol=1e-5)
    torch.testing.assert_close(out["copies"], out["dense"][:, :, index["copies"]], rtol=0, atol=1e-5)
    assert index["copies"].tolist()[:8] == [0, 1, 2, 3, 4, 5, 0, 6]
    # the last document alone, by the softmax's definition
    q, k, v = (x[:, :, 18:] for x in tensors)
    scores = (q @ k.mT / 8**0.5).masked_fill(torch.ones(6, 6).triu(1).bool(), float("-inf"))
    torch.testing.assert_close(out["plain"][:, :, -6:], scores.softmax(-1) @ v, rtol=0, atol=1e-5)
    assert out["plain"].shape[2] == 23, "no anchor"
    assert torch.allclose(out["full"][:, :, :6], out["merge"][:, :, :6], atol=1e-5)
    assert (out["full"] - out["merge"])[:, :, 6:].abs().max() > 0.1


def test_quick_run(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--quick", "--rounds", "1", "--threads", "1", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert "copies / plain" in done.stdout and "merge / copies" in done.stdout and "peak memory" in done.stdout
    result = json.loads((tmp_path / "attention_cpu.json").read_text())
    assert (tmp_path / "attention_cpu.png").stat().st_size > 10_000
    manifest = result["manifest"]
    assert manifest["cpu"] and manifest["threads"] == 1 and manifest["versions"]["torch"] == torch.__version__
    assert [row["tokens"] for row in result["timings"]] == [1024] * 3
    for row in result["timings"]:
        assert all(len(seconds) == 1 and seconds[0] > 0 for seconds in row["seconds"].values())
        assert max(row["max_difference_to_dense"].values()) < 1e-5
        assert 0 < row["score_pairs_of_full"] < 1
    assert [row["document"] for row in result["short"]] == [8, 32]
    measured = {(row["variant"], row["tokens"]): row["peak_mib"] for row in result["memory"]}
    assert set(measured) == {(variant, tokens) for variant in ("copies", "dense") for tokens in (1024, 2048)}
    # At least the output and three gradients, 2048 x 8 x 64 floats each; a dense mask would take 16 MiB more.
    assert measured["copies", 2048] > 16


def test_a_run_without_rounds_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--rounds", "0", "--out", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "--rounds 0: at least one round" in done.stderr
    assert not (tmp_path / "none").exists()


def test_quick_run_of_training_steps(tmp_path: Path) -> None:
    script = SCRIPT.with_name("training_step.py")
    command = [sys.executable, str(script), "--quick", "--rounds", "1", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert "time saved" in done.stdout
    result = json.loads((tmp_path / "training_step_cpu.json").read_text())["variants"]
    full, anchored = result["full"], result["anchor, documents of 128"]
    assert full["saved"] == 0 and full["flops_of_full"] == 1
    assert 0 < anchored["flops_of_full"] < 1 and anchored["documents"] == 8
    assert anchored["saved"] == pytest.approx(1 - anchored["seconds"][0] / full["seconds"][0])
    assert (tmp_path / "training_step_cpu.png").stat().st_size > 10_000

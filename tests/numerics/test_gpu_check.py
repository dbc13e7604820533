"""`scripts/gpu_check.sh` on a machine without a GPU: what it says, and that its verdicts tell right from wrong."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from anchorctx.attention import attend
from anchorctx.attention.kernels.base import Score
from anchorctx.attention.kernels.varlen import MAX_SEQUENCES
from anchorctx.layout import PackedLayout

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="what the script says on a machine without a GPU")
def test_gpu_check_without_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "gpu_check.sh"), "--out", str(out)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1 and not out.exists()
    lines = (done.stdout + done.stderr).strip().splitlines()
    assert len(lines) == 1 and "CUDA" in lines[0]


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, on this machine's CPU and its backends."""
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "scripts" / "gpu_check.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_check", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "DEVICE", "cpu")
    return module


def test_gpu_check_tells_right_from_wrong(gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = {case.name: case for case in gpu_check.cases()}
    case = replace(cases["softcap"], layouts=(PackedLayout((0, 1, 40, 90), 1),))
    (refused,) = gpu_check.errors(case, torch.float32)
    assert gpu_check.passed(refused) and "refused: " in gpu_check.line(refused)
    case = replace(case, score=Score(0.125))
    (right,) = gpu_check.errors(case, torch.float32)
    assert gpu_check.passed(right) and gpu_check.line(right).endswith("ok")
    wrong_scale = {"wrong": lambda q, k, v: attend(q, k, v, case.layouts, scale=0.126)}
    monkeypatch.setattr(gpu_check, "functions", lambda case: wrong_scale)
    (wrong,) = gpu_check.errors(case, torch.float32)
    assert not gpu_check.passed(wrong) and gpu_check.line(wrong).endswith("FAILED")
    monkeypatch.setattr(gpu_check, "functions", lambda case: {"broken": lambda q, k, v: q @ k})
    (broken,) = gpu_check.errors(case, torch.float32)
    assert not gpu_check.passed(broken) and "FAILED: RuntimeError" in gpu_check.line(broken)
    written = json.loads(json.dumps(gpu_check.plain([right, wrong, broken])))
    assert [row.get("deviations", [{}])[0].get("ok") for row in written] == [True, False, None]


def test_gpu_check_covers_every_pattern_and_feature(gpu_check: ModuleType) -> None:
    cases = gpu_check.cases()
    assert {"full", "intra_doc", "anchor", "interleaved", "window", "softcap"} <= {case.name for case in cases}
    assert {len(case.layouts) for case in cases} == {1, 2} and {case.kv_heads for case in cases} == {8, 2}
    assert max(len(case.layouts[0].doc_offsets) for case in cases) > MAX_SEQUENCES
    q, k, *_ = gpu_check.tensors(cases[0], torch.bfloat16)
    assert q.shape == (1, 8, 1000, 64) and q.stride(1) == 64 and not torch.equal(q, k)

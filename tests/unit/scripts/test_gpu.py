"""`scripts/gpu`: a rehearsal of every stage, what a stage that fails leaves behind, and verdicts right and wrong."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from anchorctx.attention import attend
from anchorctx.attention.kernels.varlen import MAX_SEQUENCES

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "scripts" / "gpu"


def run_sh(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(FOLDER / "run.sh"), *map(str, arguments)]
    environment = os.environ | {"PYTHON": sys.executable}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what the kit says on a machine without a card")
def test_without_a_card_one_sentence_says_what_to_do(tmp_path: Path) -> None:
    done = run_sh("--out", tmp_path / "out")
    assert done.returncode == 1 and not (tmp_path / "out").exists()
    lines = (done.stdout + done.stderr).strip().splitlines()
    assert len(lines) == 1 and "CUDA" in lines[0] and "--tiny" in lines[0]


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All stages' tables, by stage."""
    out = tmp_path_factory.mktemp("gpu")
    done = run_sh("--out", out, "--tiny")
    assert done.returncode == 0, (out / "gpu.txt").read_text()[-5000:] + done.stderr[-2000:]
    result = json.loads((out / "gpu.json").read_text())
    assert result["manifest"]["versions"]["torch"] and result["manifest"]["machine"]["devices"] == ["cpu"]
    assert all(stage["ended"] == "done" for stage in result["stages"].values())
    assert all(f"== {name}: done" in (out / "gpu.txt").read_text() for name in result["stages"])
    return {name: stage["tables"] for name, stage in result["stages"].items()}


@pytest.mark.slow  # the rehearsal takes two minutes
def test_a_rehearsal_goes_through_every_stage(rehearsed: dict[str, Any]) -> None:
    assert list(rehearsed) == ["check", "attention", "fused", "step", "resume", "reuse", "precision", "smollm2"]
    rows = [row for tables in rehearsed.values() for table in tables.values() for row in table]
    assert not [row for row in rows if "failed" in row or "skipped" in row]


@pytest.mark.slow  # the rehearsal takes two minutes
def test_check_and_attention(rehearsed: dict[str, Any]) -> None:
    errors = rehearsed["check"]["errors"]
    assert {row["case"] for row in errors} == {"batch of 2", "window", "sinks", "wider values"}
    assert all(row["ok"] for row in errors)
    timed = {(row["documents"], row["variant"]): row for row in rehearsed["attention"]["attention"]}
    for documents in ("4 of 64", "1 of lognormal"):
        assert all(timed[documents, name]["of kernel"] > 0 for name in ("kernel", "intra_doc", "copies", "anchor"))
        assert "refused" in timed[documents, "flex"]  # it has no backward on a CPU
    assert [row["equal"] for row in rehearsed["fused"]["rotation"]] == [True, True]
    assert rehearsed["fused"]["merge"][0]["largest deviation"] < 1e-4
    for row in rehearsed["attention"]["copies against the merge"]:
        assert row["largest deviation"] < 1e-5 * row["largest"]


@pytest.mark.slow  # the rehearsal takes two minutes
def test_a_killed_run_goes_on_with_the_same_bits(rehearsed: dict[str, Any]) -> None:
    continued, twice = rehearsed["resume"]["two runs"]
    assert continued["ok"] and continued["losses apart"] == continued["weights apart"] == 0
    assert twice["steps"] == 6 and twice["losses apart"] == 0  # on a CPU


@pytest.mark.slow  # the rehearsal takes two minutes
def test_training_reports_rates_and_losses(rehearsed: dict[str, Any]) -> None:
    steps = {row["setting"]: row for row in rehearsed["step"]["training step"]}
    assert steps["full"]["attention saved"] == 0 < steps["anchor"]["attention saved"]
    assert all(row["tokens/s"] > 0 and row["peak, GiB of plan"] > 0 for row in steps.values())
    trained = {row["pattern"]: row for row in rehearsed["smollm2"]["training"]}
    assert list(trained) == ["full", "anchor", "intra_doc"]
    for row in trained.values():
        assert row["steps"] == 3 and row["validation after"] < row["validation before"]


@pytest.mark.slow  # the rehearsal takes two minutes
def test_reuse_stands_beside_the_paper(rehearsed: dict[str, Any]) -> None:
    arms = {row["arm"]: row for row in rehearsed["reuse"]["time to first token"]}
    wanted = {"dense", "rotate_glue", "kvcomm_ungated", "mean_offset", "anchored", "the paper's dense, H100"}
    assert wanted <= set(arms) and arms["the paper's kvcomm, H100"]["agent 5, ms"] == 54.8
    assert "attention that moves" in rehearsed["precision"]["study"][0]["text"]


# -- parts ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports a module of the kit."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(sys.modules, "run", raising=False)  # a recipe's, left by another test
    yield importlib.import_module
    for name in [name for name in sys.modules if name == "run" or name.partition(".")[0] == "stages"]:
        del sys.modules[name]


STUB = """
import json, sys, time
stage, out = sys.argv[sys.argv.index("--stage") + 1], sys.argv[sys.argv.index("--out") + 1]
with open(out + "/rows.jsonl", "a") as file:
    file.write(json.dumps({"stage": stage, "table": "t", "x": 1.0}) + "\\n" + '{"stage": "')
if stage == "check":
    raise SystemExit("what went wrong")
time.sleep(60)
"""


@pytest.mark.parametrize(("name", "ended"), [("check", "failed with exit status 1"), ("step", "stopped after 2 s")])
def test_a_stage_that_fails_or_hangs_leaves_its_rows(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, ended: str
) -> None:
    run = gpu("run")
    (tmp_path / "stub.py").write_text(STUB)
    (tmp_path / "logs").mkdir()
    monkeypatch.setattr(run, "__file__", str(tmp_path / "stub.py"))
    began = time.time()
    found = run.run_stage(name, ["--out", str(tmp_path)], tmp_path, tmp_path, 2.0)
    assert time.time() - began < 30
    assert found["ended"] == ended and found["tables"] == {"t": [{"x": 1.0}]} and run.failed(found)
    assert ("what went wrong" in run.table_text(name, found)) == (name == "check")


def test_a_row_that_fails_fails_the_run(gpu: Any) -> None:
    def stage(**row: object) -> dict[str, object]:
        return {"ended": "done", "tables": {"t": [{"x": 1}, row]}}

    failed = gpu("run").failed
    assert failed(stage(failed="OutOfMemoryError")) and failed(stage(ok=False))
    assert not failed(stage(ok=True)) and not failed(stage(refused="no")) and not failed(stage(skipped="late"))


def test_measurements_that_fail_are_rows(gpu: Any, tmp_path: Path) -> None:
    module = gpu("stages.stage")
    stage = module.Stage("check", tmp_path, tmp_path, time.time() + 5, True)

    def broken() -> dict[str, object]:
        raise RuntimeError("first line\nsecond")

    stage.measure("t", broken, case="a")
    stage.measure("t", broken, case="b", needs=60.0)
    stage.measure("t", lambda: {"x": 1}, case="c")
    a, b, c = module.read_rows(tmp_path)
    assert a["failed"] == "RuntimeError: first line" and "60 needed" in b["skipped"] and c["x"] == 1


@pytest.fixture
def check(gpu: Any) -> ModuleType:
    return gpu("stages.check")


def test_check_tells_right_from_wrong(check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(next(case for case in check.cases() if case.name == "copies"))
    cpu = torch.device("cpu")
    assert check.errors("cpu", case, torch.float32, cpu)["ok"]
    wrong_scale = lambda q, k, v: attend(q, k, v, case.layouts, scale=1.01 * case.score.scale)  # noqa: E731
    monkeypatch.setattr(check, "attention", lambda name, case: wrong_scale)
    assert not check.errors("cpu", case, torch.float32, cpu)["ok"]


def test_check_covers_every_pattern_and_feature(check: ModuleType) -> None:
    cases = check.cases()
    assert {"full", "intra_doc", "anchor", "copies", "interleaved", "window", "softcap"} <= {
        case.name for case in cases
    }
    assert {len(case.layouts) for case in cases} == {1, 2} and {case.kv_heads for case in cases} == {8, 2}
    assert max(len(case.layouts[0].doc_offsets) for case in cases) > MAX_SEQUENCES
    q, k, *_ = check.tensors(cases[0], torch.bfloat16, torch.device("cpu"))
    assert q.shape == (1, 8, 1000, 64) and q.stride(1) == 64 and not torch.equal(q, k)

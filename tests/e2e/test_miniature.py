"""The miniature's small version from the first command to the last: some three minutes on two quiet cores."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "miniature"


def test_the_chain_runs_and_shows_what_every_run_must_show(tmp_path: Path) -> None:
    out = tmp_path / "miniature"
    command, environment = ["bash", str(RECIPE / "run.sh")], os.environ | {"OUT": str(out), "SCALE": "ci"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    check = [sys.executable, str(ROOT / "scripts" / "check_recipe.py"), str(RECIPE / "expected_ci.json")]
    compared = subprocess.run([*check, str(out / "summary")], capture_output=True, text=True)
    assert compared.returncode == 0, compared.stdout
    claims = [line.split(" | ") for line in done.stdout.splitlines() if re.match(r"\| [A-Z]\d+ \| .* \|$", line)]
    assert len(claims) == 50 and {cells[-1] for cells in claims} == {"undecided |"}  # one seed decides nothing
    assert {cells[0][2:] for cells in claims if cells[-2] == "1"} == {"T1", "T9", "T10", "K5", "K6"}
    assert {path.name for path in (out / "summary").glob("*.png")} == {"trained.png", "reuse.png", "claims.png"}
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    stages = len(list((out / "done").iterdir()))
    assert again.returncode == 0 and f"{stages} of {stages} stages are done already" in again.stdout

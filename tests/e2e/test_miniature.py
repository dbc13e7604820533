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
    claims = [line for line in done.stdout.splitlines() if re.match(r"\| [TLDPKC]\d+ ", line)]
    assert len(claims) == 39 and all(line.endswith("| undecided |") for line in claims)  # one seed decides nothing
    assert {path.name for path in (out / "summary").glob("*.png")} == {"trained.png", "reuse.png", "claims.png"}
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    stages = len(list((out / "done").iterdir()))
    assert again.returncode == 0 and f"{stages} of {stages} stages are done already" in again.stdout

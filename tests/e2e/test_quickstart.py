"""The quickstart from the first command to the last, and its figures against recipes/quickstart/expected.json."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from anchorctx.records.results import read_results

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "quickstart"


@pytest.mark.slow
def test_the_quickstart_keeps_its_claim(tmp_path: Path) -> None:
    out = tmp_path / "quickstart"
    command, environment = ["bash", str(RECIPE / "run.sh")], os.environ | {"OUT": str(out)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert AutoModelForCausalLM.from_pretrained(out / "exported").config.max_position_embeddings == 4096
    assert (out / "report.html").stat().st_size > 50_000
    rows = list(read_results(out / "eval" / "results.jsonl"))
    for figure in json.loads((RECIPE / "expected.json").read_text())["figures"]:
        wanted = (figure["metric"], figure["model"], figure["length"])
        found = [r.value for r in rows if (r.metric, r.context["model"], r.context.get("length")) == wanted]
        assert len(found) == 1 and abs(found[0] - figure["value"]) <= figure["tolerance"], (figure, found)
    logged = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in logged if "perf/data_seconds" in row]
    waited, whole = (sum(row[f"perf/{name}_seconds"] for row in steps) for name in ("data", "step"))
    assert len(steps) >= 100 and waited < 0.01 * whole  # 0.06 to 0.13 % measured
    made = sorted((out / "run").rglob("*.pt")) + [out / name / "model.safetensors" for name in ("base", "exported")]
    written = [path.stat().st_mtime_ns for path in made]
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and "exists already" in again.stdout
    assert len(made) > 3 and written == [path.stat().st_mtime_ns for path in made]  # nothing is done twice

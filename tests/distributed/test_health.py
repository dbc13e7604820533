"""Bad numbers end a run, or leave an update out, before weights or the optimizer's states have changed in any bit."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from anchorctx.data.packed_set import PackedSet

from .runs import Launcher, metrics, torchrun

pytestmark = pytest.mark.distributed
SMALL = (
    "model.config={model_type: llama, vocab_size: 64, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, "
    "num_attention_heads: 2, num_key_value_heads: 2, max_position_embeddings: 64}"
)


def run(launcher: Launcher, start: list[str], cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What became of each run of `cases`, by its name."""
    overrides = ("data.validation=null", "validate_every=0", "tokens_per_step=128", "optim.lr=0.001", SMALL)
    for name, case in cases.items():
        given = case.pop("overrides")
        case |= {"rank": case.get("rank", 0), "overrides": launcher.overrides(name, *overrides, *given)}
    command = [*start, str(Path(__file__).with_name("bad_numbers.py")), json.dumps(list(cases.values()))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"code"')]
    assert len(found) == len(cases), done.stderr[-3000:]
    assert "OVERFLOW" not in done.stdout
    return dict(zip(cases, found, strict=True))


def suspicious(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "suspicious.jsonl").read_text().splitlines()]


STAGES = ((1, "bfloat16"), (2, "bfloat16"), (2, "float32"), (3, "float32"))
KINDS = {f"skips_{stage}_{dtype}": (stage, dtype) for stage, dtype in STAGES}


@pytest.fixture(scope="module")
def one(launcher: Launcher) -> dict[str, dict[str, Any]]:
    """Runs of one process, all in one start."""
    skip = ("health.on_nonfinite=skip", "health.on_spike=skip", "health.max_skipped=3", "steps=14")
    faults = {"3": "loss", "5": "gradient", "12": "spike"}
    cases: dict[str, dict[str, Any]] = {
        name: {"faults": faults, "overrides": (*skip, f"parallel.zero_stage={stage}", f"model.dtype={dtype}")}
        for name, (stage, dtype) in KINDS.items()
    }
    capped = ("health.on_nonfinite=skip", "health.max_skipped=1", "checkpoint.every=1")
    cases["too_many"] = {"faults": {"2": "loss", "3": "gradient"}, "overrides": capped}
    cases["fails"] = {"faults": {"3": "gradient"}, "overrides": ("checkpoint.every=1",)}
    return run(launcher, [sys.executable], cases)


@pytest.mark.parametrize("name", KINDS)
def test_an_update_that_is_left_out_changes_nothing(launcher: Launcher, one: dict[str, Any], name: str) -> None:
    """Neither weights nor states, at any stage or dtype; the step counts, and the metrics say so."""
    assert (one[name]["code"], one[name]["changed"]) == (0, [1, 2, 4, 6, 7, 8, 9, 10, 11, 13, 14])
    rows = [row for row in metrics(launcher.root / name) if row["step"]]
    assert [row.get("train/skipped", 0) for row in rows] == [0, 0, 1, 1, *[2] * 7, 3, 3, 3]
    assert [row["step"] for row in rows if "train/grad_norm" not in row] == [3, 5, 12]
    assert "train/loss" not in rows[2] and rows[4]["train/loss"] > 0  # NaN is no JSON
    written = suspicious(launcher.root / name)
    kinds = [(line["step"], line["reason"], str(line["loss"]) == "nan") for line in written]
    assert kinds == [(3, "not finite", True), (5, "not finite", False), (12, "spike", False)]
    assert written[2]["deviations"] > 6


def test_a_run_ends_before_the_update(launcher: Launcher, one: dict[str, Any]) -> None:
    assert (one["fails"]["code"], one["fails"]["changed"]) == (2, [1, 2])
    assert one["fails"]["said"].startswith("the gradient of step 3 is not finite, so the update was not made: look")
    assert (one["too_many"]["code"], one["too_many"]["changed"]) == (2, [1])
    assert "and as many updates as health.max_skipped=1 were left out before" in one["too_many"]["said"]
    for name in ("fails", "too_many"):
        assert sorted(path.name for path in (launcher.root / name / "checkpoints").iterdir()) == [
            "step_00000001",
            "step_00000002",
        ]


def test_the_rows_are_written_with_their_documents(launcher: Launcher, one: dict[str, Any]) -> None:
    (line,) = suspicious(launcher.root / "fails")
    assert line["packed"] == f"{1:012x}" and len(line["rows"]) == 2  # tokens_per_step of two rows
    packed = PackedSet.open(launcher.train)
    for row in line["rows"]:
        offsets = packed.row(row["row"]).layout.doc_offsets
        spans = [[[start, stop]] for start, stop in pairwise(offsets[1:])]
        assert [document["tokens"] for document in row["documents"]] == spans
        numbers = [document["document"] for document in row["documents"]]
        assert numbers[0] == packed.row_documents[: row["row"]].sum() and numbers == list(
            range(numbers[0], numbers[0] + len(spans))
        )
        first = packed.row(row["row"]).input_ids[offsets[1]]
        assert row["documents"][0]["begins"].split()[0] == f"t{first}"


@pytest.fixture(scope="module")
def two(launcher: Launcher) -> dict[str, dict[str, Any]]:
    each = ("health.weights_every=1", "checkpoint.every=1")
    cases = {
        "loss_of_one": {"faults": {"2": "loss"}, "rank": 1, "overrides": each},
        "flip": {"faults": {"2": "flip"}, "rank": 1, "overrides": each},
        "share": {"faults": {"3": "nan"}, "rank": 1, "overrides": (*each, "parallel.zero_stage=3")},
        "copy": {"faults": {"3": "nan"}, "rank": 1, "overrides": ("health.weights_every=0", "checkpoint.every=1")},
    }
    return run(launcher, torchrun(2), cases)


def test_of_two_processes_one_with_bad_numbers_ends_both(launcher: Launcher, two: dict[str, dict[str, Any]]) -> None:
    """In the same step, before the update or before the next checkpoint."""
    assert {name: found["code"] for name, found in two.items()} == dict.fromkeys(two, 2)
    assert "the loss of step 2 is nan, so the update was not made" in two["loss_of_one"]["said"]
    assert two["loss_of_one"]["changed"] == [1]
    assert "after step 2 the weight" in two["flip"]["said"]
    assert "of process 0 and 1 of 2 differs from the others'" in two["flip"]["said"]
    assert "is not finite on process 1 of 2: go on without that machine" in two["share"]["said"]
    assert "is not finite: go on with a lower optim.lr; the last checkpoint was made before" in two["copy"]["said"]
    for name, steps in {"loss_of_one": 1, "flip": 1, "share": 2, "copy": 2}.items():
        folders = sorted(path.name for path in (launcher.root / name / "checkpoints").iterdir())
        assert folders == [f"step_{step:08d}" for step in range(1, steps + 1)], name

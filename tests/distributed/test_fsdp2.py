"""The example of a loop of one's own with FSDP2: two processes against each document alone in one."""

import importlib
import os
import subprocess
from pathlib import Path

import pytest

from ..unit.integrations.alone import curve, placed
from .runs import torchrun

pytestmark = pytest.mark.distributed
EXAMPLES = Path(__file__).parents[2] / "examples"


def test_two_processes_take_the_steps_of_documents_alone(monkeypatch):
    """Float32, AdamW, printed to seven digits. Measured: losses of 20 steps differ by at most 5.2e-7."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    example = importlib.import_module("fsdp2")
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"}
    command = [*torchrun(2), str(EXAMPLES / "fsdp2.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [float(loss) for loss in done.stdout.splitlines()[-1].removeprefix("losses: ").split(", ")]
    texts = [
        [[(ids.tolist(), [-100, *ids[1:].tolist()]) for ids in example.documents(step)[rank::2]] for rank in range(2)]
        for step in range(example.STEPS)
    ]
    steps = [[d for row in rows for d in placed(row, example.ROW, example.BOS)] for rows in texts]
    expected = curve(example.build(), steps, 3e-3, example.BOS)
    assert len(losses) == 20 and losses == pytest.approx(expected, abs=1e-5) and losses[0] - losses[-1] > 0.3

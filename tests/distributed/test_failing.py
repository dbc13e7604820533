"""A process that fails ends the job soon, with its own error, and leaves nothing that looks whole."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .runs import Launcher, torchrun

pytestmark = pytest.mark.distributed


def seconds_until_the_end(launcher: Launcher, how: str, *options: str) -> float:
    """From the failure to the job's end; checks what the job said."""
    failed_at, name = launcher.root / f"failed_{how}", f"failing_{how}"
    command = [*torchrun(2), *options, str(Path(__file__).with_name("failing.py")), how]
    command += launcher.overrides(name, "checkpoint.every=1", "parallel.sequence_parallel=2")
    environment = os.environ | {"FAILED_AT": str(failed_at), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    ended = time.time()
    assert done.returncode == 1
    assert "[rank1]: RuntimeError: the second process has lost its disk" in done.stderr
    assert "failing.py FAILED" in done.stderr and "rank      : 1 (local_rank: 1)" in done.stderr
    checkpoints = sorted(path.name for path in (launcher.root / name / "checkpoints").iterdir())
    assert checkpoints == ["step_00000001"]
    return ended - float(failed_at.read_text())


def test_a_process_that_raises_ends_the_job_with_its_error(launcher: Launcher) -> None:
    """The others wait for it in a collective, which ends with its connection."""
    assert seconds_until_the_end(launcher, "waits") < 20


@pytest.mark.slow
def test_processes_that_do_not_notice_are_ended_after_the_grace(launcher: Launcher) -> None:
    """Slow: torchrun gives them 30 s, whatever its --shutdown-timeout, which is for a job that is told to end."""
    assert 29 < seconds_until_the_end(launcher, "stuck", "--shutdown-timeout", "2") < 75


def test_a_mistake_is_one_sentence_and_nothing_else(tmp_path: Path) -> None:
    """Not torchrun's forty lines after it, and not a second time by the other process."""
    options = ["--standalone", "--nproc_per_node", "2", "-m", "anchorctx", "train"]
    command = [sys.executable, "-m", "anchorctx.cli.torchrun", *options, "out_dir=out", f"data.train={tmp_path}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, cwd=tmp_path)
    assert done.returncode == 2 and not done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"anchorctx train: {tmp_path} holds no packed set: make one with")
    assert not list(tmp_path.iterdir())


def test_a_finished_process_does_not_abort_at_its_end() -> None:
    """With `sys.exit` in place of `leave`, gloo's thread ends this process with SIGABRT."""
    command = [sys.executable, str(Path(__file__).with_name("leaving.py"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]

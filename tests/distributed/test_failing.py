"""A process that fails ends the job soon, with its own error, and leaves nothing that looks whole."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from .runs import Launcher, torchrun

pytestmark = pytest.mark.distributed


def seconds_until_the_end(launcher: Launcher, how: str) -> float:
    """From the failure to the job's end; checks what the job said."""
    failed_at, name = launcher.root / f"failed_{how}", f"failing_{how}"
    command = [*torchrun(2), str(Path(__file__).with_name("failing.py")), how]
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
def test_processes_that_do_not_notice_end_too(launcher: Launcher) -> None:
    """As in a collective on CUDA; torchrun would give them 30 s. Slow, being so like the one above."""
    assert seconds_until_the_end(launcher, "stuck") < 29


def test_a_frozen_process_is_named_and_ends_the_job(launcher: Launcher) -> None:
    """Not gloo's traceback: a sentence, and an exit code of its own."""
    words = ("steps=100000", "validate_every=0", "checkpoint.every=0", "parallel.timeout_s=8")
    command = launcher.command("frozen", 2, *words, ours=True)
    metrics = launcher.root / "frozen" / "metrics.jsonl"
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as job:
        wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 2, job)
        workers = [p for p in psutil.Process(job.pid).children(recursive=True) if "RANK" in p.environ()]
        frozen = next(p for p in workers if p.environ()["RANK"] == "1")
        frozen.suspend()
        next(p for p in workers if p is not frozen).wait(60)
        frozen.kill()  # as torchrun does after 30 s
        said = job.communicate(timeout=60)[1]
    assert job.returncode == 3
    line = next(line for line in said.splitlines() if line.startswith("anchorctx train: "))
    assert re.search(
        rf"rank 0 waits at step \d+, since \d+ s, for rank 1 \(pid {frozen.pid} on \S+\), which does not answer any "
        r"more and began (step \d+|what follows step \d+) last: see to these processes",
        line,
    )
    assert "Traceback" not in said


def wait_for(done: Callable[[], bool], job: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not done():
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


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

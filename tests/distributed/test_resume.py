"""Runs that end early continue as if they had not, and runs that cannot be continued say why."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.torch import load_file

import anchorctx
from anchorctx.data.loader import RowLoader
from anchorctx.data.packed_set import PackedSet
from anchorctx.data.pieces import Cutting
from anchorctx.layout import Pattern
from anchorctx.train.config import ExportConfig
from anchorctx.train.export import export

from .runs import LENGTH, curve, metrics

pytestmark = pytest.mark.distributed
LONG = ("steps=60", "checkpoint.every=5", "validate_every=20", "checkpoint.keep_last=100")
CURVE = ("step", "tokens", "train/loss", "train/lr", "train/grad_norm", "val/loss")


@pytest.fixture(scope="module")
def whole(launcher):
    return launcher.run("whole", 2, *LONG)


def interrupt(launcher, name, how):
    """Start a run, and once it wrote a checkpoint end it by `how`(launcher process); returns its exit code."""
    command = launcher.command(name, 2, *LONG, ours=True)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    first = launcher.root / name / "checkpoints" / "step_00000005"
    deadline = time.monotonic() + 120
    while not first.exists():
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before it could be interrupted"
        time.sleep(0.02)
    how(psutil.Process(process.pid))
    return process.wait(timeout=120)


def kill_all(launcher_process):
    """kill -9 for the launcher and every worker, as a power cut would."""
    for process in (*launcher_process.children(recursive=True), launcher_process):
        process.send_signal(signal.SIGKILL)
    psutil.wait_procs(launcher_process.children(recursive=True), timeout=30)


def terminate_one_worker(launcher_process):
    """SIGTERM to one rank only, as a scheduler may do."""
    workers = [p for p in launcher_process.children(recursive=True) if "RANK" in p.environ()]
    next(p for p in workers if p.environ()["RANK"] == "1").send_signal(signal.SIGTERM)


def same_run(run, whole, tmp_path):
    """Bit for bit: the loss curve and the exported weights."""
    ours, theirs = ([{k: row.get(k) for k in CURVE} for row in metrics(r)] for r in (run, whole))
    assert ours == theirs
    weights = [
        load_file(export(ExportConfig(run=str(r), out_dir=str(tmp_path / r.name))) / "model.safetensors")
        for r in (run, whole)
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])


def test_kill_9_and_resume_is_bit_identical(launcher, whole, tmp_path):
    assert interrupt(launcher, "killed", kill_all) != 0
    killed = launcher.root / "killed"
    assert metrics(killed)[-1]["step"] < 60
    (killed / "checkpoints" / ".step_00000099.partial").mkdir()  # as a kill in the middle of a checkpoint leaves it
    launcher.run("killed", 2, *LONG)
    assert not (killed / "checkpoints" / ".step_00000099.partial").exists()
    same_run(killed, whole, tmp_path)


def test_sigterm_on_one_rank_saves_and_ends_cleanly(launcher, whole, tmp_path):
    assert interrupt(launcher, "terminated", terminate_one_worker) == 143  # not a finished run, for the scripts around
    terminated = launcher.root / "terminated"
    stopped_at = metrics(terminated)[-1]["step"]
    assert stopped_at < 60
    assert (terminated / "checkpoints" / f"step_{int(stopped_at):08d}" / "COMPLETE").exists()
    launcher.run("terminated", 2, *LONG)
    same_run(terminated, whole, tmp_path)


def stopped_at(launcher, run, name, step):
    """A copy of a finished run that looks as if it had been ended after `step`."""
    copy = shutil.copytree(run, launcher.root / name)
    for folder in (copy / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step_")) > step:
            shutil.rmtree(folder)
    return copy


def same_curve(run, whole):
    """To 1e-5: sums are taken in another order."""
    names = ("step", "tokens", "train/loss", "train/grad_norm", "val/loss")
    np.testing.assert_allclose(curve(run, *names), curve(whole, *names), rtol=1e-5)


@pytest.mark.parametrize("stage", [2, pytest.param(1, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_a_run_goes_on_with_another_number_of_processes(launcher, whole, stage):
    if stage != 2:
        whole = launcher.run(f"whole_{stage}", 2, *LONG, f"parallel=zero{stage}")
    for processes in (1, 4)[: 1 if stage == 2 else 2]:
        run = stopped_at(launcher, whole, f"divided_{stage}_{processes}", 30)
        launcher.run(run.name, processes, *LONG, f"parallel=zero{stage}")
        same_curve(run, whole)
        assert not [path for path in (run / "checkpoints").iterdir() if "universal" in path.name]


def test_a_run_goes_on_with_another_batch_from_its_trained_tokens(launcher, whole):
    run = stopped_at(launcher, whole, "larger_batch", 30)
    launcher.run(run.name, 2, *LONG, f"tokens_per_step={LENGTH * 16}")
    packed = PackedSet.open(launcher.train)
    seen = {row["step"]: row["tokens"] for row in metrics(run)}
    assert [seen[step] for step in range(31)] == [row["tokens"] for row in metrics(whole)][:31]
    stream = RowLoader(packed, Pattern.anchor, Cutting(LENGTH), rows_per_step=1)
    trained = np.cumsum([packed.row_trained[stream.rows(i)[0]] for i in range(30 * 8 + 30 * 16)])
    assert [seen[30 + step] for step in range(31)] == [trained[30 * 8 + step * 16 - 1] for step in range(31)]


def test_a_run_goes_on_with_other_pieces(launcher, whole):
    """A step trains the same whatever its pieces: tokens to the last one, losses to rounding."""
    run = stopped_at(launcher, whole, "other_pieces", 30)
    launcher.run(run.name, 2, *LONG, "micro_tokens=40", "parallel.sequence_parallel=2")
    same_curve(run, whole)
    assert metrics(run)[-1]["data/long_documents"] > 0


CANNOT = [
    (("seed=5",), "written with seed=0, but this run has seed=5"),
    (("pattern=full",), "written with pattern=anchor, but this run has pattern=full"),
    (("checkpoint.resume=never",), "already holds a run"),
    (("checkpoint.resume=nowhere",), "nowhere is no folder"),
    (("tokens_per_step=100",), "tokens_per_step=100 must be a multiple of the row length, 64: use 128"),
    (("data.train={validation}",), "written with corpus=000000000001, but this run has corpus=000000000002"),
]


def test_runs_that_cannot_be_continued_say_why(launcher, whole):
    runs = [("whole", *LONG, *(o.format(validation=launcher.validation) for o in overrides)) for overrides, _ in CANNOT]
    before = sorted(path.name for path in whole.rglob("*"))
    for result, (_, sentence) in zip(launcher.several(2, runs), CANNOT, strict=True):
        assert result["code"] == 2
        (line,) = [line for line in result["stderr"].splitlines() if line.startswith("anchorctx ")]
        assert line.startswith("anchorctx train: ") and sentence in line
        assert "Traceback" not in result["stderr"]
    assert sorted(path.name for path in whole.rglob("*")) == before  # nothing half-written


def test_under_torchrun_a_mistake_is_one_sentence_before_torchruns_own(launcher, whole):
    command = launcher.command("whole", 1, *LONG, "seed=5")
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    sentence = "written with seed=0, but this run has seed=5"
    assert done.stderr.count("anchorctx train: ") == 1 and sentence in done.stderr
    assert str(Path(anchorctx.__file__).parent / "cli") not in done.stderr  # no traceback of ours


def test_a_folder_in_use_is_refused(launcher, whole):
    import fcntl

    with (whole / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = subprocess.run(launcher.command("whole", 1, *LONG), capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "is being written by " in done.stderr


def test_a_failing_rank_ends_the_job_quickly(launcher, tmp_path):
    """Rank 1 cannot read its data: the job ends with that rank's error, it does not hang in a collective."""
    broken = tmp_path / "sitecustomize.py"
    broken.write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1':\n"
        "    import anchorctx.data.loader as loader\n"
        "    def fail(*args, **kwargs):\n"
        "        raise RuntimeError('rank 1 lost its disk')\n"
        "    loader.make_batch = fail\n"
    )
    began = time.monotonic()
    done = subprocess.run(
        launcher.command("failing", 2),
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode != 0
    assert "rank 1 lost its disk" in done.stderr
    assert time.monotonic() - began < 90

"""The launchers print exactly what they run, and under SLURM the job runs what was printed."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from anchorctx.cli.main import parse

LAUNCH = Path(__file__).parents[2] / "scripts" / "launch"
WORDS = ["--recipe", "a folder/recipe.yaml", "out_dir=runs/it's mine", "model.config={a: 1}", "x=$HOME"]


def launch(script: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a launcher where `python` (and SLURM's commands, if any) are those in `folder`."""
    kept = {name: value for name, value in os.environ.items() if name not in ("GPUS", "NODES", "HEAD")}
    path = f"{folder}:{os.environ['PATH']}"
    variables = kept | {"PATH": path, "PYTHON": str(folder / "python")} | environment
    command = ["bash", str(LAUNCH / f"{script}.sh"), *WORDS]
    return subprocess.run(command, capture_output=True, text=True, env=variables, cwd=folder)


def program(path: Path, body: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a python that writes down what it is called with, one argument a line."""
    program(
        tmp_path / "python", f'printf "%s\\n" "$0" "$@" >{tmp_path}/called; echo "alloc $PYTORCH_ALLOC_CONF"; exit 7'
    )
    return tmp_path


NODE = ["-m", "anchorctx.cli.torchrun", "--standalone", "--nproc_per_node", "4", "-m", "anchorctx", "train", *WORDS]
NODES = ["-m", "anchorctx.cli.torchrun", "--nnodes", "3", "--nproc_per_node", "4", "--max_restarts", "0"]
RENDEZVOUS = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "head:29500", "--rdzv_id", "mine"]
SEVERAL = [*NODES, *RENDEZVOUS, "-m", "anchorctx", "train", *WORDS]


@pytest.mark.parametrize(("script", "expected"), [("one_node", NODE), ("several_nodes", SEVERAL)])
def test_what_is_printed_is_what_runs(script: str, expected: list[str], folder: Path) -> None:
    settings = {"GPUS": "4", "NODES": "3", "HEAD": "head:29500", "JOB": "mine"}
    printed = launch(script, folder, DRY_RUN="1", **settings)
    assert printed.returncode == 0 and not (folder / "called").exists()
    assert shlex.split(printed.stdout) == [str(folder / "python"), *expected]
    ran = launch(script, folder, **settings)
    assert ran.returncode == 7  # the exit code is the job's
    assert (folder / "called").read_text().splitlines() == [str(folder / "python"), *expected]
    assert "alloc expandable_segments:True" in ran.stdout
    parse(expected[expected.index("train") + 1 :])


def test_several_nodes_ask_for_what_is_missing(folder: Path) -> None:
    done = launch("several_nodes", folder, NODES="2")
    assert done.returncode != 0 and "set HEAD to host:port of one of the machines" in done.stderr
    assert not (folder / "called").exists()


def test_a_slurm_job_is_submitted_and_runs_on_every_node(folder: Path) -> None:
    program(folder / "sbatch", f'printf "%s\\n" "$@" >{folder}/options; cat >{folder}/job; exec bash {folder}/job')
    program(folder / "scontrol", "printf 'first\\nsecond\\n'")
    program(folder / "srun", '[ "$1" = --kill-on-bad-exit=1 ] && shift && exec "$@"')
    settings = {"GPUS": "4", "NODES": "3", "PARTITION": "long", "GRACE": "120", "TIME": "2:00:00"}
    of_slurm = {"SLURM_NNODES": "3", "SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "node[1-3]"}
    printed = launch("slurm", folder, DRY_RUN="1", **settings)
    assert printed.returncode == 0 and not (folder / "called").exists()
    first, *rest = printed.stdout.splitlines()
    assert launch("slurm", folder, **settings, **of_slurm).returncode == 7
    options = (folder / "options").read_text().splitlines()
    assert shlex.split(first) == ["sbatch", *options]
    assert {"--signal", "TERM@120", "--partition", "long", "--gpus-per-node", "4", "--nodes", "3"} <= set(options)
    assert (folder / "job").read_text().splitlines() == ["#!/usr/bin/env bash", *rest]
    called = (folder / "called").read_text().splitlines()[1:]
    rendezvous = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "first:29500", "--rdzv_id", "anchorctx_12"]
    assert called == [*NODES, *rendezvous, "-m", "anchorctx", "train", *WORDS]

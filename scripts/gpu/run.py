"""Everything that this project says about GPUs, measured on one card, in stages, in less than nine minutes.

    bash scripts/gpu/run.sh --out gpu_out                            every stage that needs no trained model
    bash scripts/gpu/run.sh --out gpu_out --model SmolLM2-135M       and the two that need one: its folder
    bash scripts/gpu/run.sh --out gpu_out --only step --total 300    one stage, with more time
    bash scripts/gpu/run.sh --out gpu_out --tiny                     a rehearsal with tiny shapes on a CPU

Each stage is a process of its own with a time limit, and writes its rows as it goes: a crash or the limit costs what
was not done yet. FOLDER/gpu.json (all rows, versions, the card) and FOLDER/gpu.txt (tables) are written after each
stage; FOLDER/logs has what the stages printed. Exits 1 when a stage or a row failed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from stages.stage import ROWS, Stage, read_rows

from anchorctx.records.manifest import FILE, build_manifest, read_manifest, write_json, write_manifest
from anchorctx.records.table import text_table

STAGES = {
    "check": 75,
    "attention": 60,
    "fused": 25,
    "step": 90,
    "resume": 90,
    "reuse": 70,
    "precision": 60,
    "smollm2": 60,
}
"""In order of worth, with each one's share of the time: its limit in seconds where all run and none ends early."""
TOTAL = 520
GRACE = 5.0
"""Seconds between the moment when a stage should end and its limit."""
LOG_LINES = 12
"""Of a failed stage's log, printed with the tables."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages that were asked for, one after the other; 0 when all of them went well."""
    words = list(sys.argv[1:] if argv is None else argv)
    a = arguments(words)
    if a.stage is not None:
        return run_here(a)
    if not a.tiny and not torch.cuda.is_available():
        print("scripts/gpu needs a CUDA card, and torch sees none: give --tiny to rehearse on the CPU", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the stage that runs is ended too
    shutil.rmtree(a.out / "precision", ignore_errors=True)  # an earlier study would be continued
    (a.out / "logs").mkdir(parents=True, exist_ok=True)
    (a.out / ROWS).write_text("")
    (a.out / FILE).unlink(missing_ok=True)
    chosen = [name for name in STAGES if name in a.only]
    result: dict[str, dict[str, object]] = {}
    ends = time.time() + a.total
    with tempfile.TemporaryDirectory(prefix="gpu_", dir=a.scratch) as scratch:
        for number, name in enumerate(chosen):
            # what earlier stages did not use is spread over the later ones
            share = STAGES[name] / sum(STAGES[other] for other in chosen[number:])
            result[name] = run_stage(name, words, a.out, Path(scratch), share * (ends - time.time()))
            tables = table_text(name, result[name])
            print(tables, flush=True)
            with (a.out / "gpu.txt").open("a" if number else "w") as file:
                file.write(tables + "\n")
            write_json(a.out / "gpu.json", {"manifest": manifest_of(a.out), "stages": result})
    failures = [name for name, stage in result.items() if failed(stage)]
    verdict = f"failed: {', '.join(failures)}" if failures else "all well"
    print(f"\nwritten: {a.out / 'gpu.json'}, gpu.txt; {verdict}")
    return 1 if failures else 0


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder written to")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a trained Hugging Face model with its tokenizer")
    parser.add_argument("--only", default=",".join(STAGES), help=f"stages, of {','.join(STAGES)}")
    parser.add_argument("--total", type=float, default=TOTAL, metavar="SECONDS", help=f"for all stages ({TOTAL})")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on a CPU: to see that it works")
    parser.add_argument("--scratch", type=Path, metavar="FOLDER", help="for 3 GB while it runs (default: the system's)")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    a = parser.parse_args(argv)
    a.only = a.only.split(",")
    if unknown := [name for name in a.only if name not in STAGES]:
        parser.error(f"--only {unknown[0]} is no stage: choose from {', '.join(STAGES)}")
    if a.model is not None and not (a.model / "config.json").is_file():
        parser.error(f"--model {a.model} has no config.json: name the folder of a Hugging Face model")
    return a


def run_here(a: argparse.Namespace) -> int:
    """Run a stage in this process, which its driver started. The first one describes the machine: the driver itself
    never touches the card."""
    if not (a.out / FILE).exists():
        write_manifest(a.out, build_manifest("scripts/gpu", {"only": a.only, "total": a.total, "tiny": a.tiny}))
    stage = Stage(a.stage, a.out, a.scratch, a.until, a.tiny, a.model and a.model.resolve())
    importlib.import_module(f"stages.{a.stage}").run(stage)
    return 0


def manifest_of(out: Path) -> dict[str, object] | None:
    """Versions and the card; None where no stage came so far."""
    return read_manifest(out) if (out / FILE).exists() else None


def run_stage(name: str, words: Sequence[str], out: Path, scratch: Path, limit: float) -> dict[str, object]:
    """Run a stage in a process of its own, for `limit` seconds at most; how it ended, its tables, its log's end."""
    began, log = time.time(), out / "logs" / f"{name}.txt"
    own = ["--stage", name, "--scratch", str(scratch), "--until", str(began + limit - GRACE)]
    # one process talks to itself: NCCL need not look for a network
    environment = {"NCCL_SOCKET_IFNAME": "lo"} | os.environ | {"HF_HUB_OFFLINE": "1"}
    if "--tiny" in words:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    print(f"\n{name}: {limit:.0f} s at most", flush=True)
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, __file__, *words, *own],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # a group of its own, so that what it starts ends with it
        )
        try:
            status = process.wait(max(limit, 1.0))
            ended = "done" if status == 0 else f"failed with exit status {status}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {limit:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    tables: dict[str, list[dict[str, object]]] = {}
    for row in read_rows(out):
        if row.pop("stage") == name:
            tables.setdefault(str(row.pop("table")), []).append(row)
    tail = log.read_text(errors="replace").splitlines()[-LOG_LINES:] if ended != "done" else []
    return {"ended": ended, "seconds": round(time.time() - began, 1), "tables": tables, "log": tail}


def failed(stage: dict) -> bool:
    """Did the stage end early, or a row of it fail?"""
    rows = [row for table in stage["tables"].values() for row in table]
    return stage["ended"] != "done" or any("failed" in row or row.get("ok") is False for row in rows)


def table_text(name: str, stage: dict) -> str:
    """A stage's tables, their columns in the order in which they first appear."""
    lines = ["", f"== {name}: {stage['ended']}, {stage['seconds']} s"]
    for title, rows in stage["tables"].items():
        lines += ["", title]
        lines += [str(row["text"]) for row in rows if "text" in row]
        rows = [row for row in rows if "text" not in row]
        columns = list(dict.fromkeys(column for row in rows for column in row))
        if rows:
            lines += text_table([columns, *([shown(row.get(column)) for column in columns] for row in rows)])
    return "\n".join([*lines, *(f"  | {line}" for line in stage["log"])])


def shown(value: object) -> str:
    """A cell: three digits of a number."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return "" if value is None else f"{value:,}" if type(value) is int else str(value)


if __name__ == "__main__":
    sys.exit(main())

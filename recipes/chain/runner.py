"""Run a recipe: every stage once, some at a time; what is done already is left alone.

    PYTHONPATH=recipes python recipes/miniature/run.py RECIPE.yaml OUT [--jobs 2] [--only train/0 kvcomm]

OUT/logs/STAGE.log    commands and their output
OUT/done/STAGE.json   seconds that they took, and a fingerprint: remove it to do a stage, and what rests on it, again
OUT/begun/STAGE.json  the fingerprint of one that was cut off, whose commands go on with what they find
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from chain.stage import Stage, fingerprints

from anchorctx.errors import UserError
from anchorctx.records.manifest import read_json, write_json


class Runner:
    """The stages of one folder."""

    def __init__(self, todo: list[Stage], out: Path, jobs: int) -> None:
        self.stages, self.out, self.jobs = todo, out, jobs
        self.fingerprints, self.done = fingerprints(todo, out), set[str]()
        for stage in todo:
            if self._is_done(stage):
                self.done.add(stage.name)
        self.began, self.spent, self.planned = time.perf_counter(), 0.0, 0
        """Seconds of this call's stages, and what they were to take."""

    def run(self) -> None:
        """Run what is not done; SystemExit with the log's end when a stage fails."""
        left = sum(s.budget for s in self.stages if s.name not in self.done) / self.jobs / 60
        ahead = f", the others are to take about {left:.0f} min" if left else ""
        print(f"{len(self.done)} of {len(self.stages)} stages are done already{ahead}", flush=True)
        with ThreadPoolExecutor(self.jobs) as pool:
            running: dict[Future[float], Stage] = {}
            while len(self.done) < len(self.stages):
                for stage in self._ready([s.name for s in running.values()])[: self.jobs - len(running)]:
                    running[pool.submit(self._execute, stage)] = stage
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    stage = running.pop(future)
                    self._report(stage, future.result())

    def _ready(self, running: list[str]) -> list[Stage]:
        taken = self.done | set(running)
        return [s for s in self.stages if s.name not in taken and self.done.issuperset(s.needs)]

    def _execute(self, stage: Stage) -> float:
        """Seconds that the stage took."""
        log, start = self._path("logs", stage, ".log"), time.perf_counter()
        begun = self._begin(stage)
        threads = str(max((os.cpu_count() or 1) // self.jobs, 1))
        environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}
        with log.open("w") as file:
            file.write(stage.script() + "\n")
            file.flush()
            for command in stage.commands:
                if subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode:
                    tail = log.read_text(errors="replace")[-1500:]
                    raise SystemExit(f"{stage.name} failed; {log} ends with:\n{tail}")
        seconds = time.perf_counter() - start
        write_json(
            self._path("done", stage, ".json"),
            {"commands": self.fingerprints[stage.name], "seconds": round(seconds, 1)},
        )
        begun.unlink()
        return seconds

    def _begin(self, stage: Stage) -> Path:
        """Make room, unless this very stage was cut off: what others left there would be gone on with, or refused."""
        begun, mine = self._path("begun", stage, ".json"), {"commands": self.fingerprints[stage.name]}
        if not begun.is_file() or read_json(begun) != mine:
            for folder in stage.clears:
                shutil.rmtree(folder, ignore_errors=True)
        write_json(begun, mine)
        return begun

    def _report(self, stage: Stage, seconds: float) -> None:
        self.done.add(stage.name)
        self.spent, self.planned = self.spent + seconds, self.planned + stage.budget
        passed, pace = time.perf_counter() - self.began, self.spent / self.planned
        left = [pace * s.budget for s in self.stages if s.name not in self.done]
        print(
            f"[{len(self.done)}/{len(self.stages)}, {passed:.0f} s] {stage.name}: {seconds:.0f} s "
            f"(budget {stage.budget}), about {sum(left) / self.jobs / 60:.0f} min left",
            flush=True,
        )

    def _is_done(self, stage: Stage) -> bool:
        path = self._path("done", stage, ".json")
        known = path.is_file() and self.done.issuperset(stage.needs)
        return known and read_json(path)["commands"] == self.fingerprints[stage.name]

    def _path(self, folder: str, stage: Stage, suffix: str) -> Path:
        path = self.out / folder / f"{stage.name.replace('/', '.')}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def command_line(
    stages: Callable[[Path, Path], list[Stage]], arguments: list[str] | None = None, *, jobs: int = 2
) -> int:
    """Run what was typed; `stages` makes them of the recipe's file and OUT. Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("recipe", type=Path, help="YAML file: what is made and measured")
    parser.add_argument("out", type=Path, help="folder for everything")
    parser.add_argument("--jobs", type=int, default=jobs, help=f"stages at a time ({jobs})")
    parser.add_argument("--only", nargs="+", help="only stages whose name begins so, and what they need")
    parser.add_argument("--list", action="store_true", help="print the stages and their commands, run nothing")
    options = parser.parse_args(arguments)
    try:
        todo = stages(options.recipe, options.out)
    except UserError as error:
        parser.error(str(error))
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs} must be at least 1: give the number of stages at a time")
    if options.only:
        unknown = [prefix for prefix in options.only if not wanted(todo, (prefix,))]
        if unknown:
            parser.error(f"--only {unknown[0]} begins no stage's name: --list prints them")
        todo = wanted(todo, tuple(options.only))
    if options.list:
        print("\n\n".join(f"# {stage.name}, {stage.budget} s\n{stage.script()}" for stage in todo))
        return 0
    Runner(todo, options.out, options.jobs).run()
    return 0


def wanted(todo: list[Stage], prefixes: tuple[str, ...]) -> list[Stage]:
    """The stages whose names begin so, and whatever they need, in the same order."""
    by_name = {stage.name: stage for stage in todo}
    keep: set[str] = set()
    queue = [name for name in by_name if name.startswith(prefixes)]
    while queue:
        if (name := queue.pop()) not in keep:
            keep.add(name)
            queue += by_name[name].needs
    return [stage for stage in todo if stage.name in keep]

"""What the stages share: rows that are on disk as soon as they are measured, failures that are rows, and the clock."""

from __future__ import annotations

import gc
import importlib
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from anchorctx.errors import BackendUnavailableError

ROOT = Path(__file__).parents[3]
ROWS = "rows.jsonl"
"""All stages' rows, one a line: `stage`, `table` and the table's columns."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of a run, in a process of its own."""

    name: str
    out: Path
    """Folder of the results."""
    scratch: Path
    """Folder for packed sets and checkpoints, which are not kept."""
    until: float
    """When the stage should end, as `time.time()` counts; it is killed some seconds later."""
    tiny: bool
    """A rehearsal: small shapes on a CPU."""
    model: Path | None = None
    """A trained Hugging Face folder, where one was given."""

    @property
    def device(self) -> torch.device:
        """Where everything is measured."""
        return torch.device("cpu" if self.tiny else "cuda")

    @property
    def dtype(self) -> torch.dtype:
        """Of tensors and weights; a CPU without bfloat16 instructions would be slow in it."""
        return torch.float32 if self.tiny else torch.bfloat16

    def left(self) -> float:
        """Seconds until the stage should end."""
        return self.until - time.time()

    def row(self, table: str, cells: Mapping[str, object]) -> None:
        """Write a row at once, so that it is kept whatever happens next."""
        line = json.dumps({"stage": self.name, "table": table, **cells}, default=str)
        with (self.out / ROWS).open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)

    def measure(
        self, table: str, run: Callable[[], Mapping[str, object]], *, needs: float = 0.0, **cells: object
    ) -> Mapping[str, object]:
        """Write what `run` returns as a row behind `cells`; returns the row.

        An error is written in its place (`failed`, or `refused` where a backend cannot serve the call) and is not
        raised. With fewer than `needs` seconds left nothing is run (`skipped`).
        """
        late = {"skipped": f"{max(self.left(), 0):.0f} s are left, {needs:.0f} needed"}
        row = late if self.left() < needs else attempt(run)
        self.row(table, {**cells, **row})
        free_memory()
        return row


def attempt(run: Callable[[], Mapping[str, object]]) -> Mapping[str, object]:
    """What `run` returns; of an error the cell `refused` (a backend cannot serve the call) or `failed`."""
    try:
        return run()
    except BackendUnavailableError as refusal:
        return {"refused": str(refusal)}
    except Exception as error:  # a result like any other: the table shows it, and the rest is measured
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"}


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """Time of one call: CUDA events on a card, a clock on a CPU."""
    if device.type != "cuda":
        began = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - began)
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    run()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended)


def median_ms(run: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Median milliseconds of some calls, after one to warm up."""
    run()
    return statistics.median(milliseconds(run, device) for _ in range(rounds))


def free_memory() -> None:
    """Give memory that nothing refers to back to the card, and begin a new peak."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def benchmark(name: str) -> ModuleType:
    """A module of `benchmarks/`, which has the measurement already."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    return importlib.import_module(name)


def read_rows(out: Path) -> list[dict[str, object]]:
    """The rows so far; a line that a killed stage left half-written is left out."""
    path = out / ROWS
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def trained_model(stage: Stage) -> Path | None:
    """The folder that was given; in a rehearsal without one, a tiny random model with a tokenizer of 300 tokens."""
    if stage.model is not None or not stage.tiny:
        return stage.model
    from anchorctx.data.sources.stdlib import train_tokenizer
    from anchorctx.testing.tiny import save, text_model

    folder = stage.scratch / "tiny"
    if not folder.exists():
        tokenizer = train_tokenizer(vocabulary=300, sample_chars=20_000)
        save(text_model(tokenizer, 128), tokenizer, folder)
    return folder

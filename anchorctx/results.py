"""Result rows: what an evaluation found, appended to `results.jsonl`; the only thing that evals and report share."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from anchorctx.errors import UserError

FILE = "results.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One measured number, with what is needed to trust it."""

    metric: str
    """What was measured, such as `retrieval_accuracy`."""
    value: float
    """The number, in `unit`."""
    unit: str
    """Its unit; `1` is a plain ratio."""
    n: int
    """Independent observations behind it."""
    low: float | None = None
    """Lower end of the 95 % confidence interval; None when it is not known."""
    high: float | None = None
    """Upper end of the 95 % confidence interval."""
    manifest: str = ""
    """Hash of the manifest of the run that measured it."""
    context: dict[str, Any] = field(default_factory=dict)
    """Whatever tells rows apart: model, length in tokens, split."""


def append_results(path: Path, results: Iterable[Result]) -> None:
    """Append rows to the JSON-lines file `path`, made with its folder if needed; each row is on disk on return."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for result in results:
            file.write(json.dumps(asdict(result)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_results(path: Path) -> Iterator[Result]:
    """Yield the rows of `path` in order; UserError for a missing file or a line that is no result row."""
    if not path.is_file():
        raise UserError(f"{path} is no file of results: evaluate a model first, with anchorctx eval out_dir=...")
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                yield Result(**json.loads(line))
            except (ValueError, TypeError) as error:
                raise UserError(
                    f"{path}:{number} is no result row ({error}): delete the line or evaluate again"
                ) from None


def wilson_interval(hits: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % confidence interval of a proportion (Wilson, JASA 1927), which stays in [0, 1] for few observations."""
    if n == 0:
        return 0.0, 1.0
    share, spread = hits / n, z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return max(centre - half, 0.0), min(centre + half, 1.0)

"""What the folders given to `anchorctx report` hold: training runs, evaluations, packed sets, and their manifests."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anchorctx.errors import UserError
from anchorctx.layout import PackedLayout
from anchorctx.records.manifest import FILE as MANIFEST
from anchorctx.records.manifest import manifest_hash
from anchorctx.records.results import FILE as RESULTS
from anchorctx.records.results import Result, read_results
from anchorctx.records.typed import read_typed

METRICS = "metrics.jsonl"
MANIFESTS = "manifests"
"""Folder beside results.jsonl with a manifest for each evaluation of each model."""
SKIPPED = ("checkpoints", "wandb", "units", "tokenizer", MANIFESTS)
"""Folders inside runs that hold nothing to report; hidden and unfinished (`.partial`) ones are skipped too."""
NUMBERS = ("length", "context_length", "start", "stop", "depth", "shift")
"""Entries of a row's context that are numbers wherever they are."""
LARGEST = 1e100
"""Of any number in a row: sums and squares of such numbers are finite."""
Column = tuple[list[float], list[float]]
"""Trained tokens, and the value of a metric there."""


@dataclass(frozen=True, slots=True)
class Place:
    """A folder with something to report."""

    argument: str
    """Short name of the command line's folder that it lies in."""
    name: str
    """Where it lies in there; `argument` where it is that folder itself."""
    path: Path
    manifest: dict[str, Any]
    """Empty where there is none."""
    more: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Other manifests that its rows may name, by hash: of the first run of each evaluation of each model."""

    @property
    def hash(self) -> str:
        """The manifest's hash; empty where there is no manifest."""
        return manifest_hash(self.manifest) if self.manifest else ""

    @property
    def pattern(self) -> str | None:
        """What a run was trained with; None where its manifest does not say."""
        config = self.manifest.get("config")
        pattern = config.get("pattern") if isinstance(config, dict) else None
        return pattern if isinstance(pattern, str) else None

    @property
    def full_name(self) -> str:
        """The name with the command line's folder before it."""
        return self.name if self.name == self.argument else f"{self.argument}/{self.name}"


@dataclass(frozen=True, slots=True)
class TrainRun:
    """A training run's metrics."""

    place: Place
    rows: list[dict[str, Any]]
    """Lines of metrics.jsonl."""

    @property
    def label(self) -> str:
        """Its name in legends and tables."""
        return self.place.full_name

    def column(self, key: str) -> Column:
        """(trained tokens, value) of every row that has a finite `key`."""
        return column(self.rows, key)


@dataclass(frozen=True, slots=True)
class Row:
    """A result and the folder that it comes from."""

    result: Result
    place: Place
    model: str
    """Its model's name in this report."""


@dataclass(slots=True)
class Material:
    """Everything that a report is made from."""

    runs: list[TrainRun] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    packed: list[Place] = field(default_factory=list)
    """The folders of packed sets."""
    places: list[Place] = field(default_factory=list)
    """Every folder that has a manifest, in order."""
    layouts: dict[Path, PackedLayout] = field(default_factory=dict)
    """One row of some packed sets, by folder, with the pattern applied."""
    pretraining_length: int | None = None
    """Tokens; marked in charts where given."""

    def color(self, model: str) -> int:
        """The number of a model's colour, the same in all charts."""
        return list(dict.fromkeys(row.model for row in self.rows)).index(model)


def collect(folders: Sequence[str]) -> Material:
    """Read what lies in `folders`, oldest first in each.

    Raises UserError when one is missing, unreadable or holds nothing to report.
    """
    if not folders:
        raise UserError("anchorctx report needs at least one folder: anchorctx report runs/mine out=report.html")
    material = Material()
    names = _short_names([Path(folder) for folder in folders])
    found: list[tuple[Result, Place]] = []
    for folder, name in zip(folders, names, strict=True):
        before = len(material.runs) + len(found) + len(material.packed)  # to see whether the folder adds anything
        # By time, so that the first model of a comparison is the one that was measured first.
        for place in sorted(_places(Path(folder), name), key=lambda place: str(place.manifest.get("created", ""))):
            found += _take(place, material)
        if len(material.runs) + len(found) + len(material.packed) == before:
            raise UserError(
                f"{folder} holds no {METRICS}, {RESULTS} or packed set: name the out_dir of a training run, of an "
                "evaluation or of anchorctx prepare, or a folder that contains some"
            )
    material.rows = _named(found)
    return material


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, one for each logged step; UserError for a line that is no row.

    A run that is being written may end in half a line, which is left out.
    """
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_text().splitlines(keepends=True), 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not an object")
        except ValueError as error:
            # Only the last line can lack its newline, and only while the run still writes it.
            if not line.endswith("\n"):
                break
            raise UserError(f"{path}:{number} is no row of metrics ({error}): delete the line") from None
        rows.append(row)
    return rows


def column(rows: Sequence[dict[str, Any]], key: str) -> Column:
    """(trained tokens, value) of every row of metrics that has a finite `key`."""
    points = [(row["tokens"], row[key]) for row in rows if _finite(row.get(key)) and _finite(row.get("tokens"))]
    return [x for x, _ in points], [y for _, y in points]


def _take(place: Place, material: Material) -> list[tuple[Result, Place]]:
    """Add what one folder holds to the material; returns its result rows, which get their models' names later."""
    if place.manifest:
        material.places.append(place)
    if place.manifest.get("command") == "prepare" and "accounting" in place.manifest:
        material.packed.append(place)
    if (path := place.path / METRICS).is_file():
        material.runs.append(TrainRun(place, read_metrics(path)))
    # A folder may be several things: a run's out_dir can hold its evaluation.
    if (path := place.path / RESULTS).is_file():
        return [(checked(row, path), place) for row in read_results(path)]
    return []


def checked(row: Result, path: Path) -> Result:
    """The row of a results file; UserError for one that holds something else than an evaluation writes."""
    numbers = {"value": row.value, "n": row.n}
    numbers |= {name: end for name, end in {"low": row.low, "high": row.high}.items() if end is not None}
    context = row.context if isinstance(row.context, dict) else {}
    numbers |= {name: context[name] for name in NUMBERS if name in context}
    wrong = next((name for name, number in numbers.items() if not _finite(number) or abs(number) > LARGEST), None)
    texts = isinstance(row.metric, str) and isinstance(row.manifest, str) and isinstance(row.context, dict)
    if wrong is not None or not texts:
        what = f"{numbers[wrong]!r:.40} as {wrong}" if wrong else "no texts where a metric and its manifest are named"
        raise UserError(f"{path} has {what} in a row of {row.metric!r:.40}: delete the row, or evaluate again")
    return row


def _places(folder: Path, argument: str) -> Iterator[Place]:
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: name the out_dir of a training run or of an evaluation")
    for path, folders, files in os.walk(folder):
        # Assigned in place: `os.walk` goes into the folders that are left, in this order.
        folders[:] = sorted(f for f in folders if f not in SKIPPED and not f.startswith(".") and ".partial" not in f)
        if MANIFEST in files or METRICS in files or RESULTS in files:
            here = Path(path)
            inside = here.relative_to(folder).as_posix()
            manifest = _json(here / MANIFEST) if MANIFEST in files else {}
            # A result names the manifest under which it was first measured; a resumed evaluation has a newer one.
            files = sorted((here / MANIFESTS).glob("*.json"))
            first = {file.stem: _json(file).get("first_measured") for file in files}
            more = {mark: facts for mark, facts in first.items() if isinstance(facts, dict)}
            yield Place(argument, argument if inside == "." else inside, here, manifest, more)


def _json(path: Path) -> dict[str, Any]:
    return read_typed(path, dict[str, Any], "remove it, or leave its folder out")


def _named(found: Sequence[tuple[Result, Place]]) -> list[Row]:
    """Rows with their models' names.

    Where several folders of the command line have the same metric of the same model, the folder's name is added.
    """
    # Who measured what: {("perplexity", "after"): {"one", "two"}} needs the folders' names, but a model whose
    # perplexity is in one folder and whose retrieval is in another is one model.
    users: dict[tuple[str, str], set[str]] = {}
    named = [(result, place, str(result.context.get("model", place.name))) for result, place in found]
    for result, place, model in named:
        users.setdefault((result.metric, model), set()).add(place.argument)
    ambiguous = {model for (_, model), arguments in users.items() if len(arguments) > 1}
    return [Row(r, place, f"{model} · {place.argument}" if model in ambiguous else model) for r, place, model in named]


def _short_names(paths: Sequence[Path]) -> list[str]:
    """As few of each path's last parts as tell all apart: a/run and b/run stay whole, a/one and b/two lose a and b."""
    parts = [path.resolve().parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"{[str(path) for path in paths]} names a folder twice: name each once")


def _finite(value: Any) -> bool:
    # Python's json reads NaN and Infinity; NaN fails the comparison too.
    return isinstance(value, int | float) and abs(value) < float("inf")

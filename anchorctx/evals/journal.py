"""What a folder of results holds already, so that it is not measured again; and averages over checkpoints.

Every evaluation of a model has a manifest, whose hash covers exactly what its numbers depend on: the model's files, the
evaluation's settings, the documents, the seed, precision, device kind, library versions and the package's code. The
rows carry that hash. A unit is done when its rows are there under the hash of this run; after any change of substance
the hash differs, and everything is measured anew beside the old rows. `manifests/<hash>.json` keeps what was hashed,
and when and where it was first measured.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anchorctx import interrupt
from anchorctx.evals.base import Unit
from anchorctx.evals.config import EvaluatedModel
from anchorctx.evals.parts import FOLDER, Parts
from anchorctx.records.disk import Writing
from anchorctx.records.locks import lock_folder
from anchorctx.records.manifest import build_manifest, fingerprint, write_json
from anchorctx.records.places import check_place
from anchorctx.records.results import FILE, Result, append_results, mean_interval, mend_results
from anchorctx.records.transcripts import FILE as TRANSCRIPTS
from anchorctx.records.typed import read_typed

MANIFESTS = "manifests"
CODE = ("evals", "kvcomm", "models", "attention", "data", "parallel", "layout.py", "flops.py")
"""Parts of the package that an evaluation's numbers can depend on."""


class Journal:
    """The results of one folder, which only one process at a time may write."""

    def __init__(self, out_dir: Path) -> None:
        self.path = out_dir / FILE
        self._lock = lock_folder(out_dir)
        try:
            for name in (FILE, TRANSCRIPTS):
                check_place(out_dir / name)
            for name in (MANIFESTS, FOLDER):
                check_place(out_dir / name, folder=True)
            self.rows = mend_results(self.path)
        except BaseException:
            self.close()
            raise

    def find(self, manifest: str, label: str, unit: Unit) -> list[Result]:
        """The rows of a unit that was measured before; [] when it was not."""
        return [row for row in self.rows if row.manifest == manifest and _is_of(row, label, unit)]

    @staticmethod
    def key(identity: dict[str, Any]) -> str:
        """The manifest's hash."""
        return fingerprint(identity)

    def open(self, identity: dict[str, Any], facts: dict[str, Any]) -> str:
        """Keep the manifest of what is measured next, once; returns its hash, which covers `identity` alone."""
        key = self.key(identity)
        path = self.path.parent / MANIFESTS / f"{key}.json"
        if not path.exists():
            with Writing("a manifest", path.parent, intact=f"all rows so far are in {FILE}"):
                path.parent.mkdir(exist_ok=True)
                write_json(path, {"hash": key, "identity": identity, "first_measured": facts})
        return key

    def parts(self, manifest: str, label: str, unit: Unit) -> Parts:
        """What a unit that was cut off has given already."""
        return Parts(self.path.parent / FOLDER / f"{fingerprint([manifest, label, unit])}.jsonl")

    def close(self) -> None:
        """Let others write."""
        self._lock.close()

    def add(self, rows: list[Result]) -> None:
        """Append a unit's rows; they are on disk, all together, on return."""
        with interrupt.deferred():
            append_results(self.path, rows)
            self.rows += rows


def begun(out_dir: str, evaluation: str, label: str) -> dict[str, Any] | None:
    """The settings under which an evaluation of a model of this label was last begun in a folder; None for the first.

    What an evaluation chose by itself, such as its size, an interrupted one takes from here.
    """
    files = sorted((Path(out_dir) / MANIFESTS).glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in files:
        found = read_typed(path, _Manifest, "remove it to measure anew what it describes").identity
        if found.evaluation == evaluation and found.model is not None and found.model.label == label:
            return found.settings
    return None


@dataclass
class _Model:
    label: str


@dataclass
class _Identity:
    evaluation: str
    model: _Model | None = None  # averages have none
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Manifest:
    """What the manifest of an evaluation must have."""

    identity: _Identity


def code_fingerprint() -> str:
    """Over the sources that evaluations run: the same for a checkout and an installed wheel, edited or not."""
    return _code_fingerprint(Path(__file__).parents[1])


@functools.cache
def _code_fingerprint(package: Path) -> str:
    digest = hashlib.sha256()
    for part in CODE:
        # Names too, so that a renamed module counts as a change; sorted, since folders are listed in any order.
        for path in [package / part] if part.endswith(".py") else sorted((package / part).rglob("*.py")):
            digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def run_facts(command: str, config: dict[str, Any]) -> dict[str, Any]:
    """When, where and by which command something was measured."""
    return build_manifest(command, config)


def _is_of(row: Result, label: str, unit: Unit) -> bool:
    return all(row.context.get(key) == value for key, value in {"model": label, **unit}.items())


# -- averages over checkpoints ----------------------------------------------------------------------------------------


def average(rows: Sequence[Result], models: Sequence[EvaluatedModel], journal: Journal) -> list[Result]:
    """A row for every number that all checkpoints of a group have, appended to `journal` unless it is there.

    The paper averages RULER in this way, which swings from one checkpoint to the next. The value is the mean over the
    checkpoints, the interval Student's over them: it says how they differ, not how well each was measured. `n` is their
    number.
    """
    found: list[Result] = []
    for word in dict.fromkeys(model.average for model in models if model.average):
        labels = [str(model.label) for model in models if model.average == word]
        for same in _series([row for row in rows if row.model in labels]).values():
            if len(same) == len(labels):  # a number that one checkpoint lacks has no average
                found += _average(word, labels, same, journal)
    return found


def _series(rows: Sequence[Result]) -> dict[Any, list[Result]]:
    """Rows of the same number (metric, unit and place), one for each model."""
    series: dict[Any, list[Result]] = {}
    for row in rows:
        key = (row.metric, row.unit, frozenset(row.where.items()))
        series.setdefault(key, []).append(row)
    return series


def _average(word: str, labels: list[str], rows: list[Result], journal: Journal) -> list[Result]:
    identity = {"evaluation": "average", "label": word, "of": [row.manifest for row in rows]}
    manifest = journal.open(identity, {"checkpoints": labels})
    unit = rows[0].where
    known = [row for row in journal.find(manifest, word, unit) if row.metric == rows[0].metric]
    if known:
        return known
    values = [row.value for row in rows]
    low, high = mean_interval(values) or (None, None)
    context = {"model": word, **unit, "checkpoints": labels}
    row = Result(
        metric=rows[0].metric,
        value=sum(values) / len(values),
        unit=rows[0].unit,
        n=len(values),
        low=low,
        high=high,
        manifest=manifest,
        context=context,
    )
    journal.add([row])
    return [row]

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
import json
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from anchorctx.errors import UserError
from anchorctx.evals.base import Unit
from anchorctx.evals.config import EvaluatedModel
from anchorctx.evals.parts import FOLDER, Parts
from anchorctx.records.files import lock_folder, write_bytes
from anchorctx.records.manifest import build_manifest, fingerprint, write_json
from anchorctx.records.results import FILE, Result, append_results, mean_interval, read_results

MANIFESTS = "manifests"
CODE = ("evals", "kvcomm", "models", "attention", "data", "parallel", "layout.py", "flops.py")
"""Parts of the package that an evaluation's numbers can depend on."""


class Journal:
    """The results of one folder, which only one process at a time may write."""

    def __init__(self, out_dir: Path) -> None:
        self.path = out_dir / FILE
        out_dir.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(out_dir)
        try:
            _mend(self.path)
            self.rows = list(read_results(self.path)) if self.path.exists() else []
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
        append_results(self.path, rows)
        self.rows += rows


def begun(out_dir: str, evaluation: str, label: str) -> dict[str, Any] | None:
    """The settings under which an evaluation of a model of this label was last begun in a folder; None for the first.

    What an evaluation chose by itself, such as its size, an interrupted one takes from here.
    """
    files = sorted((Path(out_dir) / MANIFESTS).glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in files:
        found = json.loads(path.read_text()).get("identity", {})
        if found.get("evaluation") == evaluation and found.get("model", {}).get("label") == label:
            return found["settings"]
    return None


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


def _mend(path: Path) -> None:
    """Cut off a line that a crash left unfinished, with the rows of its manifest before it: they may be of its unit."""
    # Lines A A B B B| with the last B unfinished: keeps A A. Rows of whole units of B are lost with them and are only
    # measured again; half a unit that stayed would pass for a whole one.
    text = path.read_bytes() if path.is_file() else b""
    whole = text[: text.rfind(b"\n") + 1]
    if whole == text:
        return
    lines = whole.splitlines(keepends=True)
    torn = [_manifest(line) for line in lines[-1:]]
    while lines and _manifest(lines[-1]) in torn:
        lines.pop()
    write_bytes(path, b"".join(lines))


def _manifest(line: bytes) -> Any:
    try:
        return json.loads(line).get("manifest")
    except (ValueError, AttributeError):
        return None


def _lock(out_dir: Path) -> IO[str]:
    try:
        return lock_folder(out_dir)
    except BlockingIOError:
        raise UserError(
            f"out_dir={out_dir} is being written by another evaluation: wait for it, or choose another out_dir"
        ) from None


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

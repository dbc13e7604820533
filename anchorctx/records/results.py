"""Result rows: what an evaluation measured, one JSON object a line in `results.jsonl`, which `report` reads.

Rows that are measured together are written together, and each says which of how many it is. So whoever finds the file
after a crash or a copy that broke off can tell whole measurements from the beginnings of others.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

from anchorctx.errors import UserError
from anchorctx.records.disk import Writing
from anchorctx.records.files import append_bytes, write_bytes

FILE = "results.jsonl"
ABOUT = frozenset(
    ("loss_nats", "documents", "facts", "bos", "style", "distractors", "checkpoints", "asked")
    + ("values", "counts", "problems", "by_construction", "device", "head_dim", "theta", "sentence", "recommendation")
    + ("bound", "recommended", "stopped")
)
"""Names in a row's context that say how its number came about; all others say which number it is."""
COUNTS = ("tokens", "rows")
"""Names of which a number says how it came about, and a word, such as `rows: intra_doc`, which number it is."""
TEXT = ("documents", "tokens")
"""Names that count the text that a number was measured on."""

FIELDS: dict[str, tuple[type, ...]] = {
    **{"metric": (str,), "unit": (str,), "manifest": (str,), "value": (int, float), "n": (int,)},
    **{"low": (int, float, NoneType), "high": (int, float, NoneType), "context": (dict,), "part": (list, NoneType)},
}
"""What JSON has of a row's fields."""
logger = logging.getLogger(__name__)


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
    """What tells rows apart, and how the number came about: model, length in tokens, documents read."""
    part: tuple[int, int] | None = field(default=None, compare=False)
    """Its number, from 1 on, among the rows that were written with it, and how many those are; None: not written."""

    @property
    def model(self) -> str:
        """Label of the model; empty where the row has none."""
        return str(self.context.get("model", ""))

    @property
    def where(self) -> dict[str, Any]:
        """Which number of its model and metric it is: equal for the rows of two models that can be compared."""
        return {key: value for key, value in self.context.items() if key != "model" and not _is_about(key, value)}

    @property
    def about(self) -> dict[str, Any]:
        """How the number came about."""
        return {key: value for key, value in self.context.items() if _is_about(key, value)}

    @property
    def key(self) -> str:
        """`where` as text, for use as a key; the order of its entries does not matter."""
        return json.dumps(self.where, sort_keys=True, default=str)

    def same_text(self, other: Result) -> bool:
        """Whether both rows are about as much text; not so for two tokenizers. A row that does not say may be."""
        return all(self.about.get(name, n) == n for name in TEXT if (n := other.about.get(name)) is not None)


class Rows(list[Result]):
    """Result rows that can be looked up.

    `find` and `of` take entries of the context; None asks for rows that do not have the entry.
    """

    def find(self, metric: str, /, **context: Any) -> Result | None:
        """The first row of `metric` whose context has all of `context`; None where there is none."""
        return next((r for r in self if r.metric == metric and _has(r, context)), None)

    def of(self, metric: str | None = None, /, **context: Any) -> Rows:
        """All rows of `metric` (of any metric for None) whose context has all of `context`."""
        return Rows(r for r in self if metric in (None, r.metric) and _has(r, context))

    def distinct(self, name: str) -> list[Any]:
        """The values of a context entry, in order of appearance."""
        return list(dict.fromkeys(r.context[name] for r in self if name in r.context))

    def latest(self) -> Rows:
        """One row for each number of each model: the last where one was measured several times."""
        return Rows({(r.metric, r.model, r.key): r for r in self}.values())


def _has(row: Result, context: dict[str, Any]) -> bool:
    return all(row.context.get(key) == value for key, value in context.items())


def _is_about(key: str, value: Any) -> bool:
    return key in ABOUT or (key in COUNTS and not isinstance(value, str))


def append_results(path: Path, results: Iterable[Result]) -> None:
    """Append rows that belong together to `path`, made with its folder if needed: all on disk on return, or none.

    Raises:
        DiskError: there is no room for them, or no right to write.
    """
    rows = list(results)
    numbered = (dataclasses.replace(row, part=(i, len(rows))) for i, row in enumerate(rows, 1))
    text = "".join(json.dumps(asdict(row)) + "\n" for row in numbered).encode()
    with Writing("result rows", path.parent, len(text), f"the rows before them are in {path.name}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        append_bytes(path, text)


def read_results(path: Path) -> Iterator[Result]:
    """Yield the rows of `path` in order, without a last line that is unfinished.

    Raises:
        UserError: the file is missing, or another line is not a result row.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file of results: evaluate a model first, with anchorctx eval out_dir=...")
    yield from (row for _, row in _rows(path))


def mend_results(path: Path) -> list[Result]:
    """The rows of whole measurements; those of others are removed from the file, which need not exist.

    Raises:
        UserError: a line other than the last is not a result row.
    """
    content = path.read_bytes() if path.is_file() else b""
    kept: list[tuple[bytes, Result]] = []
    together: list[tuple[bytes, Result]] = []
    for line, row in _rows(path) if content else ():
        # parts 1/1, 1/3, 2/3, 1/2, 2/2: the first is whole, two of three are not, and the last two are
        number, count = row.part or (1, 1)
        before = together[-1][1] if together else row
        if number > 1 and (before.part, before.manifest) != ((number - 1, count), row.manifest):
            together = []
            continue
        together = [*(together if number > 1 else ()), (line, row)]
        if number == count:
            kept += together
            together = []
    whole = b"".join(line + b"\n" for line, _ in kept)
    if whole != content:
        lines = content.count(b"\n") + (not content.endswith(b"\n")) - len(kept)
        if lines:
            logger.warning("%s: %d lines of unfinished measurements are removed, to be measured again", path, lines)
        with Writing("result rows", path.parent, len(whole), f"{path.name} is as it was"):
            write_bytes(path, whole)
    return [row for _, row in kept]


def _rows(path: Path) -> Iterator[tuple[bytes, Result]]:
    """Lines without their ends, and what they hold; a last one without its end counts if it is whole."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield line.rstrip(b"\n"), _parse(line)
            except (ValueError, TypeError, RecursionError) as error:
                if not line.endswith(b"\n"):
                    logger.warning("%s ends in the middle of a row, which is left out", path)
                    return
                raise UserError(
                    f"{path}:{number} is no result row ({error}): delete the line or evaluate again"
                ) from None


def _parse(line: bytes) -> Result:
    """The row of a line; ValueError or TypeError where it is none."""
    value = json.loads(line)
    row = Result(**value)
    for name, kinds in FIELDS.items():
        found = getattr(row, name)
        if not isinstance(found, kinds) or isinstance(found, bool) or not _finite(found):
            raise TypeError(f"{name}={_shown(found)}")
    if row.part is None:
        return row
    number, count = row.part
    if type(number) is not int or type(count) is not int or not 1 <= number <= count:
        raise ValueError(f"part={_shown(row.part)}")
    return dataclasses.replace(row, part=(number, count))


def _finite(value: Any) -> bool:
    """False for NaN, infinity, and an integer too large for a number that is computed with."""
    try:
        return not isinstance(value, int | float) or math.isfinite(value)
    except OverflowError:
        return False


def _shown(value: Any) -> str:
    try:
        return f"{value!r:.40}"
    except ValueError:  # Python writes no integers of more than 4,300 digits
        return "a number of thousands of digits"


def ratio_interval(sums: Sequence[float], counts: Sequence[float], z: float = 1.959964) -> tuple[float, float] | None:
    """95 % confidence interval of sum(sums) / sum(counts) over independent clusters, such as documents' losses.

    The usual large-sample variance of a ratio estimate (Cochran, Sampling Techniques, 1977, section 6.3), by how much
    the clusters differ from their common ratio; None for fewer than two clusters.
    """
    n, total = len(sums), math.fsum(counts)
    if n < 2 or not total:
        return None
    # losses of 30 and 50 nats over 10 and 20 tokens: ratio 80 / 30 = 2.67, clusters off by 3.3 and -3.3
    ratio = math.fsum(sums) / total
    spread = math.fsum((s - ratio * c) ** 2 for s, c in zip(sums, counts, strict=True)) * n / (n - 1)
    half = z * math.sqrt(spread) / total
    return ratio - half, ratio + half


def mean_interval(values: Sequence[float], miss: float = 0.05) -> tuple[float, float] | None:
    """Confidence interval of a mean (Student's t) of independent values, which misses it with probability `miss`.

    None for fewer than two values.
    """
    n = len(values)
    if n < 2:
        return None
    from scipy.special import stdtrit

    mean = math.fsum(values) / n
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    half = float(stdtrit(n - 1, 1 - miss / 2)) * deviation / math.sqrt(n)
    return mean - half, mean + half


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % confidence interval of a median between two of the values, whatever their distribution; None below six.

    For times: one request that the machine held up moves it little.
    """
    n, ordered = len(values), sorted(values)
    # The median is below the k-th smallest of n where fewer than k values are: the chance is that of fewer than k heads
    # in n tosses. 10 values: 2 * (1 + 10) / 1024 = 0.02 for the second and the ninth, 0.11 for the third.
    below, k = 0.0, 0
    while 2 * (below := below + math.comb(n, k) / 2**n) <= 0.05:
        k += 1
    return (ordered[k - 1], ordered[n - k]) if k else None


def wilson_interval(hits: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % confidence interval of a proportion (Wilson, JASA 1927), which stays in [0, 1] for few observations."""
    if n == 0:
        return 0.0, 1.0
    # 10 of 10: the plain interval p +- z sqrt(p (1 - p) / n) would be 1 to 1, Wilson's is 0.72 to 1
    share, spread = hits / n, z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return max(centre - half, 0.0), min(centre + half, 1.0)

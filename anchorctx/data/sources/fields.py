"""Which fields of a row make its documents: a text, or token ids and where documents end among them.

Rows of token ids come in two layouts, which are told apart by the boundaries of each row:

- `source: [{"end": 812, ...}, ...]` beside `input_ids`, of Long-Context-Data-Engineering (Fu et al., arXiv 2402.10171);
  if the entries name a `source`, it is the document's domain;
- cumulative boundaries `indices: [0, 812, ...]`, or `[[0, 812], [812, 4096]]`, of ProLong (arXiv 2410.02660).

No token of a row is left out: those after the last boundary are a document too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from anchorctx.data.sources.documents import BadRow, Document, Reading, Tokens, check_text, shown, wrong_type
from anchorctx.errors import UserError


@dataclass(frozen=True, slots=True)
class Fields:
    """Names of fields; `a.b` is field b of the object in field a, where there is no field called `a.b`."""

    text: str
    """The text's field; unused where there is `tokens`."""
    domain: str | None = None
    """The domain's field; None when rows have none."""
    constant_domain: str = ""
    """Domain of all rows when there is no such field."""
    tokens: str | None = None
    """The token ids' field; None when rows are texts."""
    boundaries: str | None = None
    """The field that says where in `tokens` documents end; None when each row is one document."""

    def documents(self, row: Any, where: str) -> list[Document] | list[Tokens]:
        """The row's documents, in order; raises BadRow when the row has no usable text, ids or domain."""
        if not isinstance(row, Mapping):
            raise BadRow("not an object", f"{where} is {shown(row)}, not a JSON object: mend the row")
        domain = self.constant_domain if self.domain is None else self._get(row, self.domain, "domain_field", where)
        if not isinstance(domain, str):
            wrong_type("domain not a string", where, domain, self.domain, "a string")
        if self.tokens is None:
            text = self._get(row, self.text, "text_field", where)
            check_text(text, where, f"field {self.text}")
            return [Document(text, where, domain)]
        ids = token_ids(self._get(row, self.tokens, "tokens_field", where), where, self.tokens)
        if self.boundaries is None:
            return [Tokens(ids, where, domain)]
        boundaries = self._get(row, self.boundaries, "boundaries_field", where)
        return cut_ids(ids, boundaries, where, self.boundaries, domain)

    def read(
        self, rows: Iterable[Any], where: str, reading: Reading, *, size: int, count: int, before: int = 0
    ) -> Iterator[Document | Tokens]:
        """Yield the documents of `rows`; a bad row is an error or counted, as `reading` has it.

        Args:
            rows: as `documents` takes them.
            where: what the rows are of; messages append each row's number, from `before` + 1 on.
            reading: its `bytes_read` grows by `size`, evenly over `count` rows.
            before: rows that come before these.
        """
        begin = reading.bytes_read
        for number, row in enumerate(rows, start=1):
            reading.bytes_read = begin + size * number // max(count, 1)
            try:
                yield from self.documents(row, f"{where}:{before + number}")
            except BadRow as bad:
                reading.bad(bad)

    def columns(self, names: Any, where: str) -> list[str]:
        """The columns among `names` that are read; UserError when one is missing: skipping rows would not help."""
        wanted = (
            ("text_field", self.text if self.tokens is None else None),
            ("domain_field", self.domain),
            ("tokens_field", self.tokens),
            ("boundaries_field", self.boundaries),
        )
        found = []
        for option, name in wanted:
            if name is not None:
                # `meta.url` is a column of that name, else a field of the objects in column `meta`
                column = name if name in names else name.split(".")[0]
                if column not in names:
                    raise UserError(_missing(name, option, names, where).sentence)
                found.append(column)
        return list(dict.fromkeys(found))

    def _get(self, row: Mapping[str, Any], name: str, option: str, where: str) -> Any:
        """The value of field `name`, `a.b` being looked up step by step; `option` is what a user set it with."""
        if name in row:
            return row[name]
        value: Any = row
        for part in name.split("."):
            if not isinstance(value, Mapping) or part not in value:
                raise _missing(name, option, value if isinstance(value, Mapping) else row, where)
            value = value[part]
        return value


def _missing(name: str, option: str, names: Any, where: str) -> BadRow:
    what, have = option.removesuffix("_field"), ", ".join(map(str, names)) or "none"
    return BadRow(f"no {what} field", f"{where} has no field {name} (it has: {have}): set {option} to one of them")


def token_ids(value: Any, where: str, name: str) -> np.ndarray:
    """(n,) integers of a row's field; raises BadRow when it holds something else, or nothing."""
    ids = _integers(value)
    if ids is None:
        wrong_type("ids not integers", where, value, name, "a list of integers")
    if not len(ids):
        raise BadRow("no tokens", f"{where} has no token in field {name}: remove the row")
    return ids


def cut_ids(ids: np.ndarray, boundaries: Any, where: str, name: str, domain: str) -> list[Tokens]:
    """The documents of a row; raises BadRow unless the boundaries increase and stay inside the row.

    Args:
        ids: (n,) the row's token ids.
        boundaries: ends as integers, a leading 0 allowed; or (start, end) pairs; or objects with `end`.
        where: the row, for messages.
        name: the boundaries' field, for messages.
        domain: the documents' domain, unless their boundary says another.
    """
    # 10 ids, boundaries [0, 4, 7]: ends = [4, 7], then [4, 7, 10] with the rest: ids[0:4], ids[4:7], ids[7:10]
    ends, domains = _ends(boundaries, where, name, domain)
    before = 0
    for end in ends:
        if end <= before:
            raise BadRow(
                "bad boundaries", f"{where} has {end} after {before} in {name}, which must increase: mend the row"
            )
        before = end
    if before > len(ids):
        raise BadRow(
            "bad boundaries",
            f"{where} has {before} in {name}, past the end of its {len(ids)} tokens: mend the row",
        )
    if before < len(ids):
        ends, domains = [*ends, len(ids)], [*domains, domain]
    starts = [0, *ends[:-1]]
    return [Tokens(ids[start:end], where, of) for start, end, of in zip(starts, ends, domains, strict=True)]


def _ends(boundaries: Any, where: str, name: str, domain: str) -> tuple[list[int], list[str]]:
    """Where documents end, and their domains; a leading 0 is left out."""
    # [{"end": 4}, {"end": 7}], [[0, 4], [4, 7]], [0, 4, 7] and [4, 7] are all [4, 7]
    entries = boundaries.tolist() if isinstance(boundaries, np.ndarray) else boundaries
    if not isinstance(entries, list | tuple):
        wrong_type("bad boundaries", where, boundaries, name, "a list")
    domains = [domain] * len(entries)
    if entries and all(isinstance(entry, Mapping) and "end" in entry for entry in entries):
        domains = [str(entry.get("source") or domain) for entry in entries]
        entries = [entry["end"] for entry in entries]
    elif entries and all(isinstance(entry, list | tuple) and len(entry) == 2 for entry in entries):
        starts, ends = zip(*entries, strict=True)
        if list(starts) != [0, *ends[:-1]]:
            raise BadRow(
                "bad boundaries",
                f"{where} has ranges in {name} that do not follow each other from 0, which would lose tokens: "
                "mend the row",
            )
        entries = list(ends)
    if any(not isinstance(end, int) or isinstance(end, bool) for end in entries):  # True is an int in Python
        raise BadRow(
            "bad boundaries",
            f'{where} has {shown(boundaries)} as field {name}, neither ends, [start, end] nor {{"end": ...}}: '
            "set boundaries_field to the field that is, or mend the row",
        )
    return (list(entries[1:]), domains[1:]) if entries and entries[0] == 0 else (list(entries), domains)


def _integers(value: Any) -> np.ndarray | None:
    """(n,) of an integer type; None when the value is anything but a flat list of integers."""
    if not isinstance(value, list | tuple | np.ndarray):
        return None
    if not len(value):
        return np.empty(0, np.int64)
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError):  # lists of different lengths
        return None
    return array if array.ndim == 1 and array.dtype.kind in "iu" else None


def arrow_rows(batch: Any, tokens: str | None) -> Iterator[dict[str, Any]]:
    """The rows of a pyarrow RecordBatch or Table; the column `tokens` (None: there is none) as (n,) arrays."""
    if tokens is None or tokens not in batch.schema.names:
        yield from batch.to_pylist()
        return
    # to_pylist would make a Python integer of every id, at several times the memory and time
    others = batch.drop_columns([tokens]).to_pylist()
    if not others:  # there is no other column
        others = [{} for _ in range(batch.num_rows)]
    for row, ids in zip(others, _arrays(batch.column(tokens)), strict=True):
        yield row | {tokens: ids}


def _arrays(column: Any) -> Iterator[Any]:
    """The lists of a column as arrays without a copy; as Python lists where it holds nulls or something else."""
    import pyarrow

    for array in getattr(column, "chunks", [column]):
        is_list = pyarrow.types.is_list(array.type) or pyarrow.types.is_large_list(array.type)
        if not is_list or array.null_count or array.values.null_count:
            yield from array.to_pylist()
            continue
        # [[5, 6], [], [7]] is offsets [0, 2, 2, 3] into values [5, 6, 7]
        offsets = array.offsets.to_numpy()
        values = array.values.to_numpy(zero_copy_only=False)
        for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
            yield values[start:end]

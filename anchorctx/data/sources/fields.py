"""Which fields of a row make its documents: a text, or token ids with their labels and where documents end among them.

Rows of token ids come in two layouts, which are told apart by the boundaries of each row:

- `source: [{"end": 812, ...}, ...]` beside `input_ids`, of Long-Context-Data-Engineering (Fu et al., arXiv 2402.10171);
  if the entries name a `source`, it is the document's domain;
- cumulative boundaries `indices: [0, 812, ...]`, or `[[0, 812], [812, 4096]]`, of ProLong (arXiv 2410.02660).

No token of a row is left out: those after the last boundary are a document too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from anchorctx.data.sources.documents import BadRow, Document, Reading, Tokens, check_text, shown, wrong_type
from anchorctx.data.sources.labels import flat_array, trained_by_labels, trained_by_mask
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
    labels: str | None = None
    """The field of labels, -100 or the token itself; None when all tokens are trained."""
    mask: str | None = None
    """Instead of `labels`, a field of 1 for tokens that are trained and 0 for others."""

    @property
    def identity(self) -> dict[str, Any]:
        """As JSON; `labels` and `mask` only where they are used, so that sets made before there were any are found."""
        every = dataclasses.asdict(self)
        return {name: value for name, value in every.items() if value is not None or name not in ("labels", "mask")}

    @property
    def arrays(self) -> list[str]:
        """The fields with a number for each token."""
        return [name for name in (self.tokens, self.labels, self.mask) if name is not None]

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
        whole = Tokens(ids, where, domain, self._trained(row, ids, where))
        if self.boundaries is None:
            return [whole]
        return cut_ids(whole, self._get(row, self.boundaries, "boundaries_field", where), self.boundaries)

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
            ("labels_field", self.labels),
            ("mask_field", self.mask),
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

    def _trained(self, row: Mapping[str, Any], ids: np.ndarray, where: str) -> np.ndarray | None:
        """(n,) bool: which of the row's `ids` (n,) are trained; None: all."""
        if self.labels is not None:
            return trained_by_labels(self._get(row, self.labels, "labels_field", where), ids, where, self.labels)
        if self.mask is not None:
            return trained_by_mask(self._get(row, self.mask, "mask_field", where), ids, where, self.mask)
        return None

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
    ids = flat_array(value, "iu")
    if ids is None:
        wrong_type("ids not integers", where, value, name, "a list of integers")
    if not len(ids):
        raise BadRow("no tokens", f"{where} has no token in field {name}: remove the row")
    return ids


def cut_ids(whole: Tokens, boundaries: Any, name: str) -> list[Tokens]:
    """The documents of a row; raises BadRow unless the boundaries increase and stay inside the row.

    Args:
        whole: the whole row; its domain is the documents', unless their boundary says another.
        boundaries: ends as integers, a leading 0 allowed; or (start, end) pairs; or objects with `end`.
        name: the boundaries' field, for messages.
    """
    ids, where, domain = whole.ids, whole.source, whole.domain
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
    return [whole.part(start, end, of) for start, end, of in zip(starts, ends, domains, strict=True)]


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


def arrow_rows(batch: Any, arrays: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows of a pyarrow RecordBatch or Table; those of its columns that are named in `arrays` as (n,) arrays."""
    # to_pylist would make a Python integer of every id, at several times the memory and time
    names = [name for name in arrays if name in batch.schema.names]
    others = batch.drop_columns(names).to_pylist() if names else batch.to_pylist()
    if not others:  # there is no other column
        others = [{} for _ in range(batch.num_rows)]
    for row, *values in zip(others, *(_arrays(batch.column(name)) for name in names), strict=True):
        yield row | dict(zip(names, values, strict=True))


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

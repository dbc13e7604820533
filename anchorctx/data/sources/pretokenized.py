"""Documents that were tokenised before: a row of ids, and where in it documents end.

Two layouts are in use, and both are read (which one, each row's boundaries say):

- `source: [{"end": 812, ...}, ...]` beside `input_ids`, of Long-Context-Data-Engineering (Fu et al., arXiv 2402.10171);
  where the entries name their own `source`, that is the documents' domain;
- cumulative boundaries `indices: [0, 812, ...]`, or `[[0, 812], [812, 4096]]`, of ProLong (arXiv 2410.02660).

Nothing of a row is left out: tokens after the last boundary are a document too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from anchorctx.data.sources.documents import BadRow, Tokens, shown, wrong_type


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
    return [Tokens(ids[start:end], where, own) for start, end, own in zip([0, *ends[:-1]], ends, domains, strict=True)]


def _ends(boundaries: Any, where: str, name: str, domain: str) -> tuple[list[int], list[str]]:
    """Where documents end, and their domains; a leading 0 is taken off."""
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
    if any(not isinstance(end, int) or isinstance(end, bool) for end in entries):
        raise BadRow(
            "bad boundaries",
            f'{where} has {shown(boundaries)} as field {name}, neither ends, [start, end] nor {{"end": ...}}: '
            "set boundaries_field to the field that is, or mend the row",
        )
    return (list(entries[1:]), domains[1:]) if entries and entries[0] == 0 else (list(entries), domains)


def _integers(value: Any) -> np.ndarray | None:
    if not isinstance(value, list | tuple | np.ndarray):
        return None
    if not len(value):
        return np.empty(0, np.int64)
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError):  # lists of different lengths
        return None
    return array if array.ndim == 1 and array.dtype.kind in "iu" else None

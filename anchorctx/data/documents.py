"""A document, and what becomes of rows that are none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NoReturn

from anchorctx.errors import UserError


@dataclass(frozen=True, slots=True)
class Document:
    """One text to train on."""

    text: str
    """The whole text, without special tokens."""
    source: str
    """Where it came from: file name, with `:line` or `:row` where it holds several."""
    domain: str = ""
    """Kind of text, such as `books`; empty when unknown."""


class OnBadRow(StrEnum):
    """What to do with a row that is no document: malformed, without text, or not UTF-8."""

    fail = "fail"
    """Stop with an error that names the row."""
    skip = "skip"
    """Leave the row out, count it by reason and report the counts."""


class BadRow(Exception):
    """A row that is no document."""

    def __init__(self, reason: str, sentence: str) -> None:
        super().__init__(sentence)
        self.reason, self.sentence = reason, sentence


@dataclass(slots=True)
class Reading:
    """What was read of one source so far, and its policy for bad rows."""

    on_bad_row: OnBadRow = OnBadRow.fail
    documents: int = 0
    """Documents yielded."""
    bytes_read: int = 0
    """Bytes of files read (compressed, where they are), for progress."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Rows left out, by reason."""

    def bad(self, row: BadRow) -> None:
        """Count the row when bad rows are skipped, else raise UserError."""
        if self.on_bad_row is OnBadRow.fail:
            raise UserError(f"{row.sentence}, or set on_bad_row=skip to leave such rows out") from row
        self.skipped[row.reason] += 1


@dataclass(frozen=True, slots=True)
class Fields:
    """Which fields of a row make a document."""

    text: str
    """Name of the text's field."""
    domain: str | None
    """Name of the domain's field; None when rows have none."""
    constant_domain: str
    """Domain of all rows when there is no such field."""

    def names(self) -> list[str]:
        """The fields that are read."""
        return [self.text] + ([self.domain] if self.domain else [])

    def document(self, row: Any, where: str) -> Document:
        """The row's document; raises BadRow when the row has no usable text (or domain)."""
        if not isinstance(row, Mapping):
            raise BadRow("not an object", f"{where} is a JSON {type(row).__name__}, not an object: mend the row")
        self.check(row, where)
        text = row[self.text]
        check_text(text, where, f"field {self.text}")
        domain = self.constant_domain if self.domain is None else row[self.domain]
        if not isinstance(domain, str):
            self._bad_domain(domain, where)
        return Document(text, where, domain)

    def check(self, names: Any, where: str) -> None:
        """Raise BadRow unless all fields are among `names`."""
        for name, option in ((self.text, "text_field"), (self.domain, "domain_field")):
            if name is not None and name not in names:
                have = ", ".join(map(str, names)) or "none"
                what = "text" if option == "text_field" else "domain"
                raise BadRow(
                    f"no {what} field", f"{where} has no field {name} (it has: {have}): set {option} to one of them"
                )

    def _bad_domain(self, domain: Any, where: str) -> NoReturn:
        kind = type(domain).__name__
        raise BadRow("domain not a string", f"{where} has a {kind} as field {self.domain}, not a string: mend the row")


def check_text(text: Any, where: str, what: str) -> None:
    """Raise BadRow unless `text` is a non-empty string that UTF-8 can hold."""
    if not isinstance(text, str):
        raise BadRow("text not a string", f"{where} has a {type(text).__name__} as {what}, not a string: mend the row")
    if not text:
        raise BadRow("empty text", f"{where} has an empty text as {what}: remove the row")
    try:
        text.encode()
    except UnicodeEncodeError:
        sentence = f"{where} has a lone surrogate in {what}, which is no valid Unicode: mend the row"
        raise BadRow("invalid UTF-8", sentence) from None

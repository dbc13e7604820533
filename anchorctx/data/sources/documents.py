"""Documents, the policy for rows that are not valid, and the parts that a source is read in."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NoReturn, Protocol

import numpy as np

from anchorctx.errors import UserError

MAX_DOCUMENT_BYTES = 2**26
"""A longer text, or line of a file, is taken for a mistake, such as a whole corpus in one JSON array. A tokenizer needs
some 100 bytes a token, all at once, so that such a text would use up the memory instead of giving an error."""

SHOWN_CHARS = 40
"""Characters of a wrong value in a message."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text to train on."""

    text: str
    """The whole text, without special tokens."""
    source: str
    """Where it came from: file name, with `:line` or `:row` where it holds several."""
    domain: str = ""
    """Kind of text, such as `books`; empty when unknown."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """One tokenised document."""

    ids: np.ndarray
    """(n,) uint32 from a tokenizer; any integers, unchecked, from a pre-tokenised source; n may be 0."""
    source: str
    """Where the document came from."""
    domain: str
    """Its domain; empty when unknown."""
    trained: np.ndarray | None = None
    """(n,) bool: tokens that are to be predicted, as labels of a pre-tokenised source say; None: all."""
    written: int = 0
    """How many names of special tokens stood in its text."""

    def part(self, start: int, end: int, domain: str) -> Tokens:
        """Tokens start..end, a document of their own."""
        trained = None if self.trained is None else self.trained[start:end]
        return Tokens(self.ids[start:end], self.source, domain, trained)


class OnBadRow(StrEnum):
    """What to do with a row that is not a valid document: malformed, without text, or not UTF-8."""

    fail = "fail"
    """Stop with an error that names the row."""
    skip = "skip"
    """Leave the row out, count it by reason and report the counts."""


class BadRow(Exception):
    """A row that is not a valid document; `Reading.bad` decides what becomes of it."""

    def __init__(self, reason: str, sentence: str) -> None:
        """`reason` is what such rows are counted under, `sentence` tells the user about this one, without a period."""
        super().__init__(sentence)
        self.reason, self.sentence = reason, sentence


@dataclass(slots=True)
class Reading:
    """How much of a source was read so far, and what to do with bad rows."""

    on_bad_row: OnBadRow = OnBadRow.fail
    documents: int = 0
    """Documents yielded."""
    written: int = 0
    """Names of special tokens in them."""
    bytes_read: int = 0
    """Bytes of files read (compressed, where they are), for progress."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Rows left out, by reason."""

    def bad(self, row: BadRow) -> None:
        """Count the row when bad rows are skipped, else raise UserError."""
        if self.on_bad_row is OnBadRow.fail:
            raise UserError(f"{row.sentence}, or set on_bad_row=skip to leave such rows out") from row
        self.skipped[row.reason] += 1


class Part(Protocol):
    """Some of a source's documents: what one worker reads, and, once it is tokenised, need not be read again.

    Can be sent to another process.
    """

    @property
    def identity(self) -> dict[str, Any]:
        """JSON that changes whenever the documents do."""
        ...

    @property
    def size(self) -> int | None:
        """By how much `Reading.bytes_read` will grow; None where it cannot be known."""
        ...

    def documents(self, reading: Reading) -> Iterator[Document | Tokens]:
        """Yield the documents, in an order that never changes."""
        ...


def check_text(text: Any, where: str, what: str) -> None:
    """Raise BadRow unless `text` is a non-empty string that UTF-8 can hold."""
    # `where` names the row, `what` the field: "a.jsonl:7 has 12 as field text, not a string: mend the row"
    if not isinstance(text, str):
        raise BadRow("text not a string", f"{where} has {shown(text)} as {what}, not a string: mend the row")
    if not text:
        raise BadRow("empty text", f"{where} has an empty text as {what}: remove the row")
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        sentence = f"{where} has a lone surrogate in {what}, which is no valid Unicode: mend the row"
        raise BadRow("invalid UTF-8", sentence) from None
    if size > MAX_DOCUMENT_BYTES:
        raise BadRow("too long", too_long(where, f"a text as {what}"))


def too_long(where: str, what: str) -> str:
    """The sentence about a line or a text of more than MAX_DOCUMENT_BYTES."""
    limit = f"{MAX_DOCUMENT_BYTES:,} bytes, the most that a document may have"
    return f"{where} has {what} of more than {limit}: split it"


def wrong_type(reason: str, where: str, value: Any, field_name: str | None, wanted: str) -> NoReturn:
    """Raise BadRow about a field that does not hold what it should."""
    raise BadRow(reason, f"{where} has {shown(value)} as field {field_name}, not {wanted}: mend the row")


def shown(value: Any) -> str:
    """A value as JSON, cut to what fits into a sentence."""
    # cut before it is serialised: a row may have a million token ids
    few = value[:SHOWN_CHARS] if isinstance(value, str | list | np.ndarray) else value
    plain = few.tolist() if isinstance(few, np.ndarray) else few
    text = json.dumps(plain, ensure_ascii=False, default=str)
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}..."

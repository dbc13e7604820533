"""JSON files that this package wrote, read back with their form compared: what is not of it is refused in a sentence.

    @dataclass
    class Marker:
        run: str
        files: dict[str, File]

    marker = read_typed(folder / "COMPLETE", Marker, "remove the folder to resume from the one before")

Such a file may have been cut short, garbled, edited, or be another program's. pydantic compares, strictly: "3" is no
number. It is imported when the first file is read, so that `--help` does not wait for it.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from anchorctx.errors import UserError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")
SHOWN = 120
"""Characters of pydantic's reason that are shown, at most: it may quote the file."""


def read_typed(path: Path, kind: type[T], remedy: str) -> T:
    """The file's value as a `kind`, a dataclass (keys that it does not know are left out) or any type.

    Args:
        path: of a JSON file.
        kind: what its value must be.
        remedy: the end of the refusal: what to do with such a file.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it cannot be read, is no UTF-8, no JSON, nested too deeply, or not of the form; says what is wrong.
    """
    return parse_typed(_content(path, remedy), kind, str(path), remedy)


def parse_typed(text: str | bytes, kind: type[T], what: str, remedy: str) -> T:
    """As `read_typed`, of JSON that was read already; `what` names it in the refusal."""
    from pydantic import ValidationError

    try:
        return _adapter(kind).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        reason = f"{where}: {first['msg']}" if where else first["msg"]
        raise UserError(f"{what} is not of the form that anchorctx writes ({_short(reason)}): {remedy}") from None


def read_fields(path: Path, kind: type, remedy: str) -> dict[str, Any]:
    """As `read_typed`, but the file's whole object: `kind` names the fields that it must have, of which types."""
    read_typed(path, kind, remedy)
    return read_typed(path, dict[str, Any], remedy)


def _content(path: Path, remedy: str) -> bytes:
    if path.exists() and not path.is_file():  # a FIFO would never return
        raise UserError(f"{path} is no regular file: {remedy}")
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {remedy}") from None


def _short(reason: str) -> str:
    line = " ".join(reason.split())
    return line if len(line) <= SHOWN else line[: SHOWN - 3] + "..."


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)

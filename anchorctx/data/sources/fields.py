"""Which fields of a row make its documents: a text, or token ids with the boundaries of several documents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from anchorctx.data.sources.documents import BadRow, Document, Tokens, check_text, shown, wrong_type
from anchorctx.data.sources.pretokenized import cut_ids, token_ids


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

    def columns(self, names: Any, where: str) -> list[str]:
        """The columns among `names` that are read; raises BadRow when one is missing."""
        wanted = (
            ("text_field", self.text if self.tokens is None else None),
            ("domain_field", self.domain),
            ("tokens_field", self.tokens),
            ("boundaries_field", self.boundaries),
        )
        found = []
        for option, name in wanted:
            if name is not None:
                column = name if name in names else name.split(".")[0]
                if column not in names:
                    raise _missing(name, option, names, where)
                found.append(column)
        return list(dict.fromkeys(found))

    def _get(self, row: Mapping[str, Any], name: str, option: str, where: str) -> Any:
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

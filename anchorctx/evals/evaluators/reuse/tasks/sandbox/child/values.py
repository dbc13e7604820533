"""Plain values as JSON and back, so that nothing but plain values crosses: no code, no object with methods of its own.

None, booleans, numbers and strings stand for themselves; anything else is [kind, content].
"""

from __future__ import annotations

from typing import Any

SEQUENCES = {"list": list, "tuple": tuple, "frozenset": frozenset, "set": set}
"""Subclasses, such as a namedtuple, count as what they derive from."""


def pack(value: Any) -> Any:
    """JSON of a value; TypeError where it is not plain.

    >>> pack({"a": (1, 2.5)})
    ['dict', [['a', ['tuple', [1, 2.5]]]]]
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    for kind, maker in SEQUENCES.items():
        if isinstance(value, maker):
            return [kind, [pack(item) for item in value]]
    if isinstance(value, dict):
        return ["dict", [[pack(key), pack(item)] for key, item in value.items()]]
    if isinstance(value, bytes | bytearray):
        return ["bytes", value.hex()]
    if isinstance(value, complex):
        return ["complex", [value.real, value.imag]]
    if type(value).__module__ == "numpy":
        return pack(value.item())  # a scalar; ValueError for an array of several numbers
    raise TypeError(f"{type(value).__name__} is no plain value")


def unpack(content: Any) -> Any:
    """The value, of exactly the plain types; an exception where it is not such JSON."""
    if content is None or isinstance(content, bool | int | float | str):
        return content
    kind, inside = content
    if kind in SEQUENCES:
        return SEQUENCES[kind](unpack(item) for item in inside)
    if kind == "dict":
        return {unpack(key): unpack(item) for key, item in inside}
    if kind == "bytes":
        return bytes.fromhex(inside)
    if kind == "complex":
        return complex(*inside)
    raise ValueError(f"{kind!r} is no kind of value")

"""Ranges of settings: a field's type says what it may be, and pydantic compares.

    steps: Positive = 2000
    eps: Annotated[float, Ge(0)] = 1e-8
    workers: Annotated[int, Ge(1), "null chooses by the processors"] | None = None

Text beside a range is the remedy that the refusal ends with; without one it names the default. The configurations stay
plain dataclasses. pydantic is imported when the first one is checked, so that `--help` does not wait for it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from enum import Enum
from functools import cache
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

from annotated_types import Ge, Gt, Le

from anchorctx.errors import UserError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

Count = Annotated[int, Ge(0)]
Positive = Annotated[int, Ge(1)]
LONGEST = 2**31 - 1
Length = Annotated[int, Ge(1), Le(LONGEST)]
"""Tokens of a row or a model's positions: packed sets keep boundaries in 32 bits."""
Seed = Annotated[int, Ge(0), Le(2**32 - 1)]
"""What numpy's generators take."""
Share = Annotated[float, Ge(0), Le(1)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
Spread = Annotated[float, Ge(0), Le(10)]
"""Standard deviation of a logarithm; with 10, one value in six is more than 22,000 times the median."""
FAR = 1000
MOST = 10**15
"""No number of any configuration is larger, whatever its own range."""

OUT_OF_RANGE = ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number")
"""pydantic's names of the mistakes that count here. Types are left to OmegaConf and pyright: a caller in Python may
pass a Path for a folder."""


def check_ranges(config: Any, section: str = "") -> None:
    """Raise UserError for the first number of a configuration that is out of its range, NaN, infinite or above MOST.

    Args:
        config: a dataclass, with others inside.
        section: the key under which a user writes it, such as `perplexity`; "" for a command's whole configuration.
    """
    from pydantic import ValidationError

    owner = type(config)
    # asdict, because pydantic takes an instance of a dataclass as it is, without looking inside
    try:
        _adapter(owner).validate_python(dataclasses.asdict(config))
    except ValidationError as error:
        wrong = [e for e in error.errors(include_url=False) if e["type"] in OUT_OF_RANGE]
        if wrong:
            raise UserError(_sentence(owner, wrong[0]["loc"], wrong[0]["input"], section)) from None
    for place, value in _numbers(config):
        if abs(value) > MOST:
            raise UserError(_sentence(owner, place, value, section, f"at most {MOST:.0e}"))


def shown(value: Any) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, Enum):
        value = value.value
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    return str(value)


def default_of(field: dataclasses.Field[Any]) -> Any:
    """A field's default, or dataclasses.MISSING."""
    return field.default_factory() if callable(field.default_factory) else field.default


@cache
def _adapter(owner: type) -> TypeAdapter[Any]:
    from pydantic import ConfigDict, TypeAdapter

    # pydantic takes no config beside a dataclass, but hands that of an optional one on to it
    optional: Any = owner | None
    return TypeAdapter(optional, config=ConfigDict(allow_inf_nan=False))


def _numbers(config: Any, place: tuple[int | str, ...] = ()) -> Iterator[tuple[tuple[int | str, ...], int | float]]:
    """Where a configuration has numbers, and which; those of a free dictionary, a model's own fields, are left out."""
    if isinstance(config, int | float) and not isinstance(config, bool):
        yield place, config
    elif isinstance(config, list | tuple | dict):
        for key, value in config.items() if isinstance(config, dict) else enumerate(config):
            yield from _numbers(value, (*place, key))
    elif dataclasses.is_dataclass(config):
        for name, hint in get_type_hints(type(config)).items():
            if Any not in (hint, *get_args(hint)):
                yield from _numbers(getattr(config, name), (*place, name))


def _sentence(owner: type, place: Sequence[int | str], value: Any, section: str, limits: str = "") -> str:
    """`place` is pydantic's: ("models", 1, "max_length") is models[1].max_length; `limits` instead of the type's."""
    key = section + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    metadata = () if limits else _metadata(owner, place)  # a remedy beside its range is about that
    limits = limits or _limits(metadata, value)
    if not limits or (isinstance(value, float) and math.isinf(value)):
        limits = "a finite number"
    # metadata of workers: (Ge(1), "null chooses by the processors")
    remedy = "".join(f": {text}" for text in metadata if isinstance(text, str))
    default = _default(owner, place)
    if not remedy and default is not dataclasses.MISSING:
        remedy = f"; the default is {shown(default)}"
    return f"{key.removeprefix('.')}={value} must be {limits}{remedy}"


def _metadata(owner: type, place: Sequence[int | str]) -> tuple[Any, ...]:
    """What stands beside a number's type: (Ge(1),) of `models: list[Model] | None`, `max_length: Positive | None`."""
    hint: Any = owner
    for part in place:
        if dataclasses.is_dataclass(hint):
            hint = get_type_hints(hint, include_extras=True)[str(part)]
        else:
            hint = get_args(hint)[-1]  # of a list's element, or a dictionary's value
        if NoneType in get_args(hint):
            hint = get_args(hint)[0]
    return getattr(hint, "__metadata__", ())


def _limits(metadata: Sequence[Any], value: Any) -> str:
    """`at least 1`, `between 0 and 1`, `above 0 and at most 1`; an end that is far away only where it is passed."""
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    limits = {name: getattr(item, name) for item in metadata for name in words if hasattr(item, name)}
    if limits.keys() == {"ge", "le"} and limits["le"] >= FAR:
        del limits["ge" if value > limits["le"] else "le"]
    if limits.keys() == {"ge", "le"}:
        return f"between {limits['ge']} and {limits['le']}"
    return " and ".join(f"{words[name]} {limit}" for name, limit in limits.items())


def _default(owner: type, place: Sequence[int | str]) -> Any:
    """The default of a key, of the whole list for one of its elements; MISSING where there is none."""
    first, *rest = place
    value = default_of(owner.__dataclass_fields__[first])  # type: ignore[attr-defined]
    # LiveConfig's own default of perplexity.documents counts (16), not that of PerplexityConfig (200)
    for part in (part for part in rest if isinstance(part, str)):
        value = getattr(value, part) if dataclasses.is_dataclass(value) else dataclasses.MISSING
    return value

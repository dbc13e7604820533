"""The arms by name. Imports no torch until an arm is made, so that a configuration can name arms quickly.

A name may have the value of the arm's main setting behind a colon, `blend:0.15`, and the arms of exemplars others too,
`kvcomm:0.3,h=values`: so one list of arms can hold an arm several times, as the points of a curve.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from anchorctx.errors import UserError

if TYPE_CHECKING:
    from anchorctx.kvcomm.arms.basic import Arm

ARMS = (
    "dense",
    "dense_prefix_cache",
    "naive",
    "rotate",
    "rotate_first_k",
    "rotate_glue",
    "blend",
    "kvcomm",
    "kvcomm_ungated",
    "mean_offset",
    "anchored",
    "predicted",
)
"""Ways to reuse."""
CONTROLS = ("dense_chunked", "zeroed", "random", "other_request")
"""The numerics floor, and what an arm must beat."""


class Feature(StrEnum):
    """What tells two contents apart."""

    embeddings = "embeddings"
    """Their tokens' input embeddings: the paper's text."""
    values = "values"
    """Base values of all layers: the gate of the paper's public code."""
    keys_values = "keys_values"
    """Base keys and values of all layers: the weights of the paper's public code."""


class Reduce(StrEnum):
    """How distances between contents become weights."""

    frobenius = "frobenius"
    """One norm over the whole content, and so one weight an exemplar."""
    per_token = "per_token"
    """The mean absolute difference of each token, and so weights by token."""


# -- an arm with its setting ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Setting:
    """A number that an arm is told, also behind its name, and what it may be."""

    name: str
    whole: bool = False
    """Whether it is a whole number."""
    least: float = 0
    most: float = math.inf
    choices: type[StrEnum] | None = None
    """One of these words, instead of a number."""

    @property
    def allowed(self) -> str:
        """What it may be, in words."""
        if self.choices is not None:
            return f"one of {', '.join(self.choices)}"
        if self.most < math.inf:
            return f"a {'whole ' * self.whole}number from {self.least:g} to {self.most:g}"
        return f"a {'whole' if self.whole else 'finite'} number of at least {self.least:g}"

    def read(self, text: str) -> int | float | StrEnum | None:
        """The value, None where it is none or out of range."""
        if self.choices is not None:
            return self.choices(text) if text in list(self.choices) else None
        try:
            value = int(text) if self.whole else float(text)
        except ValueError:
            return None
        return value if self._holds(value) else None

    def of(self, arm: str, value: Any) -> Any:
        """What an arm is told from Python, a choice as one also where it came as text; UserError where it cannot be."""
        if self.choices is not None and value in list(self.choices):
            return self.choices(value)
        if self.choices is None and isinstance(value, Integral if self.whole else Real) and self._holds(value):
            return value
        raise UserError(
            f"{arm} {self.name}={value!r} must be {self.allowed}: correct it, or leave it out for the default"
        )

    def _holds(self, value: Any) -> bool:
        return self.least <= value <= self.most and value < math.inf  # nan is not


SETTINGS = {
    "rotate_first_k": Setting("k", whole=True),
    "rotate_glue": Setting("k", whole=True),
    "blend": Setting("share", most=1.0),
    "kvcomm": Setting("gamma"),
    "predicted": Setting("bound"),
}
"""The main setting of the arms that have one: how much is computed, or how readily they share."""
POOL = {
    "temperature": Setting("temperature", least=1e-9),
    **{name: Setting(name, whole=True, least=1) for name in ("min_exemplars", "max_exemplars", "window")},
    **{name: Setting(name, choices=Feature) for name in ("h", "weights_h")},
    "reduce": Setting("reduce", choices=Reduce),
}
"""Further settings of the arms of exemplars (`arms.pool`), each as `name=value`."""
OPTIONS = {"kvcomm": POOL, "kvcomm_ungated": POOL}


@dataclass(frozen=True, slots=True)
class ArmSpec:
    """An arm as a configuration names it: `rotate`, or `rotate_first_k:16`."""

    name: str
    value: int | float | StrEnum | None = None
    """Of its main setting; None leaves it as it is elsewhere."""
    options: tuple[tuple[str, Any], ...] = ()
    """Further settings and their values."""

    @classmethod
    def parse(cls, text: str) -> ArmSpec:
        """UserError for an unknown arm, a setting where there is none, or a wrong one."""
        name, colon, rest = text.partition(":")
        if name not in (*ARMS, *CONTROLS):
            raise UserError(f"unknown arm {name!r}: choose {', '.join((*ARMS, *CONTROLS))}")
        if not colon:
            return cls(name)
        main, options = SETTINGS.get(name), OPTIONS.get(name, {})
        if main is None and not options:
            raise UserError(
                f"arm {text!r} has a setting, which {name} has not: write {name}, or choose {', '.join(SETTINGS)}"
            )
        value, found = None, dict[str, Any]()
        for place, word in enumerate(rest.split(",")):
            key, equals, given = word.partition("=")
            if equals and key in options and key not in found:
                found[key] = _read(text, name, options[key], given, f"behind {key}=")
            elif place == 0 and main is not None and not equals:
                value = _read(text, name, main, word, "behind its colon")
            else:
                others = f"{', '.join(options)}, each once as name=value" if options else f"{name}:number alone"
                raise UserError(f"arm {text!r} has {word!r}, which is no setting of {name}: write {others}")
        return cls(name, value, tuple(found.items()))

    def maker(self, known: Mapping[str, Callable[..., Arm]]) -> Callable[[], Arm]:
        """What makes this arm, given what makes each arm: called without a value, or with one for its main setting, and
        with its further settings by name."""
        return partial(known[self.name], *(() if self.value is None else (self.value,)), **dict(self.options))


def _read(text: str, name: str, setting: Setting, word: str, where: str) -> int | float | StrEnum:
    value = setting.read(word)
    if value is None:
        raise UserError(
            f"arm {text!r} must have {setting.allowed} {where}, the {setting.name} of {name}: correct it, or write "
            f"{name} for the default"
        )
    return value


def makers() -> dict[str, Callable[..., Arm]]:
    """Every arm and control by name, with its default settings; those in SETTINGS also take a value for theirs, and
    those in OPTIONS these by name."""
    from anchorctx.kvcomm.arms import basic, blend, offsets, predicted
    from anchorctx.kvcomm.arms.pool import PoolConfig

    def kvcomm(gamma: float = PoolConfig().gamma, **options: Any) -> Arm:
        return offsets.Kvcomm(PoolConfig(gamma=gamma, **options))

    def ungated(**options: Any) -> Arm:
        return offsets.KvcommUngated(PoolConfig(**options))

    arms: tuple[Any, ...] = (
        *(basic.Dense, basic.DensePrefixCache, basic.Naive, basic.Rotate, basic.RotateFirst, basic.RotateGlue),
        *(blend.Blend, kvcomm, ungated, offsets.MeanOffset, basic.Anchored, predicted.Predicted),
    )
    controls = (basic.DenseChunked, basic.Zeroed, basic.RandomMoments, basic.OtherRequest)
    return dict(zip((*ARMS, *CONTROLS), (*arms, *controls), strict=True))


def make_arm(text: str) -> Arm:
    """A new arm of that name, `name` or `name:value`, with nothing learnt; UserError for a wrong one."""
    return ArmSpec.parse(text).maker(makers())()

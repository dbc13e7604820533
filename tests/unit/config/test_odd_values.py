"""Every number of every command: NaN, infinity, -1, 1e30 and 2**63 are refused in a sentence that names the key."""

from __future__ import annotations

import copy
import dataclasses
import typing
from collections.abc import Iterator
from types import NoneType
from typing import Any, get_args, get_type_hints

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from anchorctx.config import SCHEMAS, resolve, schema
from anchorctx.config.compose import compose_config, plain
from anchorctx.config.sentences import sentence
from anchorctx.errors import UserError

GIVEN = {
    "prepare": {"out_dir": "x", "tokenizer": "y", "row_length": "64", "sources": "[{path: z}]"},
    "train": {"out_dir": "x", "data.train": "y"},
    "export": {"run": "x", "out_dir": "y"},
    "eval": {"out_dir": "x", "models": "[{path: y}]"},
    "kvcomm": {"out_dir": "x", "models": "[{path: y}]"},
    "precision": {"model": "x", "out_dir": "y"},
    "plot": {"out_dir": "x"},
}
ODD = ("nan", "inf", "-1", "1e30", str(2**63))


def numbers(owner: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(key, how its value is written) of every number, those in lists, dictionaries and other settings too."""
    for name, hint in get_type_hints(owner).items():
        key, kind = f"{prefix}{name}", bare(hint)
        inside = bare(get_args(kind)[-1]) if typing.get_origin(kind) in (list, dict) else None
        if kind in (int, float):
            yield key, "{}"
        elif dataclasses.is_dataclass(kind):
            yield from numbers(kind, f"{key}.")
        elif dataclasses.is_dataclass(inside):
            yield from numbers(inside, f"{key}[0].")
        elif inside in (int, float):
            yield key, "[{}]" if typing.get_origin(kind) is list else "{{a: {}}}"


def bare(hint: Any) -> Any:
    """`int` of `int | None`."""
    others = [part for part in get_args(hint) if part is not NoneType]
    return others[0] if NoneType in get_args(hint) and len(others) == 1 else hint


CASES = [(command, key, form) for command in SCHEMAS for key, form in numbers(schema(command))]


def test_the_walk_finds_numbers_everywhere() -> None:
    found = {f"{command} {key}" for command, key, _ in CASES}
    assert {
        "prepare row_length",
        "prepare sources[0].stdlib.sigma",
        "prepare mixture.weights",
        "train optim.betas",
        "train live.retrieval.rows",
        "eval models[0].max_length",
        "kvcomm settings.gamma",
    } <= found
    assert len(found) > 250


@pytest.mark.parametrize("command", SCHEMAS)
def test_odd_values_are_refused(command: str) -> None:
    """By the command's own composition, into which each value is put where Hydra puts an override."""
    config = compose_config(command, [f"{key}={value}" for key, value in GIVEN.get(command, {}).items()])
    accepted = []
    for key, form in ((key, form) for of, key, form in CASES if of == command):
        before = copy.deepcopy(OmegaConf.select(config, key))
        for odd in ODD:
            value = OmegaConf.create(f"x: {form.format(odd)}").x
            try:
                OmegaConf.update(config, key, value, merge=False)
                plain(config)
                accepted.append(f"{key}={odd}")
            except OmegaConfBaseException as error:  # no integer
                assert sentence(error, command, schema(command)).startswith(key)
            except UserError as error:
                assert str(error).startswith(key) and str(error).count("\n") == 0
        OmegaConf.update(config, key, before, merge=False)
    assert not accepted  # no key has a use for any of them


@pytest.mark.slow
@pytest.mark.parametrize(("command", "key", "form"), [case for case in CASES if "[0]" not in case[1]])
def test_odd_values_on_the_command_line(command: str, key: str, form: str) -> None:
    """Slow: two minutes for 1,400 command lines."""
    given = [f"{name}={value}" for name, value in GIVEN.get(command, {}).items() if name != key]
    for odd in ODD:
        with pytest.raises(UserError, match=f"^{key}"):
            resolve(command, [*given, f"{key}={form.format(odd)}"])

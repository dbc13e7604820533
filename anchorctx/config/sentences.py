"""A sentence for each of a user's mistakes that Hydra and OmegaConf tell in many lines, or in a parser's words."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Sequence
from enum import Enum
from typing import Any, get_args, get_type_hints

MOVED = {
    "parallel.activation_checkpointing": "memory.checkpoint_every=1",
    "micro_rows": "micro_tokens=TOKENS, what a forward pass holds (before: micro_rows x the row length)",
}
"""Keys of earlier versions, and what to write now."""


def sentence(error: BaseException, command: str, owner: type) -> str:
    """What `error` of Hydra or OmegaConf means for the user of `command`, whose configuration is an `owner`."""
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

    # Hydra wraps OmegaConf's errors, sometimes twice, and only the innermost knows the key
    chain = [error]
    while before := chain[-1].__cause__ or (isinstance(chain[-1], HydraException) and chain[-1].__context__):
        chain.append(before)
    cause = next((e for e in reversed(chain) if isinstance(e, OmegaConfBaseException)), chain[-1])
    full_key = getattr(cause, "full_key", None)
    if isinstance(cause, (ConfigKeyError, ConfigAttributeError)) and full_key:
        return unknown_key(str(full_key), command, getattr(cause, "object_type", None), owner)
    if isinstance(error, MissingConfigException) and error.options:
        return _unknown_choice(str(error.missing_cfg_file), list(error.options))
    if isinstance(cause, MissingMandatoryValue):
        return f"anchorctx {command}: {first_line(cause)}"
    if isinstance(cause, OmegaConfBaseException) and full_key:
        return _wrong_value(str(full_key), first_line(cause), command, owner)
    return first_line(error)


def unknown_key(full_key: str, command: str, owner: Any, whole: type) -> str:
    """Names the valid keys of its `owner`, a dataclass, the nearest first; `whole` is the command's configuration."""
    if full_key in MOVED:
        return f"{full_key} moved: write {MOVED[full_key]}"
    parent, _, key = full_key.rpartition(".")
    valid = [f.name for f in dataclasses.fields(owner)] if dataclasses.is_dataclass(owner) else []
    of_command = f"of anchorctx {command}" if owner is whole else "beside it"  # in an element of a list
    place = f"in {parent}" if parent else of_command
    return f"unknown key '{full_key}': {nearest(key, valid)}valid keys {place} are {', '.join(valid)}"


def first_line(error: BaseException) -> str:
    """The first line of an error's text, without a period."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


def _wrong_value(full_key: str, said: str, command: str, owner: type) -> str:
    """`said` is the first line of OmegaConf's complaint about the value of a key."""
    if "is not a ListConfig" in said:
        return f"{full_key} is a list: write {full_key}=[...] (anchorctx {command} --help has an example)"
    if choice := re.fullmatch(r"Invalid value '(.*)', expected one of \[(.*)\]", said):
        valid = choice[2].split(", ")
        return f"{full_key}={choice[1]} is unknown: {nearest(choice[1], valid)}choose {', '.join(valid)}"
    part = re.fullmatch(r"Invalid type assigned: \w+ is not a subclass of \w+\. value: (.*)", said)
    if part and dataclasses.is_dataclass(hint := _hint(owner, full_key)):
        example = f"{{{_example(hint, part[1])}}}"
        key, *index = re.split(r"\[\d+\]$", full_key)
        return f"{full_key}={part[1]} is not {{key: value}}: write {key}={f'[{example}]' if index else example}"
    return f"{full_key}: {said}"


def _hint(owner: type, full_key: str) -> Any:
    """The type of what a key such as live.corpus, or an element such as sources[0], has to be; None if unknown."""
    hint: Any = owner
    for part in re.sub(r"\[\d+\]", "", full_key).split("."):
        if not dataclasses.is_dataclass(hint):
            return None
        hint = get_type_hints(hint).get(part)
        hint = next((of for of in get_args(hint) if dataclasses.is_dataclass(of)), hint)
    return hint


def _example(part: Any, value: str) -> str:
    """The key of a part that `value` may have been meant for: `format: stdlib`, else its first, `path: ...`."""
    hints = get_type_hints(part)
    for name, hint in hints.items():
        if isinstance(hint, type) and issubclass(hint, Enum) and value in hint.__members__:
            return f"{name}: {value}"
    return f"{next(iter(hints))}: {value}"


def _unknown_choice(path: str, choices: list[str]) -> str:
    """Names the ready-made choices of a group, the nearest first; `path` is "parallel/zero4"."""
    group, _, choice = path.rpartition("/")
    near = nearest(choice, choices, quote="")
    return f"{group}={choice} is no ready-made choice: {near}choose {', '.join(choices)}"


def nearest(word: str, valid: Sequence[str], quote: str = "'") -> str:
    """The beginning of a remedy, where a word is like one of those that are valid; else nothing."""
    near = difflib.get_close_matches(word, valid, n=1)
    return f"did you mean {quote}{near[0]}{quote}? " if near else ""

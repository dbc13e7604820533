"""What a user types after a command's name, made ready for Hydra's grammar.

The grammar takes few signs outside quotes, and reads 1e3 as a number and `a,b` as a sweep. A field of the configuration
that is a text (a path, a name) takes what was typed; for lists and other values a sentence says what to put in quotes.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Sequence
from types import NoneType
from typing import Any, get_args, get_type_hints

from anchorctx.config.sentences import unknown_key
from anchorctx.errors import UserError
from anchorctx.settings import default_of, shown

OVERRIDE = re.compile(r"(\+{0,2})([\w.]+)=(.*)", re.DOTALL)
"""`+model.path=x` in its parts; other forms, such as ~key and group@package=x, are left to Hydra."""


def check_words(words: Sequence[str], command: str, owner: type) -> None:
    """UserError for words that are no overrides and for unknown keys, without Hydra, whose import takes longer."""
    check_whole(words)
    for word in words:
        if word.endswith("\r"):
            raise UserError(f"{word.rstrip()} ends in a carriage return: give your script Unix line ends (dos2unix)")
        if "=" not in word and not word.startswith("~"):
            raise UserError(f"{word} has no '=': write key=value (anchorctx {command} --help lists the keys)")
        place_of(word.lstrip("+~").partition("=")[0], command, owner)


def check_whole(words: Sequence[str]) -> None:
    """UserError for a list that a shell cut at its spaces."""
    # evals=[perplexity, needle] without quotes arrives as two words: `evals=[perplexity,` and `needle]`
    for first, begin in enumerate(words):
        if not re.match(r"[\w.+]+=[\[{]", begin):
            continue
        depth, last = 0, first
        for last, word in enumerate(words[first:], start=first):  # noqa: B007  (the last one is what is looked for)
            depth += sum((letter in "[{(") - (letter in ")}]") for letter in word)
            if depth <= 0:
                break
        if depth <= 0 and last > first:
            whole = " ".join(words[first : last + 1])
            raise UserError(f"{begin} was cut off at a space: put quotes around the whole, '{whole}'")


def place_of(key: str, command: str, owner: type) -> tuple[type, str] | None:
    """The dataclass and the field that a dotted key names; UserError for an unknown one.

    None where any key is right: in free dictionaries, lists, and among Hydra's own.
    """
    # model.rope.extra.x: model and rope are dataclasses, extra is a free dictionary
    parts = [] if re.search(r"[^\w.]", key) or key.startswith("hydra.") else key.split(".")
    whole, part, place = owner, "", None
    for i, part in enumerate(parts):
        if not dataclasses.is_dataclass(owner):
            return None
        hints = get_type_hints(owner)
        if part not in hints:
            raise UserError(unknown_key(".".join(parts[: i + 1]), command, owner, whole))
        place, owner = (owner, part), hints[part]
    return place


def for_hydra(word: str, command: str, owner: type) -> str:
    """The override, a text's value in quotes where Hydra would read it otherwise than it was typed.

    UserError for an empty value where it means nothing, and for what Hydra's grammar does not take.
    """
    typed = OVERRIDE.fullmatch(word)
    place = place_of(typed[2], command, owner) if typed else None
    hint = get_type_hints(place[0])[place[1]] if place else None
    if typed is None or place is None or not _is_text(hint, typed[3]):
        _check_grammar(word, hint)
        return word
    if not typed[3].strip():
        _check_may_be_empty(typed[2], *place)
    if _reads_as_text(word):  # in quotes, with Hydra's own escapes, or harmless
        return word
    return f"{typed[1]}{typed[2]}={quoted(typed[3])}"


def quoted(text: str) -> str:
    """The text in quotes, as Hydra's grammar takes it anywhere."""
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(text, Quote.single).with_quotes()


def expand_home(config: Any, key: str = "") -> None:
    """Put the home folder for `~` at the beginning of every text of a configuration, in place.

    Free dictionaries, a model's own fields, are left alone. UserError where nobody knows a home folder.
    """
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{key}{field.name}"
        if isinstance(value, str):
            setattr(config, field.name, _expanded(value, name))
        elif isinstance(value, list):
            for i, element in enumerate(value):
                if isinstance(element, str):
                    value[i] = _expanded(element, f"{name}[{i}]")
                elif dataclasses.is_dataclass(element):
                    expand_home(element, f"{name}[{i}].")
        elif dataclasses.is_dataclass(value):
            expand_home(value, f"{name}.")


def _expanded(value: str, key: str) -> str:
    if not value.startswith("~"):
        return value
    expanded = os.path.expanduser(value)
    if expanded == value and value[:2] in ("~", "~/"):
        raise UserError(f"{key}={value} needs a home folder, and HOME is not set: write the whole path")
    return expanded


def misread(config: Any, hint: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Texts of a configuration, given as dictionaries and lists, that a parser has taken for numbers or booleans.

    Yields where each is, ("sources", 0, "revision"), and what it was taken for; `hint` is the type that is wanted.
    """
    if isinstance(config, dict) and dataclasses.is_dataclass(hint):
        hints = get_type_hints(hint)
        for name, value in config.items():
            yield from misread(value, hints.get(name), (*path, name))
    elif isinstance(config, list):
        of = next(iter(get_args(hint)), None)
        for index, value in enumerate(config):
            yield from misread(value, of, (*path, index))
    elif isinstance(config, bool | int | float) and hint is not None and _is_text(hint, ""):
        yield path, config


def misread_sentence(key: str, value: Any, typed: str) -> str:
    """About a text that was taken for the number or boolean `value`."""
    return f"{key}: {typed} is read as {shown(value)}, though it is a text: put it in quotes, {key}: '{typed}'"


def _is_text(hint: Any, value: str) -> bool:
    """Is a field of this type a text? A field of any type is, unless it is given a list."""
    return hint is str or set(get_args(hint)) == {str, NoneType} or (hint is Any and not value.startswith("["))


def _check_may_be_empty(key: str, owner: type, name: str) -> None:
    # most often a shell variable that is not set: out_dir=$OUT
    default = default_of(owner.__dataclass_fields__[name])  # type: ignore[attr-defined]
    if default == "":
        return
    needed = default in (dataclasses.MISSING, "???")
    remedy = f"write {key}=..." if needed else f"leave it out for its default, {shown(default)}"
    raise UserError(f"{key}= is empty: {remedy}")


def _parse(word: str) -> Any:
    """Hydra's `Override`; HydraException for what its grammar does not take."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create().parse_override(word)


def _reads_as_text(word: str) -> bool:
    from hydra.errors import HydraException

    if re.match(r"[^=]*=\s*\w+\s*\(", word):  # a function of the grammar's, sort(a), or an error
        return False
    try:
        value = _parse(word).value()
    except HydraException:
        return False
    return value is None or isinstance(value, str)


def _check_grammar(word: str, hint: Any) -> None:
    """UserError for what Hydra's grammar does not take, and for texts in lists that it would take for numbers.

    `hint` is the type of the value that is wanted, None where any will do.
    """
    from hydra.errors import HydraException

    try:
        parsed = _parse(word)
    except HydraException as error:
        raise UserError(_ungrammatical(word, error.__cause__)) from error
    if parsed.is_sweep_override():
        raise UserError(f"{word} has several values, and a command runs with one: write one of them")
    for path, value in misread(parsed.value(), hint):
        # 5e12345 is inf and 1_000 is 1000: nothing is lost where the word has the value as it is written
        if not re.search(rf"(?<![\w.+-]){re.escape(str(value))}(?![\w.+-])", word):
            written = re.search(rf"\b{path[-1]}\s*:\s*([^,}}\]]*)", word) if isinstance(path[-1], str) else None
            if written:
                raise UserError(misread_sentence(str(path[-1]), value, written[1].strip()))
            raise UserError(f"{word} is read as having {shown(value)} in it, though it has texts: put them in quotes")


def _ungrammatical(word: str, cause: BaseException | None) -> str:
    """`cause` is the lexer's or the parser's complaint, which knows where."""
    at = getattr(cause, "startIndex", None)
    if at is None:
        token = getattr(cause, "offendingToken", None)
        at = token.start if token is not None and token.start >= 0 else len(word)
    if at >= len(word.rstrip()):
        return f"{word} ends too early: close its brackets and quotes"
    return (
        f"{word} cannot be read from '{word[at:]}' on: put a text with such signs in quotes of its own, "
        "as in sources=[{path: 'a, b.jsonl'}]"
    )

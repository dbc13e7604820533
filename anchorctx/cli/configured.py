"""What every command with a configuration shares: `--help`, `--show`, and the resolved dataclass."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any, get_args, get_origin, get_type_hints

from anchorctx.cli.main import COMMANDS, Arguments
from anchorctx.config import compose_config, conf_dir, resolve, schema
from anchorctx.errors import UserError
from anchorctx.settings import default_of, shown


def configuration(command: str, arguments: Arguments, example: str) -> Any | None:
    """The command's configuration, or None after printing what `--help` or `--show` asked for."""
    if arguments.dry_run and command != "prepare":
        raise UserError(f"--dry-run is an option of anchorctx prepare, not of {command}: leave it out, or use --show")
    if arguments.help:
        print(help_text(command, example))
        return None
    if arguments.show:
        from omegaconf import OmegaConf

        print(OmegaConf.to_yaml(compose_config(command, arguments.overrides, arguments.recipe)), end="")
        return None
    return resolve(command, arguments.overrides, arguments.recipe)


def help_text(command: str, example: str) -> str:
    """Every key with its default and its meaning, the groups of `conf/`, and an example."""
    lines = [f"anchorctx {command}: {COMMANDS[command]}", "", "example:", textwrap.indent(example, "  "), "", "keys:"]
    for key, default, meaning in _keys(schema(command)):
        lines.append(f"  {key}={default}")
        lines += textwrap.wrap(meaning, 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
    lines += _groups(command)
    return "\n".join(lines)


def _keys(owner: type, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    docs, hints = field_docs(owner), get_type_hints(owner)
    for field in dataclasses.fields(owner):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            yield from _keys(kind, f"{prefix}{field.name}.")  # type: ignore[arg-type]
            continue
        yield prefix + field.name, _default(field), docs.get(field.name, "")
        for element in get_args(kind) if get_origin(kind) is list else ():
            if dataclasses.is_dataclass(element):
                yield from _keys(element, f"{prefix}{field.name}[].")  # type: ignore[arg-type]


def field_docs(owner: type) -> dict[str, str]:
    """The docstring line under each field of a dataclass and of those it derives from, from their sources."""
    docs: dict[str, str] = {}
    for part in reversed(owner.__mro__):
        if dataclasses.is_dataclass(part):
            docs |= _own_field_docs(part)
    return docs


def _own_field_docs(owner: type) -> dict[str, str]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(owner)))
    body = tree.body[0].body  # type: ignore[attr-defined]
    docs = {}
    for field, doc in zip(body, body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant):
            docs[ast.unparse(field.target)] = " ".join(str(doc.value.value).split())
    return docs


def _default(field: dataclasses.Field[Any]) -> str:
    value = default_of(field)
    return "???" if value is dataclasses.MISSING else shown(value)


def _groups(command: str) -> list[str]:
    """Ready-made choices for parts of the configuration."""
    fields = {field.name for field in dataclasses.fields(schema(command))}
    groups = {path.name: sorted(p.stem for p in path.glob("*.yaml")) for path in conf_dir().iterdir() if path.is_dir()}
    found = [f"  {name}={'|'.join(choices)}" for name, choices in sorted(groups.items()) if name in fields]
    return ["", "ready-made choices:", *found] if found else []

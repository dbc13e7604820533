"""Prompts of chat models: the tokenizer's own template is applied to the whole conversation, which is then cut.

Placeholders go into the template as marks that nobody can guess, so that the template puts its special tokens where the
model expects them, once. What it makes must be what it makes of any other content: a template that drops, moves,
repeats, trims or rewrites a message is found by comparison, and refused.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from anchorctx.errors import UserError
from anchorctx.kvcomm.agents import Agent, Ids, Messages, Slot, Template

REMEDY = "use prompts of plain text (chat=false)"


def has_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer brings a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def template_of(agent: Agent, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The agent's prompt as glue and placeholders, its messages rendered by the chat template; the glue is in tokens.

    Raises:
        UserError: there is no chat template, or it does not leave the messages as they are.
    """
    if not isinstance(agent.template, Messages):
        return Template.of(agent.template)
    if not has_template(tokenizer):
        raise UserError(
            f"agent {agent.name!r} has messages, but the tokenizer {tokenizer.name_or_path or ''} has no chat template "
            f"to put them in: {REMEDY}, or take a chat model"
        )
    templates = tokenizer.chat_template
    if isinstance(templates, dict) and "default" not in templates:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path or ''} has the chat templates {', '.join(templates)}, none of them "
            f"called default: set its chat_template to one of them, or {REMEDY}"
        )
    messages = {role: Template.parse(text) for role, text in agent.template.by_role.items()}
    slots = [part for message in messages.values() for part in message.parts if isinstance(part, Slot)]
    # One mark a placeholder, with blanks around it, which a template that trims contents would take away.
    marks = [f" {_mark()} " for _ in slots]
    filled, free = {}, iter(marks)
    for role, message in messages.items():
        filled[role] = "".join(next(free) if isinstance(part, Slot) else str(part) for part in message.parts)
    glues = _split(_rendered(agent, tokenizer, filled), marks)
    # "<s>[INST] solve ", {question}, " now [/INST]": what stands between the marks is encoded with its special tokens.
    parts: list[Ids | Slot] = [_encoded(tokenizer, glues[0])]
    for slot, glue in zip(slots, glues[1:], strict=True):
        parts += [slot, _encoded(tokenizer, glue)]
    if not parts[0]:
        raise UserError(
            f"the chat template puts nothing before {{{slots[0].name}}} of agent {agent.name!r}, so that its prompt "
            f"has no fixed beginning: put words before it, or {REMEDY}"
        )
    return Template(tuple(part for part in parts if part), bos=False)


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the template puts behind an assistant's message; None where it puts text or nothing."""
    mark = _mark()
    try:
        said = _apply(tokenizer, {"user": "a", "assistant": mark}, prompt=False)
    except Exception:  # whatever a template does that knows no answers; it may still serve for prompts
        return None
    behind = _encoded(tokenizer, said.partition(mark)[2])
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return behind[0] if behind and behind[0] in special | set(tokenizer.all_special_ids) else None


def _rendered(agent: Agent, tokenizer: PreTrainedTokenizerBase, messages: Mapping[str, str]) -> str:
    """The template's text for these messages; UserError where it is not the template's frame with them in it."""
    marks = {role: _mark() for role in messages}
    try:
        frame = _apply(tokenizer, marks)
        found = _apply(tokenizer, messages)
    except Exception as error:  # jinja2's, the template's own (raise_exception), or any that its Python raises
        reason = " ".join(str(error).split()).rstrip(".")[:150]
        if not _works(tokenizer):
            raise UserError(
                f"the chat template of the tokenizer {tokenizer.name_or_path or ''} does not even take a single "
                f"message ({reason}): correct the template, or {REMEDY}"
            ) from error
        raise UserError(
            f"the chat template does not take the messages of agent {agent.name!r} ({reason}): "
            f"{_without_system(messages)}{REMEDY}"
        ) from error
    for role, mark in marks.items():
        if frame.count(mark) != 1:
            raise UserError(
                f"the chat template puts the {role} message of agent {agent.name!r} into the prompt "
                f"{frame.count(mark)} times instead of once: {_without_system(messages)}{REMEDY}"
            )
    places = [frame.index(mark) for mark in marks.values()]
    if places != sorted(places):
        raise UserError(f"the chat template moves the messages of agent {agent.name!r} to another order: {REMEDY}")
    expected = frame
    for role, mark in marks.items():
        expected = expected.replace(mark, messages[role])
    if found != expected:
        raise UserError(
            f"the chat template changes the messages of agent {agent.name!r} (such as the blanks that they begin or "
            f"end with): begin and end each message with words, no placeholder and no blank, or {REMEDY}"
        )
    return found


def _apply(tokenizer: PreTrainedTokenizerBase, messages: Mapping[str, str], *, prompt: bool = True) -> str:
    conversation = [{"role": role, "content": text} for role, text in messages.items()]
    found: Any = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=prompt)
    return found


def _works(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template takes a conversation of one user message: else no agent's messages can be blamed."""
    try:
        return bool(_apply(tokenizer, {"user": _mark()}))
    except Exception:  # see _rendered
        return False


def _split(text: str, marks: list[str]) -> list[str]:
    """The text between the marks, which stand in it once each and in this order; one piece more than marks."""
    pieces = []
    for mark in marks:
        piece, _, text = text.partition(mark)
        pieces.append(piece)
    return [*pieces, text]


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> Ids:
    # As `apply_chat_template` encodes: BOS stands in the text where the template wants it.
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else ()  # type: ignore[arg-type]


def _mark() -> str:
    return f"placeholder{secrets.token_hex(12)}"


def _without_system(messages: Mapping[str, str]) -> str:
    return "put the system message's text into the user message, or " if "system" in messages else ""

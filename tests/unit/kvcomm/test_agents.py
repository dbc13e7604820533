from __future__ import annotations

import pytest

from anchorctx.errors import UserError
from anchorctx.kvcomm.agents import Agent, Frame, Slot, Template, check_agents, check_placeholders, common_prefix


def encode(text: str) -> tuple[int, ...]:
    return tuple(ord(c) for c in text)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a {x} b", ("a ", Slot("x"), " b")),
        ("{x}{y}", (Slot("x"), Slot("y"))),
        ("{x}", (Slot("x"),)),
        ("{ x }b", (Slot("x"), "b")),
        ("{{{x}}}", ("{", Slot("x"), "}")),
        ("no {{braces}}", ("no {braces}",)),
        ("", ()),
    ],
)
def test_templates_parse(text: str, parts: tuple) -> None:
    assert Template.parse(text).parts == parts


@pytest.mark.parametrize("text", ["a {} b", "a { } b", '{"answer": 1}', "{x!r}"])
def test_a_placeholder_needs_a_plain_name(text: str) -> None:
    with pytest.raises(UserError, match="without a name"):
        Template.parse(text)


@pytest.mark.parametrize("text", ["a {x", "a } b", "{a{b}}"])
def test_braces_come_in_pairs(text: str) -> None:
    with pytest.raises(UserError, match="without its other half"):
        Template.parse(text)


def test_reordering_exchanges_contents_and_keeps_the_text() -> None:
    found = Template.parse("{a}: x {b}, y").reordered({"a": "b", "b": "a"})
    assert found.parts == (Slot("b"), ": x ", Slot("a"), ", y")


def test_prompts_cut_into_segments_that_cover_them() -> None:
    frame = Frame("m", Template((Slot("x"), Slot("y"), "ab", "c", (7, 8), Slot("x"))), encode, 1)
    prompt = frame.prompt({"x": (50, 51), "y": ()})
    assert prompt.ids == (1, 50, 51, *encode("abc"), 7, 8, 50, 51) and prompt.length == 10
    assert [(s.name, s.start, s.stop, s.occurrence) for s in prompt.segments] == [
        (None, 0, 1, 0),
        ("x", 1, 3, 0),
        ("y", 3, 3, 0),
        (None, 3, 8, 0),
        ("x", 8, 10, 1),
    ]
    x, y, again = prompt.placeholders
    assert prompt.glue_after(x) is None and prompt.glue_after(again) is None
    assert prompt.glue_after(y) == prompt.segments[3]
    assert frame.skeleton().ids == (1, *encode("xyabc"), 7, 8, *encode("x"))


def test_common_prefix() -> None:
    assert [common_prefix((1, 2), b) for b in ((1, 2, 3), (1, 3), (), (1, 2))] == [2, 1, 0, 2]


def test_bad_agents_are_refused() -> None:
    with pytest.raises(UserError, match="two agents are called 'a'"):
        check_agents([Agent("a", ""), Agent("a", "")])
    check_agents([Agent("a", "", checkpoint="m"), Agent("b", "")])
    with pytest.raises(UserError, match="agent 'a' runs m but agent 'b' runs n.*one checkpoint"):
        check_agents([Agent("a", "", checkpoint="m"), Agent("b", "", checkpoint="n")])
    with pytest.raises(UserError, match="max_new_tokens=0"):
        check_agents([Agent("a", "", 0)])
    with pytest.raises(UserError, match="placeholder {z}.*gives? it x, a"):
        check_placeholders(Agent("m", "{z}"), Template.parse("{z}"), {"x"}, ["a"])

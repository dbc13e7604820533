"""Several talks at once say what each says alone, and leave the same keys and values behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from anchorctx.errors import UserError
from anchorctx.kvcomm import Agent, Session, grouped, memory
from anchorctx.kvcomm.decoder import Decoder
from anchorctx.kvcomm.together import together
from anchorctx.testing.numerics import max_error
from anchorctx.testing.tiny import ARCHITECTURES, word_tokenizer

ARMS = ("dense", "rotate", "naive", "kvcomm", "blend:0.4", "rotate_glue:2")
AGENTS = [Agent("a", "w3 {doc}", 5), Agent("b", "w4 w5 {a} {doc}", 9), Agent("c", "{b} w6 {a} w7", 3)]
TEXTS = [{"doc": " ".join(f"w{3 + (k * 7 + i * i) % 80}" for i in range(11 + 3 * k))} for k in range(3)]


@pytest.fixture(params=["llama", "llama grouped", "mistral", "gemma3", "gpt_neox"])
def parts(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Without and with a window, with one in some layers, with rotation of a part of each head, with our attention."""
    name, attention = request.param.split(" ") if " " in request.param else (request.param, "sdpa")
    model = ARCHITECTURES[name].build(torch.float64)
    model.set_attn_implementation(attention if attention == "sdpa" else grouped.register())
    return model.eval(), word_tokenizer(96)


def sessions(parts, decoder: Decoder) -> dict[str, Session]:
    return {arm: Session(*parts, AGENTS, arm=arm, decoder=decoder) for arm in ARMS}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers are made of memory that may hold anything."""
    monkeypatch.setattr(memory, "empty", lambda shape, dtype, device: torch.full(shape, torch.nan, dtype=dtype))


def test_they_say_what_each_says_alone(parts) -> None:
    decoder = Decoder(parts[0])
    single, several = sessions(parts, decoder), sessions(parts, decoder)
    for texts in TEXTS:  # the second time kvcomm has learnt something
        found = together(decoder, {arm: session.talk(texts) for arm, session in several.items()})
        assert list(found) == list(ARMS)
        for arm, turns in found.items():
            for name, expected in single[arm].ask(texts).items():
                turn = turns[name]
                assert (turn.ids, turn.message, turn.computed) == (expected.ids, expected.message, expected.computed)
                assert max_error(turn.logits, expected.logits) < 1e-10
                filled = expected.prompt.length + max(len(expected.ids) - 1, 0)
                for kind in ("keys", "values"):
                    ours, theirs = (getattr(t.buffer, kind)[..., :filled, :] for t in (turn, expected))
                    assert max_error(ours, theirs) < 1e-10


@pytest.mark.parametrize("arm", ["dense", "rotate"])
def test_several_requests_of_one_session(parts, arm: str) -> None:
    one, other = (Session(*parts, AGENTS, arm=arm) for _ in range(2))
    expected = [{name: turn.ids for name, turn in one.ask(texts).items()} for texts in TEXTS]
    found = other.ask_all(TEXTS, at_once=2)
    assert [{name: turn.ids for name, turn in turns.items()} for turns in found] == expected
    with pytest.raises(UserError, match="at_once=0 must be at least 1"):
        other.ask_all(TEXTS, at_once=0)


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many talks each forward of several served."""
    found, run = [], Decoder.forward_rows

    def counted(self: Decoder, ids: torch.Tensor, *more: Any) -> torch.Tensor:
        found.append(len(ids))
        return run(self, ids, *more)

    monkeypatch.setattr(Decoder, "forward_rows", counted)
    return found


def test_one_begins_when_another_is_over(parts, rows: list[int]) -> None:
    """Three at a time: no forward has more, and few have fewer."""
    decoder = Decoder(parts[0])
    expected = {arm: session.ask(TEXTS[0])["c"].ids for arm, session in sessions(parts, decoder).items()}
    talks = {arm: session.talk(TEXTS[0]) for arm, session in sessions(parts, decoder).items()}
    found = together(decoder, talks, at_once=3)
    assert {arm: turns["c"].ids for arm, turns in found.items()} == expected and list(found) == list(ARMS)
    assert max(rows) == 3 and rows.count(3) >= len(rows) // 2


def test_there_is_no_memory_for_talks_that_do_not_exist(parts, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, make = [], Decoder.buffer
    monkeypatch.setattr(Decoder, "buffer", lambda self, n, count=1: rows.append(count) or make(self, n, count))
    Session(*parts, AGENTS, arm="dense").ask_all(TEXTS, at_once=10**9)
    assert max(rows) == len(TEXTS)


def test_a_forward_serves_everyone(parts, rows: list[int]) -> None:
    """Talks of 5, 9 and 3 tokens: no more forwards for six arms than the longest of them takes."""
    decoder = Decoder(parts[0])
    together(decoder, {arm: session.talk(TEXTS[0]) for arm, session in sessions(parts, decoder).items()})
    assert rows[0] == len(ARMS) and len(rows) <= 4 + 8 + 2


def test_an_error_of_one_ends_all(parts) -> None:
    decoder = Decoder(parts[0])
    bad = Session(*parts, [Agent("a", "{doc}", 4, lambda *_: 1 / 0)], arm="dense", decoder=decoder)
    with pytest.raises(ZeroDivisionError):
        together(decoder, {"good": Session(*parts, AGENTS, decoder=decoder).talk(TEXTS[0]), "bad": bad.talk(TEXTS[0])})

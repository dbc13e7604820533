from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from anchorctx.errors import UserError
from anchorctx.kvcomm import Agent, Session
from anchorctx.kvcomm.arms.predicted import Predicted, _Rung, divergence
from anchorctx.kvcomm.decoder import Decoder

AGENTS = [Agent("a", "one two {q} three", 4), Agent("b", "four {a} five {q} six seven", 4)]


def session(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, decoder: Decoder, arm: object) -> Session:
    return Session(model, tokenizer, AGENTS, arm=arm, topology="chain", decoder=decoder)  # type: ignore[arg-type]


def question(number: int) -> dict[str, tuple[int, ...]]:
    generator = torch.Generator().manual_seed(number)
    return {"q": tuple(torch.randint(3, 90, (24,), generator=generator).tolist())}


@pytest.mark.parametrize(("bound", "stage"), [(100.0, "shared"), (1e-9, "dense")])
def test_the_first_requests_are_dense_and_then_the_bound_decides(
    bound: float,
    stage: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    decoder: Decoder,
) -> None:
    arm = Predicted(bound, warmup=4, miss=0.2, ladder=(2, 6), tokens=3)
    mine, dense, rung = (session(model, tokenizer, decoder, a) for a in (arm, "dense", _Rung(2)))
    seen = []
    for number in range(6):
        requests = [s.start(question(number)) for s in (mine, dense, rung)]  # three sessions, each with its own
        for agent in ("a", "b"):
            said = (7, 8, 9)
            turn, true, rotated = (request.run(agent, answer=said, message=said) for request in requests)
            assert arm.forecast is not None
            seen.append(arm.forecast.stage)
            like = rotated if seen[-1] == "shared" else true
            # What is shared is rotate_glue but for the probes' first layers, which are fresh.
            torch.testing.assert_close(turn.logits, like.logits, atol=0.02 if seen[-1] == "shared" else 1e-4, rtol=0)
            assert any(turn.reused) == (seen[-1] == "shared")
    assert seen == ["warmup"] * 8 + [stage] * 4
    # Two rungs of eight turns, each expected by a fit without its request.
    assert arm._predictor is not None and len(arm._predictor.left_out) == 16 and arm.nbytes > 0


def test_what_is_measured_of_a_dense_turn_is_what_sharing_it_gives(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, decoder: Decoder
) -> None:
    arm, said = Predicted(warmup=9, ladder=(2, 6)), (7, 8, 9)
    arms = {"mine": arm, "true": "dense", "2": _Rung(2), "6": _Rung(6)}
    turns = {
        name: session(model, tokenizer, decoder, a).start(question(1)).run("a", answer=said) for name, a in arms.items()
    }
    expected = [divergence(turns["true"].logits, turns[k].logits) for k in ("2", "6")]
    assert arm._samples[0].kl == pytest.approx(expected, rel=1e-4) and min(expected) > 1e-6
    # Two rungs of 26 tokens at most, and the answer, are counted beside the prompt.
    assert turns["mine"].hidden > turns["true"].hidden + 2 * len(said)


def test_an_answer_that_was_spoken_is_measured_like_one_that_was_given(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, decoder: Decoder
) -> None:
    spoken, given = Predicted(warmup=9), Predicted(warmup=9)
    turn = session(model, tokenizer, decoder, spoken).start(question(1)).run("a")
    session(model, tokenizer, decoder, given).start(question(1)).run("a", answer=turn.ids)
    assert len(turn.ids) > 1 and spoken._samples[0].kl == pytest.approx(given._samples[0].kl, rel=1e-4)


def test_requests_that_are_under_way_at_once_are_told_apart(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, decoder: Decoder
) -> None:
    """Each divergence beside the signals of its own turn, not of the one that began last."""
    samples = []
    for at_once in (1, 3):
        arm = Predicted(warmup=9)
        session(model, tokenizer, decoder, arm).ask_all([question(number) for number in range(3)], at_once)
        # Of requests in a row, b's turn comes before the next one's a.
        samples.append({(s.signals.request, s.signals.agent): s for s in arm._samples})
    assert len(samples[1]) == 6
    for key, alone in samples[0].items():
        assert samples[1][key].signals.numbers == pytest.approx(alone.signals.numbers, rel=1e-4)
        assert samples[1][key].kl == pytest.approx(alone.kl, rel=1e-3)


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(UserError, match=r"exceeded in 0.1 of the turns from 5 requests: raise warmup to 9 or more"):
        Predicted(warmup=5)
    for ladder in ((), (8, 8), (16, 8)):
        with pytest.raises(UserError, match="ladder .* must rise"):
            Predicted(ladder=ladder)

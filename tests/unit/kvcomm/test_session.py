from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from anchorctx.errors import UserError
from anchorctx.kvcomm import Agent, Session, grouped
from anchorctx.kvcomm.arms.names import ARMS, CONTROLS, make_arm
from anchorctx.kvcomm.arms.offsets import Kvcomm, KvcommUngated, MeanOffset
from anchorctx.kvcomm.arms.pool import PoolConfig
from anchorctx.kvcomm.decoder import Decoder
from anchorctx.kvcomm.topology import Topology
from anchorctx.kvcomm.turn import Turn
from anchorctx.testing import decoders
from anchorctx.testing.tiny import ARCHITECTURES

TEXTS = {"doc": "w10 w11 w12 w13 w14 w15 w16 w17", "q": "w20 w21"}
OTHER = {"doc": "w30 w31 w32 w33 w34 w35 w36 w37", "q": "w40 w41"}
AGENTS = [
    Agent("a", "w50 w51 {doc} w52 {q}", 4),
    Agent("b", "{doc}{a} w53", 4),
    Agent("c", "w54 {b} w55 w56 {a}{q}{doc}", 4),
]


@pytest.fixture
def make(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, decoder: Decoder) -> Any:
    def made(arm: Any = "dense", agents: list[Agent] = AGENTS, **options: Any) -> Session:
        return Session(model, tokenizer, agents, arm=arm, decoder=decoder, **options)

    return made


def logits(turns: dict[str, Turn]) -> torch.Tensor:
    return torch.stack([turn.logits[0] for turn in turns.values()])


@pytest.mark.parametrize("name", [*ARMS, *CONTROLS])
def test_every_arm_speaks_and_two_sessions_give_identical_numbers(make: Any, name: str) -> None:
    found = []
    for _ in range(2):
        session = make(name)
        for texts in (TEXTS, OTHER, TEXTS, OTHER, TEXTS, OTHER):
            turns = session.ask(texts)
        found.append(turns)
    assert torch.equal(logits(found[0]), logits(found[1]))
    assert [turn.ids for turn in found[0].values()] == [turn.ids for turn in found[1].values()]
    for turn in turns.values():
        assert 1 <= turn.computed <= turn.prompt.length and turn.ttft > 0
        assert set(turn.seconds) == {"match", "encode", "assemble", "forward", "upkeep"}


def test_what_an_agent_goes_on_to_say_is_no_work_beside_the_prompt(make: Any) -> None:
    """The comparison is on the first words, and the message is all of them: its rest is decoding, as they are."""
    said, message = (20, 21), (20, 21, 22, 23, 24)
    arms = [make("rotate").start(TEXTS), make("rotate").start(TEXTS)]
    short = arms[0].run("a", answer=said, message=said)
    whole = arms[1].run("a", answer=said, message=message)
    assert whole.hidden == short.hidden and whole.flops == short.flops and torch.equal(whole.logits, short.logits)
    assert arms[1].state.shared["a"].kv.length == 5
    # The same keys and values as when all of it was the answer; other words were never said, and are work.
    again = make("rotate").start(TEXTS)
    again.run("a", answer=message, message=message)
    torch.testing.assert_close(again.state.shared["a"].kv.keys, arms[1].state.shared["a"].kv.keys)
    other = make("rotate").start(TEXTS)
    assert other.run("a", answer=said, message=(30, *message)).hidden == short.hidden + 6


def test_dense_is_the_models_own_generation(make: Any, model: PreTrainedModel) -> None:
    for turn in make().ask(TEXTS).values():
        ids = torch.tensor([turn.prompt.ids])
        mask = torch.ones_like(ids)
        out = model.generate(ids, max_new_tokens=4, do_sample=False, attention_mask=mask, pad_token_id=0)  # type: ignore
        said = out[0, ids.shape[1] :].tolist()
        assert list(turn.ids) == (said[: said.index(2)] if 2 in said else said)


def test_reuse_is_counted(make: Any) -> None:
    session = make("rotate")
    turns = session.ask(TEXTS)
    a, c = turns["a"], turns["c"]
    assert a.computed == 1 and a.hidden >= 8 + 2 and a.reused == (True, True)
    assert c.computed == 1 and c.hidden == 0  # all of it is known by then
    assert c.flops < 0.2 * c.dense_flops and a.flops > c.flops
    dense = make().ask(TEXTS)["c"]
    assert dense.flops == dense.dense_flops and dense.reused == (False,) * 4


@pytest.mark.parametrize("name", [*ARMS, *CONTROLS])
def test_open_requests_do_not_mix(make: Any, name: str) -> None:
    """Two requests in turns give what each gives when it is alone in its session."""
    if name in ("kvcomm", "kvcomm_ungated", "mean_offset"):
        arm: Any = {"mean_offset": lambda: MeanOffset(9)}.get(name, lambda: Kvcomm(PoolConfig(min_exemplars=9)))
    else:
        arm = lambda: make_arm(name)  # noqa: E731
    alone = [logits(make(arm()).ask(texts)) for texts in (TEXTS, OTHER)]
    session = make(arm())
    requests = [session.start(texts) for texts in (TEXTS, OTHER)]
    turns: list[dict[str, Turn]] = [{}, {}]
    for agent in session.topology.order:
        for request, found in zip(requests, turns, strict=True):
            found[agent] = request.run(agent)
    if name in ("random", "other_request"):  # both depend on the requests before, by intention
        assert turns[0]["a"].prompt.ids != turns[1]["a"].prompt.ids
        return
    for expected, found in zip(alone, turns, strict=True):
        torch.testing.assert_close(logits(found), expected, rtol=0, atol=1e-5)


def test_the_pool_learns_from_each_open_request_apart(make: Any) -> None:
    session = make(Kvcomm(PoolConfig(min_exemplars=9)))
    one, two = session.start(TEXTS), session.start(OTHER)
    for agent in session.topology.order:
        one.run(agent)
        two.run(agent)
    held = session.arm.pool.held("doc")
    assert [e.ids for e in held] == [tuple(range(10, 18)), tuple(range(30, 38))]
    assert all(set(e.offsets) == {("a", 0), ("b", 0), ("c", 0)} for e in held)


def test_the_decision_agent_is_dense(make: Any) -> None:
    """But for the fixed text that its prompt begins with, which is exact."""
    session = make("rotate", decision="c")
    turns = session.ask(TEXTS)
    prompt = turns["c"].prompt
    assert turns["c"].computed == prompt.length - prompt.segments[0].length and turns["b"].computed == 1
    ids = session.decoder.tensor(prompt.ids)
    alone = session.decoder.forward(ids, session.decoder.buffer(prompt.length), range(prompt.length))[0, -1]
    torch.testing.assert_close(turns["c"].logits[0], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [*ARMS, *CONTROLS])
@pytest.mark.parametrize("template", ["{a}", "{a}{q}", "{q}{a}{doc}", "w50 {a}{a} w51", "{a} w52 {q}"])
def test_empty_answers_and_bare_templates_work(make: Any, name: str, template: str) -> None:
    """An answer of no tokens, neighbours, and placeholders at either end, also once the arm has learnt."""
    agents = [Agent("a", "w50 {doc}", 2, lambda answer, texts: ""), Agent("b", template, 2)]
    dense, session = make("dense", agents), make(name, agents)
    for texts in (TEXTS, OTHER, TEXTS, OTHER, TEXTS):
        expected, turn = dense.ask(texts)["b"], session.ask(texts)["b"]
        assert turn.prompt.ids == expected.prompt.ids
        assert torch.isfinite(turn.logits).all()
        if name.startswith("dense"):
            torch.testing.assert_close(turn.logits, expected.logits, rtol=0, atol=1e-5)


def test_messages_may_differ_from_answers(make: Any) -> None:
    agents = [
        dataclasses.replace(AGENTS[0], speak=lambda answer, texts: f"{texts['q']} w60 w61 w62 w63 w64 w65 w66"),
        *AGENTS[1:],
    ]
    turns = make("rotate", agents).ask(TEXTS)
    assert turns["a"].message == (20, 21, 60, 61, 62, 63, 64, 65, 66) and turns["a"].hidden > 9
    assert turns["b"].prompt.placeholders[1].ids == turns["a"].message


def test_an_agent_is_told_texts_as_they_came(make: Any) -> None:
    """Text stays text, spaces and all; what is known only as tokens is decoded."""
    told: list[Any] = []
    agents = [
        dataclasses.replace(AGENTS[0], speak=lambda answer, texts: "w60  w61"),
        Agent("b", "{doc}{a}{q}", 1, lambda answer, texts: told.append(texts) or "w5"),
    ]
    texts = {"doc": (10, 11, 12), "q": "w20   w21"}
    session = make("dense", agents)
    session.ask(texts)
    assert told.pop() == {"doc": "w10 w11 w12", "a": "w60  w61", "q": "w20   w21"}
    request = session.start(texts)
    request.run("a", message=(60, 61))
    request.run("b")
    assert told.pop()["a"] == "w60 w61"
    request.run("a")
    request.fork().run("b")
    assert told.pop()["a"] == "w60  w61"


def test_stop_ends_an_answer(make: Any) -> None:
    agent = Agent("a", "{doc}", 4, stop=lambda text: True)
    assert len(make("dense", [agent]).ask({"doc": TEXTS["doc"]})["a"].ids) <= 1


def test_mean_offset_and_recomputed_glue_cut_the_pool_tenfold(make: Any) -> None:
    """At V = 20; with the formula: 20 exemplars of text and glue against one mean of text."""
    pool = PoolConfig(min_exemplars=20)
    kept = {}
    arms = {"kvcomm": Kvcomm(pool), "mean": MeanOffset(30), "bare": Kvcomm(pool, recompute_glue=True)}
    for name, arm in arms.items():
        session = make(arm)
        for number in range(22):
            session.ask({"doc": " ".join(f"w{3 + (number * 5 + i) % 90}" for i in range(8)), "q": "w20 w21"})
        kept[name] = session.arm.nbytes
    assert 10 * kept["mean"] < kept["kvcomm"] and kept["bare"] < kept["kvcomm"]


def test_distances_are_forgotten_when_an_agent_speaks_again(make: Any) -> None:
    """They belong to what it said first; the new message is nearer to the other exemplar."""
    pool = PoolConfig(min_exemplars=2, max_exemplars=2)
    session = make(KvcommUngated(pool))
    messages = [(60, 61, 62, 63), (70, 71, 72, 73), (80, 81, 82, 83)]
    for message in messages[:2]:
        request = session.start(TEXTS)
        request.run("a", answer=message)
        request.run("b", answer=(5,))
    request = session.start(TEXTS)
    request.run("a", answer=messages[2])
    request.run("b", answer=(5,))
    before = dict(request.state.distances)
    assert before["a", 0] > 0
    request.run("a", answer=(60, 61, 62, 73))
    request.run("b", answer=(5,))
    after = request.state.distances
    assert 0 < after["a", 0] < before["a", 0] and after["a", 0] < after["a", 1]


def test_ungated_shares_once_there_are_enough(make: Any) -> None:
    session = make(KvcommUngated(PoolConfig(min_exemplars=2)))
    shared = [session.ask(texts)["a"].reused[0] for texts in (TEXTS, OTHER, TEXTS)]
    assert shared == [False, False, True]


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_bad_requests_are_refused(make: Any) -> None:
    with pytest.raises(UserError, match="agent 'a' has the placeholder {q}.*gives? it doc"):
        make().start({"doc": "w10"})
    with pytest.raises(UserError, match="'a' has an agent's name"):
        make().start({**TEXTS, "a": "w1"})
    with pytest.raises(UserError, match="hears 'a', who has not spoken"):
        make().start(TEXTS).run("b")
    with pytest.raises(UserError, match="prompt of 602 tokens and 4 to say, but the model reaches 512"):
        make("dense", [Agent("a", "{doc}{q}", 4)]).ask({"doc": [5] * 600, "q": [6]})
    with pytest.raises(UserError, match="message of 600, but the model reaches 512"):
        make("dense", [Agent("a", "{doc}", 4, lambda *_: "w9 " * 600)]).ask({"doc": [5]})


def test_a_fork_leaves_the_request_and_the_arm_as_they_are(make: Any) -> None:
    session = make(KvcommUngated(PoolConfig(min_exemplars=1)))
    session.ask(TEXTS)
    request = session.start(OTHER)
    request.run("a")
    known = {name: dict(getattr(request.state, name)) for name in ("contents", "shared", "distances")}
    uses = [exemplar.uses for exemplar in session.arm.pool]
    request.fork().run("b", keep=False)
    assert {name: getattr(request.state, name) for name in known} == known
    assert [exemplar.uses for exemplar in session.arm.pool] == uses
    request.run("b")
    assert sum(exemplar.uses for exemplar in session.arm.pool) > sum(uses)


def test_long_messages_count_before_anything_is_run(make: Any) -> None:
    def speak(answer: Any, texts: Any) -> str:
        return "w60 w61 w62 w63 w64 w65"

    reach = make().decoder.reach
    agents = [Agent("a", "{q}", 1, speak, message_tokens=6), Agent("b", "{a}", 1)]
    make(agents=agents).check({"q": (5,) * 8})
    long = [Agent("a", "{q}", 1, speak, message_tokens=reach), Agent("b", "{a}", 1)]
    with pytest.raises(UserError, match="agent 'b' has a prompt of"):
        make(agents=long).check({"q": (5,) * 8})


def test_lengths_are_added_up_and_never_made(make: Any) -> None:
    """Of a, b and c with answers of 10**15 tokens, b is the first whose prompt holds one."""
    agents = [dataclasses.replace(agent, max_new_tokens=10**15) for agent in AGENTS]
    with pytest.raises(UserError, match=f"agent 'a' has a prompt of 14 tokens and {10**15} to say, but the model"):
        make(agents=agents).check(TEXTS)
    with pytest.raises(UserError, match=f"agent 'b' has a prompt of {10**15 + 10} tokens and 4 to say"):
        make(agents=[dataclasses.replace(AGENTS[0], message_tokens=10**15), *AGENTS[1:]]).check(TEXTS)
    session = make()
    frame = session.frames["c"]
    assert frame.length({"b": 3, "a": 2, "q": 2, "doc": 8}) == frame.prompt(
        {"b": (5,) * 3, "a": (5,) * 2, "q": (5,) * 2, "doc": (5,) * 8}
    ).length  # fmt: skip


@pytest.mark.parametrize(
    ("agent", "message"),
    [
        (Agent("a", "{q}", 0), "agent 'a' has max_new_tokens=0: give it a whole number, 1 at least"),
        (Agent("a", "{q}", 2.5), "max_new_tokens=2.5: give it a whole number"),  # type: ignore[arg-type]
        (Agent("a", "{q}", 1, message_tokens=-1), "message_tokens=-1: give it a whole number, 0 at least"),
    ],
)
def test_lengths_that_are_none_are_refused(make: Any, agent: Agent, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(agents=[agent])


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (TEXTS | {"q": None}, "the request's text 'q' is None: give text, or token ids, which are whole numbers"),
        (TEXTS | {"q": 7}, "the request's text 'q' is 7: give text, or token ids"),
        (TEXTS | {"q": [5, "w6"]}, r"the request's text 'q' is \[5, 'w6'\]: give text, or token ids"),
        (TEXTS | {"q": [5, 96]}, "the request's text 'q' has the token id 96, but the model knows 0 to 95: take"),
        (TEXTS | {"q": (-1,)}, "the request's text 'q' has the token id -1, but the model knows 0 to 95"),
        (None, "the request is None: give it as a dictionary, a text for each placeholder"),
        ({"doc": "w10"}, "agent 'a' has the placeholder {q}"),
        (TEXTS | {"doc": [5] * 600}, "agent 'a' has a prompt of 606 tokens and 4 to say, but the model reaches 512"),
    ],
)
def test_no_request_begins_before_all_are_right(make: Any, texts: Any, message: str) -> None:
    session, said = make(agents=[dataclasses.replace(AGENTS[0], speak=lambda *_: said.append(1) or "w5")]), []
    texts = texts if texts is None else {name: x for name, x in texts.items()}
    with pytest.raises(UserError, match=message):
        session.ask(texts)
    with pytest.raises(UserError, match=f"request 2 of 3: {message}"):
        session.ask_all([TEXTS, texts, TEXTS])
    assert not said and session.start(TEXTS).state.number <= 1  # those that are refused have no number


def test_given_answers_and_messages_are_the_models_tokens(make: Any) -> None:
    with pytest.raises(UserError, match="the answer of agent 'a' has the token id 96, but the model knows 0 to 95"):
        make().start(TEXTS).run("a", answer=(96,))
    with pytest.raises(UserError, match="the message of agent 'a' is 3: give text, or token ids"):
        make().start(TEXTS).run("a", message=3)


def test_bad_sessions_are_refused(make: Any) -> None:
    for template in ("say {question", "say question}"):
        with pytest.raises(UserError, match="without its other half"):
            make(agents=[Agent("a", template, 1)])
    with pytest.raises(UserError, match="unknown arm 'fast': choose dense"):
        make("fast")
    with pytest.raises(UserError, match="unknown topology 'ring': choose chain"):
        make(topology="ring")
    with pytest.raises(UserError, match="decision='z' is no agent"):
        make(decision="z")
    with pytest.raises(UserError, match="give both the same names"):
        make(topology=Topology.of({"a": []}))


@pytest.mark.parametrize(
    ("architecture", "options", "message"),
    [
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic RoPE"),
    ],
)
def test_models_whose_keys_cannot_move_are_refused(architecture: str, options: dict[str, Any], message: str) -> None:
    if options:
        from transformers import LlamaForCausalLM

        small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        found: Any = LlamaForCausalLM(LlamaConfig(vocab_size=96, **small, **options))  # type: ignore[arg-type]
    else:
        found = ARCHITECTURES[architecture].build(torch.float32)
        found.set_attn_implementation("sdpa")
    with pytest.raises(UserError, match=message):
        Decoder(found)


@pytest.mark.filterwarnings("ignore")  # transformers' own
def test_models_whose_caches_cannot_be_shared_are_refused() -> None:
    reasons = {
        "gpt2": "GPT2LMHeadModel has no rotary",
        "llama4": "Llama4ForCausalLM has chunked_attention layers",
        "qwen3_next": "Qwen3NextForCausalLM has linear_attention layers",
        "blt": "BltForCausalLM has nested layers",
        "moshi": "MoshiForCausalLM has a sliding window that transformers' masks do not know",
        "gemma4_text": "Gemma4ForCausalLM does not cache the same keys in each layer",
    }
    for name, reason in reasons.items():
        with pytest.raises(UserError, match=reason):
            Decoder(decoders.build(decoders.tiny(name), "sdpa"))
    config = decoders.tiny("gemma2")
    config.sliding_window = None  # transformers itself cannot build a mask then
    with pytest.raises(UserError, match="Gemma2ForCausalLM cannot be run on a plain cache"):
        Decoder(decoders.build(config, "eager"))


def test_the_mask_is_for_the_attention_that_the_model_has_now(model: PreTrainedModel) -> None:
    """Scattered tokens behind a filled cache, after the implementation was changed under the decoder."""
    before, found = model.config._attn_implementation, []
    slots, ids = torch.tensor([2, 5, 7]), torch.arange(8)[None]
    try:
        model.set_attn_implementation(grouped.register())
        decoder = Decoder(model)
        for name in (grouped.NAME, "sdpa", "eager"):
            model.set_attn_implementation(name)
            buffer = decoder.buffer(8)
            decoder.forward(ids, buffer, range(8))
            found.append(decoder.forward(ids[:, slots], buffer, slots))
    finally:
        model.set_attn_implementation(before)
    for logits_ in found[1:]:
        torch.testing.assert_close(logits_, found[0])


def test_attention_that_takes_no_mask_is_refused() -> None:
    with pytest.raises(UserError, match="attn_implementation=anchor.*sdpa or eager"):
        Decoder(ARCHITECTURES["llama"].build(torch.float32))

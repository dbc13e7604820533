"""A session: agents that run one checkpoint, who hears whom, and one arm; and the requests that go through it.

Several requests may be open at once: each has its own state, and only what an arm learns from them belongs to the
session. A session is for one thread.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from anchorctx.errors import UserError
from anchorctx.flops import ModelFlops
from anchorctx.kvcomm.agents import Agent, Answer, Frame, Ids, Messages, Prompt, check_agents, check_placeholders
from anchorctx.kvcomm.arms.basic import Arm, FixedPrefix
from anchorctx.kvcomm.arms.names import make_arm
from anchorctx.kvcomm.chat import end_of_turn, template_of
from anchorctx.kvcomm.decoder import Buffer, Decoder
from anchorctx.kvcomm.request import Prefixes, RequestState, TurnContext, now
from anchorctx.kvcomm.together import alone, together
from anchorctx.kvcomm.topology import TOPOLOGIES, Topology
from anchorctx.kvcomm.turn import Talk, Turn, finished, keep_message, prefill, recite, speak


class Session:
    """See the module."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        agents: Sequence[Agent],
        *,
        arm: str | Arm = "kvcomm",
        topology: str | Topology = "full",
        decision: str | None = None,
        header: str = "",
        decoder: Decoder | None = None,
    ) -> None:
        """All agents run `model`.

        Args:
            model: a RoPE decoder of transformers; refused by name if its keys cannot be moved.
            tokenizer: its tokenizer.
            agents: in any order.
            arm: how KV is reused: a name, or an object with its own settings (one session's only).
            topology: a name, or who hears whom.
            decision: an agent that is always dense; judges suffer most from reuse (arXiv 2601.08343).
            header: fixed text between BOS and a request's text where its base KV is computed, such as a role's.
            decoder: the model's `Decoder`, where several sessions share one.
        """
        check_agents(agents)
        self.agents = {agent.name: agent for agent in agents}
        self.topology = _topology(topology, list(self.agents))
        self.arm = make_arm(arm) if isinstance(arm, str) else arm
        self.tokenizer, self.decoder = tokenizer, decoder or Decoder(model)
        if decision is not None and decision not in self.agents:
            raise UserError(f"decision={decision!r} is no agent: choose {', '.join(self.agents)}")
        self.decision = decision
        self.templates = {agent.name: template_of(agent, tokenizer) for agent in agents}
        self.flops = ModelFlops.of(model)
        self.ends = _end_tokens(model, tokenizer, agents)
        self.frames = {name: self.frame(name) for name in self.templates}
        # The base KV of a text is computed behind the token that all prompts begin with, since it takes the attention
        # that looks for nothing (a sink): BOS, or what the chat template begins with, <|im_start|> in ChatML.
        self.prefixes = Prefixes(self.decoder, _first_token(self.frames), self.encode(header))
        self._dense, self._numbers = FixedPrefix(), itertools.count()

    def frame(self, name: str, names: Mapping[str, str] | None = None) -> Frame:
        """An agent's template in tokens; `names` exchange its placeholders, as in `Template.reordered`."""
        template, tokenizer = self.templates[name].reordered(names or {}), self.tokenizer
        bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if template.bos and not isinstance(bos, int):
            raise UserError("the tokenizer has neither a BOS nor an EOS token to begin prompts with: set its bos_token")
        return Frame(name, template, self.encode, bos)  # type: ignore[arg-type]

    def encode(self, text: str) -> Ids:
        """Tokens of a prompt's fixed text; the names of special tokens in it are these tokens."""
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else ()  # type: ignore

    def encode_content(self, text: str) -> Ids:
        """Tokens of a request's text or of a message, where `<|im_end|>` are letters: contents give no orders."""
        options = {"add_special_tokens": False, "split_special_tokens": True}
        return tuple(self.tokenizer(text, **options)["input_ids"]) if text else ()  # type: ignore

    def decode(self, ids: Sequence[int]) -> str:
        """Text of some tokens."""
        return str(self.tokenizer.decode(list(ids)))

    def prepare(self) -> float:
        """Encode the fixed texts now rather than when they are first needed; returns the seconds it took."""
        began = now(self.decoder.device)
        for frame in self.frames.values():
            self.prefixes.glue(frame)
        return now(self.decoder.device) - began

    def start(self, texts: Mapping[str, str | Sequence[int]]) -> Request:
        """Open a request with its texts (or their tokens) by placeholder."""
        contents = self._contents(texts)
        plain = {n: x for n, x in texts.items() if isinstance(x, str)}
        return Request(self, RequestState(next(self._numbers), contents, plain))

    def check(self, texts: Mapping[str, str | Sequence[int]]) -> None:
        """UserError where a request's prompts could grow past the model's length: every answer as long as it may be."""
        self._check(texts, {name: agent.longest_message for name, agent in self.agents.items()})

    def _check(self, texts: Mapping[str, str | Sequence[int]], messages: Mapping[str, int]) -> None:
        """UserError where a request's prompts are too long with messages of so many tokens."""
        lengths = {name: len(ids) for name, ids in self._contents(texts).items()} | dict(messages)
        for name, frame in self.frames.items():
            self.check_length(name, frame.length(lengths), self.agents[name].max_new_tokens)

    def _contents(self, texts: Mapping[str, str | Sequence[int]]) -> dict[str, Ids]:
        """A request's texts in tokens, by placeholder; UserError where they are none, or not those of the prompts."""
        if not isinstance(texts, Mapping):
            raise UserError(f"the request is {str(texts)[:60]}: give it as a dictionary, a text for each placeholder")
        for name, template in self.templates.items():
            check_placeholders(self.agents[name], template, texts.keys(), self.topology.inputs[name])
        clash = sorted(set(texts) & set(self.agents))
        if clash:
            raise UserError(f"the request's text {clash[0]!r} has an agent's name: rename one")
        return {name: self.given(text, f"the request's text {name!r}") for name, text in texts.items()}

    def given(self, text: str | Sequence[int], what: str) -> Ids:
        """The tokens of a text, or given ones; UserError where it is neither, or the model does not know them."""
        try:
            ids = self.encode_content(text) if isinstance(text, str) else tuple(map(operator.index, text))
        except TypeError:
            raise UserError(f"{what} is {str(text)[:60]}: give text, or token ids, which are whole numbers") from None
        known = self.decoder.vocabulary
        if unknown := next((i for i in ids if not 0 <= i < known), None):
            raise UserError(
                f"{what} has the token id {unknown}, but the model knows 0 to {known - 1}: take the tokenizer that "
                "belongs to the model"
            )
        return ids

    def check_length(self, name: str, length: int, room: int) -> None:
        """UserError where an agent's prompt and answer are longer than the model reaches."""
        if length + room > self.decoder.reach:
            raise UserError(
                f"agent {name!r} has a prompt of {length} tokens and {room} to say, but the model reaches "
                f"{self.decoder.reach}: shorten the texts, lower max_new_tokens, or raise the model's length"
            )

    def ask(self, texts: Mapping[str, str | Sequence[int]]) -> dict[str, Turn]:
        """Run a request through all agents; each one's turn, in order."""
        return alone(self.decoder, self.talk(texts))

    def ask_all(self, several: Sequence[Mapping[str, str | Sequence[int]]], at_once: int = 8) -> list[dict[str, Turn]]:
        """`ask` for several requests, `at_once` of them beside each other: a forward has a token of each.

        An arm learns from them in the order in which they come to it, so that one request does not know what another
        that is under way is about to teach it. Each takes memory for its prompt's keys and values, twice. What is wrong
        with any request's texts is said before the first one is answered.
        """
        if at_once < 1:
            raise UserError(f"at_once={at_once} must be at least 1: 1 answers one request after the other")
        for number, texts in enumerate(several, 1):
            try:
                self._check(texts, dict.fromkeys(self.agents, 0))
            except UserError as error:
                raise UserError(f"request {number} of {len(several)}: {error}") from None
        talks = {i: self.talk(texts) for i, texts in enumerate(several)}
        return list(together(self.decoder, talks, at_once).values())

    def talk(self, texts: Mapping[str, str | Sequence[int]]) -> Talk[dict[str, Turn]]:
        """`ask`, to be run by `kvcomm.together` beside other talks of the same model."""
        request, turns = self.start(texts), {}
        for name in self.topology.order:
            turns[name] = yield from request.turn(name)
        return turns

    def arm_of(self, agent: str) -> Arm:
        """The session's arm; dense, its fixed beginning apart, for the decision agent."""
        return self._dense if agent == self.decision else self.arm


class Request:
    """One open request."""

    def __init__(self, session: Session, state: RequestState) -> None:
        self.session, self.state = session, state
        self.answers: dict[str, Answer] = {}

    def run(
        self,
        name: str,
        *,
        answer: Ids | None = None,
        message: Ids | None = None,
        frame: Frame | None = None,
        keep: bool = True,
    ) -> Turn:
        """Let an agent speak, after all that it hears; see `turn`."""
        return alone(self.session.decoder, self.turn(name, answer=answer, message=message, frame=frame, keep=keep))

    def turn(
        self,
        name: str,
        *,
        answer: Ids | None = None,
        message: Ids | None = None,
        frame: Frame | None = None,
        keep: bool = True,
    ) -> Talk[Turn]:
        """An agent's turn, after all that it hears.

        Args:
            name: the agent.
            answer: tokens that it is made to say, so that arms can be compared on the same words; None lets it speak.
            message: tokens that it is made to pass on; None passes on what it says.
            frame: another order of its placeholders.
            keep: keep the message for others, and let the arm learn; False leaves no trace in the arm.
        """
        session = self.session
        agent, decoder = session.agents[name], session.decoder
        answer = None if answer is None else session.given(answer, f"the answer of agent {name!r}")
        message = None if message is None else session.given(message, f"the message of agent {name!r}")
        # A given message that goes on from a given answer is what the agent says in all.
        rest = message[len(answer) :] if answer and message and message[: len(answer)] == answer else ()
        room = agent.max_new_tokens if answer is None else len(answer) + len(rest)
        prompt = self._prompt(name, frame, room)
        context = TurnContext(decoder, prompt, frame or session.frames[name], self.state, session.prefixes, keep)
        arm = session.arm_of(name)
        found = prefill(context, arm, room)
        confidence = float(found.logits.float().softmax(-1).max())
        if answer is None:
            stop = None if agent.stop is None else lambda ids: agent.stop(session.decode(ids))  # type: ignore
            ids, filled = yield from speak(found.buffer, prompt.length, found.logits, room, session.ends, stop)
            logits = found.logits[None]
        else:
            ids, filled = answer, len(answer)
            logits = recite(decoder, found.buffer, prompt.length, found.logits, ids)
            if rest and session.arm.shares:  # decoding, like the answer: no part of the time to first token
                at = range(prompt.length + filled, prompt.length + filled + len(rest))
                decoder.forward(decoder.tensor(rest), found.buffer, at, keep=0)
                filled += len(rest)
        said = Answer(session.decode(ids), confidence)
        text = None  # of the message, where it is not only tokens
        if message is None and agent.speak is not None:
            text = agent.speak(said, self._texts(prompt))
            message = session.encode_content(text)
        elif message is None:
            text, message = said.text, ids
        began = now(decoder.device)
        if keep:  # the arm learns first: the message that follows may move the buffer to a larger one
            arm.observe(context, found.buffer, found.given)
            arm.hear(context, found.buffer, ids, logits)
            self.answers[name] = said
            # A message that begins with the answer has the KV of its first tokens in the buffer already.
            self._keep(context, found.buffer, message, text, filled if message[: len(ids)] == ids else 0)
        seconds = found.seconds | {"upkeep": now(decoder.device) - began}
        return finished(session.flops, context, found, seconds, said, ids, message, logits)

    def fork(self) -> Request:
        """A copy of the request as it stands, to try something on: what is computed there is not known here."""
        other = Request(self.session, self.state.fork())
        other.answers = dict(self.answers)
        return other

    def _prompt(self, name: str, frame: Frame | None, room: int) -> Prompt:
        missing = [other for other in self.session.topology.inputs[name] if other not in self.answers]
        if missing:
            raise UserError(f"agent {name!r} hears {missing[0]!r}, who has not spoken yet: run it first")
        prompt = (frame or self.session.frames[name]).prompt(self.state.contents)
        self.session.check_length(name, prompt.length, room)
        return prompt

    def _texts(self, prompt: Prompt) -> dict[str, str]:
        """What stands in a prompt's placeholders as text; only what came as tokens is decoded."""
        names = [segment.name for segment in prompt.placeholders if segment.name is not None]
        known, contents = self.state.texts, self.state.contents
        return {name: known[name] if name in known else self.session.decode(contents[name]) for name in names}

    def _keep(self, context: TurnContext, buffer: Buffer, message: Ids, text: str | None, filled: int) -> None:
        """Make a message known to those who hear it; its first `filled` tokens have their KV in the buffer."""
        session, name = self.session, context.prompt.agent
        if context.prompt.length + len(message) > session.decoder.reach:
            raise UserError(
                f"agent {name!r} has a prompt of {context.prompt.length} tokens and a message of {len(message)}, but "
                f"the model reaches {session.decoder.reach}: shorten what it passes on"
            )
        self.state.contents[name] = message
        self.state.texts.pop(name, None)  # of what the agent said before, where it speaks a second time
        if text is not None:
            self.state.texts[name] = text
        known = self.state.distances
        # Distances are of the agent's former message; those of other contents stay.
        self.state.distances = {key: distance for key, distance in known.items() if key[0] != name}
        heard = any(name in inputs for inputs in session.topology.inputs.values())
        if session.arm.shares and heard:
            self.state.shared[name] = keep_message(context, buffer, message, filled)


def _topology(topology: str | Topology, names: list[str]) -> Topology:
    if isinstance(topology, str):
        if topology not in TOPOLOGIES:
            raise UserError(f"unknown topology {topology!r}: choose {', '.join(TOPOLOGIES)}")
        topology = TOPOLOGIES[topology](names)
    unlike = set(names) ^ set(topology.order)
    if unlike:
        raise UserError(
            f"the topology has the agents {', '.join(topology.order)}, but the session has {', '.join(names)}: "
            "give both the same names"
        )
    return topology


def _first_token(frames: Mapping[str, Frame]) -> int:
    """The one that all agents' prompts begin with."""
    (name, frame), *others = frames.items()
    for other, another in others:
        if another.first != frame.first:
            raise UserError(
                f"the prompts of agents {name!r} and {other!r} begin with different tokens ({frame.first} and "
                f"{another.first}), so that no text's cache can stand in both: give all agents messages, or none"
            )
    return frame.first


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, agents: Sequence[Agent]) -> frozenset[int]:
    """Tokens that end an answer: the model's, the tokenizer's, and what ends a turn where agents have messages."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    several = [*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id]
    if any(isinstance(agent.template, Messages) for agent in agents):
        several.append(end_of_turn(tokenizer))
    return frozenset(e for e in several if isinstance(e, int))

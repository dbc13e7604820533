"""A session: agents that run one checkpoint, who hears whom, and one arm; and the requests that go through it.

Several requests may be open at once: each has its own state, and only what an arm learns from them is the session's.
A session is for one thread.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from anchorctx.errors import UserError
from anchorctx.flops import ModelFlops
from anchorctx.kvcomm.agents import Agent, Answer, Template, check_agents, check_placeholders
from anchorctx.kvcomm.arms.basic import Arm, Dense
from anchorctx.kvcomm.arms.registry import make_arm
from anchorctx.kvcomm.decoder import Buffer, Decoder
from anchorctx.kvcomm.prompts import Frame, Ids, Prompt
from anchorctx.kvcomm.request import Prefixes, RequestState, Scene, now
from anchorctx.kvcomm.topology import TOPOLOGIES, Topology
from anchorctx.kvcomm.turn import Prefill, keep_message, prefill, recite, speak, total


@dataclass(frozen=True, slots=True)
class Turn:
    """What one agent did."""

    agent: str
    prompt: Prompt
    computed: int
    """Prompt tokens that were run with this prompt."""
    hidden: int
    """Tokens that were run beside it: base texts, anchored documents, the message's own KV."""
    reused: tuple[bool, ...]
    """For each non-empty placeholder: did any of its KV come from elsewhere?"""
    flops: float
    """Forward FLOPs of the prefill with all hidden work."""
    dense_flops: float
    """Those of a dense prefill."""
    seconds: dict[str, float]
    """By part; see `engine`."""
    answer: Answer
    ids: Ids
    """The answer's tokens."""
    message: Ids
    """What it passed on, in tokens."""
    logits: torch.Tensor
    """(n, V) that predicted the answer's tokens when it was given; (1, V), the first ones, otherwise."""
    buffer: Buffer
    """The prompt's KV."""

    @property
    def ttft(self) -> float:
        """Seconds to the first token with all hidden work, upkeep too."""
        return total(self.seconds)


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
        self.templates = {agent.name: Template.of(agent.template) for agent in agents}
        self.flops = ModelFlops.of(model)
        self.ends = _end_tokens(model, tokenizer)
        bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if not isinstance(bos, int):
            raise UserError("the tokenizer has neither a BOS nor an EOS token to begin prompts with: set its bos_token")
        self.bos = bos
        self.frames = {n: Frame(n, template, self.encode, bos) for n, template in self.templates.items()}
        self.prefixes = Prefixes(self.decoder, bos, self.encode(header))
        self._dense, self._numbers = Dense(), itertools.count()

    def encode(self, text: str) -> Ids:
        """Tokens of one piece of a prompt, without special ones."""
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else ()  # type: ignore

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
        for name, template in self.templates.items():
            check_placeholders(self.agents[name], template, texts.keys(), self.topology.inputs[name])
        clash = sorted(set(texts) & set(self.agents))
        if clash:
            raise UserError(f"the request's text {clash[0]!r} has an agent's name: rename one")
        contents = {n: self.encode(x) if isinstance(x, str) else tuple(x) for n, x in texts.items()}
        return Request(self, RequestState(next(self._numbers), contents))

    def check(self, texts: Mapping[str, str | Sequence[int]]) -> None:
        """UserError where a request's prompts could grow past the model's length: every answer as long as it may be."""
        contents = dict(self.start(texts).state.contents)
        contents |= {name: (0,) * agent.longest_message for name, agent in self.agents.items()}
        for name, frame in self.frames.items():
            self.check_length(name, frame.prompt(contents).length, self.agents[name].max_new_tokens)

    def check_length(self, name: str, length: int, room: int) -> None:
        """UserError where an agent's prompt and answer are longer than the model reaches."""
        if length + room > self.decoder.reach:
            raise UserError(
                f"agent {name!r} has a prompt of {length} tokens and {room} to say, but the model reaches "
                f"{self.decoder.reach}: shorten the texts, lower max_new_tokens, or raise the model's length"
            )

    def ask(self, texts: Mapping[str, str | Sequence[int]]) -> dict[str, Turn]:
        """Run a request through all agents; each one's turn, in order."""
        request = self.start(texts)
        return {name: request.run(name) for name in self.topology.order}

    def arm_of(self, agent: str) -> Arm:
        """The session's arm; dense for the decision agent."""
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
        """Let an agent speak, after all that it hears.

        Args:
            name: the agent.
            answer: tokens that it is made to say, so that arms can be compared on the same words; None lets it speak.
            message: tokens that it is made to pass on; None passes on what it says.
            frame: another order of its placeholders.
            keep: keep the message for others, and let the arm learn; False leaves no trace in the arm.
        """
        session = self.session
        agent, decoder = session.agents[name], session.decoder
        prompt = self._prompt(name, frame, agent.max_new_tokens if answer is None else len(answer))
        scene = Scene(decoder, prompt, frame or session.frames[name], self.state, session.prefixes, keep)
        arm, room = session.arm_of(name), agent.max_new_tokens if answer is None else len(answer)
        found = prefill(scene, arm, room)
        confidence = float(found.logits.float().softmax(-1).max())
        if answer is None:
            stop = None if agent.stop is None else lambda ids: agent.stop(session.decode(ids))  # type: ignore
            ids, filled = speak(decoder, found.buffer, prompt.length, found.logits, room, session.ends, stop)
            logits = found.logits[None]
        else:
            ids, filled = answer, len(answer)
            logits = recite(decoder, found.buffer, prompt.length, found.logits, ids)
        said = Answer(session.decode(ids), confidence)
        if message is None:
            message = ids if agent.speak is None else session.encode(agent.speak(said, self._texts(prompt)))
        began = now(decoder.device)
        if keep:
            arm.observe(scene, found.buffer, found.given)
            self.answers[name] = said
            self._keep(scene, found.buffer, message, filled if message[: len(ids)] == ids else 0)
        seconds = found.seconds | {"upkeep": now(decoder.device) - began}
        return _turn(session, scene, found, seconds, said, ids, message, logits)

    def fork(self) -> Request:
        """The request as it stands, to try something on: what is worked out there is not known here."""
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
        return {s.name: self.session.decode(s.ids) for s in prompt.placeholders if s.name is not None}

    def _keep(self, scene: Scene, buffer: Buffer, message: Ids, filled: int) -> None:
        """Make a message known to those who hear it; its first `filled` tokens have their KV in the buffer."""
        session, name = self.session, scene.prompt.agent
        if scene.prompt.length + len(message) > session.decoder.reach:
            raise UserError(
                f"agent {name!r} has a prompt of {scene.prompt.length} tokens and a message of {len(message)}, but the "
                f"model reaches {session.decoder.reach}: shorten what it passes on"
            )
        self.state.contents[name] = message
        known = self.state.distances  # of what it said before, where it speaks a second time
        self.state.distances = {key: distance for key, distance in known.items() if key[0] != name}
        heard = any(name in inputs for inputs in session.topology.inputs.values())
        if session.arm.shares and heard:
            self.state.shared[name] = keep_message(scene, buffer, message, filled)


def _turn(
    session: Session,
    scene: Scene,
    found: Prefill,
    seconds: dict[str, float],
    answer: Answer,
    ids: Ids,
    message: Ids,
    logits: torch.Tensor,
) -> Turn:
    tally, length, flops = scene.tally, scene.prompt.length, session.flops
    layers = len(flops.windows)

    def forward(tokens: int, pairs: int) -> float:
        return (flops.per_token * tokens + flops.per_pair * pairs * layers) / 3  # ModelFlops counts the backward too

    return Turn(
        agent=scene.prompt.agent,
        prompt=scene.prompt,
        computed=found.computed,
        hidden=tally.tokens,
        reused=found.reused,
        flops=forward(found.computed + tally.tokens, found.pairs + tally.pairs),
        dense_flops=forward(length, length * (length + 1) // 2),
        seconds=seconds,
        answer=answer,
        ids=ids,
        message=message,
        logits=logits,
        buffer=found.buffer,
    )


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


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end an answer: the model's, and the tokenizer's."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    several = ends if isinstance(ends, list) else [ends]
    return frozenset(e for e in [*several, tokenizer.eos_token_id] if isinstance(e, int))

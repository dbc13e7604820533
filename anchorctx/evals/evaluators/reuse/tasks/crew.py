"""The agents of a task from a YAML file: their names and messages, who hears whom, and who decides.

`agents.yaml` beside this module is the one that comes with the package, and says what such a file may hold.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError

from anchorctx.data.sources.nature import check_regular
from anchorctx.errors import UserError
from anchorctx.evals.evaluators.reuse.tasks.base import named_topology
from anchorctx.kvcomm.agents import Agent, Messages, Slot, Template
from anchorctx.kvcomm.topology import Topology

LONGEST = 2**20
"""Bytes of a file of agents, at most."""
HEARD = "heard"
"""The placeholder for all that an agent hears."""
Name = Annotated[str, Field(pattern=r"^[A-Za-z]\w*$")]


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Member(_Closed):
    name: Name
    system: str = ""
    user: Annotated[str, Field(pattern=r"\S")]
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None


class _Crew(_Closed):
    agents: Annotated[list[_Member], Field(min_length=2)]
    decision: str
    topology: str | dict[str, list[str]] | None = None


class _File(RootModel[dict[str, _Crew]]):
    pass


@dataclass(frozen=True, slots=True)
class Crew:
    """The agents of one task, as a file describes them."""

    source: str
    """Where they come from, for messages."""
    members: tuple[_Member, ...]
    """The decision agent is the last."""
    topology: str | Mapping[str, Sequence[str]] | None
    """None leaves it to the command."""

    @classmethod
    def of(cls, file: str | None, task: str) -> Crew:
        """From a file, or the one of the package.

        Raises:
            UserError: it cannot be read, or describes no agents for this task.
        """
        source = file or "the package's agents.yaml"
        crews = _read(agents_file(file), source)
        if task not in crews:
            raise UserError(
                f"{source} has agents for {', '.join(crews) or 'nothing'}, not for {task}: add {task}, or leave it "
                "out of tasks"
            )
        crew = crews[task]
        source = f"{source}, {task}"
        names = [member.name for member in crew.agents]
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f"{source}: two agents are called {twice[0]!r}: rename one")
        if crew.decision not in names:
            raise UserError(f"{source}: decision={crew.decision!r} is no agent: name one of {', '.join(names)}")
        last = names.index(crew.decision)
        members = (*crew.agents[:last], *crew.agents[last + 1 :], crew.agents[last])
        return cls(source, members, crew.topology)

    @property
    def decision(self) -> str:
        """The name of the agent that decides."""
        return self.members[-1].name

    def of_size(self, count: int) -> Crew:
        """With `count` agents, the decision agent included: the others taken in turn, numbered where they repeat."""
        if count < 2:
            raise UserError(f"agents.count={count} must be at least 2: one that answers, and the decision agent")
        *others, decision = self.members
        taken = []
        # Roles a b and four agents beside the decision agent: a, b, a_2, b_2.
        for number, member in zip(range(count - 1), itertools.cycle(others), strict=False):
            turn = number // len(others) + 1
            taken.append(member if turn == 1 else member.model_copy(update={"name": f"{member.name}_{turn}"}))
        return replace(self, members=(*taken, decision))

    def team(
        self,
        texts: Collection[str],
        topology: str,
        tokens: int,
        chat: bool,
        own: Callable[[int], Mapping[str, str]] = lambda place: {},
    ) -> tuple[tuple[Agent, ...], Topology]:
        """The agents, in the order in which they speak, and who hears whom.

        Args:
            texts: placeholders that every request of the task fills.
            topology: a name, where the file has none.
            tokens: longest answer, where the file has none.
            chat: whether they have messages, or prompts of plain text.
            own: what else stands for a placeholder in the messages of a member, by its place.

        Raises:
            UserError: an unknown name or placeholder, one of the task's that no agent has, or a circle.
        """
        places = {member.name: place for place, member in enumerate(self.members)}
        if taken := [name for name, place in places.items() if name in (*texts, HEARD, *own(place))]:
            raise UserError(f"{self.source}: an agent is called {taken[0]!r}, as a placeholder is: rename it")
        graph = self._graph(self.topology or topology)
        agents = []
        for name in graph.order:
            place = places[name.partition("@")[0]]  # solver@2 is solver's second turn in a debate
            member = self.members[place]
            messages = self._messages(member, graph.inputs[name], texts, own(place))
            longest = member.max_new_tokens or tokens
            agents.append(Agent(name, messages if chat else messages.plain(), longest))
        self._check_known([*([text] for text in texts), {name for place in places.values() for name in own(place)}])
        return tuple(agents), graph

    def _check_known(self, wanted: Sequence[Collection[str]]) -> None:
        """UserError where no agent has any placeholder of one of these groups: the task cannot be done without."""
        said = [text for member in self.members for text in (member.system, member.user)]
        used = {name for text in said for name in Template.parse(text).placeholders}
        for names in wanted:
            if names and not used.intersection(names):
                missing = " or ".join(f"{{{name}}}" for name in sorted(names))
                raise UserError(
                    f"{self.source}: no agent has {missing}, so that nobody knows what the task is about: put it into "
                    "a message"
                )

    def _graph(self, topology: str | Mapping[str, Sequence[str]]) -> Topology:
        names = [member.name for member in self.members]
        try:
            if isinstance(topology, str):
                return named_topology(topology, names[:-1], self.decision)
            if unknown := sorted(set(topology) - set(names)):
                raise UserError(f"topology has {unknown[0]!r}, who is no agent: the agents are {', '.join(names)}")
            graph = Topology.of({name: topology.get(name, ()) for name in names})
        except UserError as error:
            raise UserError(f"{self.source}: {error}") from None
        if self.decision not in graph.last:
            reader = next(name for name in graph.order if self.decision in graph.inputs[name])
            raise UserError(
                f"{self.source}: {reader!r} hears {self.decision!r}, whose answer is the last word: decide by another "
                "agent, or remove that connection"
            )
        return graph

    def _messages(
        self, member: _Member, heard: Sequence[str], texts: Collection[str], own: Mapping[str, str]
    ) -> Messages:
        """A member's messages with {heard} and its own written out; UserError for a placeholder that nothing fills."""
        said = "".join(
            f"{other.replace('@', ' in round ')} wrote:\n{{{other}}} (end of what {other.partition('@')[0]} wrote)\n\n"
            for other in heard
        )
        stands, found = {HEARD: said, **own}, {}
        for role in ("system", "user"):
            try:
                parts = Template.parse(getattr(member, role).strip()).parts
            except UserError as error:
                raise UserError(f"{self.source}, {role} of {member.name}: {error}") from None
            names, known = [part.name for part in parts if isinstance(part, Slot)], [*texts, *heard, *stands]
            if unknown := [name for name in names if name not in known]:
                raise UserError(
                    f"{self.source}: the {role} message of {member.name!r} has the placeholder {{{unknown[0]}}}, but "
                    f"the task and the topology give it {', '.join(known)}: correct the name, or connect the agents"
                )
            found[role] = "".join(_written(part, stands) for part in parts).strip()
        return Messages(**found)


def _written(part: Any, stands: Mapping[str, str]) -> str:
    """A template's part as it is written: text with its braces doubled, a placeholder, or what stands for it."""
    if isinstance(part, Slot):
        return stands.get(part.name, f"{{{part.name}}}")
    return part.replace("{", "{{").replace("}", "}}")


def agents_file(file: str | None) -> bytes:
    """The content of a file of agents, or of the package's; UserError where it cannot be read."""
    if file is None:
        return (resources.files("anchorctx.evals.evaluators.reuse.tasks") / "agents.yaml").read_bytes()
    path = Path(file).expanduser()
    check_regular(path, f"agents.file={file}")
    try:
        with path.open("rb") as opened:
            content = opened.read(LONGEST + 1)
    except OSError as error:
        raise UserError(
            f"agents.file={file} cannot be read ({error.strerror or error}): name a YAML file with agents, or leave it "
            "out for the package's"
        ) from None
    if len(content) > LONGEST:
        raise UserError(f"agents.file={file} has more than {LONGEST:,} bytes: name a YAML file with agents")
    return content


def _read(content: bytes, source: str) -> dict[str, _Crew]:
    try:
        value = yaml.load(content.decode("utf-8"), _Loader)
        return _File.model_validate(value).root
    except ValidationError as error:
        raise UserError(f"{source}: {_first(error)}") from None
    except UserError as error:  # the loader's
        raise UserError(f"{source}: {error}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{source} is not YAML in UTF-8 ({' '.join(str(error).split())}): correct it") from None


def _first(error: ValidationError) -> str:
    """The first mistake that pydantic found, in a sentence."""
    wrong = error.errors(include_url=False)[0]
    # ("gsm8k", "agents", 1, "sytem") -> gsm8k.agents[1].sytem
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in wrong["loc"]).strip(".")
    owner = _Member if "agents" in wrong["loc"][:-1] else _Crew
    if wrong["type"] == "extra_forbidden":
        return f"unknown key {place}: the keys beside it are {', '.join(owner.model_fields)}"
    if wrong["type"] == "missing":
        return f"{place} is missing: add it"
    if wrong["type"] == "string_pattern_mismatch" and wrong["loc"][-1] == "user":
        return f"{place} is empty: write what the agent is asked"
    if wrong["type"] == "string_pattern_mismatch":
        return f"{place}={wrong['input']!r} is no name: use letters, digits and _, a letter first"
    shown = repr(wrong["input"])
    if "topology" in wrong["loc"]:
        return f"{place.partition('.topology')[0]}.topology is {shown[:60]}: give a name, or {{agent: [whom it hears]}}"
    if wrong["type"] in ("model_type", "model_attributes_type"):
        remedy = f"give it the keys {', '.join(owner.model_fields)}"
    else:
        remedy = REMEDIES.get(wrong["type"], "correct it")
    return f"{place or 'the file'}={shown if len(shown) < 60 else shown[:57] + '...'} is wrong: {remedy}"


REMEDIES = {
    "string_type": "give it as text, in quotes where need be",
    "int_type": "give a whole number",
    "greater_than_equal": "give at least 1",
    "list_type": "give a list",
    "too_short": "give two agents at least, one that answers and one that decides",
    "dict_type": "give a key for each task, such as gsm8k",
}
"""What helps against the mistakes that pydantic finds, by its names for them."""


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, of which YAML's own loader takes the last, and what is no name."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """The mapping of a node; UserError with the line of a key that is refused."""
        seen = set[str]()
        for key_node, _ in node.value:
            line = f"(line {key_node.start_mark.line + 1})"
            if key_node.tag == "tag:yaml.org,2002:merge":
                raise UserError(f"the merge key << {line} is not read here: write its keys out")
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise UserError(f"the key {str(key)[:60]} {line} is no text: put it in quotes")
            if key in seen:
                raise UserError(f"the key {key!r} stands twice {line}: remove one")
            seen.add(key)
        return super().construct_mapping(node, deep)

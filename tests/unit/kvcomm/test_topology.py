from __future__ import annotations

import pytest

from anchorctx.errors import UserError
from anchorctx.kvcomm.topology import TOPOLOGIES, Topology, debate, layered, random

NAMES = ["a", "b", "c", "d", "e"]


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("chain", {"a": "", "b": "a", "c": "b", "d": "c", "e": "d"}),
        ("star", {"a": "", "b": "a", "c": "a", "d": "a", "e": "a"}),
        ("full", {"a": "", "b": "a", "c": "ab", "d": "abc", "e": "abcd"}),
        ("mesh", {"a": "", "b": "a", "c": "b", "d": "a", "e": "bd"}),
        ("layered", {"a": "", "b": "", "c": "ab", "d": "ab", "e": "cd"}),
    ],
)
def test_named_graphs(name: str, inputs: dict[str, str]) -> None:
    found = TOPOLOGIES[name](NAMES)
    assert {n: "".join(found.inputs[n]) for n in NAMES} == inputs


def test_debate_reads_the_round_before() -> None:
    found = debate(["a", "b"], 2)
    assert found.order == ("a@1", "b@1", "a@2", "b@2") and found.inputs["b@2"] == ("a@1", "b@1")
    assert found.last == ("a@2", "b@2")
    assert found.with_decision("d", hears=found.last).inputs["d"] == ("a@2", "b@2")


def test_random_is_seeded() -> None:
    assert random(NAMES, seed=1) == random(NAMES, seed=1) != random(NAMES, seed=2)
    assert random(NAMES, 1.0).inputs == TOPOLOGIES["full"](NAMES).inputs
    assert not any(random(NAMES, 0.0).inputs.values())


@pytest.mark.parametrize("name", list(TOPOLOGIES))
@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_every_agent_hears_only_earlier_ones(name: str, count: int) -> None:
    found = TOPOLOGIES[name]([f"n{i}" for i in range(count)])
    place = {agent: i for i, agent in enumerate(found.order)}
    assert all(place[other] < place[agent] for agent, heard in found.inputs.items() for other in heard)


def test_order_follows_the_inputs_wherever_they_are_given() -> None:
    assert Topology.of({"c": ["b"], "b": ["a"], "a": []}).order == ("a", "b", "c")


def test_cycles_and_strangers_are_refused() -> None:
    with pytest.raises(UserError, match="cycle a -> c -> b -> a"):
        Topology.of({"a": ["c"], "b": ["a"], "c": ["b"], "d": ["a"]})
    with pytest.raises(UserError, match="hears 'x', who is no agent: the agents are a"):
        Topology.of({"a": ["x"]})
    with pytest.raises(UserError, match="width 0"):
        layered(NAMES, 0)
    with pytest.raises(UserError, match="0 rounds"):
        debate(NAMES, 0)

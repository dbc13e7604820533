"""Who hears whom: a directed graph without cycles over the agents, in the order in which they speak."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from anchorctx.errors import UserError


@dataclass(frozen=True, slots=True)
class Topology:
    """An order to speak in, and each agent's inputs, which come earlier in it."""

    order: tuple[str, ...]
    inputs: Mapping[str, tuple[str, ...]]
    """For each agent those whose messages it reads, in the order in which they spoke."""

    @classmethod
    def of(cls, inputs: Mapping[str, Sequence[str]]) -> Topology:
        """From each agent's inputs, in any order; UserError for an unknown agent or a cycle, which it spells out."""
        for name, heard in inputs.items():
            unknown = [other for other in heard if other not in inputs]
            if unknown:
                known = ", ".join(inputs)
                raise UserError(f"agent {name!r} hears {unknown[0]!r}, who is no agent: the agents are {known}")
        order: list[str] = []
        path: list[str] = []

        # Depth first: an agent comes after all that it hears, and meeting one that is still on the path closes a cycle.
        def visit(name: str) -> None:
            if name in path:
                cycle = " -> ".join([*path[path.index(name) :], name])
                raise UserError(f"the topology has the cycle {cycle}: remove one of its connections")
            if name in order:
                return
            path.append(name)
            for other in inputs[name]:
                visit(other)
            order.append(path.pop())

        for name in inputs:
            visit(name)
        place = {name: i for i, name in enumerate(order)}
        return cls(tuple(order), {name: tuple(sorted(inputs[name], key=place.__getitem__)) for name in order})

    @property
    def last(self) -> tuple[str, ...]:
        """The agents that no other agent hears."""
        heard = {other for inputs in self.inputs.values() for other in inputs}
        return tuple(name for name in self.order if name not in heard)

    def with_decision(self, name: str, *, hears: Sequence[str] | None = None) -> Topology:
        """With one more agent at the end, which hears all others unless `hears` says whom."""
        return Topology.of({**self.inputs, name: self.order if hears is None else hears})


def chain(names: Sequence[str]) -> Topology:
    """Each hears the one before."""
    return _from(names, lambda i: [i - 1])


def star(names: Sequence[str]) -> Topology:
    """The first is the hub: all others hear it alone."""
    return _from(names, lambda i: [0])


def full(names: Sequence[str]) -> Topology:
    """Fully connected: each hears all before it."""
    return _from(names, lambda i: list(range(i)))


def mesh(names: Sequence[str]) -> Topology:
    """A square grid, row by row: each hears its left and its upper neighbour."""
    # 5 agents, width 3: rows (0 1 2) and (3 4); agent 4 hears 1 (above) and 3 (to its left).
    width = math.isqrt(max(len(names) - 1, 0)) + 1
    return _from(names, lambda i: [*([i - width] if i >= width else []), *([i - 1] if i % width else [])])


def layered(names: Sequence[str], width: int = 2) -> Topology:
    """Layers of `width` agents: each hears the whole layer before its own."""
    if width < 1:
        raise UserError(f"a layered topology of width {width} has no agents in a layer: give a width of at least 1")
    # Width 2: agents 4 and 5 hear 2 and 3. In the first layer the range is negative, which `_from` leaves out.
    return _from(names, lambda i: list(range((i // width - 1) * width, i // width * width)))


def debate(names: Sequence[str], rounds: int = 2) -> Topology:
    """All speak in every round and hear what all said in the round before; round r of agent a is called `a@r`."""
    if rounds < 1:
        raise UserError(f"a debate of {rounds} rounds says nothing: give at least 1")
    inputs = {
        turn(name, number): [turn(other, number - 1) for other in names] if number > 1 else []
        for number in range(1, rounds + 1)
        for name in names
    }
    return Topology.of(inputs)


def turn(name: str, number: int) -> str:
    """An agent's name in one round of a debate."""
    return f"{name}@{number}"


def random(names: Sequence[str], probability: float = 0.5, seed: int = 0) -> Topology:
    """Each hears each earlier one with a probability; the same seed gives the same graph."""
    draws = np.random.default_rng(seed).random((len(names), len(names)))
    return _from(names, lambda i: [j for j in range(i) if draws[i, j] < probability])


def _from(names: Sequence[str], heard: Callable[[int], list[int]]) -> Topology:
    return Topology.of({name: [names[j] for j in heard(i) if 0 <= j < i] for i, name in enumerate(names)})


TOPOLOGIES: dict[str, Callable[[Sequence[str]], Topology]] = {
    "chain": chain,
    "star": star,
    "mesh": mesh,
    "layered": layered,
    "full": full,
    "debate": debate,
    "random": random,
}
"""Those that a configuration names; call the functions for other widths, rounds or probabilities."""

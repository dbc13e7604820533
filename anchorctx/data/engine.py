"""Where the stages of a preparation run: in this process, or on the workers of a Ray cluster.

A stage is a function of one item (a part to tokenise, a shard to write) that leaves its result in a folder all workers
see. What it makes depends on nothing but its arguments, so that the engine, the number of workers and a worker that
died change nothing in the packed set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Any, Protocol, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class EngineName(StrEnum):
    """Where to run."""

    local = "local"
    """In this process, and in the tokenizer's threads or processes."""
    ray = "ray"
    """On a Ray cluster: RAY_ADDRESS names one, else one is started on this machine."""


class Engine(Protocol):
    """Runs a stage."""

    is_local: bool
    """Does it run in this process?"""

    def map(
        self, function: Callable[[Any, Item], Result], context: Any, items: Iterable[Item]
    ) -> Iterator[tuple[Item, Result]]:
        """Yield each item and `function(context, item)`, in order; items are taken as there is room for them."""
        ...


class LocalEngine:
    """One after the other, here."""

    is_local = True

    def map(
        self, function: Callable[[Any, Item], Result], context: Any, items: Iterable[Item]
    ) -> Iterator[tuple[Item, Result]]:
        """Run each item when its result is asked for."""
        for item in items:
            yield item, function(context, item)


@contextmanager
def open_engine(name: EngineName, workers: int | None) -> Iterator[Engine]:
    """The engine, for as long as the context lasts; `workers` is for Ray: how many at once, None as many as fit."""
    if name is EngineName.local:
        yield LocalEngine()
        return
    from anchorctx.data.ray_engine import open_ray

    with open_ray(workers) as engine:
        yield engine

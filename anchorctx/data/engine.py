"""Where the stages of a preparation run: in this process, or on the workers of a Ray cluster.

A stage is a function of one item (a part to tokenise, a shard to write) that leaves its result in a folder that all
workers see. What it makes depends on its arguments alone, so that neither the engine nor the number of workers nor a
worker that died changes the packed set.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Any, Protocol, TypeVar

from anchorctx.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

RETRIES = 5
"""How often an item is tried again whose Ray worker died, before the preparation gives up."""


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


class RayEngine:
    """On a Ray cluster: each worker has one item that it works on and one that waits.

    A worker that dies is replaced and its item done again; the result is the same.
    """

    is_local = False

    def __init__(self, ray: Any, workers: int) -> None:
        self._ray, self._at_once = ray, 2 * workers

    def map(
        self, function: Callable[[Any, Item], Result], context: Any, items: Iterable[Item]
    ) -> Iterator[tuple[Item, Result]]:
        """Yield each item and its result, in order."""
        remote = self._ray.remote(num_cpus=1, max_retries=RETRIES)(function)
        shared = self._ray.put(context)  # sent to each machine once, not with every item
        waiting: deque[tuple[Item, Any]] = deque()
        try:
            for item in items:
                waiting.append((item, remote.remote(shared, item)))
                if len(waiting) >= self._at_once:
                    yield self._next(waiting)
            while waiting:
                yield self._next(waiting)
        finally:
            for _, reference in waiting:  # after an error, or when the caller stopped asking
                self._ray.cancel(reference, force=True)

    def _next(self, waiting: deque[tuple[Item, Any]]) -> tuple[Item, Any]:
        item, reference = waiting.popleft()
        try:
            return item, self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise UserError(str(error.cause)) from error
            if isinstance(error.cause, OSError):  # a full disk, for which the preparation has a sentence
                raise error.cause from error
            raise
        except self._ray.exceptions.WorkerCrashedError as error:
            raise UserError(
                f"a Ray worker died {RETRIES + 1} times over the same work, most often for lack of memory: "
                "give workers more of it, or set workers lower"
            ) from error


@contextmanager
def open_engine(name: EngineName, workers: int | None) -> Iterator[Engine]:
    """The engine, as a context; `workers` is for Ray: how many run at once, None for as many as the cluster has."""
    if name is EngineName.local:
        yield LocalEngine()
        return
    with _open_ray(workers) as engine:
        yield engine


@contextmanager
def _open_ray(workers: int | None) -> Iterator[RayEngine]:
    """Join the cluster that RAY_ADDRESS names, or start one here with `workers` workers; leave it at the end."""
    try:
        import ray
    except ImportError:
        raise UserError("engine=ray needs Ray: pip install 'anchorctx[ray]'") from None
    started = not ray.is_initialized()
    if started:
        options: dict[str, Any] = {"log_to_driver": False, "include_dashboard": False, "configure_logging": False}
        if "RAY_ADDRESS" not in os.environ:  # a running cluster has the workers that it has
            options["num_cpus"] = workers
        try:
            ray.init(**options)
        except ConnectionError as error:
            address = os.environ.get("RAY_ADDRESS")
            raise UserError(
                f"RAY_ADDRESS={address} cannot be reached ({error}): start the cluster, or unset it"
            ) from error
    try:
        yield RayEngine(ray, workers or max(int(ray.cluster_resources().get("CPU", 1)), 1))
    finally:
        if started:
            ray.shutdown()

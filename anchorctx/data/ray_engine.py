"""The stages on a Ray cluster. A worker that dies is replaced and its item done again; the result is the same."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from anchorctx.data.engine import Item, Result
from anchorctx.errors import UserError

RETRIES = 5
"""Times that an item is done again because its worker died, before the preparation gives up."""


class RayEngine:
    """As many items at once as there are workers, and one more each that waits."""

    is_local = False

    def __init__(self, ray: Any, workers: int) -> None:
        self._ray, self._at_once = ray, 2 * workers

    def map(
        self, function: Callable[[Any, Item], Result], context: Any, items: Iterable[Item]
    ) -> Iterator[tuple[Item, Result]]:
        """Yield each item and its result, in order."""
        remote = self._ray.remote(num_cpus=1, max_retries=RETRIES)(function)
        shared = self._ray.put(context)
        waiting: deque[tuple[Item, Any]] = deque()
        try:
            for item in items:
                waiting.append((item, remote.remote(shared, item)))
                if len(waiting) >= self._at_once:
                    yield self._next(waiting)
            while waiting:
                yield self._next(waiting)
        finally:
            for _, reference in waiting:
                self._ray.cancel(reference, force=True)

    def _next(self, waiting: deque[tuple[Item, Any]]) -> tuple[Item, Any]:
        item, reference = waiting.popleft()
        try:
            return item, self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise UserError(str(error.cause)) from error
            raise
        except self._ray.exceptions.WorkerCrashedError as error:
            raise UserError(
                f"a Ray worker died {RETRIES + 1} times over the same work, most often for lack of memory: "
                "give workers more of it, or set workers lower"
            ) from error


@contextmanager
def open_ray(workers: int | None) -> Iterator[RayEngine]:
    """Join the cluster that RAY_ADDRESS names, or start one here with `workers` workers; leave it at the end."""
    import os

    try:
        import ray
    except ImportError:
        raise UserError("engine=ray needs Ray: pip install 'anchorctx[ray]'") from None
    started = not ray.is_initialized()
    if started:
        options: dict[str, Any] = {"log_to_driver": False, "include_dashboard": False, "configure_logging": False}
        if "RAY_ADDRESS" not in os.environ:
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

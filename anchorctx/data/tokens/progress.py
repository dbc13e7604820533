"""The bar of the first stage: what was read, and how fast it becomes tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from tqdm import tqdm

from anchorctx.data.sources.documents import Reading
from anchorctx.data.sources.source import Source
from anchorctx.data.tokens.ingest import Ingest

Done = TypeVar("Done")


class ReadingBar:
    """Bytes read where this process reads, else parts done; a context manager."""

    def __init__(self, sources: Sequence[Source], parts: int) -> None:
        sizes = [source.total_bytes for source in sources]
        total = None if None in sizes else sum(size or 0 for size in sizes)
        self._bar: Any = tqdm(total=total, unit="B", unit_scale=True, desc="tokenise", mininterval=0.5)
        self._parts, self._is_running = parts, False
        self._documents = self._tokens = self._before = 0

    def __enter__(self) -> ReadingBar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def running(self, function: Callable[..., Any]) -> Callable[[Ingest, Any], Any]:
        """The stage's function for one part, followed by the bar as it reads."""
        self._is_running = True

        def run(ingest: Ingest, item: Any) -> Any:
            began = self._documents, self._tokens, self._before

            def follow(reading: Reading, tokens: int) -> None:
                self._documents, self._tokens = began[0] + reading.documents, began[1] + tokens
                self._move(began[2] + reading.bytes_read)

            folder = function(ingest, item, follow)
            self._before = began[2] + (item.part.size or self._before - began[2])
            self._move(self._before)
            return folder

        return run

    def counting(self, done: Iterable[Done]) -> Iterator[Done]:
        """The results as they come; where other processes read, the bar counts them."""
        if not self._is_running:
            self._bar.reset(self._parts)
            self._bar.unit, self._bar.unit_scale = "part", False
        for result in done:
            if not self._is_running:
                self._bar.update()
            yield result

    def _move(self, to: int) -> None:
        elapsed = max(time.time() - self._bar.start_t, 1e-9)
        rates = f"{self._documents / elapsed:,.0f} documents/s, {self._tokens / elapsed:,.0f} tokens/s"
        self._bar.set_postfix_str(rates, refresh=False)
        self._before = to
        self._bar.update(max(to - self._bar.n, 0))

"""Texts to token ids, in parallel; the order and the ids are the same whatever the number of workers.

With one worker the tokenizers library's threads use all processors, on two batches at a time. Their ids become Python
integers under the interpreter lock, which costs a tenth of the speed. With more workers each is a process that returns
numpy arrays, and nothing waits for the lock. benchmarks/packing.md has the rates.
Workers import `tokenizers` and numpy, neither transformers nor torch.
"""

from __future__ import annotations

import json
import os
import re
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from multiprocessing import get_context
from typing import TYPE_CHECKING

import numpy as np

from anchorctx import interrupt
from anchorctx.data.sources.documents import Document, Tokens
from anchorctx.data.tokens.tokenizer import SpecialTokens, serialized
from anchorctx.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

BATCH_CHARS = 2**20
"""Characters of text sent to a worker at once, some 150 ms of work of two cores: little memory, and little time at the
end of a batch, when the last long texts keep few threads busy."""
BATCH_DOCUMENTS = 4096
"""Documents sent at once, at most."""

PROCESSES_FROM_BYTES = 2**25
"""Bytes of text from which processes are worth their start."""
ENCODING_THREADS = 2
"""Batches that the tokenizers library's threads work on at the same time, so that they have work while one of them
finishes the last long text of a batch."""

Encoded = tuple[np.ndarray, np.ndarray, list[int]]
"""Token ids of several texts end to end, uint32, the number of tokens of each, int64, and how many names of special
tokens stand in each."""


@dataclass(frozen=True, slots=True)
class Encoder:
    """A tokenizer that can be sent to another process."""

    rules: str | None
    """The fast tokenizer as JSON; None when it is a slow one."""
    slow: PreTrainedTokenizerBase | None
    """The tokenizer itself where it is a slow one."""
    special: SpecialTokens = SpecialTokens.text
    """What becomes of special tokens' names in a text."""
    names: tuple[str, ...] = ()
    """These names."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, special: SpecialTokens = SpecialTokens.text) -> Encoder:
        """The tokenizer's encoder."""
        rules = serialized(tokenizer)
        names = set(tokenizer.all_special_tokens)
        if rules is not None:
            names |= {token["content"] for token in json.loads(rules)["added_tokens"] if token["special"]}
        return cls(rules, tokenizer if rules is None else None, special, tuple(sorted(names, key=len, reverse=True)))


def default_workers(size: int | None) -> int:
    """Workers for `size` bytes of text: 1, which uses threads, if they are few, else one for each usable processor.

    Starting processes takes as long as threads need for some megabytes. None is an unknown size, taken for a large one.
    """
    # the affinity leaves out processors that a container or a batch system does not give us
    if size is not None and size < PROCESSES_FROM_BYTES:
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def tokenize(documents: Iterable[Document], encoder: Encoder, workers: int = 1) -> Iterator[Tokens]:
    """Yield each document's tokens, in order, no special tokens added.

    At most `workers` + 2 batches are read ahead. A tokenizer without a fast backend runs in one thread.
    """
    with _executor(encoder, workers) as (pool, encode):
        pending: deque[tuple[list[Document], Future[Encoded]]] = deque()
        try:
            for batch in _batches(documents):
                # first in, first out: batches come back in order, however long each takes
                pending.append((batch, pool.submit(encode, [document.text for document in batch])))
                if len(pending) > workers + 2:
                    yield from _unpack(*pending.popleft())
            while pending:
                yield from _unpack(*pending.popleft())
        except BrokenProcessPool as error:
            raise UserError(
                f"a tokenising process died, most often for lack of memory: set workers below {workers}"
            ) from error


@contextmanager
def _executor(encoder: Encoder, workers: int) -> Iterator[tuple[Executor, Callable[[list[str]], Encoded]]]:
    """Where batches are encoded, and the function that does it."""
    if encoder.rules is not None and workers > 1:
        pool: Executor = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (encoder,))
        encode = _encode_in_worker
    else:
        pool, encode = ThreadPoolExecutor(ENCODING_THREADS, thread_name_prefix="tokenize"), _encoding(encoder)
    try:
        yield pool, encode
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _encoding(encoder: Encoder) -> Callable[[list[str]], Encoded]:
    if encoder.rules is not None:
        return partial(_encode, _fast(encoder.rules, encoder.special is SpecialTokens.text), encoder.names)
    slow, as_text = encoder.slow, encoder.special is SpecialTokens.text
    assert slow is not None

    def encode(text: str) -> list[int]:
        return slow.encode(text, add_special_tokens=False, split_special_tokens=as_text, verbose=False)

    return lambda texts: _flat([encode(text) for text in texts], _written(encoder.names, texts))


@lru_cache(maxsize=2)  # a worker tokenises one part after the other
def _fast(rules: str, as_text: bool) -> Tokenizer:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(rules)
    tokenizer.encode_special_tokens = as_text  # which the rules do not hold
    return tokenizer


_worker: Callable[[list[str]], Encoded] | None = None


def _start_worker(encoder: Encoder) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    interrupt.ignore_all()
    _worker = _encoding(encoder)


def _encode_in_worker(texts: list[str]) -> Encoded:
    assert _worker is not None
    return _worker(texts)


def _encode(tokenizer: Tokenizer, names: tuple[str, ...], texts: list[str]) -> Encoded:
    lists = [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    return _flat(lists, _written(names, texts))


@lru_cache(maxsize=2)
def _pattern(names: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, names)))  # the longest first, of those that begin alike


def _written(names: tuple[str, ...], texts: list[str]) -> list[int]:
    """How many names of special tokens stand in each text."""
    return [len(_pattern(names).findall(text)) if names else 0 for text in texts]


def _flat(lists: list[list[int]], written: list[int]) -> Encoded:
    lengths = np.array([len(ids) for ids in lists], dtype=np.int64)
    flat = [np.frombuffer(array("I", ids), np.uint32) for ids in lists]  # a third of the time of np.array(ids)
    return np.concatenate(flat), lengths, written


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARS or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _unpack(batch: list[Document], future: Future[Encoded]) -> Iterator[Tokens]:
    flat, lengths, written = future.result()
    # lengths = [3, 2, 4]: cut at [3, 5] into ids 0..3, 3..5 and 5..9
    parts = np.split(flat, np.cumsum(lengths)[:-1])
    for document, ids, count in zip(batch, parts, written, strict=True):
        yield Tokens(ids, document.source, document.domain, written=count)

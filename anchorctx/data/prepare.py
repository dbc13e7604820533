"""`prepare`: documents -> tokens -> packed rows on disk, with a fingerprint, progress and an account of every token."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from anchorctx.data.assemble import RowShape
from anchorctx.data.documents import BadRow, Document, Reading
from anchorctx.data.facts import FactTokens, loss_weights
from anchorctx.data.pack import PackConfig, Packer, Policy
from anchorctx.data.shards import PackedSet, Row, ShardWriter
from anchorctx.data.sources import Source, SourceConfig, open_source
from anchorctx.data.tokenize import Tokens, default_workers, tokenize
from anchorctx.data.tokenizer import SpecialIds, load_tokenizer, tokenizer_fingerprint, vocab_size
from anchorctx.errors import UserError
from anchorctx.manifest import FILE, build_manifest, fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

CODE_VERSION = 1
"""Raised whenever the same inputs would give other rows, so that old packed sets are not taken for new ones."""


class LossWeights(StrEnum):
    """How much each token counts in the loss."""

    uniform = "uniform"
    """All trained tokens the same."""
    facts = "facts"
    """Planted facts: 1 on answers, 0.1 on text, 0 on what cannot be predicted."""


@dataclass(kw_only=True, slots=True)
class PrepareConfig:
    """What `anchorctx prepare` does."""

    out_dir: str
    """Folder for packed sets; each gets a folder of its own in it, named by its fingerprint."""
    sources: list[SourceConfig]
    """Where the documents come from, read one after the other."""
    tokenizer: str
    """Folder or hub name of the model whose tokenizer to use."""
    row_length: int
    """Tokens in a row, anchor included."""
    anchor_len: int = 1
    """Anchor tokens at the start of each row."""
    pack: PackConfig = field(default_factory=PackConfig)
    """How documents become rows."""
    weights: LossWeights = LossWeights.uniform
    """Loss weights: uniform or facts."""
    append_eos: bool = True
    """End each document with EOS, where the tokenizer has one; it is trained like any token."""
    workers: int | None = None
    """Tokenising processes; 1 uses threads; null chooses by the number of processors. The result is the same."""
    seed: int = 0
    """Seed of the interleaving."""

    def validate(self) -> None:
        """UserError for values out of range."""
        if self.anchor_len < 1:
            raise UserError(f"anchor_len={self.anchor_len} must be at least 1: patterns without an anchor ignore it")
        if self.row_length < self.anchor_len + 2:
            raise UserError(
                f"row_length={self.row_length} must be at least {self.anchor_len + 2}, "
                "the anchor and two tokens: raise it"
            )
        if self.workers is not None and self.workers < 1:
            raise UserError(f"workers={self.workers} must be at least 1: use null to choose by the processors")
        if self.seed < 0:
            raise UserError(f"seed={self.seed} is negative: use 0 or more")
        if not self.sources:
            raise UserError("sources is empty: name at least one, such as sources=[{path: corpus.jsonl}]")
        self.pack.validate(self.row_length - self.anchor_len)


def prepare(config: PrepareConfig) -> PackedSet:
    """Make the packed set that the configuration describes, or open it where it exists already.

    Whatever goes wrong, nothing half-written is left behind; mistakes in the input are UserErrors.
    """
    config.validate()
    tokenizer = load_tokenizer(config.tokenizer)
    SpecialIds.of(tokenizer)
    if config.weights is LossWeights.facts:
        FactTokens.of(tokenizer)
    sources = [open_source(source) for source in config.sources]
    identity = _identity(config, sources, tokenizer)
    folder = Path(config.out_dir) / fingerprint(identity)
    if (folder / FILE).is_file():
        packed = PackedSet.open(folder)
        print(f"{folder} exists already, {len(packed):,} rows of {packed.row_length:,} tokens: used as it is")
        return packed
    return Preparation(config, sources, tokenizer, identity).run(folder)


class Preparation:
    """One run through the corpus."""

    def __init__(
        self,
        config: PrepareConfig,
        sources: list[Source],
        tokenizer: PreTrainedTokenizerBase,
        identity: dict[str, Any],
    ) -> None:
        self._config, self._sources, self._tokenizer, self._identity = config, sources, tokenizer, identity
        self._special = SpecialIds.of(tokenizer)
        self._eos = self._special.eos if config.append_eos else None
        self._readings = [Reading(source.on_bad_row) for source in sources]
        self._workers = config.workers or default_workers()
        self._tags: dict[str, np.ndarray] = {}
        self._histogram = np.zeros(64, dtype=np.int64)
        self._weights = _weigher(config.weights, tokenizer)
        shape = RowShape(config.row_length, config.anchor_len, self._special.anchor, self._special.pad)
        self._packer = Packer(config.pack, shape, config.seed)

    def run(self, folder: Path) -> PackedSet:
        """Write the packed set into `folder` and print the account."""
        began, config, size = time.perf_counter(), self._config, vocab_size(self._tokenizer)
        with ShardWriter(folder, config.row_length, size, config.anchor_len) as writer:
            for row, pieces in self._rows():
                writer.add(row, pieces)
            account = self._packer.accounting
            if not account.trained:
                raise UserError(
                    f"no token of the corpus would be trained (dropped: {dict(account.dropped)}): "
                    "relax pack.min_length, pack.long_documents or weights"
                )
            if writer.trained != account.trained:
                raise RuntimeError(f"{account.trained} trained tokens were packed, {writer.trained} written")
            self._tokenizer.save_pretrained(writer.folder / "tokenizer")
            writer.close(self._manifest(folder.name, size))
        print(account.table(config.row_length))
        for reason, count in sorted(self._skipped().items()):
            print(f"skipped rows: {count:,} ({reason})")
        print(f"packed set: {folder}, {account.rows:,} rows, in {time.perf_counter() - began:.1f} s")
        return PackedSet.open(folder, verify=False)

    def _rows(self) -> Iterator[tuple[Row, int]]:
        """Each row, and how many pieces it holds."""
        packed = self._packer.accounting.pieces
        with _progress(self._sources) as bar:
            for row in self._pack(bar):
                pieces = self._packer.accounting.pieces
                yield row, pieces - packed
                packed = pieces

    def _pack(self, bar: Any) -> Iterator[Row]:
        tokens = 0
        for source, reading in zip(self._sources, self._readings, strict=True):
            for document in tokenize(source.documents(reading), self._tokenizer, self._workers):
                tokens += len(document.ids)
                _advance(bar, self._readings, tokens)
                yield from self._document(document, reading)
        bar.set_postfix_str(f"{tokens:,} tok, writing")
        yield from self._packer.finish()

    def _document(self, document: Tokens, reading: Reading) -> Iterator[Row]:
        if not len(document.ids):
            sentence = f"{document.source} has a text that the tokenizer turns into no token: remove it"
            reading.bad(BadRow("no tokens", sentence))
            return
        self._histogram[int(len(document.ids)).bit_length() - 1] += 1
        ids, eos = document.ids, 0
        if self._eos is not None:
            ids, eos = np.append(ids, np.uint32(self._eos)), 1
        tag = self._tag(document) if self._config.pack.domain_tags else _NO_TAG
        yield from self._packer.add(ids, self._weights(ids), tag, eos)

    def _tag(self, document: Tokens) -> np.ndarray:
        if not document.domain:
            raise UserError(
                f"{document.source} has no domain, but pack.domain_tags=true: set domain or domain_field of its source"
            )
        if document.domain not in self._tags:
            texts = [Document(document.domain, document.source)]
            self._tags[document.domain] = next(tokenize(texts, self._tokenizer)).ids
        return self._tags[document.domain]

    def _skipped(self) -> Counter[str]:
        return sum((reading.skipped for reading in self._readings), Counter())

    def _manifest(self, name: str, size: int) -> dict[str, Any]:
        account = self._packer.accounting
        used = np.flatnonzero(self._histogram)
        return build_manifest(
            "prepare",
            dataclasses.asdict(self._config),
            fingerprint=name,
            identity=self._identity,
            row_length=self._config.row_length,
            vocab_size=size,
            tokenizer=self._config.tokenizer,
            tokenizer_fingerprint=self._identity["tokenizer"],
            anchor_id=self._special.anchor,
            pad_id=self._special.pad,
            documents=int(self._histogram.sum()),
            trained_tokens=account.trained,
            accounting=account.to_dict(),
            document_lengths={str(2**i): int(self._histogram[i]) for i in used.tolist()},
            skipped_rows=dict(self._skipped()),
        )


_NO_TAG = np.empty(0, dtype=np.uint32)


def _identity(config: PrepareConfig, sources: list[Source], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Everything that decides what the rows hold, as JSON; what it does not hold cannot change a row."""
    pack = dataclasses.asdict(config.pack)
    if config.pack.policy is not Policy.best_fit:
        del pack["buffer_tokens"]
    return {
        "code": CODE_VERSION,
        "sources": [source.identity for source in sources],
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "row_length": config.row_length,
        "anchor_len": config.anchor_len,
        "pack": pack,
        "weights": config.weights,
        "append_eos": config.append_eos,
        "seed": config.seed if config.pack.interleave > 1 else 0,
    }


def _weigher(weights: LossWeights, tokenizer: PreTrainedTokenizerBase) -> Callable[[np.ndarray], np.ndarray | None]:
    """The loss weights of a document's ids; None is 1 everywhere."""
    if weights is LossWeights.facts:
        return lambda ids: loss_weights(ids, tokenizer)
    return lambda ids: None


def _progress(sources: list[Source]) -> Any:
    sizes = [source.total_bytes for source in sources]
    total = None if None in sizes else sum(size or 0 for size in sizes)
    return tqdm(total=total, unit="B", unit_scale=True, desc="prepare", mininterval=0.5)


def _advance(bar: Any, readings: list[Reading], tokens: int) -> None:
    """Move the bar to what was read; refreshed by tqdm at its own pace."""
    done = sum(reading.bytes_read for reading in readings)
    elapsed = max(time.time() - bar.start_t, 1e-9)
    documents = sum(reading.documents for reading in readings)
    bar.set_postfix_str(f"{documents / elapsed:,.0f} documents/s, {tokens / elapsed:,.0f} tokens/s", refresh=False)
    bar.update(done - bar.n)

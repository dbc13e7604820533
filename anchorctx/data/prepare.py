"""`prepare`: documents -> tokens -> packed rows on disk, with a fingerprint, progress and an account of every token.

Three stages, each a pure function of what the one before left on disk: `run_part` tokenises the parts of the sources,
`plan_rows` decides from the lengths which documents share a row, and `write_rows` copies tokens into shards. The first
and the last run on an `engine`. After an interruption the parts that were whole are used again.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from anchorctx.data.config import LossWeights, PrepareConfig
from anchorctx.data.engine import Engine, open_engine
from anchorctx.data.packed_set import PackedSet, ShardFiles, ShardWriter, rows_per_shard, write_shard
from anchorctx.data.packing.accounting import CAME, Accounting
from anchorctx.data.packing.assemble import RowShape, Workspace, assemble
from anchorctx.data.packing.config import LongDocuments, Policy
from anchorctx.data.packing.mixture import MixtureBy, check_names
from anchorctx.data.packing.pieces import Rows, Tags
from anchorctx.data.packing.planning import Corpus, DocumentPlan, plan_rows, shards_of
from anchorctx.data.sources.documents import Document, Reading
from anchorctx.data.sources.facts import FactTokens
from anchorctx.data.sources.source import open_sources
from anchorctx.data.tokens.encode import Encoder, tokenize
from anchorctx.data.tokens.ingest import Ingest, ReadingBar, SourcePart, run_part
from anchorctx.data.tokens.store import TokenPart, token_dtype
from anchorctx.data.tokens.tokenizer import SpecialIds, load_tokenizer, tokenizer_fingerprint, vocab_size
from anchorctx.errors import UserError
from anchorctx.records.disk import Writing, need_space
from anchorctx.records.locks import in_use, remove_unused, sole_writer
from anchorctx.records.manifest import FILE, build_manifest, fingerprint

CODE_VERSION = 2
"""To be raised when the same inputs would give other rows, so that old packed sets are not taken for new ones."""
TOKENS = ".tokens"
"""Folder of the token stores, in `out_dir`."""
KEPT = f"documents that were tokenised by then are kept in {TOKENS}"


def prepare(config: PrepareConfig) -> PackedSet:
    """Make the packed set that the configuration describes, or open it if it exists already.

    Mistakes in the input are UserErrors. Whatever goes wrong, nothing half-written is left behind; the parts of the
    sources that were tokenised by then are kept, so that the next attempt does not tokenise them again.
    """
    preparation = Preparation(config)
    folder = preparation.folder
    if packed := _existing(folder):
        return packed
    with Writing("the packed set", Path(config.out_dir), intact=KEPT), sole_writer(folder):
        return _existing(folder) or preparation.run()  # another process may have made it while we waited


def _existing(folder: Path) -> PackedSet | None:
    if not (folder / FILE).is_file():
        return None
    packed = PackedSet.open(folder)
    print(f"{folder} exists already, {len(packed):,} rows of {packed.row_length:,} tokens: used as it is")
    return packed


class Preparation:
    """One run through the corpus, with everything that can be checked before the first document is read."""

    def __init__(self, config: PrepareConfig) -> None:
        """UserError for settings, a tokenizer or sources that cannot be used."""
        config.validate()
        self.config = config
        self.tokenizer = load_tokenizer(config.tokenizer)
        self.special = SpecialIds.of(self.tokenizer)
        facts = FactTokens.of(self.tokenizer) if config.weights is LossWeights.facts else None
        self.sources = open_sources(config.sources)
        if config.mixture.weights and config.mixture.by is MixtureBy.source:  # domains are known after reading only
            check_names(config.mixture, [source.name for source in self.sources])
        self.vocab_size = vocab_size(self.tokenizer)
        self.tokens_folder = Path(config.out_dir) / TOKENS
        self.ingest = Ingest(
            root=self.tokens_folder,
            encoder=Encoder.of(self.tokenizer),
            tokenizer=tokenizer_fingerprint(self.tokenizer),
            vocab_size=self.vocab_size,
            eos=self.special.eos if config.append_eos else None,
            needs_domain=config.pack.domain_tags,
            facts=facts,
            workers=config.workers,
        )
        self.shape = RowShape(
            row_length=config.row_length,
            anchor_len=config.anchor_len,
            anchor_id=self.special.anchor,
            pad_id=self.special.pad,
            chunks=config.pack.interleave,
            seed=config.seed,
        )

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that decides what the rows hold, as JSON; nothing else can change a row."""
        # settings that change nothing are left out, so that the set that exists is found: the buffer without best_fit,
        # the seed without interleaving, the mixture when every document is taken once
        config = self.config
        pack, mixture = dataclasses.asdict(config.pack), dataclasses.asdict(config.mixture)
        if config.pack.policy is not Policy.best_fit:
            del pack["buffer_tokens"]
        identity = {
            "code": CODE_VERSION,
            "sources": [source.identity for source in self.sources],
            "tokenizer": self.ingest.tokenizer,
            "row_length": config.row_length,
            "anchor_len": config.anchor_len,
            "pack": pack,
            "weights": config.weights,
            "append_eos": config.append_eos,
            "seed": config.seed if config.pack.interleave > 1 else 0,
        }
        if config.mixture.weights or config.mixture.deduplicate:
            is_named = config.mixture.by is MixtureBy.source and config.mixture.weights
            identity["mixture"] = mixture | ({"names": [source.name for source in self.sources]} if is_named else {})
        return identity

    @property
    def folder(self) -> Path:
        """Where the packed set is, or will be: named by its fingerprint."""
        return Path(self.config.out_dir) / fingerprint(self.identity)

    def run(self) -> PackedSet:
        """Write the packed set and print the account."""
        began, config = time.perf_counter(), self.config
        finished: list[str] = []  # folders of tokens that are not needed any more
        try:
            with in_use(self.tokens_folder), open_engine(config.engine, config.workers) as engine:
                corpus = self.corpus(engine)
                plan = DocumentPlan(corpus, config.mixture)
                needed = self._needed(plan)
                need_space(self.folder, needed, "the packed set", KEPT)
                shards = ShardWriter(self.folder, config.row_length, self.vocab_size, config.anchor_len)
                with Writing("the packed set", self.folder, needed, KEPT), shards as writer:
                    accounting = self._write(engine, corpus, plan, writer)
                    self._check(accounting, writer)
                    self.tokenizer.save_pretrained(writer.folder / "tokenizer")
                    writer.close(self._manifest(corpus, plan, accounting))
            if not config.keep_tokens:
                finished = [part.folder.name for part in corpus.parts]
        finally:
            remove_unused(self.tokens_folder, finished)
        print(accounting.table(config.row_length))
        for reason, count in sorted(corpus.skipped().items()):
            print(f"skipped rows: {count:,} ({reason})")
        print(f"packed set: {self.folder}, {accounting.rows:,} rows, in {time.perf_counter() - began:.1f} s")
        return PackedSet.open(self.folder, verify=False)

    def corpus(self, engine: Engine) -> Corpus:
        """The first stage: every source tokenised; UserError for a source without documents."""
        items = [
            SourcePart(index, source.on_bad_row, part)
            for index, source in enumerate(self.sources)
            for part in source.parts
        ]
        # Ray's workers tokenise parts side by side, so that none of them needs processes of its own
        ingest = self.ingest if engine.is_local else dataclasses.replace(self.ingest, workers=1)
        with ReadingBar(self.sources, len(items)) as bar:
            done = engine.map(bar.running(run_part) if engine.is_local else run_part, ingest, items)
            stretches = [(item.source, folder) for item, folders in bar.counting(done) for folder in folders]
        corpus = Corpus(
            parts=[TokenPart.open(folder) for _, folder in stretches],
            sources=[source for source, _ in stretches],
            names=[source.name for source in self.sources],
        )
        for index, source in enumerate(self.sources):
            parts = corpus.parts_of(index)
            reading = Reading(documents=sum(part.facts["read"] for part in parts))
            reading.skipped = sum((part.skipped for part in parts), Counter())
            try:
                source.check_not_empty(reading)
            except UserError:  # these stores are of no use: the source has to be changed
                for part in parts:
                    shutil.rmtree(part.folder)
                raise
        return corpus

    def tags(self, corpus: Corpus) -> tuple[Tags, list[np.ndarray]]:
        """What is put in front of documents, and for each part the (number of domains,) tags of its domains.

        UserError for BOS without a BOS token, and for domain tags where a document has no domain.
        """
        pack, tags, numbers = self.config.pack, Tags(), {}
        bos = [self.tokenizer.bos_token_id] if pack.prepend_bos else []
        if bos == [None]:
            raise UserError(
                f"the tokenizer {self.config.tokenizer} has no BOS token, but pack.prepend_bos=true: set it to false"
            )
        for domain in corpus.domains():
            name = np.empty(0, np.uint32)
            if pack.domain_tags:
                if not domain:  # of documents that were tokenised before without tags
                    raise UserError(
                        "a document has no domain, but pack.domain_tags=true: set domain or domain_field of its source"
                    )
                name = next(tokenize([Document(domain, "")], self.ingest.encoder)).ids
            numbers[domain] = tags.add(np.concatenate([np.array(bos, np.uint32), name]))
        return tags, [np.array([numbers[domain] for domain in part.domains], np.int64) for part in corpus.parts]

    def _write(self, engine: Engine, corpus: Corpus, plan: DocumentPlan, writer: ShardWriter) -> Accounting:
        """The second and third stage: rows planned, and written shard by shard."""
        tags, domain_tags = self.tags(corpus)
        accounting, rows = plan.accounting(), rows_per_shard(self.config.row_length)
        planned = plan_rows(plan, self.config.pack, self.shape.capacity, tags, domain_tags, accounting)
        making = Making(
            folder=writer.folder,
            shape=self.shape,
            tags=tags,
            parts=corpus.parts,
            rows_per_shard=rows,
            names=tuple(plan.names),
        )
        shards = enumerate(shards_of(planned, rows))
        with tqdm(unit="tok", unit_scale=True, desc="pack", mininterval=0.5) as bar:
            for (_, shard), (files, counted) in engine.map(write_rows, making, shards):
                writer.put(files)
                accounting.merge_rows(counted)
                bar.update(len(shard) * self.config.row_length)
        return accounting

    def _needed(self, plan: DocumentPlan) -> int:
        """The least bytes that the set will take; only packing itself shows how much of a corpus it drops: then 0."""
        pack, accounting = self.config.pack, plan.accounting()
        if pack.long_documents is not LongDocuments.split or pack.min_length > 1:
            return 0
        # 10 tokens of uint16 and weights of at least one byte: 30 bytes, before anchors, tags and padding
        kept = sum(accounting.total(name) for name in CAME) - sum(accounting.total_dropped.values())
        return kept * (np.dtype(token_dtype(self.vocab_size)).itemsize + 1)

    def _check(self, accounting: Accounting, writer: ShardWriter) -> None:
        """UserError when nothing would be trained; RuntimeError unless every token is accounted for."""
        accounting.check(self.config.row_length)
        trained = accounting.total("trained")
        if not trained:
            raise UserError(
                f"no token of the corpus would be trained (dropped: {dict(accounting.total_dropped)}): "
                "relax pack.min_length, pack.long_documents or weights, or unmask labels"
            )
        if writer.trained != trained:
            raise RuntimeError(f"{trained} trained tokens were packed, {writer.trained} written")

    def _manifest(self, corpus: Corpus, plan: DocumentPlan, accounting: Accounting) -> dict[str, Any]:
        histogram = corpus.length_histogram()
        return build_manifest(
            "prepare",
            dataclasses.asdict(self.config),
            fingerprint=self.folder.name,
            identity=self.identity,
            row_length=self.config.row_length,
            vocab_size=self.vocab_size,
            tokenizer=self.config.tokenizer,
            tokenizer_fingerprint=self.ingest.tokenizer,
            anchor_id=self.special.anchor,
            pad_id=self.special.pad,
            documents=int(histogram.sum()),
            trained_tokens=accounting.total("trained"),
            accounting=accounting.to_dict(),
            mixture=plan.report(accounting.content),
            document_lengths={str(2**i): int(histogram[i]) for i in np.flatnonzero(histogram).tolist()},
            skipped_rows=dict(corpus.skipped()),
        )


@dataclass(frozen=True, slots=True)
class Making:
    """What writing any shard of a set needs; can be sent to another process."""

    folder: Path
    """Where shards are written."""
    shape: RowShape
    tags: Tags
    parts: Sequence[TokenPart]
    """The tokenised documents."""
    rows_per_shard: int
    names: tuple[str, ...]
    """The sources (or domains) that tokens are counted under."""


_workspace = Workspace()
"""Memory of this process that is used for one shard after the other."""


def write_rows(making: Making, item: tuple[int, Rows]) -> tuple[ShardFiles, Accounting]:
    """The third stage: a shard's number and planned rows to its files, and an account of the tokens in them."""
    number, rows = item
    counted = Accounting(making.names)
    with ExitStack() as files:
        # files are opened for this shard only: a corpus may have more parts than a process may hold open
        parts = np.unique(rows.pieces["part"]).tolist()
        texts = {part: files.enter_context(making.parts[part].text()) for part in parts}
        first = number * making.rows_per_shard
        shard = assemble(rows, making.shape, making.tags, texts, counted, first, _workspace)
    return write_shard(making.folder, number, shard), counted

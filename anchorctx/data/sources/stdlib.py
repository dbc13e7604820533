"""The embedded corpus: the sources of Python's standard library, which every machine has that can run this package.

Some 11 to 13 MB of real text in documents of 10 to 300,000 characters, with no network. Optionally with planted facts
(see `facts`): then files are cut at line boundaries into documents of log-normal lengths, so that what a document
states, it also asks for. Everything is a pure function of the configuration and the installed Python version.
"""

from __future__ import annotations

import hashlib
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from annotated_types import Ge, Le

from anchorctx.data.sources.documents import Document, Reading, Tokens
from anchorctx.data.sources.facts import NUM_KEYS, SPECIAL_TOKENS, lines_of, plant
from anchorctx.errors import UserError
from anchorctx.settings import Positive, Seed, Share, Spread

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LEFT_OUT = frozenset(
    ("test tests idlelib idle_test lib2to3 turtledemo ensurepip site-packages dist-packages __pycache__").split()
)
"""Folders of tests, applications, frozen history and other packages."""


class Split(StrEnum):
    """Which files; the same ones whatever the seed."""

    train = "train"
    """All but the held-out files."""
    validation = "validation"
    """The held-out files."""
    all = "all"
    """Both."""


@dataclass(kw_only=True, slots=True)
class StdlibConfig:
    """The standard library as a corpus."""

    split: Split = Split.train
    """train, validation or all."""
    held_out: Share = 0.08
    """Share of the files that are held out for validation, 0 to 1, chosen by a hash of their names."""
    seed: Seed = 0
    """Seed of the cuts and the facts."""
    facts: bool = False
    """Cut files into shorter documents and plant facts in them; false yields whole files."""
    median_chars: Positive = 2500
    """Median length of a cut document, in characters (a 1,024-token BPE makes about 2.8 of them a token)."""
    sigma: Spread = 0.8
    """Spread of the documents' log lengths."""
    max_chars: Positive = 9000
    """Longest cut document, in characters: what still fits a row."""
    chars_per_fact: Positive = 250
    """Characters of text for each planted fact; a document has between 1 and 64 of them."""
    mentions: Annotated[int, Ge(1), Le(1024)] = 2
    """Times a fact appears in its document: stated once, then asked for."""


@dataclass(frozen=True, slots=True)
class StdlibPart:
    """The embedded corpus."""

    config: StdlibConfig
    identity: dict[str, Any]
    size: int | None

    @classmethod
    def of(cls, config: StdlibConfig) -> StdlibPart:
        """The corpus is read once to identify it: distributions patch and leave out files, whatever the version."""
        digest, total = hashlib.sha256(), 0
        for document in documents(config):
            text = document.text.encode()
            digest.update(f"{document.source}\0{document.domain}\0{len(text)}\0".encode() + text)
            total += len(text)
        return cls(config, {"stdlib": digest.hexdigest()}, total)

    def documents(self, reading: Reading) -> Iterator[Document | Tokens]:
        """The library's files."""
        for document in documents(self.config):
            reading.bytes_read += len(document.text.encode())
            yield document


def documents(config: StdlibConfig) -> Iterator[Document]:
    """Yield the corpus in the order of file names; raises UserError where no library sources are installed."""
    for name, text in _files(config):
        domain = name.split("/")[0].removesuffix(".py")
        if not config.facts:
            yield Document(text=text, source=name, domain=domain)
            continue
        rng = np.random.default_rng([config.seed, _name_hash(name)])  # its own, whatever other files there are
        for number, piece in enumerate(_cut(text, config, rng)):
            facts = min(max(len(piece) // config.chars_per_fact, 1), NUM_KEYS)
            yield Document(text=plant(piece, rng, facts, config.mentions), source=f"{name}#{number}", domain=domain)


def train_tokenizer(vocabulary: int = 1024, sample_chars: int = 2_000_000) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of `vocabulary` tokens on some of the training files; facts, BOS and EOS come on top.

    No token spans a line boundary, so that planting facts there does not change how the text is tokenised.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AddedToken, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [pre_tokenizers.Split("\n", "merged_with_previous"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(_sample(sample_chars), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )
    facts: list[str | AddedToken] = [AddedToken(token, normalized=False) for token in SPECIAL_TOKENS]
    tokenizer.add_tokens(facts)
    return tokenizer


def _sample(chars: int) -> list[str]:
    """Training files in an order that mixes packages, up to `chars` characters."""
    files = sorted(_files(StdlibConfig()), key=lambda file: hashlib.sha256(file[0].encode()).digest())
    taken: list[str] = []
    for _, text in files:
        if chars <= 0:
            break
        taken.append(text[: min(chars, 100_000)])
        chars -= len(taken[-1])
    return taken


def _files(config: StdlibConfig) -> Iterator[tuple[str, str]]:
    """(name relative to the library, text) of the split's files, sorted by name; undecodable and empty ones skipped."""
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if LEFT_OUT.isdisjoint(path.relative_to(root).parts[:-1])
    )
    if not names:
        raise UserError(
            f"Python {platform.python_version()} has no library sources under {root}: "
            "use a Python that is installed with its .py files, or another corpus"
        )
    for name in names:
        if config.split is not Split.all and _is_held_out(name, config.held_out) != (config.split is Split.validation):
            continue
        try:
            text = (root / name).read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if text:
            yield name, text


def _is_held_out(name: str, share: float) -> bool:
    return _name_hash(name) < share * 2**64


def _name_hash(name: str) -> int:
    """A number in 0 .. 2**64 - 1, the same on every machine, unlike Python's `hash`."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def _cut(text: str, config: StdlibConfig, rng: np.random.Generator) -> Iterator[str]:
    """Cut at line boundaries into pieces of log-normal lengths; a line longer than a whole piece is cut inside."""
    # max_chars = 9,000, a line of 20,000: three lines of 9,000, 9,000 and 2,000
    lines = [
        line[start : start + config.max_chars]
        for line in lines_of(text)
        for start in range(0, len(line), config.max_chars)
    ]
    piece: list[str] = []
    size, target = 0, 0.0
    for line in lines:
        if piece and (size >= target or size + len(line) > config.max_chars):
            yield "".join(piece)
            piece, size = [], 0
        if not piece:
            target = min(rng.lognormal(np.log(config.median_chars), config.sigma), config.max_chars)
        piece.append(line)
        size += len(line)
    if piece:
        yield "".join(piece)

"""Tokenised documents on disk: what a stretch of a part of a source becomes, once, before anything is packed.

    FINGERPRINT/            of the part's content, the tokenizer, whatever else decides the tokens, and the stretch
      part.json             documents, skipped rows, domains, sizes; written last
      tokens.bin            all documents' token ids end to end, uint16, or uint32 for vocabularies above 65,536
      weights.bin           their loss weights, float16; only where documents have some: labels, or planted facts
      documents.npy         (D,) DOCUMENT: where each lies, its domain and its hash

Packing reads all lengths first, then each token once, so that the corpus need not fit into memory. A preparation that
was interrupted goes on after the stretches that were whole.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from anchorctx.data.sources.documents import Reading, Tokens
from anchorctx.errors import UserError
from anchorctx.records.files import StagedFolder
from anchorctx.records.manifest import write_json
from anchorctx.records.typed import read_fields

FILE = "part.json"
DOCUMENT = np.dtype(
    [
        ("start", "<i8"),  # first token
        ("length", "<i8"),  # tokens, an appended EOS included; at least 1
        ("eos", "<i8"),  # 1 where an EOS was appended
        ("domain", "<i4"),  # index into the part's domains
        ("hash", "<u8", (2,)),  # of the token ids, and of the labels where some are masked, 128 bits
    ]
)
FLOAT16_MAX = 65504


def token_dtype(vocab_size: int) -> type[np.integer]:
    """The narrowest type that holds the ids of a vocabulary."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


@dataclass
class _Facts:
    """What `part.json` must have."""

    documents: int
    tokens: int
    dtype: Literal["uint16", "uint32"]
    weights: bool
    domains: list[str]
    read: int
    written: int
    skipped: dict[str, int]
    is_last: bool
    is_clean: bool
    bytes: dict[str, int]


@dataclass(frozen=True, slots=True)
class TokenPart:
    """A stretch that was tokenised; its arrays are read when they are asked for."""

    folder: Path
    facts: dict[str, Any]
    """What `part.json` says: see `TokenWriter.close`."""

    @classmethod
    def open(cls, folder: Path) -> TokenPart:
        """Open a whole part; UserError when a file is missing or cut short."""
        facts = read_fields(folder / FILE, _Facts, f"remove {folder} and prepare again")
        for name, size in facts["bytes"].items():
            file = folder / name
            if not file.is_file() or file.stat().st_size != size:
                raise UserError(f"{file} is missing or cut short: remove {folder} and prepare again")
        return cls(folder, facts)

    @property
    def documents(self) -> np.ndarray:
        """(D,) DOCUMENT, mapped."""
        return np.load(self.folder / "documents.npy", mmap_mode="r" if self.facts["documents"] else None)

    @property
    def domains(self) -> list[str]:
        """The different domains of its documents, which DOCUMENT's `domain` is an index into."""
        return self.facts["domains"]

    @property
    def skipped(self) -> Counter[str]:
        """Rows left out, by reason."""
        return Counter(self.facts["skipped"])

    def masked(self) -> int:
        """Tokens of loss weight 0."""
        if not self.facts["weights"]:
            return 0
        weights = np.fromfile(self.folder / "weights.bin", np.float16)
        return len(weights) - int(np.count_nonzero(weights))

    @contextmanager
    def text(self) -> Iterator[FileText]:
        """The tokens and loss weights, open for reading."""
        with ExitStack() as files:
            tokens = files.enter_context((self.folder / "tokens.bin").open("rb")).fileno()
            weights = None
            if self.facts["weights"]:
                weights = files.enter_context((self.folder / "weights.bin").open("rb")).fileno()
            yield FileText(np.dtype(self.facts["dtype"]), tokens, weights)


@dataclass(frozen=True, slots=True)
class FileText:
    """Tokens in files, read rather than mapped, so that pages of a large corpus do not pile up in memory."""

    dtype: np.dtype
    tokens: int
    """Descriptor of the open file."""
    weights: int | None

    @property
    def has_weights(self) -> bool:
        """Are there loss weights?"""
        return self.weights is not None

    def read_tokens(self, start: int, into: np.ndarray) -> None:
        """Read tokens."""
        _read(self.tokens, start, into)

    def read_weights(self, start: int, into: np.ndarray) -> None:
        """Read loss weights."""
        if self.weights is None:
            into.fill(1)
        else:
            _read(self.weights, start, into)


def _read(file: int, start: int, into: np.ndarray) -> None:
    """Fill `into`, contiguous, from its `start`-th element on."""
    # uint16, start = 100: byte 200 of the file; a read may return less than was asked for, then the rest follows
    left, at = into.view(np.uint8).data, start * into.itemsize
    while count := os.preadv(file, [left], at):
        if count == len(left):
            return
        left, at = left[count:], at + count
    raise UserError("a file of tokens was cut short while it was read: prepare again")


class TokenWriter:
    """Writes a part; a context manager: left without `close`, it removes what it has written."""

    def __init__(self, folder: Path, vocab_size: int, eos: int | None) -> None:
        self._staged = StagedFolder(folder, FILE)
        self._dtype = np.dtype(token_dtype(vocab_size))
        self._eos = None if eos is None else np.array([eos], self._dtype).tobytes()
        try:
            self._tokens = (self._staged.folder / "tokens.bin").open("wb")
        except BaseException:
            self._staged.discard()
            raise
        self._weights: BinaryIO | None = None  # opened by the first document, if it has some: then all have
        self._documents: list[tuple[int, int, int, int, bytes]] = []
        self._domains: dict[str, int] = {}
        self.tokens = 0

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # of what a full disk did not take, and which is removed now
            self._close_files()
        self._staged.discard()

    def add(self, document: Tokens, weights: np.ndarray | None) -> None:
        """Append a document of at least one token, and EOS unless it ends in one already.

        `weights` are those of its ids and of the EOS after them; either all documents of a part have some, or none.
        """
        # ids [5, 6], EOS 2, at token 100 of the store: start 100, length 3, eos 1; ids [5, 2]: length 2, eos 0
        content = document.ids.astype(self._dtype, copy=False).tobytes()
        eos = int(self._eos is not None and not content.endswith(self._eos))
        length = len(document.ids) + eos
        self._tokens.write(content)
        if eos:
            assert self._eos is not None
            self._tokens.write(self._eos)
        if weights is not None:
            if self._weights is None:
                assert not self._documents
                self._weights = (self._staged.folder / "weights.bin").open("wb")
            self._weights.write(stored_weights(weights[:length]).tobytes())
        number = self._domains.setdefault(document.domain, len(self._domains))
        self._documents.append((self.tokens, length, eos, number, _digest(content, document.trained)))
        self.tokens += length

    def close(self, reading: Reading, is_last: bool, is_clean: bool) -> Path:
        """Write the index, and give the folder its name.

        `is_last` says that nothing of the part comes after it, `is_clean` that no row was left out so far.
        """
        self._close_files()
        folder = self._staged.folder
        documents = np.zeros(len(self._documents), DOCUMENT)
        if self._documents:
            starts, lengths, eos, domains, digests = zip(*self._documents, strict=True)
            documents["start"], documents["length"], documents["eos"] = starts, lengths, eos
            documents["domain"] = domains
            documents["hash"] = np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2)
        np.save(folder / "documents.npy", documents)
        facts = {
            "documents": len(documents),
            "tokens": self.tokens,
            "dtype": self._dtype.name,
            "weights": self._weights is not None,
            "domains": list(self._domains),
            "read": reading.documents,
            "written": reading.written,
            "skipped": dict(reading.skipped),
            "is_last": is_last,
            "is_clean": is_clean,
            "bytes": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
        }
        write_json(folder / FILE, facts)
        return self._staged.publish()

    def _close_files(self) -> None:
        with ExitStack() as files:  # both are closed, also where one cannot write its last bytes
            files.callback(self._tokens.close)
            if self._weights is not None:
                files.callback(self._weights.close)


def _digest(content: bytes, trained: np.ndarray | None) -> bytes:
    """What is the same of duplicates: the ids, without an appended EOS, so that append_eos does not decide; and the
    labels where some are masked: the same conversation with another answer trained is another document."""
    if trained is None or trained.all():
        return hashlib.blake2b(content, digest_size=16).digest()
    return hashlib.blake2b(content + np.packbits(trained).tobytes(), digest_size=16, person=b"masked").digest()


def stored_weights(weights: np.ndarray) -> np.ndarray:
    """(n,) float16; ValueError unless 0 stays 0 and nothing else becomes it."""
    with np.errstate(over="ignore"):
        stored = weights.astype(np.float16)
    if not np.isfinite(stored).all() or (stored < 0).any() or ((stored == 0) != (weights == 0)).any():
        raise ValueError(f"loss weights must be 0 or within 1e-7 to {FLOAT16_MAX}, the range of float16")
    return stored

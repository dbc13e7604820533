"""A packed set on disk: memory-mapped shards of rows, named by a fingerprint, described by a manifest.

    FINGERPRINT/
      manifest.json            what went in, what came out, every file's size and sha256; written last
      tokenizer/               the tokenizer that made the ids
      tokens_00000.npy         (rows, T) uint16, or uint32 for vocabularies above 65,536
      weights_00000.npy        (rows, T) loss weights: uint8 where all are 0 or 1, else float16; 0 is not trained
      offsets_00000.npy        segment boundaries of the shard's rows, flattened, int32
      doc_ids_00000.npy        the document of each segment, flattened, int32; nothing for rows without interleaving
      pointers_00000.npy       (rows + 1, 2) int64: where each row's boundaries and document ids begin
      rows.npz                 per row: sum of weights, trained tokens, documents

It is written into a hidden folder beside and renamed when whole (`staging`), so a set that exists is complete.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from anchorctx.data.staging import StagedFolder
from anchorctx.errors import UserError
from anchorctx.layout import PackedLayout
from anchorctx.manifest import FILE, read_manifest, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHARD_TOKENS = 2**25
"""Tokens in a shard, about: 64 or 128 MiB of token ids. The writer holds one shard in memory."""
OPEN_SHARDS = 64
"""Shards that are mapped at once, at most: each map holds a file open."""
ARRAYS = ("tokens", "weights", "offsets", "doc_ids", "pointers")


@dataclass(frozen=True, slots=True)
class Row:
    """One packed row."""

    input_ids: np.ndarray
    """(T,) int64."""
    loss_weights: np.ndarray
    """(T,) float32; 0 is not trained."""
    layout: PackedLayout
    """Its first segment is the anchor; positions continuous."""


class ShardWriter:
    """Collects rows and writes them, a shard at a time, into a folder that becomes visible when it is whole.

    A context manager: left without `close`, it removes what it has written. Two may write the same folder at once.
    """

    def __init__(
        self, folder: Path, row_length: int, vocab_size: int, anchor_len: int, rows_per_shard: int | None = None
    ) -> None:
        self._anchor_len, self._vocab_size = anchor_len, vocab_size
        self._rows_per_shard = rows_per_shard or max(SHARD_TOKENS // row_length, 1)
        self._staged = StagedFolder(folder, FILE)
        self._dtype = np.uint16 if vocab_size <= 2**16 else np.uint32
        self._ids: list[np.ndarray] = []
        self._weights: list[np.ndarray] = []
        self._layouts: list[PackedLayout] = []
        self._index: list[tuple[float, int, int]] = []
        self._shards = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._staged.discard()

    @property
    def folder(self) -> Path:
        """The folder being written; other files may be put into it before `close`."""
        return self._staged.folder

    @property
    def trained(self) -> int:
        """Trained tokens of all rows so far."""
        return sum(row[1] for row in self._index)

    def add(self, row: Row, documents: int) -> None:
        """Append a row that holds so many documents (or pieces)."""
        if int(row.input_ids.max()) >= self._vocab_size:
            raise ValueError(f"token id {row.input_ids.max()} is beyond the vocabulary of {self._vocab_size}")
        weights = row.loss_weights.astype(np.float16)
        self._ids.append(row.input_ids.astype(self._dtype))
        self._weights.append(weights)
        self._layouts.append(row.layout)
        self._index.append((float(weights.sum(dtype=np.float64)), int(np.count_nonzero(weights)), documents))
        if len(self._ids) == self._rows_per_shard:
            self._flush()

    def close(self, manifest: dict[str, Any]) -> Path:
        """Write the index and the manifest, and give the folder its name, unless another writer was first."""
        self._flush()
        folder = self.folder
        weight, trained, documents = (np.array(column) for column in zip(*self._index, strict=True))
        np.savez(folder / "rows.npz", weight=weight, trained=trained, documents=documents)
        files = {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        facts = {"rows": len(self._index), "rows_per_shard": self._rows_per_shard, "anchor_len": self._anchor_len}
        write_json(folder / FILE, {**manifest, **facts, "files": files})
        return self._staged.publish()

    def _flush(self) -> None:
        if not self._ids:
            return
        weights = np.stack(self._weights)
        doc_ids = [layout.doc_ids or () for layout in self._layouts]
        ends = [[len(layout.doc_offsets) for layout in self._layouts], [len(ids) for ids in doc_ids]]
        arrays = {
            "tokens": np.stack(self._ids),
            "weights": weights.astype(np.uint8) if np.isin(weights, (0, 1)).all() else weights,
            "offsets": np.concatenate([layout.doc_offsets for layout in self._layouts]).astype(np.int32),
            "doc_ids": np.concatenate(doc_ids).astype(np.int32),
            "pointers": np.pad(np.cumsum(ends, axis=1), ((0, 0), (1, 0))).T.astype(np.int64),
        }
        for name, array in arrays.items():
            np.save(_shard_file(self.folder, name, self._shards), array)
        self._ids, self._weights, self._layouts = [], [], []
        self._shards += 1


class PackedSet:
    """A packed set, opened for random access."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        with np.load(folder / "rows.npz") as archive:
            index = dict(archive)
        self.row_weight: np.ndarray = index["weight"]
        """(rows,) float64: sum of the loss weights of each row."""
        self.row_trained: np.ndarray = index["trained"]
        """(rows,) int64: trained tokens of each row."""
        self.row_documents: np.ndarray = index["documents"]
        """(rows,) int64: documents (or pieces) in each row."""
        self._shards: OrderedDict[int, dict[str, np.ndarray]] = OrderedDict()
        self._lock = threading.Lock()  # the loader reads in a thread of its own

    @classmethod
    def open(cls, path: str | Path, verify: bool = True) -> PackedSet:
        """Open the folder of a packed set, or a folder that holds exactly one.

        `verify` compares every file's checksum. Raises UserError when there is no whole, unchanged set.
        """
        folder = _locate(Path(path))
        try:
            manifest = read_manifest(folder)
        except ValueError as error:
            raise UserError(f"{folder / FILE} is not valid JSON: remove {folder} and prepare it again") from error
        if not {"fingerprint", "row_length", "rows_per_shard", "files"} <= set(manifest):
            raise UserError(f"{folder} is no packed set: name a folder that anchorctx prepare made")
        for name, expected in manifest["files"].items():
            file = folder / name
            if not file.is_file() or file.stat().st_size != expected["bytes"]:
                raise UserError(f"{file} is missing or cut short: remove {folder} and prepare it again")
            if verify and _sha256(file) != expected["sha256"]:
                raise UserError(f"{file} was changed after it was written: remove {folder} and prepare it again")
        return cls(folder, manifest)

    def __len__(self) -> int:
        return int(self.manifest["rows"])

    @property
    def fingerprint(self) -> str:
        """Names the set's content: sources, tokenizer and policies."""
        return self.manifest["fingerprint"]

    @property
    def row_length(self) -> int:
        """Tokens in each row, `T`."""
        return int(self.manifest["row_length"])

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that made the ids."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder / "tokenizer")

    def row(self, index: int) -> Row:
        """Row `index`, 0 .. len-1."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        number, i = divmod(index, int(self.manifest["rows_per_shard"]))
        shard = self._shard(number)
        (a, c), (b, d) = shard["pointers"][i].tolist(), shard["pointers"][i + 1].tolist()
        doc_ids = tuple(shard["doc_ids"][c:d].tolist()) or None
        offsets = tuple(shard["offsets"][a:b].tolist())
        layout = PackedLayout(offsets, int(self.manifest["anchor_len"]), doc_ids=doc_ids)
        return Row(shard["tokens"][i].astype(np.int64), shard["weights"][i].astype(np.float32), layout)

    def _shard(self, number: int) -> dict[str, np.ndarray]:
        """The shard's memory-mapped arrays; those used longest ago are closed."""
        with self._lock:
            if number not in self._shards:
                self._shards[number] = {name: _map(_shard_file(self.folder, name, number)) for name in ARRAYS}
                if len(self._shards) > OPEN_SHARDS:
                    self._shards.popitem(last=False)
            self._shards.move_to_end(number)
            return self._shards[number]


def _locate(path: Path) -> Path:
    if (path / FILE).is_file():
        return path
    found = sorted(child for child in path.glob("*") if (child / FILE).is_file() and not child.name.startswith("."))
    if len(found) == 1:
        return found[0]
    if not found:
        raise UserError(f"{path} holds no packed set: make one with `anchorctx prepare out_dir={path} ...`")
    names = ", ".join(folder.name for folder in found)
    raise UserError(f"{path} holds {len(found)} packed sets ({names}): name one of them")


def _shard_file(folder: Path, name: str, number: int) -> Path:
    return folder / f"{name}_{number:05d}.npy"


def _map(file: Path) -> np.ndarray:
    small = file.stat().st_size <= 4096  # not worth a map, and an empty array cannot be mapped
    return np.load(file, mmap_mode=None if small else "r")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

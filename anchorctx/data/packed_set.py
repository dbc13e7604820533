"""A packed set on disk: memory-mapped shards of rows, named by a fingerprint, described by a manifest.

    FINGERPRINT/
      manifest.json            what went in, what came out, every file's size and sha256; written last
      tokenizer/               the tokenizer that made the ids
      tokens_00000.npy         (rows, T) uint16, or uint32 for vocabularies above 65,536
      weights_00000.npy        (rows, T) loss weights: uint8 where all are 0 or 1, else float16; 0 is not trained
      offsets_00000.npy        segment boundaries of the shard's rows, flattened, int32
      doc_ids_00000.npy        the document of each segment, flattened, int32; nothing for rows without interleaving
      pointers_00000.npy       (rows + 1, 2) int64: where each row's boundaries and document ids begin
      rows.npz                 per row: sum of weights, trained tokens, documents, attention's cost

It is written into a hidden folder and renamed when whole (`records.files`), so that a set that exists is complete.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from anchorctx.data.packing.shard import Row, Shard
from anchorctx.data.tokens.store import token_dtype
from anchorctx.errors import UserError
from anchorctx.layout import PackedLayout
from anchorctx.records.files import StagedFolder, file_sha256
from anchorctx.records.manifest import FILE, write_json
from anchorctx.records.typed import read_fields

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHARD_TOKENS = 2**25
"""Tokens in a shard, about: 64 or 128 MiB of token ids. A process that makes a shard holds all of it in memory."""
OPEN_SHARDS = 64
"""Shards that are mapped at once, at most: each of their maps keeps a file open."""
CONTENT, PLACES = ("tokens", "weights"), ("offsets", "doc_ids", "pointers")
ARRAYS = (*CONTENT, *PLACES)


@dataclass(frozen=True, slots=True)
class ShardFiles:
    """One shard, written."""

    index: dict[str, np.ndarray]
    """(R,) figures of each of its rows, see `Shard.index`."""
    files: dict[str, dict[str, Any]]
    """Size and sha256 of each of its files, by name."""


def write_shard(folder: Path, number: int, shard: Shard) -> ShardFiles:
    """Write shard `number` of the set in the making in `folder`."""
    paths = {name: _shard_file(folder, name, number) for name in ARRAYS}
    for name, path in paths.items():
        np.save(path, getattr(shard, name))
    return ShardFiles(shard.index(), {path.name: _entry(path) for path in paths.values()})


def rows_per_shard(row_length: int) -> int:
    """Rows of a shard, by default."""
    return max(SHARD_TOKENS // row_length, 1)


@dataclass
class _File:
    bytes: int
    sha256: str


@dataclass
class _Manifest:
    """What the manifest of a packed set must have."""

    fingerprint: str
    vocab_size: int
    row_length: int
    anchor_len: int
    rows: int
    rows_per_shard: int
    files: dict[str, _File]
    tokenizer_fingerprint: str | None = None
    """A set that is trained on has it; one that was made by hand may not."""


class ShardWriter:
    """Writes a packed set, which becomes visible when it is whole.

    Either shards are written into `folder` by other code and announced with `put`, or single rows are given with `add`.
    A context manager: left without `close`, it removes what was written. Two may write the same set at once.
    """

    def __init__(
        self, folder: Path, row_length: int, vocab_size: int, anchor_len: int, rows: int | None = None
    ) -> None:
        """`rows` is the number of rows in a shard, None the default."""
        self._anchor_len, self._vocab_size = anchor_len, vocab_size
        self._rows_per_shard = rows or rows_per_shard(row_length)
        self._staged = StagedFolder(folder, FILE)
        self._rows: list[Row] = []
        self._documents: list[int] = []
        self._shards: list[ShardFiles] = []

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
        """Trained tokens of all shards so far, as they were written."""
        return sum(int(shard.index["trained"].sum()) for shard in self._shards)

    def put(self, shard: ShardFiles) -> None:
        """Take the next shard, whose files are in `folder` already; all shards but the last must be full."""
        self._shards.append(shard)

    def add(self, row: Row, documents: int) -> None:
        """Append a row that holds so many documents (or pieces); ValueError for an id beyond the vocabulary."""
        if int(row.input_ids.max()) >= self._vocab_size:
            raise ValueError(f"token id {row.input_ids.max()} is beyond the vocabulary of {self._vocab_size}")
        self._rows.append(row)
        self._documents.append(documents)
        if len(self._rows) == self._rows_per_shard:
            self._flush()

    def close(self, manifest: dict[str, Any]) -> Path:
        """Write the index and the manifest, and give the folder its name, unless another writer was first."""
        self._flush()
        folder, names = self.folder, self._shards[0].index
        index = {name: np.concatenate([shard.index[name] for shard in self._shards]) for name in names}
        np.savez(folder / "rows.npz", **index)  # type: ignore[arg-type]
        files = {name: entry for shard in self._shards for name, entry in shard.files.items()}
        # the shards' files were hashed by those who wrote them; what is left is rows.npz and the tokenizer
        others = (path for path in folder.rglob("*") if path.is_file() and path.name not in files)
        files |= {path.relative_to(folder).as_posix(): _entry(path) for path in others}
        rows = len(index["trained"])
        facts = {"rows": rows, "rows_per_shard": self._rows_per_shard, "anchor_len": self._anchor_len}
        facts |= {"vocab_size": self._vocab_size}
        write_json(folder / FILE, {**manifest, **facts, "files": dict(sorted(files.items()))})
        return self._staged.publish()

    def _flush(self) -> None:
        if self._rows:
            shard = Shard.of(self._rows, self._documents, token_dtype(self._vocab_size))
            self.put(write_shard(self.folder, len(self._shards), shard))
        self._rows, self._documents = [], []


class PackedSet:
    """A packed set, opened for random access."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        try:
            with np.load(folder / "rows.npz") as archive:
                index = dict(archive)
        except ValueError as error:  # a pickle, which is not opened
            raise UserError(f"{folder / 'rows.npz'} holds no plain arrays: prepare the set again") from error
        self.row_weight: np.ndarray = index["weight"]
        """(rows,) float64: sum of the loss weights of each row."""
        self.row_trained: np.ndarray = index["trained"]
        """(rows,) int64: trained tokens of each row."""
        self.row_documents: np.ndarray = index["documents"]
        """(rows,) int64: documents (or pieces) in each row."""
        self.row_cost: np.ndarray = index["cost"]
        """(rows,) float64: what each row costs in attention, in tokens squared (`shard.attention_costs`)."""
        self._shards: OrderedDict[int, Shard] = OrderedDict()
        self._lock = threading.Lock()  # the loader reads in a thread of its own

    @classmethod
    def open(cls, path: str | Path, verify: bool = True) -> PackedSet:
        """Open the folder of a packed set, or a folder that holds exactly one.

        `verify` compares every file's checksum. Raises UserError when there is no whole, unchanged set.
        """
        folder = _locate(Path(path))
        remedy = f"name a packed set that anchorctx prepare made, or remove {folder} and prepare it again"
        manifest = read_fields(folder / FILE, _Manifest, remedy)
        for name, expected in manifest["files"].items():
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise UserError(
                    f"{folder / FILE} names {name}, outside its folder: it was not made by anchorctx prepare"
                )
            file = folder / name
            if not file.resolve().is_relative_to(folder.resolve()):
                raise UserError(f"{folder / FILE} names {name}, which is not in its folder: {remedy}")
            if not file.is_file() or file.stat().st_size != expected["bytes"]:
                raise UserError(f"{file} is missing or cut short: remove {folder} and prepare it again")
            if verify and file_sha256(file) != expected["sha256"]:
                raise UserError(f"{file} was changed after it was written: remove {folder} and prepare it again")
        return cls(folder, manifest)

    def __len__(self) -> int:
        return int(self.manifest["rows"])

    @property
    def fingerprint(self) -> str:
        """Twelve hex digits that name the set's content: sources, tokenizer and policies."""
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
        """Row `index`, 0 .. len-1; UserError, as of the other readers, where its files were changed since `open`."""
        shard, i = self._place(index, CONTENT)
        tokens, weights = shard.tokens[i].astype(np.int64), shard.weights[i].astype(np.float32)
        return Row(self._checked(tokens, index), weights, self.layout(index))

    def layout(self, index: int) -> PackedLayout:
        """The layout of row `index`; its tokens are not read."""
        shard, i = self._place(index, PLACES)
        try:
            return shard.layout(i, int(self.manifest["anchor_len"]))
        except (ValueError, IndexError) as error:
            raise self._changed(f"row {index} in {self.folder} has no documents that fill it") from error

    def predictions(self, index: int, where: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of row `index` the tokens at `where` (N,), the tokens after them, and those predictions' loss weights.

        (N,) int64, int64 and float32; the row's last token predicts nothing: weight 0. Nothing else is read.
        """
        # a row <s> a b c of weights [0, 0, 1, .5]: at [0, 1, 3] there is <s> a c, then a b c, weights [0, 1, 0]
        shard, i = self._place(index, CONTENT)
        after = np.minimum(where + 1, self.row_length - 1)
        weights = np.where(where < self.row_length - 1, shard.weights[i][after], 0).astype(np.float32)
        tokens = shard.tokens[i]
        here, next_ones = tokens[where].astype(np.int64), tokens[after].astype(np.int64)
        return self._checked(here, index), self._checked(next_ones, index), weights

    def _checked(self, ids: np.ndarray, index: int) -> np.ndarray:
        if (largest := int(ids.max(initial=0))) >= (size := int(self.manifest["vocab_size"])):
            raise self._changed(f"row {index} in {self.folder} has the token {largest}, of a vocabulary of {size}")
        return ids

    def _changed(self, what: str) -> UserError:
        return UserError(f"{what}: it was changed after it was written: remove {self.folder} and prepare it again")

    def _place(self, index: int, names: Sequence[str]) -> tuple[Shard, int]:
        """The shard of row `index`, and its number there, to read its arrays of these `names`."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        # 8,192 rows a shard: row 20,000 is row 3,616 of shard 2
        number, i = divmod(index, int(self.manifest["rows_per_shard"]))
        shard = self._shard(number)
        # To read beyond the end of a file that was cut short since it was mapped ends the process without a word.
        for file in (_shard_file(self.folder, name, number) for name in names):
            with suppress(FileNotFoundError):  # the map of a removed one stays
                if (size := file.stat().st_size) != (whole := self.manifest["files"][file.name]["bytes"]):
                    raise self._changed(f"{file} has {size} of {whole} bytes")
        return shard, i

    def _shard(self, number: int) -> Shard:
        """The shard, memory-mapped; of too many open ones the least recently used is closed."""
        with self._lock:
            if number not in self._shards:
                arrays = [_map(_shard_file(self.folder, name, number)) for name in ARRAYS]
                self._shards[number] = Shard(*arrays, documents=self._documents_of(number))
                if len(self._shards) > OPEN_SHARDS:
                    self._shards.popitem(last=False)
            self._shards.move_to_end(number)
            return self._shards[number]

    def _documents_of(self, number: int) -> np.ndarray:
        rows = int(self.manifest["rows_per_shard"])
        return self.row_documents[number * rows : (number + 1) * rows]


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


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}

"""What becomes of refused writes: of every library that writes for us, each with its own way to say it."""

from __future__ import annotations

import errno
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from anchorctx.errors import UserError
from anchorctx.records import disk
from anchorctx.records.disk import DiskError, Writing, free_space, need_space, refused_write, size
from anchorctx.records.files import append_bytes, write_bytes

NUMBERS = np.zeros(200_000)
WRITERS: dict[str, Callable[[Path], object]] = {
    "python": lambda path: path.write_bytes(bytes(300_000)),
    "append_bytes": lambda path: append_bytes(path, bytes(300_000), sync=False),
    "numpy": lambda path: np.save(path, NUMBERS),
    "numpy archive": lambda path: np.savez(path, numbers=NUMBERS),
    "torch": lambda path: torch.save({"numbers": torch.from_numpy(NUMBERS)}, path),
    "safetensors": lambda path: save_file({"numbers": torch.from_numpy(NUMBERS)}, path),
    "tokenizers": lambda path: Tokenizer(models.WordLevel({f"w{i}": i for i in range(20_000)})).save(str(path)),
    "parquet": lambda path: pq.write_table(pa.table({"numbers": np.random.default_rng(0).random(200_000)}), path),
}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("name", sorted({*WRITERS} - {"safetensors"}))  # which puts a file of its own in the place
def test_a_full_disk_is_recognised_whoever_writes(name: str, tmp_path: Path) -> None:
    path = tmp_path / ("full.npy" if name == "numpy" else "full.npz")  # else numpy writes to full.npz.npy
    path.symlink_to("/dev/full")
    with pytest.raises(DiskError) as raised, Writing("the set", tmp_path, 5_000_000, intact="the run is intact"):
        WRITERS[name](path)
    sentence = str(raised.value)
    assert sentence.startswith(f"the set cannot be written to {tmp_path}: the disk ")
    assert "(5.0 MB needed, " in sentence and " free); the run is intact: free some there" in sentence


@pytest.mark.parametrize("name", WRITERS)
def test_a_limit_on_the_size_of_files_is_recognised_whoever_writes(name: str, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # Python ignores SIGXFSZ: writes fail with EFBIG
    try:
        with pytest.raises(DiskError, match="the set cannot be written to .*(ulimit -f|took less than it was given)"):
            with Writing("the set", tmp_path):
                WRITERS[name](tmp_path / "large.npz")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the quota is used up"),
        (OSError(errno.EROFS, "Read-only file system"), "the file system is read-only"),
        (OSError(errno.EIO, "Input/output error"), "the disk reports an input/output error"),
    ],
    ids=["quota", "read-only", "input/output"],
)
def test_other_refusals_have_their_own_words(error: OSError, said: str, tmp_path: Path) -> None:
    with pytest.raises(DiskError, match=f"to {tmp_path}/made/later: {said}.* free"):
        with Writing("the set", tmp_path / "made" / "later"):
            raise error


@pytest.mark.parametrize(
    "error",
    [
        KeyError("gone"),
        UserError("a mistake of another kind"),
        OSError(errno.ENOENT, "No such file or directory", "corpus.jsonl"),
        RuntimeError("size mismatch"),
        KeyboardInterrupt(),
        None,
    ],
    ids=lambda error: type(error).__name__,
)
def test_other_errors_pass(error: BaseException | None, tmp_path: Path) -> None:
    error = error or OSError(errno.EACCES, "Permission denied", "/elsewhere/corpus.jsonl")  # what is read, not written
    with pytest.raises(type(error)) as raised, Writing("the set", tmp_path / "out"):
        raise error
    assert raised.value is error


def test_a_full_disk_elsewhere_is_not_said_of_this_folder(tmp_path: Path) -> None:
    with pytest.raises(
        DiskError, match="cache.json cannot be written to /elsewhere: the disk is full.*; all is well: "
    ):
        with Writing("the set", tmp_path / "out", intact="all is well"):
            raise OSError(errno.ENOSPC, "No space left on device", "/elsewhere/cache.json")
    with pytest.raises(DiskError, match=f"the set cannot be written to {tmp_path}/out: "):
        with Writing("the set", tmp_path / "out"):
            raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / ".out.ab12.partial" / "tokens.bin"))


def test_an_error_that_nobody_explained_is_told_by_the_command_line(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "kvcomm.md"))
    assert str(refused_write(full)).startswith(f"kvcomm.md cannot be written to {tmp_path}: the disk is full (")
    nameless = OSError(errno.ENOSPC, "No space left on device")
    assert "the standard output or a file cannot be written: the disk is full" in str(refused_write(nameless))
    torch_says = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")
    assert "a file cannot be written: the disk took less than it was given" in str(refused_write(torch_says))
    assert refused_write(OSError(errno.ENOENT, "No such file or directory", "x")) is None
    assert refused_write(PermissionError(errno.EACCES, "Permission denied", "corpus.jsonl")) is None  # read, perhaps


def test_a_right_to_write_that_is_missing_is_said_of_the_folder_alone(tmp_path: Path) -> None:
    out = tmp_path / "above" / "out"
    for refused in (out / "manifest.json", out, out.parent, out.parent / ".out.ab12.partial" / "x"):
        with pytest.raises(DiskError, match="this user may not write there"), Writing("the set", out):
            raise PermissionError(errno.EACCES, "Permission denied", str(refused))
    with pytest.raises(PermissionError), Writing("the set", out):  # input beside it
        raise PermissionError(errno.EACCES, "Permission denied", str(out.parent / "corpus.jsonl"))


def test_space_is_asked_for_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = free_space(tmp_path / "not" / "there")
    assert free is not None
    need_space(tmp_path / "not" / "there", 1, "the export")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=9, free=3_000_000))
    with pytest.raises(DiskError, match=r"the export .*too little space is left \(16.2 GB needed, 3.0 MB free\); "):
        need_space(tmp_path, 16_200_000_000, "the export", "the checkpoint is intact")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=0, free=0))
    assert free_space(tmp_path) is None  # a file system that says nothing refuses nothing
    need_space(tmp_path, 16_200_000_000, "the export")


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (999_949, "999.9 kB"), (999_950, "1.0 MB"),
     (16_200_000_000, "16.2 GB"), (3 * 10**15, "3,000.0 TB")],
)  # fmt: skip
def test_bytes_for_a_reader(count: int, text: str) -> None:
    assert size(count) == text


def test_every_reason_has_a_remedy() -> None:
    assert all(reason and remedy for reason, remedy in disk.REASONS.values())


def test_what_is_replaced_or_appended_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_bytes(bytes(90_000))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        # 10,000 of the 20,000 bytes fit: the system call takes them, and only the next one fails
        for write in (append_bytes, write_bytes):
            with pytest.raises(OSError, match=f"File too large: '{path}'"):
                write(path, bytes(20_000 if write is append_bytes else 110_000))
            assert path.read_bytes() == bytes(90_000) and list(tmp_path.iterdir()) == [path]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    append_bytes(path, b"row\n")
    assert path.read_bytes() == bytes(90_000) + b"row\n"

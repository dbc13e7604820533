"""Disks that fail on purpose: at a chosen write in this process, or really full, where one may mount.

    with FailingDisk(out) as disk: main([...])            # disk.writes: how many there are
    with FailingDisk(out, fail_at=n) as disk: main([...])   # the n-th and all after it fail: "page by page"
    with small_disk(folder, 200_000): main([...])           # a real file system of 200 kB

Python's own files, `os` and numpy are followed write by write; what torch, safetensors and tokenizers write is one
write each, of which a half arrives. What is removed or read is let through, as a full disk does.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy.lib._format_impl
import safetensors.torch
import torch
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerFast

CHANGES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class FailingDisk:
    """A context in which the `fail_at`-th write below `folder`, counted from 1, and all later ones fail."""

    def __init__(self, folder: Path, fail_at: int | None = None, number: int = errno.ENOSPC) -> None:
        """`number` is the errno that writes fail with; without `fail_at` they are only counted."""
        self._folder, self._fail_at, self._number = os.path.abspath(folder), fail_at, number
        self._stack = ExitStack()
        self.writes = 0

    def __enter__(self) -> FailingDisk:
        self._open = builtins.open
        patches: list[tuple[Any, str, Callable[..., Any]]] = [
            (builtins, "open", self._opened),
            (io, "open", self._opened),
            (os, "open", self._guard(os.open, lambda path, flags, *_, **__: path if flags & CHANGES else None)),
            (os, "write", self._written(os.write)),
            (os, "fsync", self._guard(os.fsync, _name_of)),
            (os, "mkdir", self._guard(os.mkdir, lambda path, *_, **__: path)),
            (os, "rename", self._guard(os.rename, lambda _, to, **__: to)),
            (os, "replace", self._guard(os.replace, lambda _, to, **__: to)),
            (numpy.lib._format_impl, "isfileobj", lambda _: False),  # else it writes past Python
            (torch, "save", self._by_library(torch.save, 1, RuntimeError, "unexpected pos 576 vs 534")),
            (
                safetensors.torch,
                "serialize_file",
                self._by_library(safetensors.torch.serialize_file, 1, SafetensorError),
            ),
            (PreTrainedTokenizerFast, "_save_pretrained", self._tokenizer(PreTrainedTokenizerFast._save_pretrained)),
        ]
        for owner, name, replacement in patches:
            self._stack.enter_context(mock.patch.object(owner, name, replacement))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def step(self, path: Any, content: int = 0) -> int:
        """Count a write to `path`; returns how many of `content` bytes are taken, or raises OSError.

        The first write that does not fit is taken in part and reported as shorter, as Linux does.
        """
        self.writes += 1
        if self._fail_at is None or self.writes < self._fail_at:
            return content
        if self.writes == self._fail_at and content > 1:
            return content // 2
        raise OSError(self._number, os.strerror(self._number), *([] if content else [os.fspath(path)]))

    def inside(self, path: Any) -> bool:
        """Whether a file, which may be an open one's number, is below the folder."""
        if isinstance(path, int):
            path = _name_of(path)
        absolute = os.path.abspath(os.fsdecode(path))
        return absolute == self._folder or absolute.startswith(self._folder + os.sep)

    def _guard(self, real: Callable[..., Any], target: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            path = target(*args, **kwargs)
            if path is not None and self.inside(path):
                self.step(path)
            return real(*args, **kwargs)

        return guarded

    def _written(self, real: Callable[..., int]) -> Callable[..., int]:
        def written(descriptor: int, data: Any) -> int:
            taken = self.step(descriptor, memoryview(data).nbytes) if self.inside(descriptor) else None
            return real(descriptor, data if taken is None else memoryview(data).cast("B")[:taken])

        return written

    def _opened(self, file: Any, mode: str = "r", buffering: int = -1, *args: Any, **kwargs: Any) -> Any:
        if isinstance(file, int) or not set(mode) & set("wax+") or not self.inside(file):
            return self._open(file, mode, buffering, *args, **kwargs)
        self.step(file)
        raw: Any = _Raw(self, file, mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *args, **kwargs)

    def _by_library(
        self, real: Callable[..., Any], place: int, kind: type[Exception], text: str | None = None
    ) -> Callable[..., Any]:
        """A writer whose argument `place` is the file's name; it fails with what the library raises."""

        def saved(*args: Any, **kwargs: Any) -> Any:
            path = args[place]
            if not isinstance(path, str | os.PathLike) or not self.inside(path):
                return real(*args, **kwargs)
            done = real(*args, **kwargs)
            size = os.path.getsize(path)
            try:
                taken = self.step(path, size)
            except OSError:
                taken = 0
            if taken < size:
                os.truncate(path, taken)
                raise kind(text or f"I/O error: {os.strerror(self._number)} (os error {self._number})")
            return done

        return saved

    def _tokenizer(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def saved(tokenizer: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
            if self.inside(save_directory):
                try:
                    self.step(save_directory)
                except OSError as error:
                    raise Exception(f"{error.strerror} (os error {error.errno})") from None  # as its Rust does
            return real(tokenizer, save_directory, *args, **kwargs)

        return saved


class _Raw(io.FileIO):
    """A file whose writes are counted."""

    def __init__(self, disk: FailingDisk, file: Any, mode: str) -> None:
        self._disk = disk
        super().__init__(file, mode)

    def write(self, data: Any, /) -> int:
        """Write as much as the disk takes."""
        view = memoryview(data).cast("B")
        return super().write(view[: self._disk.step(self.name, view.nbytes)])


def _name_of(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A real file system of `size` bytes, in memory, at `folder`, which is made.

    Raises:
        PermissionError: this user may not mount one here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise PermissionError(f"no file system can be mounted at {folder}: {error}") from error
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)

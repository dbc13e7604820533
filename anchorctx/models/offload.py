"""Inputs of recomputed layers wait for the backward pass in CPU memory or in files, through saved-tensor hooks.

torch's non-reentrant checkpoints (what transformers 5 uses) save each layer's input like any operator does, so hooks
around the model see exactly those: one (B, S, D) tensor a layer. On CUDA the copies go through pinned memory on a
stream of their own; going back, the next tensor is fetched while the layer before it is recomputed.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
import weakref
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.autograd.graph import saved_tensors_hooks

from anchorctx.errors import UserError

SMALLEST_BYTES = 2**20
"""Smaller tensors stay where they are."""


class Store(Protocol):
    """Takes a tensor away and gives it back, once."""

    def put(self, tensor: torch.Tensor) -> Any:
        """Returns what `get` needs."""
        ...

    def get(self, kept: Any) -> torch.Tensor:
        """The tensor, on its device."""
        ...


class Offload:
    """Called, a context manager: what autograd saves inside it goes to the store, if it is large and no parameter."""

    def __init__(self, store: Store, smallest_bytes: int = SMALLEST_BYTES) -> None:
        self._store, self._smallest = store, smallest_bytes

    def __call__(self) -> AbstractContextManager[None]:
        """The context."""
        return saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: torch.Tensor) -> Any:
        # A saved view (a transposed weight) belongs to its base. Parameters are leaves and stay where they are.
        owner = tensor if tensor._base is None else tensor._base
        if tensor.nbytes < self._smallest or not tensor.is_floating_point() or owner.is_leaf:
            return tensor
        return _Kept(self._store.put(tensor.detach()))

    def _unpack(self, kept: Any) -> torch.Tensor:
        return self._store.get(kept.handle) if isinstance(kept, _Kept) else kept


@dataclass(frozen=True, slots=True)
class _Kept:
    handle: Any


@dataclass(slots=True)
class _Pinned:
    """A tensor in pinned memory; `back` is its copy on the device once it has been fetched ahead."""

    buffer: torch.Tensor
    device: torch.device
    before: _Pinned | None
    back: torch.Tensor | None = None


class PinnedStore:
    """CPU memory; copies overlap with computation on a stream of their own (CUDA)."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._last: _Pinned | None = None

    def put(self, tensor: torch.Tensor) -> _Pinned:
        """See `Store`."""
        buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._stream is not None)
        if self._stream is None:
            buffer.copy_(tensor)
        else:
            # the copy may start once the computation that fills the tensor has ended
            self._stream.wait_stream(torch.cuda.current_stream(tensor.device))
            with torch.cuda.stream(self._stream):
                buffer.copy_(tensor, non_blocking=True)
            tensor.record_stream(self._stream)  # its memory is not used again before the copy is done
        self._last = _Pinned(buffer, tensor.device, self._last)
        return self._last

    def get(self, kept: _Pinned) -> torch.Tensor:
        """See `Store`; layers come back in reverse order, so the one before is fetched too."""
        self._fetch(kept)
        if self._stream is not None:
            # the computation may go on once the fetch has ended
            torch.cuda.current_stream(kept.device).wait_stream(self._stream)
        back, kept.back = kept.back, None
        assert back is not None
        if self._stream is not None:
            back.record_stream(torch.cuda.current_stream(kept.device))
        if kept.before is not None and self._stream is not None:
            self._fetch(kept.before)
        self._last, kept.before = kept.before, None
        return back

    def _fetch(self, kept: _Pinned) -> None:
        if kept.back is None and self._stream is None:
            kept.back = kept.buffer.to(kept.device)
        elif kept.back is None:
            with torch.cuda.stream(self._stream):
                kept.back = kept.buffer.to(kept.device, non_blocking=True)


@dataclass(frozen=True, slots=True)
class _Filed:
    """A tensor in a file."""

    path: Path
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class FolderStore:
    """One file a tensor, removed once it has been read; the folder goes with the object."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = Path(tempfile.mkdtemp(prefix="activations_", dir=folder))
        self._remove = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._names = itertools.count()

    def put(self, tensor: torch.Tensor) -> _Filed:
        """See `Store`."""
        path = self._folder / str(next(self._names))
        # numpy has no bfloat16: bytes go out and come back as they are
        tensor.contiguous().cpu().view(torch.uint8).numpy().tofile(path)
        return _Filed(path, tensor.shape, tensor.dtype, tensor.device)

    def get(self, kept: _Filed) -> torch.Tensor:
        """See `Store`."""
        raw = torch.from_numpy(np.fromfile(kept.path, dtype=np.uint8))
        kept.path.unlink()
        return raw.view(kept.dtype).view(kept.shape).to(kept.device)

    def close(self) -> None:
        """Remove what is left."""
        self._remove()


def check_space(folder: Path, needed: int) -> None:
    """UserError when the disk of `folder` has less than `needed` bytes left; the folder need not exist yet."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"memory.offload_folder={folder} has {free / 1e9:.1f} GB free, but the layers' inputs of a step need "
            f"{needed / 1e9:.1f} GB: name a folder with more space, raise memory.checkpoint_every, or shorten the rows"
        )

"""The states of all ranks in safetensors files: each rank writes what it holds, and reads whatever it needs.

A weight's state is a run of numbers: the weight flattened, of which each rank holds a stretch (or none). A file has
these stretches as one-dimensional tensors, `weight:NAME`, `exp_avg:NAME` and `exp_avg_sq:NAME`, and in its metadata
where each begins. So a checkpoint fits any number of processes, any ZeRO stage, and offloading or not.
The format is https://github.com/huggingface/safetensors#format: a length, a JSON header, plain numbers.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from anchorctx.errors import UserError
from anchorctx.records.typed import parse_typed
from anchorctx.train.checkpoints.digest import DigestedFile
from anchorctx.train.checkpoints.folders import REMEDY, File

PREFIX, SUFFIX = "states_", ".safetensors"
WEIGHT = "weight"
DTYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bool: "BOOL",
}
"""safetensors' names of dtypes; of falling size, the order in which they are written, so that all are aligned."""


@dataclass(frozen=True, slots=True)
class Fragment:
    """A rank's stretch of a weight: its numbers, and what the optimizer holds for them."""

    name: str
    """The weight's, in the model."""
    start: int
    """Index in the flattened weight of the stretch's first number."""
    states: dict[str, torch.Tensor]
    """(N,) by kind: `weight`, `exp_avg`, `exp_avg_sq`."""


def file_name(rank: int) -> str:
    """The name of a rank's file."""
    return f"{PREFIX}{rank:05d}{SUFFIX}"


def write(path: Path, fragments: Iterable[Fragment], updates: int) -> File:
    """Write a rank's fragments; `updates` is how many the optimizer made."""
    fragments = list(fragments)
    starts = {fragment.name: fragment.start for fragment in fragments}
    flat = {f"{kind}:{f.name}": tensor for f in fragments for kind, tensor in f.states.items()}
    order = sorted(flat, key=lambda name: list(DTYPES).index(flat[name].dtype))
    header: dict[str, Any] = {"__metadata__": {"starts": json.dumps(starts), "updates": str(updates)}}
    end = 0
    for name in order:
        begin, end = end, end + flat[name].nbytes
        header[name] = {"dtype": DTYPES[flat[name].dtype], "shape": [flat[name].numel()], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with DigestedFile(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            tensor = flat[name].detach().to("cpu").contiguous()
            file.write(tensor.view(torch.uint8).numpy().data)
    return file.entry


class Shards:
    """The states of a checkpoint, of all ranks; mapped, and read where they are asked for."""

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        """`names` are the checkpoint's files. UserError when one is not of the form."""
        self._folder = folder
        self._places: dict[str, list[tuple[int, Any]]] = {}
        """The stretches of `KIND:NAME`: where each begins, and the slice that holds it."""
        self.updates = 0
        """Updates that the optimizer made."""
        for name in sorted(name for name in names if name.startswith(PREFIX)):
            self._open(folder / name)
        for places in self._places.values():
            places.sort(key=lambda place: place[0])

    def check(self, shapes: Mapping[str, Iterable[int]]) -> None:
        """Raise UserError unless all of each weight is there; `shapes` has theirs, by name."""
        for name, shape in shapes.items():
            end = 0
            for start, numbers in self._places.get(f"{WEIGHT}:{name}", []):
                if start != end:
                    break
                end += numbers.get_shape()[0]
            count = math.prod(shape := list(shape))
            if any(not 0 <= size < 2**63 for size in shape):
                raise UserError(f"{self._folder} has {name} of the impossible shape {_shown(shape)}: {REMEDY}")
            if end != count:
                raise UserError(f"{self._folder} has {end} of {count} numbers of {name}: {REMEDY}")

    def copy(self, kind: str, name: str, start: int, into: torch.Tensor) -> None:
        """Fill `into` (N,) with the numbers start .. start + N of a weight's state."""
        end = start + into.numel()
        for begin, numbers in self._places[f"{kind}:{name}"]:
            low, high = max(start, begin), min(end, begin + numbers.get_shape()[0])
            if low < high:  # a stretch at 100..150 of what is wanted from 120: its numbers 20..50 go to 0..30
                into[low - start : high - start].copy_(numbers[low - begin : high - begin])

    def whole(self, name: str, shape: Iterable[int]) -> torch.Tensor:
        """A weight."""
        first = self._places[f"{WEIGHT}:{name}"][0][1][0:0]
        into = torch.empty(tuple(shape), dtype=first.dtype)
        self.copy(WEIGHT, name, 0, into.view(-1))
        return into

    def has(self, kind: str, name: str) -> bool:
        """Is there any of this state?"""
        return f"{kind}:{name}" in self._places

    def _open(self, path: Path) -> None:
        try:
            file = safe_open(path, framework="pt")
            metadata = file.metadata() or {}
            names = list(file.keys())
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is no safetensors file ({error}): {REMEDY}") from None
        starts = parse_typed(metadata.get("starts", ""), dict[str, int], f"the starts in {path}", REMEDY)
        self.updates = parse_typed(metadata.get("updates", ""), int, f"the updates in {path}", REMEDY)
        for name, numbers in _slices(file, names):
            start = starts.get(name.partition(":")[2])
            if start is None or len(numbers.get_shape()) != 1:
                raise UserError(f"{path} holds {name}, which is no stretch of a weight: {REMEDY}")
            self._places.setdefault(name, []).append((start, numbers))


def _shown(shape: list[int]) -> str:
    return ", ".join("2**63 or more" if size >= 2**63 else "below 0" if size < 0 else str(size) for size in shape)


def _slices(file: Any, names: list[str]) -> Iterator[tuple[str, Any]]:
    for name in names:
        yield name, file.get_slice(name)

"""Controls: what `rotate` does, with a placeholder's KV replaced. An arm that does no better has reused nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from anchorctx.kvcomm.arms.basic import Arm, Rotate
from anchorctx.kvcomm.cache import KV
from anchorctx.kvcomm.decoder import Buffer
from anchorctx.kvcomm.prompts import Segment
from anchorctx.kvcomm.request import Placement, Scene


class Zeroed(Rotate):
    """All zeros: the content takes its share of the attention and says nothing."""

    name = "zeroed"

    def text(self, scene: Scene, segment: Segment, name: str) -> Placement | None:
        """See Rotate."""
        kv = scene.base(name).kv
        return Placement(KV(torch.zeros_like(kv.keys), torch.zeros_like(kv.values)), segment.start)


class RandomMoments(Rotate):
    """Normal noise with each channel's mean and spread over the content's tokens."""

    name = "random"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def text(self, scene: Scene, segment: Segment, name: str) -> Placement | None:
        """The same noise for every reader of one request's content."""
        kv = scene.base(name).kv
        entropy = [self.seed, scene.request.number, *name.encode()]
        generator = torch.Generator().manual_seed(int(np.random.default_rng(entropy).integers(2**62)))
        return Placement(KV(_matched(kv.keys, generator), _matched(kv.values, generator)), segment.start)


class OtherRequest(Rotate):
    """The KV of another request's content in the same placeholder, cut or repeated to this one's length."""

    name = "other_request"
    by_construction = False

    def __init__(self) -> None:
        self._latest: dict[str, list[tuple[int, KV]]] = {}

    def text(self, scene: Scene, segment: Segment, name: str) -> Placement | None:
        """Nothing, so that it is computed, while no other request had content there."""
        scene.base(name)
        other = next((kv for number, kv in self._latest.get(name, ()) if number != scene.request.number), None)
        if other is None or not other.length:
            return None
        index = torch.arange(segment.length, device=other.keys.device) % other.length
        return Placement(KV(other.keys[:, :, :, index], other.values[:, :, :, index]), segment.start)

    def observe(self, scene: Scene, buffer: Buffer, given: Sequence[Placement]) -> None:
        """Keep this request's contents and those of the one before."""
        for name in {segment.name for segment in scene.prompt.placeholders if segment.name is not None}:
            number, kv = scene.request.number, scene.base(name).kv
            older = [entry for entry in self._latest.get(name, []) if entry[0] != number]
            self._latest[name] = [(number, kv), *older[:1]]

    @property
    def nbytes(self) -> int:
        """Of the kept contents."""
        return sum(kv.nbytes for entries in self._latest.values() for _, kv in entries)


class DenseChunked(Arm):
    """Dense in two chunks: the same numbers but for rounding. No arm can come nearer to dense than that."""

    name = "dense_chunked"

    def place(self, scene: Scene) -> Sequence[Placement]:
        """The first half, computed on its own; it saves nothing, so it counts as computed beside the prompt."""
        half = scene.prompt.length // 2
        scene.tally.count(half)
        return [Placement(scene.decoder.encode(scene.decoder.tensor(scene.prompt.ids[:half])), 0)] if half else []


def _matched(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Noise of the shape of `x` (L, B, H, T, D) with its mean and standard deviation over T."""
    if not x.shape[3]:
        return x
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float32).to(x)
    return x.mean(3, keepdim=True) + x.std(3, keepdim=True, correction=0) * noise

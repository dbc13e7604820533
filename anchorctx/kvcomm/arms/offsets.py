"""Arms that add to the base KV what earlier requests showed to be missing: KVCOMM's exemplars, and a running mean.

Known departures from the paper: a content that cannot be shared computes its own segment and the glue behind it, not
the whole prompt (`partial=False` restores that). Offsets observed in such a prompt come from a run that saw the other
contents as they were approximated. Offsets are kept and added un-rotated for every segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from anchorctx.kvcomm.agents import Ids, Segment
from anchorctx.kvcomm.arms.basic import Arm
from anchorctx.kvcomm.arms.exemplars import Content, Match, Offset, Reader
from anchorctx.kvcomm.arms.names import Setting
from anchorctx.kvcomm.arms.pool import Pool, PoolConfig
from anchorctx.kvcomm.cache import KV
from anchorctx.kvcomm.decoder import Buffer
from anchorctx.kvcomm.request import Placement, TurnContext


class Kvcomm(Arm):
    """KVCOMM as in the paper: offsets from exemplars, for contents and for the glue behind them."""

    name = "kvcomm"
    shares = True

    def __init__(self, config: PoolConfig | None = None, *, partial: bool = True, recompute_glue: bool = False) -> None:
        self.pool = Pool(config or PoolConfig())
        self.partial = partial
        """Compute only what cannot be shared; False computes the whole prompt then."""
        self.recompute_glue = recompute_glue
        """Compute the glue with the last token instead of storing its offsets."""

    def place(self, context: TurnContext) -> Sequence[Placement]:
        """Shared contents, and the glue behind each."""
        placed = [context.prefix()]
        for segment in context.prompt.placeholders:
            match = self._match(context, segment) if segment.length else None
            if match is not None:
                placed += self._approximated(context, segment, match)
            elif segment.length and not self.partial:  # as in the paper: one content that is computed, and all are
                return [context.prefix()]
        return placed

    def observe(self, context: TurnContext, buffer: Buffer, given: Sequence[Placement]) -> None:
        """Store the offsets of every content that was computed."""
        for segment in computed(context, given):
            assert segment.name is not None
            text = _difference(context, buffer, segment, context.base(segment.name).kv)
            # Glue behind a content shifts with it and sees it: it has an offset too, for this very glue text.
            glue = None if self.recompute_glue else context.prompt.glue_after(segment)
            offset = Offset(text)
            if glue is not None:
                offset = Offset(text, _difference(context, buffer, glue, context.glue(glue).kv), glue.ids)
            content = _content(context, segment)
            number, who = context.request.number, reader(context, segment)
            self.pool.add(segment.name, number, content.ids, who, offset, content.base)

    @property
    def nbytes(self) -> int:
        """Of the pool."""
        return self.pool.nbytes

    def _match(self, context: TurnContext, segment: Segment) -> Match | None:
        assert segment.name is not None
        content, who = _content(context, segment), reader(context, segment)
        return self.pool.match(segment.name, who, content, context.request.distances, context.keep)

    def _approximated(self, context: TurnContext, segment: Segment, match: Match) -> list[Placement]:
        """Equations 6 and 7."""
        assert segment.name is not None
        # Exemplars are at least as long as this content; the beginnings of their offsets are used.
        texts = [offset.text.cut(0, segment.length) for offset in match.offsets]
        base = context.base(segment.name).kv
        weights = match.weights if match.by_token is None else match.by_token.to(base.keys)
        placed = [Placement(base.weighted_sum(texts, weights), segment.start)]
        glue = context.prompt.glue_after(segment)
        seen = [offset.glue for offset in match.offsets if glue is not None and offset.glue_ids == glue.ids]
        glues = [kv for kv in seen if kv is not None]
        if glue is not None and len(glues) == len(match.offsets):  # else another text stood there: compute it
            placed.append(Placement(context.glue(glue).kv.weighted_sum(glues, match.weights), glue.start))
        return placed


class KvcommUngated(Kvcomm):
    """KVCOMM without its gate: the approximation alone, for every content that enough exemplars are as long as."""

    name = "kvcomm_ungated"
    by_construction = True

    def __init__(self, config: PoolConfig | None = None, *, partial: bool = True, recompute_glue: bool = False) -> None:
        ungated = replace(config or PoolConfig(), gamma=1.0)  # no entropy exceeds its greatest value
        super().__init__(ungated, partial=partial, recompute_glue=recompute_glue)


@dataclass(slots=True)
class _Mean:
    """Mean offset by token place; later places have been seen in fewer contents."""

    kv: KV
    counts: torch.Tensor
    """(T,) contents that reached each place."""
    contents: int = 1

    def update(self, offset: KV) -> None:
        """Take one more content in."""
        if offset.length > self.kv.length:
            # The longest content so far: grow with zeros, which the update below overwrites with weight 1 / 1.
            longer = KV(torch.zeros_like(offset.keys), torch.zeros_like(offset.values))
            longer.keys[:, :, :, : self.kv.length] = self.kv.keys
            longer.values[:, :, :, : self.kv.length] = self.kv.values
            counts = self.counts.new_zeros(offset.length)
            counts[: self.kv.length] = self.counts
            self.kv, self.counts = longer, counts
        # mean += (x - mean) / n, with another n at each place: counts (T,) -> (T, 1), against (L, B, H, T, D).
        reached = self.kv.cut(0, offset.length)  # a view, so that the additions are made in place
        self.counts[: offset.length] += 1
        weight = (1.0 / self.counts[: offset.length].to(reached.keys.dtype))[:, None]
        reached.keys.add_((offset.keys - reached.keys) * weight)
        reached.values.add_((offset.values - reached.values) * weight)
        self.contents += 1

    @property
    def nbytes(self) -> int:
        return self.kv.nbytes + self.counts.nbytes


class MeanOffset(Arm):
    """One running mean offset for each reader and placeholder instead of exemplars; the glue is recomputed.

    The first `warmup` contents are computed, and later ones that are longer than any seen.
    """

    name = "mean_offset"
    shares = True

    def __init__(self, warmup: int = 3) -> None:
        self.warmup = Setting("warmup", whole=True, least=1).of(self.name, warmup)
        self._means: dict[tuple[str, Reader], _Mean] = {}

    def place(self, context: TurnContext) -> Sequence[Placement]:
        """Every content that the mean reaches."""
        placed = [context.prefix()]
        for segment in context.prompt.placeholders:
            assert segment.name is not None
            mean = self._means.get((segment.name, reader(context, segment)))
            # Layers 1 and above alone have offsets; layer 0 is the base's.
            if segment.length and mean and mean.contents >= self.warmup and mean.kv.length >= segment.length:
                kv = context.base(segment.name).kv.plus(mean.kv.cut(0, segment.length))
                placed.append(Placement(kv, segment.start))
        return placed

    def observe(self, context: TurnContext, buffer: Buffer, given: Sequence[Placement]) -> None:
        """Take the computed contents into the means."""
        for segment in computed(context, given):
            assert segment.name is not None
            key = (segment.name, reader(context, segment))
            offset = _difference(context, buffer, segment, context.base(segment.name).kv)
            if key in self._means:
                self._means[key].update(offset)
            else:
                counts = torch.ones(offset.length, dtype=torch.int64, device=offset.keys.device)
                self._means[key] = _Mean(offset, counts)

    @property
    def nbytes(self) -> int:
        """Of the means."""
        return sum(mean.nbytes for mean in self._means.values())


def _content(context: TurnContext, segment: Segment) -> Content:
    name = segment.name
    assert name is not None
    decoder = context.decoder

    def embed(ids: Ids) -> torch.Tensor:
        return decoder.embeddings(decoder.tensor(ids)[0])

    return Content(segment.ids, embed, lambda: context.base(name).kv)


def reader(context: TurnContext, segment: Segment) -> Reader:
    """Who reads a content, and where."""
    return context.prompt.agent, segment.occurrence


def computed(context: TurnContext, given: Sequence[Placement]) -> list[Segment]:
    """The non-empty placeholders that no placement filled."""
    # Placements of contents begin where their segments do.
    filled = {placement.start for placement in given if placement.kv.length}
    return [segment for segment in context.prompt.placeholders if segment.length and segment.start not in filled]


def _difference(context: TurnContext, buffer: Buffer, segment: Segment, base: KV) -> KV:
    """Observed minus base, layers 1 and above: layer 0 does not know its context."""
    return context.observed(buffer, segment).layers(1).minus(base.layers(1))

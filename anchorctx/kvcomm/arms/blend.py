"""Blend: recompute the tokens that the new surroundings change most (CacheBlend, arXiv 2405.16444)."""

from __future__ import annotations

import math

import torch

from anchorctx.kvcomm.arms.basic import Rotate
from anchorctx.kvcomm.arms.names import SETTINGS
from anchorctx.kvcomm.decoder import Buffer
from anchorctx.kvcomm.request import TurnContext

COMPARED = 1
"""The layer whose keys and values are compared: the first that knows what stands before a token."""
PART = 7 / 6
"""Layers that a token costs until it has its keys and values in layer 1: layer 0, and layer 1's projections, which are
an eighth (Llama 3 8B) to a sixth (SmolLM2 135M) of a layer's weights."""


class Blend(Rotate):
    """Rotates; then all tokens run up to their keys and values in layer 1, and those that deviate most there from what
    was reused run through all layers, with the last token.

    Layers 0 and 1 are therefore fresh for every token. A share of 1 is dense. The paper narrows the choice from layer
    to layer; here it is made once, in layer 1, and the chosen tokens begin again at layer 0, which costs one layer for
    them and works with any decoder.
    """

    name = "blend"

    def __init__(self, share: float = 0.15) -> None:
        self.share = SETTINGS["blend"].of(self.name, share)
        """Of the tokens between the agent's fixed prefix, which is exact, and the last one, 0..1."""

    def choose(self, context: TurnContext, buffer: Buffer) -> torch.Tensor:
        """The tokens of the greatest deviation."""
        # The last token is computed whatever it deviates by.
        decoder, last = context.decoder, context.prompt.length - 1
        start = context.prompt.segments[0].stop
        if start >= last:
            return torch.empty(0, dtype=torch.long)
        # A model of one layer has nothing that depends on the surroundings: all deviations are 0.
        layer = min(COMPARED, decoder.layers - 1)
        both = (buffer.keys[layer, 0, :, start:last], buffer.values[layer, 0, :, start:last])  # (H, T, D), views
        reused = [x.clone() for x in both]
        ids = decoder.tensor(context.prompt.ids[start:last])
        decoder.fill(ids, buffer, range(start, last), layer + 1)
        context.tally.count(last - start, start, PART / decoder.layers)
        keys, values = (_deviation(old, new) for old, new in zip(reused, both, strict=True))
        # A share of 0.15 of 33 tokens is 4.95: 5 of them.
        count = math.ceil(self.share * (last - start))
        return start + (keys + values).topk(count).indices.cpu()


def _deviation(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """(T,): each token's squared difference over heads and dimensions of (H, T, D), of the mean square of `new`.

    Relative, because keys are larger than values, ten times in some models.
    """
    old, new = old.float(), new.float()
    return (old - new).square().sum((0, 2)) / new.square().sum((0, 2)).mean()
